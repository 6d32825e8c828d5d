/* fuzz_comm_cases.c - what a rank meets alone: arguments, CUDA, time. Scenarios of
 * fuzz_comm_faults.c. */
#define _GNU_SOURCE
#include "fuzz_comm.h"

#include <stdlib.h>
#include <string.h>

#include "comm/priority.h"
#include "dtype.h"
#include "error.h"

/* The watch lets reductions go on, and not before its time (fake_hold). */
void never_lowered(rank_state *s) {
  int64_t before = 0, after = 0;
  uint32_t word = 0;
  opened(s);
  fine(lina_priority_read(s->rank, &word, &before), "the gate");
  fine(lina_priority_raise(s->rank, s->a2a), "raising");
  if (!fake_stream_drain(s->a2a, PATIENCE_S)) fake_broken("a raise hangs");
  double since_s = fake_now();
  fine(reduce(s, true), "a reduction");
  drain(s, "under a gate that nobody lowers");
  double took_s = fake_now() - since_s;
  fine(lina_priority_read(s->rank, &word, &after), "the gate");
  if (after != before + 1 || word || took_s > LINA_PRIORITY_HOLD_S + FUZZ_MARGIN_S)
    fake_broken("%d releases in %g s", (int)(after - before), took_s);
  meet(s);
}

void bad_arguments(rank_state *s) {
  const char id[LINA_COMM_ID_BYTES] = {0};
  int64_t bytes[MAX_RANKS] = {0, 0, 0, 0}, below[MAX_RANKS] = {-1, -1, -1, -1};
  lina_comm_options o = {"bad", 2, 2, 0, 1.0, 0};
  lina_comm *c = NULL;
  opened(s);
  expect(lina_comm_create(&c, &o, id), LINA_EINVAL, "bad: rank=2, size=2", "a rank");
  o.rank = 0, o.timeout_s = 0;
  expect(lina_comm_create(&c, &o, id), LINA_EINVAL, "timeout_s=0", "a timeout");
  o.timeout_s = 1, o.device = 99;
  expect(lina_comm_create(&c, &o, id), LINA_ECUDA, "no device 99", "a device");
  if (c) fake_broken("a communicator was made of nothing");
  lina_all_to_all a = {s->memory, s->memory, s->rank % 2 ? below : bytes, below};
  expect(lina_comm_all_to_all(s->tokens, &a, LINA_A2A_RAISE, s->a2a), LINA_EINVAL, "-1", "bytes");
  /* Sums and products past 64 bits, which would otherwise pass as small. */
  int64_t much[MAX_RANKS] = {INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX};
  a = (lina_all_to_all){s->memory, s->memory, bytes, much};
  expect(lina_comm_all_to_all(s->tokens, &a, 0, s->a2a), LINA_EINVAL, "at most 2^48", "bytes");
  much[0] = much[1] = (int64_t)1 << 48;
  a = (lina_all_to_all){s->memory, s->memory, much, bytes};
  expect(lina_comm_all_to_all(s->tokens, &a, 0, s->a2a), LINA_EINVAL, "from rank 1", "a sum");
  lina_all_reduce r = {s->memory, ((int64_t)1 << 62) + 1, LINA_F32, false, NULL};
  expect(lina_comm_all_reduce(s->gradients, &r, s->reduce), LINA_EINVAL, "2^48", "a count");
  r.count = -1;
  expect(lina_comm_all_reduce(s->gradients, &r, s->reduce), LINA_EINVAL, "-1 elements", "a count");
  r.count = 1, r.dtype = LINA_I32;
  expect(lina_comm_all_reduce(s->gradients, &r, s->reduce), LINA_ENOTSUP, "dtype", "a dtype");
  lina_reduce_scatter rs = {.count = (int64_t)1 << 61, .dtype = LINA_F32};
  expect(lina_comm_reduce_scatter(s->gradients, &rs, s->reduce), LINA_EINVAL, "2^48", "a count");
  rs.count = -1;
  expect(lina_comm_reduce_scatter(s->gradients, &rs, s->reduce), LINA_EINVAL, "-1", "a count");
  expect(scatter(s, 512 * s->size - 1), LINA_EINVAL, "scratch of", "scratch");
  expect(lina_priority_raise(-1, s->a2a), LINA_EINVAL, "device=-1", "a device");
  expect(lina_priority_wait(LINA_PRIORITY_MAX_DEVICES, s->a2a), LINA_EINVAL, "limit", "a device");
  run_round(s, s->seed + 1);
  meet(s);
}

