/* comm_private.h - a communicator's inside, for comm.c, comm_end.c and comm_run.c alone. */
#ifndef LINA_COMM_COMM_PRIVATE_H
#define LINA_COMM_COMM_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "../nccl_abi.h"
#include "comm.h"

#define LINA_COMM_CLOSED "closed by another thread"

/* Where the thread is that has a communicator's turn; outlives it with an abort that waits. */
enum lina_comm_stage { LINA_COMM_OUTSIDE, LINA_COMM_INSIDE, LINA_COMM_MAY_WAIT };
typedef struct { _Atomic int stage, users; } lina_comm_turn;

struct lina_comm {
  lina_comm_options options;
  int owner;                         /* the process that made it */
  lina_nccl_comm nccl;               /* NULL once aborted */
  /* `order` is held from begin to end, so that operations do not mix: also while NCCL or the
   * driver blocks the thread, as they do where a rank is missing or a stream's queue is full.
   * `lock`, taken second, guards `nccl` and `reason` for moments only: the watch thread can
   * have it and abort what such a call waits for. */
  pthread_mutex_t order, lock;
  lina_comm_turn *turn;
  _Atomic bool failed, closing, dropped;
  char reason[512];                  /* written once, before `failed` */
  /* Progress: operations issued, and ended as the stream counts them. */
  _Atomic uint32_t issued;
  _Atomic uint32_t *done;
  uint32_t *done_on_device;
  uint32_t seen;                     /* the watch thread's, to the end */
  double progress_s;
  int quiet;                         /* its rounds since it was dropped and idle */
  lina_comm *next;
};

/* Makes the communicator, together with the other ranks; `code` is what NCCL answered.
 * LINA_EPEER, without a text: they have not come within timeout_s. */
int lina_comm_join(const lina_comm_options *options, const char id[LINA_COMM_ID_BYTES],
                   lina_nccl_comm *nccl, int *code);

/* Has the watch look after it from now on. */
int lina_comm_watched(lina_comm *c);

/* `c->lock` being held: for the first reason, aborts what is in flight; every call refuses then. */
void lina_comm_fail(lina_comm *c, const char *reason);
void lina_comm_fail_by_nccl(lina_comm *c, int code);

/* Closes and frees, at once. */
void lina_comm_destroy(lina_comm *c);

/* An operation of one or more of NCCL's begins, if the communicator has not failed. */
int lina_comm_begin(lina_comm *c);

/* Before a call of NCCL: its handle, if it has not failed. lina_comm_took must follow. */
int lina_comm_take(lina_comm *c, lina_nccl_comm *nccl);

/* Before a call of NCCL that may wait for other ranks, or for a stream with room. */
void lina_comm_may_wait(lina_comm *c);

/* `code` is what NCCL answered to an operation on `stream`, which it counts. */
int lina_comm_took(lina_comm *c, int code, void *stream);

void lina_comm_end(lina_comm *c);

#endif
