/* simulate_rank.c - the simulator's ranks: what each of their streams does next. */
#include <stddef.h>

#include "error.h"
#include "simulate_inner.h"

/* ---- delays ---- */

/* Uniform in 0 .. straggle_s, by the rank, the stream and how many it drew (splitmix64). */
static double late_s(const sim_run *run, sim_rank *rank, int stream) {
  uint64_t x = (uint64_t)(rank - run->ranks) << 2 | (uint64_t)stream;
  x = run->args->seed + (x << 32 | rank->draws[stream]++) * 0x9e3779b97f4a7c15u;
  for (int i = 0; i < 2; i++) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
  }
  return run->args->straggle_s * (double)(x >> 11) * 0x1p-53;
}

/* ---- a2a stream ---- */

static int join_a2a(sim_run *run, sim_rank *rank) {
  int64_t flow = (rank - run->ranks) / run->args->ep;
  rank->a2a = SIM_JOINED;
  int rc = lina_sim_join(run, flow, rank->done, 0, run->program.exchanges[rank->done].bytes);
  if (rc != LINA_OK || !run->flows[flow].running) return rc;
  double ready_s = 0;
  for (int64_t i = 0; i < run->args->ep; i++) {
    double member_s = run->ranks[run->flows[flow].first + i].ready_s;
    if (member_s > ready_s) ready_s = member_s;
  }
  double waited_s = run->now_s - ready_s;
  if (waited_s > run->out->waited_s) run->out->waited_s = waited_s;
  return LINA_OK;
}

static int try_a2a(sim_run *run, sim_rank *rank) {
  if (rank->a2a == SIM_IDLE && rank->issued > rank->done) {
    if (run->args->straggle_s > 0) {
      rank->a2a = SIM_LATE;
      return lina_sim_push(run, run->now_s + late_s(run, rank, LINA_SIM_A2A), SIM_EVENT_A2A,
                           rank - run->ranks, 0);
    }
    rank->a2a = SIM_HELD;
    rank->ready_s = run->now_s;
  }
  if (rank->a2a != SIM_HELD) return LINA_OK;
  if (run->args->fault == LINA_SIM_ONE_AT_A_TIME && rank->reduce == SIM_JOINED) return LINA_OK;
  return join_a2a(run, rank);
}

/* ---- reduce stream ---- */

static int64_t bucket_of(const sim_run *run, const sim_rank *rank, int64_t id) {
  int64_t pair = id ^ 1;
  int swapped = run->args->fault == LINA_SIM_SWAPPED && (rank - run->ranks) % 2;
  return swapped && pair < run->program.bucket_count ? pair : id;
}

static int submit(sim_run *run, sim_rank *rank, int64_t bucket) {
  return lina_policy_submit(&rank->policy, run->program.buckets[bucket].bytes, NULL);
}

static int ready_bucket(sim_run *run, sim_rank *rank, int64_t bucket) {
  if (bucket_of(run, rank, bucket) == bucket) return submit(run, rank, bucket);
  if (bucket % 2 == 0) return LINA_OK; /* kept back until the next one is there */
  int rc = submit(run, rank, bucket);
  return rc == LINA_OK ? submit(run, rank, bucket - 1) : rc;
}

static int try_join_reduce(sim_run *run, sim_rank *rank) {
  if (rank->reduce != SIM_HELD) return LINA_OK;
  if (run->args->fault == LINA_SIM_ONE_AT_A_TIME && rank->a2a == SIM_JOINED) return LINA_OK;
  rank->reduce = SIM_JOINED;
  return lina_sim_join(run, rank->flow, rank->bucket, rank->op.offset, (double)rank->op.bytes);
}

/* The rank's own policy decides, by the rank's own gate. */
static int try_reduce(sim_run *run, sim_rank *rank) {
  if (rank->reduce != SIM_IDLE || !rank->policy.pending) return try_join_reduce(run, rank);
  run->out->decisions++;
  if (!lina_policy_next(&rank->policy, &rank->op)) return LINA_OK;
  if (rank->op.id != rank->next_id || rank->op.offset != rank->next_offset)
    return lina_error(
        LINA_EINVAL, "simulate: rank %lld: bytes from %lld of bucket %lld came twice or never",
        (long long)(rank - run->ranks), (long long)rank->op.offset, (long long)rank->op.id);
  run->out->behind += rank->outstanding > 0;
  rank->bucket = bucket_of(run, rank, rank->op.id);
  rank->flow = run->groups;
  if (run->program.buckets[rank->bucket].experts)
    rank->flow += 1 + (rank - run->ranks) % run->args->ep;
  if (run->args->straggle_s > 0) {
    rank->reduce = SIM_LATE;
    return lina_sim_push(run, run->now_s + late_s(run, rank, LINA_SIM_REDUCE), SIM_EVENT_REDUCE,
                         rank - run->ranks, 0);
  }
  rank->reduce = SIM_HELD;
  return try_join_reduce(run, rank);
}

static int reduced(sim_run *run, sim_rank *rank) {
  rank->reduce = SIM_IDLE;
  run->out->reduced_bytes += rank->op.bytes;
  rank->next_offset += rank->op.bytes;
  if (rank->op.last) {
    if (rank->next_offset != run->program.buckets[rank->bucket].bytes)
      return lina_error(LINA_EINVAL, "simulate: bucket %lld ended after %lld bytes",
                        (long long)rank->bucket, (long long)rank->next_offset);
    rank->next_id++;
    rank->next_offset = 0;
  }
  return lina_policy_finished(&rank->policy);
}

/* ---- compute stream ---- */

