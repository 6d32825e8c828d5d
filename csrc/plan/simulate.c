/* simulate.c - a run of the simulator, its results, and why it cannot end. */
#include "simulate.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "simulate_inner.h"

/* ---- ranks that wait for each other ---- */

/* The collective that holds the rank up: what its program waits for, or, where that
 * could not start, what the rank holds instead. */
static const sim_flow *holds(const sim_run *run, const sim_rank *rank) {
  int drains = run->program.steps[rank->pc].op == SIM_DRAIN;
  int reduces =
      drains ? rank->reduce == SIM_JOINED || rank->a2a != SIM_JOINED : rank->a2a != SIM_JOINED;
  return reduces ? &run->flows[rank->flow] : &run->flows[(rank - run->ranks) / run->args->ep];
}

static int took_part(const sim_flow *f, const sim_rank *rank, const sim_rank *other) {
  if (f->stream == LINA_SIM_A2A) return other->a2a == SIM_JOINED;
  return other->reduce == SIM_JOINED && other->flow == rank->flow &&
         other->bucket == rank->bucket && other->op.offset == rank->op.offset;
}

/* The first member that the rank waits for; -1: none. */
static int64_t waits_for(const sim_run *run, int64_t index) {
  const sim_rank *rank = &run->ranks[index];
  const sim_flow *f = holds(run, rank);
  for (int64_t i = 0; i < f->count; i++) {
    int64_t member = f->first + i * f->stride;
    if (!took_part(f, rank, &run->ranks[member])) return member;
  }
  return -1;
}

static int describe(const sim_run *run, int64_t index, int64_t next, char *text, size_t size) {
  const sim_rank *rank = &run->ranks[index];
  if (holds(run, rank)->stream == LINA_SIM_A2A)
    return snprintf(text, size, "; rank %lld in a2a %lld waits for rank %lld", (long long)index,
                    (long long)rank->done, (long long)next);
  return snprintf(text, size, "; rank %lld in the allreduce of bucket %lld waits for rank %lld",
                  (long long)index, (long long)rank->bucket, (long long)next);
}

static int deadlock(const sim_run *run) {
  char text[320] = "";
  size_t used = 0;
  int64_t rank = 0;
  while (run->ranks[rank].doing == 3) rank++;
  /* After as many steps as there are ranks the walk is on the cycle. */
  for (int64_t i = 0; i < run->args->ranks && waits_for(run, rank) >= 0; i++)
    rank = waits_for(run, rank);
  int64_t first = rank;
  do {
    int64_t next = waits_for(run, rank);
    int n = describe(run, rank, next, text + used, sizeof text - used);
    if (n < 0 || (size_t)n >= sizeof text - used) {
      text[used] = 0;            /* a long cycle: its first ranks will do */
      break;
    }
    used += (size_t)n;
    rank = next;
  } while (rank != first && rank >= 0);
  return lina_error(LINA_EINVAL, "simulate: deadlock after %.6g s, %lld of %lld ranks left%s",
                    run->now_s, (long long)(run->args->ranks - run->finished),
                    (long long)run->args->ranks, text);
}

/* ---- the run ---- */

static int set_up(sim_run *run) {
  int rc = LINA_OK;
  const lina_sim_args *a = run->args;
  LINA_TRY(lina_sim_build(a, &run->program));
  run->groups = a->ranks / a->ep;
  run->flow_count = run->groups + 1 + a->ep;
  run->ranks = calloc((size_t)a->ranks, sizeof *run->ranks);
  run->flows = calloc((size_t)run->flow_count, sizeof *run->flows);
  if (!run->ranks || !run->flows)
    LINA_FAIL(LINA_ENOMEM, "simulate: %lld ranks", (long long)a->ranks);
  for (int64_t g = 0; g < run->groups; g++)
    lina_sim_flow_init(a, &run->flows[g], LINA_SIM_A2A, g * a->ep, 1, a->ep);
  sim_flow *world = &run->flows[run->groups];
  lina_sim_flow_init(a, world, LINA_SIM_REDUCE, 0, 1, a->ranks);
  for (int64_t j = 0; j < a->ep; j++)
    lina_sim_flow_init(a, world + 1 + j, LINA_SIM_REDUCE, j, a->ep, run->groups);
  const sim_program *p = &run->program;
  for (int64_t r = 0; r < a->ranks; r++)
    LINA_TRY(lina_policy_init(&run->ranks[r].policy, p->cut, p->micro_op_s, p->unit));
  for (int64_t i = 0; i < a->watch_count; i++) run->ranks[a->watch[i]].watched = 1;
done:
  return rc;
}

static int finish(sim_run *run) {
  const lina_sim_args *a = run->args;
  const sim_program *p = &run->program;
  lina_sim_result *out = run->out;
  int64_t bytes = 0;
  for (int64_t b = 0; b < p->bucket_count; b++) bytes += p->buckets[b].bytes;
  for (int64_t r = 0; r < a->ranks; r++) {
    sim_rank *rank = &run->ranks[r];
    if (rank->next_id != p->bucket_count || rank->done != p->exchange_count || rank->outstanding)
      return lina_error(LINA_EINVAL, "simulate: rank %lld ended with work left", (long long)r);
    lina_sim_turn(run, rank, LINA_SIM_COMPUTE, 0);
    for (int i = 0; i < 8; i++) out->state_s[i] += rank->state_s[i] / (double)a->ranks;
  }
  if (out->reduced_bytes != bytes * a->ranks)
    return lina_error(LINA_EINVAL, "simulate: %lld bytes reduced, not %lld",
                      (long long)out->reduced_bytes, (long long)(bytes * a->ranks));
  for (int i = 0; i < 2 && p->moe_layers; i++)
    out->degree[i] = p->degree_sum[i] / (double)p->moe_layers;
  return LINA_OK;
}

int lina_simulate(const lina_sim_args *args, lina_sim_result *result) {
  int rc = LINA_OK;
  sim_run run = {.args = args, .out = result};
  memset(result, 0, sizeof *result);
  LINA_TRY(lina_sim_check(args));
  LINA_TRY(set_up(&run));
  for (int64_t r = 0; r < args->ranks; r++) LINA_TRY(lina_sim_advance(&run, &run.ranks[r]));
  for (sim_event event; lina_sim_next(&run, &event);) {
    run.now_s = event.at_s;
    result->events++;
    LINA_TRY(lina_sim_serve(&run, event));
  }
  rc = run.finished == args->ranks ? finish(&run) : deadlock(&run);
done:
  for (int64_t r = 0; run.ranks && r < args->ranks; r++) lina_policy_free(&run.ranks[r].policy);
  free(run.ranks);
  free(run.flows);
  free(run.heap);
  lina_sim_program_free(&run.program);
  if (rc != LINA_OK) lina_simulate_free(result);
  return rc;
}

void lina_simulate_free(lina_sim_result *result) {
  free(result->spans);
  memset(result, 0, sizeof *result);
}
