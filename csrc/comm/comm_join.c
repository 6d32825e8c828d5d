/* comm_join.c - all ranks make a communicator. Contract: comm_private.h. */
#define _GNU_SOURCE
#include "comm.h"

#include "../error.h"

#if LINA_CUDA
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "comm_private.h"
#include "watch.h"

/* NCCL's calls block, since otherwise it starts a thread for each, 100 us. Making a communicator
 * then waits for all ranks, with no handle yet by which to abort it: so it has a thread of its own. */
typedef struct {
  lina_nccl_id id;
  lina_nccl_config config;
  int rank, size, device, code;
  lina_nccl_comm nccl;
  _Atomic int state; /* whoever leaves last frees it */
} joining;
enum { JOINS, JOINED, ABANDONED };

static void *join(void *argument) {
  joining *j = argument;
  j->code = cudaSetDevice(j->device) == cudaSuccess
              ? lina_nccl.ncclCommInitRankConfig(&j->nccl, j->size, j->id, j->rank, &j->config)
              : LINA_NCCL_UNHANDLED_CUDA;
  if (atomic_exchange(&j->state, JOINED) == ABANDONED) {
    if (j->code == LINA_NCCL_SUCCESS) (void)lina_nccl.ncclCommAbort(j->nccl);
    free(j);
  }
  return NULL;
}

int lina_comm_join(const lina_comm_options *options, const char id[LINA_COMM_ID_BYTES],
                   lina_nccl_comm *nccl, int *code) {
  const struct timespec nap = {0, 200000};
  const double start = lina_watch_now();
  pthread_t thread;
  joining *j = calloc(1, sizeof *j);
  if (!j) return lina_error(LINA_ENOMEM, "%s: no memory", options->name);
  *j = (joining){.config = LINA_NCCL_CONFIG,
                 .rank = options->rank,
                 .size = options->size,
                 .device = options->device};
  memcpy(&j->id, id, sizeof j->id);
  j->config.blocking = 1;
  if (options->max_ctas > 0) j->config.max_ctas = options->max_ctas;
  if (pthread_create(&thread, NULL, join, j) != 0) {
    free(j);
    return lina_error(LINA_ENOMEM, "%s: no thread to join by", options->name);
  }
  (void)pthread_detach(thread);
  while (atomic_load(&j->state) == JOINS) {
    if (lina_watch_now() - start > options->timeout_s &&
        atomic_exchange(&j->state, ABANDONED) == JOINS)
      return LINA_EPEER;
    nanosleep(&nap, NULL);
  }
  *code = j->code;
  *nccl = j->code == LINA_NCCL_SUCCESS ? j->nccl : NULL;
  free(j);
  return LINA_OK;
}
#else
typedef int lina_comm_join_is_empty; /* ISO C wants a declaration in every file */
#endif
