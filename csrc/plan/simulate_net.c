/* simulate_net.c - the simulator's events, links and collectives. Sharing is
 * event by event: a collective's end moves whenever the first other collective
 * comes to run beside it on any member, or the last one ends. */
#include <stdlib.h>

#include "error.h"
#include "simulate_inner.h"

/* ---- events: a binary heap by (time, order) ---- */

static int before(const sim_event *a, const sim_event *b) {
  return a->at_s < b->at_s || (a->at_s == b->at_s && a->order < b->order);
}

int lina_sim_push(sim_run *run, double at_s, int what, int64_t index, uint32_t version) {
  if (run->heap_count == run->heap_room) {
    int64_t more = run->heap_room ? 2 * run->heap_room : 1024;
    sim_event *grown = realloc(run->heap, (size_t)more * sizeof *grown);
    if (!grown) return lina_error(LINA_ENOMEM, "simulate: %lld events", (long long)more);
    run->heap = grown, run->heap_room = more;
  }
  sim_event event = {at_s, run->order++, (int32_t)index, version, what};
  int64_t i = run->heap_count++;
  for (; i > 0 && before(&event, &run->heap[(i - 1) / 2]); i = (i - 1) / 2)
    run->heap[i] = run->heap[(i - 1) / 2];
  run->heap[i] = event;
  return LINA_OK;
}

static sim_event pop(sim_run *run) {
  sim_event top = run->heap[0], last = run->heap[--run->heap_count];
  int64_t i = 0;
  for (int64_t child; (child = 2 * i + 1) < run->heap_count; i = child) {
    if (child + 1 < run->heap_count && before(&run->heap[child + 1], &run->heap[child])) child++;
    if (!before(&run->heap[child], &last)) break;
    run->heap[i] = run->heap[child];
  }
  run->heap[i] = last;
  return top;
}

int lina_sim_next(sim_run *run, sim_event *event) {
  while (run->heap_count) {
    *event = pop(run);
    /* A collective whose end moved has left the event of its former end behind. */
    if (event->what != SIM_EVENT_FLOW || event->version == run->flows[event->index].version)
      return 1;
  }
  return 0;
}

/* ---- accounts ---- */

void lina_sim_turn(sim_run *run, sim_rank *rank, int stream, int on) {
  rank->state_s[rank->bits] += run->now_s - rank->since_s;
  rank->since_s = run->now_s;
  rank->bits = on ? rank->bits | 1 << stream : rank->bits & ~(1 << stream);
}

int lina_sim_log(sim_run *run, int64_t rank, const lina_sim_span *span) {
  lina_sim_result *out = run->out;
  if (!run->ranks[rank].watched) return LINA_OK;
  if (out->span_count == run->span_room) {
    int64_t more = run->span_room ? 2 * run->span_room : 256;
    lina_sim_span *grown = realloc(out->spans, (size_t)more * sizeof *grown);
    if (!grown) return lina_error(LINA_ENOMEM, "simulate: %lld spans", (long long)more);
    out->spans = grown, run->span_room = more;
  }
  out->spans[out->span_count] = *span;
  out->spans[out->span_count++].rank = rank;
  return LINA_OK;
}

/* ---- what a collective takes ---- */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void lina_sim_flow_init(const lina_sim_args *a, sim_flow *f, int stream, int64_t first,
                        int64_t stride, int64_t count) {
  int64_t end = first + (count - 1) * stride;
  *f = (sim_flow){.stream = stream, .first = first, .stride = stride, .count = count, .key = -1};
  f->level = first / a->node == end / a->node ? LINA_SIM_NEAR : LINA_SIM_FAR;
  /* The fewest that share a node with a member: it is the one that sends most out of it. */
  int64_t head = a->node - first % a->node, tail = end % a->node + 1;
  int64_t part = stream == LINA_SIM_A2A ? least(head, tail) : a->node;
  f->per_node = least(count, (part + stride - 1) / stride);
}

