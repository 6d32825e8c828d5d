/* comm_private.h - a communicator's inside, for comm.c and comm_run.c alone. */
#ifndef LINA_COMM_COMM_PRIVATE_H
#define LINA_COMM_COMM_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "../nccl_abi.h"
#include "comm.h"

struct lina_comm {
  lina_comm_options options;
  lina_nccl_comm nccl;               /* NULL once aborted */
  pthread_mutex_t lock;              /* held by whoever calls NCCL with it */
  _Atomic bool failed, closing;
  char reason[512];                  /* written once, before `failed` */
  /* Progress: operations issued, and ended as the stream counts them. */
  _Atomic uint32_t issued;
  _Atomic uint32_t *done;
  uint32_t *done_on_device;
  uint32_t seen;                     /* the watch thread's */
  double progress_s;
  lina_comm *next;
};

/* Locks and checks; on error the lock is free again. */
int lina_comm_begin(lina_comm *c);

/* `code` is what NCCL answered to an operation on `stream`: waits until NCCL has
 * taken it over, and counts it. The lock stays. */
int lina_comm_took(lina_comm *c, int code, void *stream);

void lina_comm_end(lina_comm *c);

#endif
