/* peers_private.h - the inside of mapped buffers, for peers.c and peers_run.c alone. */
#ifndef LINA_COMM_PEERS_PRIVATE_H
#define LINA_COMM_PEERS_PRIVATE_H

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>

#include "peers.h"

/* What the device tells the host, and the host the device; of one or more lina_peers. */
typedef struct {
  lina_peers_word *host, *device;
  _Atomic int users;
} lina_peers_shared;

struct lina_peers {
  lina_peers_links links;
  int device;
  int64_t out_bytes, back_bytes, tokens;
  double timeout_s;
  void *own, *mapped[LINA_PEERS_MAX];
  cudaIpcMemHandle_t handle;
  lina_peers_shared *shared;
  pthread_mutex_t lock;                  /* one thread at a time from enter to leave */
  _Atomic int stopped;
  _Atomic bool closed;                   /* nobody has this rank's buffer mapped any more */
  void *last;                            /* stream of the last call outside a capture */
  bool used;
  cudaEvent_t order;
};

/* LINA_OK, or what CUDA answered to `what`. */
int lina_peers_cuda(cudaError_t code, const char *what);

/* Locks, and sets the buffers' device; lina_peers_leave undoes both. After an error neither
 * is done. */
int lina_peers_enter(lina_peers *p, int *before);

#endif
