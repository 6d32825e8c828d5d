/* fuzz_comm_faults.c - ranks that stop, NCCL that fails, communicators that go: one
 * scenario each, and the table of all. */
#define _GNU_SOURCE
#include "fuzz_comm.h"

#include <stdlib.h>
#include <string.h>

#include "comm/priority.h"
#include "error.h"

static double lateness = 0.1;

/* Within timeout_s of `since_s`, and then for good: the calls too, and the streams go on. */
static void must_fail(rank_state *s, lina_comm *c, double since_s, const char *words) {
  double limit_s = s->timeout_s + FUZZ_MARGIN_S;
  while (lina_comm_check(c) == LINA_OK) {
    if (fake_now() - since_s > limit_s) fake_broken("no failure within %g s", limit_s);
    fake_sleep(1e-3);
  }
  expect(lina_comm_check(c), LINA_EPEER, words, "a failed communicator");
}

static void must_stay_failed(rank_state *s) {
  drain(s, "after a failure");
  expect(exchange(s, LINA_A2A_RAISE), LINA_EPEER, "tokens: rank", "an exchange after a failure");
  expect(reduce(s, true), LINA_EPEER, "gradients: rank", "a reduction after a failure");
  expect(scatter(s, 16384), LINA_EPEER, "gradients: rank", "a reduction after a failure");
  drain(s, "after calls that were refused");
}

/* The last rank stops; the others are at all points of their work, the gate raised. */
static void stops(rank_state *s) {
  opened(s);
  double since_s = fake_now();
  if (s->rank < s->size - 1) {
    fine(exchange(s, LINA_A2A_RAISE), "an exchange");
    fine(reduce(s, true), "a reduction");
    if (s->rank == 0) fine(scatter(s, 16384), "a reduction");
    must_fail(s, s->tokens, since_s, "another rank has stopped, or hangs");
    must_fail(s, s->gradients, since_s, "no progress");
    must_stay_failed(s);
  }
  meet(s);
}

static void never_joins(rank_state *s) {
  double since_s = fake_now();
  if (s->rank > 0) {
    expect(open_comms(s), LINA_EPEER, "did not answer in time", "a communicator without rank 0");
    if (fake_now() - since_s > s->timeout_s + FUZZ_MARGIN_S) fake_broken("too late");
  }
  meet(s);
}

/* NCCL's own word comes long before the timeout. */
static void reports(rank_state *s) {
  opened(s);
  if (s->rank == 0) {
    double since_s = fake_now() - s->timeout_s + FUZZ_MARGIN_S;
    fine(exchange(s, LINA_A2A_RAISE), "an exchange");
    fine(reduce(s, true), "a reduction");
    fake_break(0, FAKE_ASYNC);
    must_fail(s, s->tokens, since_s, "NCCL: fake NCCL error: broken on purpose");
    must_fail(s, s->gradients, since_s, "NCCL: fake NCCL error");
    must_stay_failed(s);
  }
  meet(s);
}

/* What was raised for an exchange that NCCL refused is lowered all the same, though the
 * stream comes to it only after the failure. */
static void refuses(rank_state *s) {
  int64_t releases = 0;
  uint32_t word = 1;
  opened(s);
  if (s->rank == 0) {
    fake_push(s->a2a, late, &lateness);
    fake_break(0, FAKE_COLLECTIVE);
    expect(exchange(s, LINA_A2A_RAISE), LINA_EPEER, "NCCL: fake NCCL error", "an exchange");
    drain(s, "after an exchange that NCCL refused");
    fine(lina_priority_read(0, &word, &releases), "the gate");
    if (word) fake_broken("the gate stays raised for an exchange that NCCL refused");
    fine(lina_priority_raise(0, s->a2a), "raising");
    drain(s, "after a raise");
    fake_break(0, FAKE_COLLECTIVE);
    expect(reduce(s, true), LINA_EPEER, "NCCL: fake NCCL error", "a reduction");
    fine(lina_priority_read(0, &word, &releases), "the gate");
    if (word) fake_broken("a failure did not release the gate at once");
    must_stay_failed(s);
  }
  meet(s);
}

/* The watch aborts what a call is in. */
static void does_not_return(rank_state *s) {
  opened(s);
  double since_s = fake_now();
  if (s->rank == 0) {
    fine(exchange(s, 0), "an exchange");
    fake_break(0, FAKE_STUCK);
    expect(exchange(s, LINA_A2A_RAISE), LINA_EPEER, "no progress", "an exchange");
    if (fake_now() - since_s > s->timeout_s + FUZZ_MARGIN_S) fake_broken("too late");
    drain(s, "after NCCL hung");
  }
  meet(s);
}

/* with_ranks frees, with work in flight for which a rank is missing: the watch ends it. */
static void freed_busy(rank_state *s) {
  opened(s);
  if (s->rank > 0) {
    fine(exchange(s, s->rank % 2 ? LINA_A2A_RAISE : 0), "an exchange");
    fine(reduce(s, true), "a reduction");
    fine(reduce(s, false), "a reduction");
  }
  if (s->rank == 1) fake_sleep(0.05);
  lina_comm_free(NULL);
}