lina_link lina_sim_a2a_link(const lina_sim_args *a, const sim_flow *f, double bytes) {
  lina_link near = a->a2a[LINA_SIM_NEAR], far = a->a2a[LINA_SIM_FAR];
  if (f->level == LINA_SIM_NEAR) return near;
  double inside = (double)(f->per_node - 1) / (double)(f->count - 1);
  near.beta_s *= inside;
  far.beta_s *= 1 - inside;
  return inside > 0 && lina_link_time(near, bytes) > lina_link_time(far, bytes) ? near : far;
}

double lina_sim_a2a_s(const lina_sim_args *a, const sim_flow *f, double bytes) {
  return bytes > 0 ? lina_link_time(lina_sim_a2a_link(a, f, bytes), bytes) : 0;
}

lina_link lina_sim_reduce_link(const lina_sim_args *a, const sim_flow *f) {
  lina_link link = a->reduce[f->level];
  if (f->level == LINA_SIM_FAR) {
    link.beta_s /= (double)f->per_node;
    if (f->per_node > 1 && link.beta_s < a->reduce[LINA_SIM_NEAR].beta_s)
      link.beta_s = a->reduce[LINA_SIM_NEAR].beta_s;
  }
  link.beta_s *= 2 * (double)(f->count - 1) / (double)f->count;
  return link;
}

/* ---- sharing ---- */

static int pace(sim_run *run, int64_t index) {
  sim_flow *f = &run->flows[index];
  f->left_s -= (run->now_s - f->since_s) * f->pace;
  if (f->left_s < 0) f->left_s = 0; /* rounding */
  f->since_s = run->now_s;
  f->pace = f->shared ? run->args->share : 1;
  f->version++;
  return lina_sim_push(run, run->now_s + f->left_s / f->pace, SIM_EVENT_FLOW, index, f->version);
}

/* The flow that runs on the member's other stream over the same level, or -1. */
static int64_t beside(const sim_run *run, const sim_flow *f, int64_t rank) {
  int other = f->stream == LINA_SIM_A2A ? LINA_SIM_REDUCE : LINA_SIM_A2A;
  if (!(run->ranks[rank].bits & 1 << other)) return -1;
  int64_t index = other == LINA_SIM_A2A ? rank / run->args->ep : run->ranks[rank].flow;
  return run->flows[index].level == f->level ? index : -1;
}

/* Every member's links are taken (sign 1) or given back (-1). */
static int share(sim_run *run, sim_flow *f, int sign) {
  int rc = LINA_OK;
  for (int64_t i = 0; i < f->count; i++) {
    int64_t rank = f->first + i * f->stride, other = beside(run, f, rank);
    lina_sim_turn(run, &run->ranks[rank], f->stream, sign > 0);
    if (other < 0) continue;
    f->shared += sign;
    int64_t was = run->flows[other].shared;
    run->flows[other].shared += sign;
    if (!was || !run->flows[other].shared) LINA_TRY(pace(run, other));
  }
done:
  return rc;
}

int lina_sim_join(sim_run *run, int64_t index, int64_t key, int64_t offset, double bytes) {
  int rc = LINA_OK;
  sim_flow *f = &run->flows[index];
  if (f->key < 0) f->key = key, f->offset = offset;
  if (f->key != key || f->offset != offset) return LINA_OK; /* waits for a match for ever */
  if (++f->joined < f->count) return LINA_OK;
  f->running = 1;
  f->bytes = bytes;
  f->alone_s = f->stream == LINA_SIM_A2A
                 ? lina_sim_a2a_s(run->args, f, bytes)
                 : lina_link_time(lina_sim_reduce_link(run->args, f), bytes);
  f->left_s = f->alone_s;
  f->begun_s = f->since_s = run->now_s;
  f->pace = 1;
  LINA_TRY(share(run, f, 1));
  LINA_TRY(pace(run, index));
done:
  return rc;
}

int lina_sim_leave(sim_run *run, int64_t index) {
  sim_flow *f = &run->flows[index];
  int rc = share(run, f, -1);
  f->key = -1;
  f->joined = f->running = 0;
  f->version++;
  return rc;
}
