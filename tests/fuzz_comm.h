/* fuzz_comm.h - ranks in one process, for fuzz_comm.c and fuzz_comm_faults.c. */
#ifndef FUZZ_COMM_H
#define FUZZ_COMM_H

#include <pthread.h>

#include "comm/comm.h"
#include "fake_cuda.h"

#define MAX_RANKS   4
#define MAX_OPS     12
#define FUZZ_MEMORY (1 << 16)
/* Streams drain well within this on a machine that is busy with other things. */
#define PATIENCE_S 15.0
/* A watch that runs every 10 ms is late by less, there. */
#define FUZZ_MARGIN_S 4.0

/* What a rank has: two communicators, each with a stream of its own. */
typedef struct {
  int rank, size;
  uint64_t seed;                   /* the same on all ranks */
  int64_t rounds;
  double timeout_s;
  const char *ids;                 /* two */
  lina_comm *tokens, *gradients;
  fake_stream *a2a, *reduce;
  char *memory;                    /* FUZZ_MEMORY zeros, there until the streams drained */
  pthread_barrier_t *together;
} rank_state;

typedef void rank_function(rank_state *s);

/* Runs `function` on `size` threads, one a rank, each with its communicators made.
 * Afterwards frees what they left, and checks that all streams drain. */
void with_ranks(int size, uint64_t seed, int64_t rounds, double timeout_s, rank_function *function);

/* Makes and frees a rank's communicators; LINA_OK or what lina_comm_create gave. */
int open_comms(rank_state *s);
void drain(rank_state *s, const char *when);

/* Says what lina said and ends the program, unless rc is `expected` with a text that
 * holds `words`. */
void expect(int rc, int expected, const char *words, const char *what);
#define fine(rc, what) expect(rc, LINA_OK, "", what)

/* One round: the operations that `seed` draws, their results checked. */
void run_round(rank_state *s, uint64_t seed);

/* Operations of one size: 256 bytes to each rank, 4 KiB reduced, gently in 8 micro-ops. */
int exchange(rank_state *s, int how);
int reduce(rank_state *s, bool gently);
int scatter(rank_state *s, int64_t scratch_bytes);

void meet(rank_state *s);
/* Makes the communicators and shows that they work. */
void opened(rank_state *s);

/* For a stream: so many seconds, a double. */
void late(fake_stream *s, void *seconds);

rank_function never_lowered, bad_arguments, cuda_fails, captured, slow, one_connection;
rank_function peers_limits, peers_turns, peers_dropped;

/* A communicator that is freed right before the process ends, with work in flight that takes its time,
 * as its abort does; and that both have ended, for an exit handler. */
void freed_last(void);
void ended_in_order(void);

/* Scenario i of fuzz_comm_faults.c; its name. */
int fault_count(void);
const char *run_fault(int i, uint64_t seed);

#endif
