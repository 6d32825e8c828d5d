/* fuzz_comm.c - random operations of csrc/comm on several ranks, over the fake CUDA
 * and NCCL of fake_cuda.h, built with ThreadSanitizer or with AddressSanitizer.
 *
 *   fuzz_comm [rounds [seed]]
 *
 * Each round issues all-to-alls, all-reductions and reduce-scatters on both streams of
 * every rank, in micro-ops and whole, then compares every byte. Sums are of small
 * multiples of 12, exact in every dtype, so a byte reduced twice, or never, shows.
 * Between sessions of rounds something breaks on purpose: fuzz_comm_faults.c.
 * Draws repeat by seed; thread timing does not.
 */
#define _GNU_SOURCE
#include "fuzz_comm.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/priority.h"
#include "dtype.h"
#include "error.h"
#include "splitmix.h"

const char *__asan_default_options(void) { return "abort_on_error=1"; }
const char *__ubsan_default_options(void) { return "abort_on_error=1:print_stacktrace=1"; }
const char *__tsan_default_options(void) { return "halt_on_error=1:second_deadlock_stack=1"; }

#define SESSION_ROUNDS 25

static _Atomic int64_t beat;

void expect(int rc, int expected, const char *words, const char *what) {
  atomic_fetch_add_explicit(&beat, 1, memory_order_relaxed);
  if (rc != expected)
    fake_broken("%s: %d and not %d: %s", what, rc, expected, rc ? lina_error_text() : "");
  if (rc != LINA_OK &&
      (!strstr(lina_error_text(), words) || strstr(lina_error_text(), "lina: lina:")))
    fake_broken("%s: \"%s\" does not say \"%s\"", what, lina_error_text(), words);
}

/* ---- ranks ---- */

int open_comms(rank_state *s) {
  lina_comm_options o = {"tokens", s->rank, s->size, s->rank, s->timeout_s, 0};
  int rc = lina_comm_create(&s->tokens, &o, s->ids);
  strcpy(o.name, "gradients");
  o.max_ctas = 4;
  if (rc == LINA_OK) rc = lina_comm_create(&s->gradients, &o, s->ids + LINA_COMM_ID_BYTES);
  return rc;
}

void drain(rank_state *s, const char *when) {
  if (!fake_stream_drain(s->a2a, PATIENCE_S) || !fake_stream_drain(s->reduce, PATIENCE_S))
    fake_broken("rank %d: streams do not drain %s", s->rank, when);
  atomic_fetch_add_explicit(&beat, 1, memory_order_relaxed);
}

typedef struct {
  rank_state state;
  rank_function *function;
} rank_thread;

static void *run_rank(void *argument) {
  rank_thread *t = argument;
  t->state.a2a = fake_stream_new(t->state.rank);
  t->state.reduce = fake_stream_new(t->state.rank);
  t->state.memory = calloc(1, FUZZ_MEMORY);
  /* The fake must know the gate before its first raise, and find it down. */
  fine(lina_priority_lower(t->state.rank, t->state.a2a), "lowering");
  fine(lina_priority_wait(t->state.rank, t->state.a2a), "a wait");
  drain(&t->state, "at the beginning");
  t->function(&t->state);
  lina_comm_free(t->state.tokens);
  lina_comm_free(t->state.gradients);
  drain(&t->state, "after the communicators were freed");
  fake_stream_free(t->state.a2a);
  fake_stream_free(t->state.reduce);
  free(t->state.memory);
  return NULL;
}

void with_ranks(int size, uint64_t seed, int64_t rounds, double timeout_s,
                rank_function *function) {
  char ids[2 * LINA_COMM_ID_BYTES];
  pthread_t threads[MAX_RANKS];
  rank_thread ranks[MAX_RANKS];
  pthread_barrier_t together;
  fine(lina_comm_id(ids), "an id");
  fine(lina_comm_id(ids + LINA_COMM_ID_BYTES), "an id");
  pthread_barrier_init(&together, NULL, (unsigned)size);
  for (int r = 0; r < size; r++) {
    rank_state state = {.rank = r,
                        .size = size,
                        .seed = seed,
                        .rounds = rounds,
                        .timeout_s = timeout_s,
                        .ids = ids,
                        .together = &together};
    ranks[r] = (rank_thread){state, function};
    if (pthread_create(&threads[r], NULL, run_rank, &ranks[r]) != 0) fake_broken("no thread");
  }
  for (int r = 0; r < size; r++) pthread_join(threads[r], NULL);
  pthread_barrier_destroy(&together);
  for (int r = 0; r < FAKE_DEVICES; r++) fake_break(r, FAKE_NO_FAULT);
  double start = fake_now();
  while (fake_nccl_live() > 0) { /* aborts run on threads of their own */
    if (fake_now() - start > PATIENCE_S) fake_broken("%d communicators leak", fake_nccl_live());
    fake_sleep(1e-3);
  }
}