static int raise_a2a(sim_run *run, sim_rank *rank, int64_t delta) {
  rank->outstanding += delta;
  return run->args->gated ? lina_policy_a2a(&rank->policy, delta) : LINA_OK;
}

static int start_compute(sim_run *run, sim_rank *rank, const sim_step *step) {
  double at_s = run->now_s;
  if (rank->doing == 0 && run->args->straggle_s > 0) {
    rank->doing = 1;
    at_s += late_s(run, rank, LINA_SIM_COMPUTE);
  } else {
    rank->doing = 2;
    rank->from_s = at_s;
    lina_sim_turn(run, rank, LINA_SIM_COMPUTE, 1);
    at_s += step->seconds;
  }
  return lina_sim_push(run, at_s, SIM_EVENT_COMPUTE, rank - run->ranks, 0);
}

static int on_compute(sim_run *run, sim_rank *rank) {
  int rc = LINA_OK;
  const sim_step *step = &run->program.steps[rank->pc];
  if (rank->doing == 1) return start_compute(run, rank, step);
  lina_sim_turn(run, rank, LINA_SIM_COMPUTE, 0);
  if (run->now_s > rank->from_s)
    LINA_TRY(lina_sim_log(run, rank - run->ranks,
                          &(lina_sim_span){.layer = step->layer,
                                           .stream = LINA_SIM_COMPUTE,
                                           .kind = step->kind,
                                           .phase = step->phase,
                                           .start_s = rank->from_s,
                                           .stop_s = run->now_s}));
  rank->doing = 0;
  rank->pc++;
  rc = lina_sim_advance(run, rank);
done:
  return rc;
}

/* Goes on with the program until it computes, waits or has ended. */
int lina_sim_advance(sim_run *run, sim_rank *rank) {
  int rc = LINA_OK;
  if (rank->doing) return LINA_OK;
  for (; rank->pc < run->program.step_count; rank->pc++) {
    const sim_step *step = &run->program.steps[rank->pc];
    switch (step->op) {
      case SIM_RUN:
        if (step->seconds == 0 && run->args->straggle_s == 0) continue;
        return start_compute(run, rank, step);
      case SIM_RAISE: LINA_TRY(raise_a2a(run, rank, step->arg)); break;
      case SIM_ISSUE:
        rank->issued = step->arg + 1;
        LINA_TRY(try_a2a(run, rank));
        break;
      case SIM_WAIT:
        if (rank->done <= step->arg) return LINA_OK;
        break;
      case SIM_SUBMIT:
        LINA_TRY(ready_bucket(run, rank, step->arg));
        LINA_TRY(try_reduce(run, rank));
        break;
      case SIM_DRAIN:
        if (rank->policy.pending) return LINA_OK;
        break;
    }
  }
  rank->doing = 3;
  if (!run->finished++) run->out->first_s = run->now_s;
  run->out->step_s = run->now_s;
done:
  return rc;
}

/* ---- events ---- */

static int on_flow(sim_run *run, int64_t index) {
  int rc = LINA_OK;
  const sim_flow f = run->flows[index];
  lina_sim_result *out = run->out;
  lina_sim_span span = {
      .stream = f.stream, .start_s = f.begun_s, .stop_s = run->now_s, .bytes = f.bytes};
  if (f.stream == LINA_SIM_A2A) {
    const sim_exchange *e = &run->program.exchanges[f.key];
    span.kind = e->kind, span.phase = e->phase, span.layer = e->layer;
    double took_s = run->now_s - f.begun_s;
    out->a2a_count++;
    out->a2a_s += took_s, out->a2a_alone_s += f.alone_s;
    if (took_s - f.alone_s > out->stretch_s) out->stretch_s = took_s - f.alone_s;
  } else {
    const sim_bucket *b = &run->program.buckets[f.key];
    span.kind = b->experts ? LINA_SIM_EXPERTS : LINA_SIM_BUCKET, span.phase = LINA_SIM_BACKWARD;
    span.layer = b->experts ? b->layer : f.key;
    out->reduce_count++;
  }
  LINA_TRY(lina_sim_leave(run, index));
  for (int64_t i = 0; i < f.count; i++) {
    sim_rank *rank = &run->ranks[f.first + i * f.stride];
    LINA_TRY(lina_sim_log(run, rank - run->ranks, &span));
    if (f.stream == LINA_SIM_A2A) {
      rank->a2a = SIM_IDLE;
      rank->done++;
      LINA_TRY(raise_a2a(run, rank, -1));
    } else {
      LINA_TRY(reduced(run, rank));
    }
  }
  for (int64_t i = 0; i < f.count; i++) { /* the program first: it may raise the next a2a */
    sim_rank *rank = &run->ranks[f.first + i * f.stride];
    LINA_TRY(lina_sim_advance(run, rank));
    LINA_TRY(try_a2a(run, rank));
    LINA_TRY(try_reduce(run, rank));
  }
done:
  return rc;
}

int lina_sim_serve(sim_run *run, sim_event event) {
  sim_rank *rank = &run->ranks[event.index];
  switch (event.what) {
    case SIM_EVENT_COMPUTE: return on_compute(run, rank);
    case SIM_EVENT_A2A:
      rank->a2a = SIM_HELD;
      rank->ready_s = run->now_s;
      return try_a2a(run, rank);
    case SIM_EVENT_REDUCE: rank->reduce = SIM_HELD; return try_join_reduce(run, rank);
    case SIM_EVENT_FLOW: return on_flow(run, event.index);
  }
  return lina_error(LINA_EINVAL, "simulate: event %d", event.what);
}