/* A rank has issued its last exchange, and drops the communicator before the others' streams have
 * come to it: they get its bytes all the same. */
static void freed_ahead(rank_state *s) {
  opened(s);
  memset(s->memory, 1 + s->rank, 1024);
  memset(s->memory + 1024, 0, 1024);
  fake_sleep(0.1); /* rounds in which nothing is in flight, before it is dropped */
  meet(s);
  if (s->rank == 0) fake_push(s->a2a, late, &lateness);
  fine(exchange(s, LINA_A2A_RAISE), "an exchange");
  if (s->rank == 1) {
    lina_comm_free(s->tokens);
    s->tokens = NULL;
  } else {
    drain(s, "after the last exchange");
    fine(lina_comm_check(s->tokens), "a communicator that another rank has dropped");
    for (int i = 0; i < 512; i++)
      if (s->memory[1024 + i] != 1 + i / 256) fake_broken("byte %d is %d", i, s->memory[1024 + i]);
  }
  meet(s);
}

static void *exchange_on_a_thread(void *argument) {
  rank_state *s = argument;
  expect(exchange(s, LINA_A2A_RAISE), LINA_EPEER, "closed", "an exchange while it is closed");
  return NULL;
}

/* free() ends a call that another thread is in, and does so before its memory goes. */
static void freed_in_call(rank_state *s) {
  pthread_t thread;
  opened(s);
  if (s->rank == 0) {
    double since_s = fake_now();
    fake_break(0, FAKE_STUCK);
    pthread_create(&thread, NULL, exchange_on_a_thread, s);
    fake_sleep(0.1);
    lina_comm_free(s->tokens);
    if (fake_now() - since_s > FUZZ_MARGIN_S) fake_broken("freeing took too long");
    pthread_join(thread, NULL);
    s->tokens = NULL;
  }
  meet(s);
}

/* The thread waits in the driver, as where a stream's queue is full, behind an exchange for
 * which a rank is missing. The watch aborts it all the same. */
static void driver_blocks(rank_state *s) {
  opened(s);
  if (s->rank == 0) {
    double since_s = fake_now();
    fake_break(0, FAKE_FULL);
    fine(exchange(s, 0), "an exchange that was taken over before its rank was missed");
    must_fail(s, s->tokens, since_s, "no progress");
    fine(lina_comm_check(s->gradients), "the other communicator");
    drain(s, "after the driver blocked");
  }
  meet(s);
}

static void *closed_meanwhile(void *argument) {
  rank_state *s = argument;
  int rc = LINA_OK;
  while (rc == LINA_OK) rc = exchange(s, 0);
  expect(rc, LINA_EPEER, "closed", "an exchange while it is closed");
  return NULL;
}

/* close() ends what the driver blocks on, and lets all threads out: one is in a call, the
 * others wait for their turn. Only then may it be freed. */
static void closed_under_threads(rank_state *s) {
  pthread_t threads[3];
  opened(s);
  if (s->rank == 0) {
    double since_s = fake_now();
    fake_break(0, FAKE_FULL);
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, closed_meanwhile, s);
    fake_sleep(0.1);
    lina_comm_close(s->tokens);
    if (fake_now() - since_s > FUZZ_MARGIN_S) fake_broken("closing took too long");
    expect(exchange(s, LINA_A2A_RAISE), LINA_EPEER, "closed", "an exchange after closing");
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    drain(s, "after closing");
  }
  meet(s);
}

static const struct {
  const char *name;
  rank_function *function;
  int size;
  double timeout_s;
} scenarios[] = {
    {"a rank stops", stops, 4, 0.8},
    {"a rank never joins", never_joins, 3, 0.5},
    {"NCCL reports an error", reports, 2, 20},
    {"NCCL refuses a call", refuses, 2, 20},
    {"a call of NCCL does not return", does_not_return, 2, 0.9},
    {"freed while busy", freed_busy, 4, 0.8},
    {"freed ahead of the others", freed_ahead, 2, 3},
    {"freed in a call of another thread", freed_in_call, 2, 20},
    {"the driver blocks a call", driver_blocks, 2, 0.8},
    {"closed under several threads", closed_under_threads, 2, 20},
    {"raised and never lowered", never_lowered, 3, 20},
    {"bad arguments", bad_arguments, 2, 20},
    {"CUDA fails", cuda_fails, 2, 20},
    {"captured", captured, 2, 20},
    {"idle and slow", slow, 2, 2.5},
    {"one connection", one_connection, 2, 20},
    {"peers: limits", peers_limits, 2, 20},
    {"peers: threads take turns", peers_turns, 2, 20},
    {"peers: dropped and closed", peers_dropped, 2, 20},
};

int fault_count(void) { return (int)(sizeof scenarios / sizeof *scenarios); }

const char *run_fault(int i, uint64_t seed) {
  bool connection = scenarios[i].function == one_connection;
  fake_hold(scenarios[i].function == never_lowered ? LINA_PRIORITY_HOLD_S : 0);
  if (connection) setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1", 1);
  with_ranks(scenarios[i].size, seed, 0, scenarios[i].timeout_s, scenarios[i].function);
  if (connection) unsetenv("CUDA_DEVICE_MAX_CONNECTIONS");
  return scenarios[i].name;
}