/* ---- operations of fixed size ---- */

#define BYTES 256                  /* from each rank to each */
#define COUNT 1024                 /* elements of a reduction */

int exchange(rank_state *s, int how) {
  const int64_t bytes[MAX_RANKS] = {BYTES, BYTES, BYTES, BYTES};
  lina_all_to_all a = {s->memory, s->memory + 4 * BYTES, bytes, bytes};
  return lina_comm_all_to_all(s->tokens, &a, how, s->a2a);
}

/* 512 bytes each. */
static lina_policy pieces(void) {
  lina_policy p;
  expect(lina_policy_init(&p, (lina_link){0, 1e-9}, 512e-9, 4), LINA_OK, "", "a policy");
  return p;
}

int reduce(rank_state *s, bool gently) {
  lina_policy p = pieces();
  lina_all_reduce a = {s->memory + 8192, COUNT, LINA_F32, false, gently ? &p : NULL};
  return lina_comm_all_reduce(s->gradients, &a, s->reduce);
}

int scatter(rank_state *s, int64_t scratch_bytes) {
  lina_policy p = pieces();
  lina_reduce_scatter a = {.parts = s->memory + 16384,
                           .out = s->memory + 40960,
                           .scratch = s->memory + 49152,
                           .count = COUNT,
                           .scratch_bytes = scratch_bytes,
                           .dtype = LINA_F32,
                           .policy = &p};
  return lina_comm_reduce_scatter(s->gradients, &a, s->reduce);
}

void late(fake_stream *s, void *seconds) {
  (void)s;
  fake_sleep(*(double *)seconds);
}

void meet(rank_state *s) { pthread_barrier_wait(s->together); }

void opened(rank_state *s) {
  fine(open_comms(s), "communicators");
  run_round(s, s->seed);
  meet(s);
}

/* ---- */

static void session(rank_state *s) {
  fine(open_comms(s), "communicators");
  for (int64_t i = 0; i < s->rounds; i++) {
    run_round(s, s->seed + (uint64_t)i);
    if (i % 8 == 0) pthread_barrier_wait(s->together);
  }
  pthread_barrier_wait(s->together); /* nobody frees while another still works */
}

static void *watch(void *unused) {
  (void)unused;
  for (int64_t seen = -1;;) {
    fake_sleep(4 * PATIENCE_S);
    int64_t now = atomic_load(&beat);
    if (now == seen) fake_broken("nothing moves: a deadlock");
    seen = now;
  }
}

int main(int argc, char **argv) {
  atexit(ended_in_order); /* runs behind lina's own handler, which is registered later */
  int64_t rounds = argc > 1 ? strtoll(argv[1], NULL, 10) : 200;
  uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  double start = fake_now();
  pthread_t watchdog;
  pthread_create(&watchdog, NULL, watch, NULL);
  pthread_detach(watchdog);
  for (int64_t left = rounds; left > 0; left -= SESSION_ROUNDS, seed += 1000) {
    uint64_t random = seed;
    int size = (int)(1 + splitmix(&random) % MAX_RANKS);
    fake_hold(LINA_PRIORITY_HOLD_S);
    with_ranks(size, random, left < SESSION_ROUNDS ? left : SESSION_ROUNDS, PATIENCE_S, session);
  }
  double ended = fake_now();
  for (int i = 0; i < fault_count(); i++) {
    double before = fake_now();
    const char *name = run_fault(i, seed);
    printf("fuzz_comm: %-34s %5.2f s\n", name, fake_now() - before);
    fflush(stdout);
  }
  printf("fuzz_comm: %lld rounds in %.1f s, %d faults in %.1f s\n", (long long)rounds,
         ended - start, fault_count(), fake_now() - ended);
  fflush(stdout);
  freed_last();
  return 0;
}