void cuda_fails(rank_state *s) {
  lina_comm *c = NULL;
  lina_comm_options o = {"bad", 0, 1, s->rank, 1.0, 0};
  opened(s);
  fake_break(s->rank, FAKE_HOST_ALLOC);
  expect(lina_comm_create(&c, &o, s->ids), LINA_ECUDA, "pinned memory", "no pinned memory");
  fake_break(s->rank, FAKE_COPY);
  expect(scatter(s, 16384), LINA_ECUDA, "packing", "a copy");
  fake_break(s->rank, FAKE_WRITE_VALUE);
  expect(reduce(s, false), LINA_ECUDA, "cuStreamWriteValue32", "a write");
  drain(s, "after an operation that was not counted");
  run_round(s, s->seed + 1);
  meet(s);
}

/* The count of operations would be wrong at each replay. */
void captured(rank_state *s) {
  opened(s);
  int64_t before = fake_stream_counts(s->a2a).writes;
  fake_stream_capture(s->a2a, true);
  fine(exchange(s, LINA_A2A_RAISE | LINA_A2A_LOWER), "an exchange");
  drain(s, "after a capture");
  fake_stream_capture(s->a2a, false);
  if (fake_stream_counts(s->a2a).writes != before + 2)
    fake_broken("a captured operation was counted");
  run_round(s, s->seed + 1);
  meet(s);
}

/* Neither idleness nor slow progress is a failure. */
void slow(rank_state *s) {
  opened(s);
  fake_sleep(s->timeout_s + 0.3);
  for (int i = 0; i < 4; i++) {
    if (s->rank == 1) fake_sleep(0.3 * s->timeout_s);
    fine(exchange(s, 0), "an exchange");
  }
  drain(s, "while a rank is slow");
  fine(lina_comm_check(s->tokens), "a slow communicator");
  meet(s);
}

/* With one connection no stream may wait for a word, or all would. */
void one_connection(rank_state *s) {
  fine(open_comms(s), "communicators");
  fine(exchange(s, LINA_A2A_RAISE), "an exchange");
  fine(reduce(s, true), "a reduction");
  drain(s, "with one connection");
  fake_counts done = fake_stream_counts(s->reduce);
  if (done.waited || done.at_once != 8 || done.writes != 8 ||
      fake_stream_counts(s->a2a).writes != 1)
    fake_broken("with one connection a stream waited, or raised");
  meet(s);
}

static char last_bytes[2][256];

void freed_last(void) {
  char id[LINA_COMM_ID_BYTES];
  const lina_comm_options o = {"last", 0, 1, 0, PATIENCE_S, 0};
  const int64_t bytes[] = {sizeof last_bytes[0]};
  const lina_all_to_all a = {last_bytes[0], last_bytes[1], bytes, bytes};
  static double longer_than_an_abort = 0.3;
  lina_comm *c = NULL;
  fake_stream *stream = fake_stream_new(0);
  fine(lina_comm_id(id), "an id");
  fine(lina_comm_create(&c, &o, id), "a communicator");
  memset(last_bytes[0], 7, sizeof last_bytes[0]);
  fake_push(stream, late, &longer_than_an_abort);
  fine(lina_comm_all_to_all(c, &a, 0, stream), "an exchange");
  fake_break(0, FAKE_SLOW_ABORT);
  lina_comm_free(c);
}

void ended_in_order(void) {
  if (fake_nccl_live()) fake_broken("the process ends while a communicator is aborted");
  if (memcmp(last_bytes[0], last_bytes[1], sizeof last_bytes[0]) != 0)
    fake_broken("the process ends before what is in flight");
}
