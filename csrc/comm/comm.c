#define _GNU_SOURCE
#include "comm.h"

#include "../error.h"

#if LINA_CUDA
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <unistd.h>

#include "../nccl_abi.h"
#include "comm_private.h"
#include "memop.h"
#include "watch.h"

static int refused(lina_comm *c, int code) {
  pthread_mutex_lock(&c->lock);
  lina_comm_fail_by_nccl(c, code);
  pthread_mutex_unlock(&c->lock);
  return lina_comm_check(c);
}

/* Finds NCCL's functions and the driver's; several threads may make communicators. */
static int load(void) {
  static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&loading);
  int rc = lina_nccl_load();
  if (rc == LINA_OK) rc = lina_memop_load();
  pthread_mutex_unlock(&loading);
  return rc;
}

int lina_comm_id(char id[LINA_COMM_ID_BYTES]) {
  int rc = load();
  if (rc != LINA_OK) return rc;
  int code = lina_nccl.ncclGetUniqueId((lina_nccl_id *)id);
  if (code == LINA_NCCL_SUCCESS) return LINA_OK;
  return lina_error(LINA_ENCCL, "comm: no id: %s", lina_nccl.ncclGetErrorString(code));
}

static int open(lina_comm *c, const char id[LINA_COMM_ID_BYTES]) {
  int code = LINA_NCCL_SUCCESS;
  int rc = lina_memop_word(c->options.device, &c->done, &c->done_on_device);
  if (rc == LINA_OK) rc = lina_comm_join(&c->options, id, &c->nccl, &code);
  if (rc == LINA_EPEER) {
    pthread_mutex_lock(&c->lock);
    lina_comm_fail(c, "the other ranks did not answer in time; one has stopped, or hangs");
    pthread_mutex_unlock(&c->lock);
    return lina_comm_check(c);
  }
  return rc == LINA_OK && code != LINA_NCCL_SUCCESS ? refused(c, code) : rc;
}

int lina_comm_create(lina_comm **out, const lina_comm_options *options,
                     const char id[LINA_COMM_ID_BYTES]) {
  *out = NULL;
  if (options->size < 1 || options->rank < 0 || options->rank >= options->size)
    return lina_error(LINA_EINVAL, "%s: rank=%d, size=%d; 0 <= rank < size needed", options->name,
                      options->rank, options->size);
  if (!(options->timeout_s > 0))
    return lina_error(LINA_EINVAL, "%s: timeout_s=%g, must be above 0", options->name,
                      options->timeout_s);
  int rc = load();
  if (rc != LINA_OK) return rc;
  lina_comm *c = calloc(1, sizeof *c);
  lina_comm_turn *turn = calloc(1, sizeof *turn);
  if (!c || !turn) {
    free(c), free(turn);
    return lina_error(LINA_ENOMEM, "%s: no memory", options->name);
  }
  c->options = *options, c->turn = turn, c->owner = getpid();
  atomic_store(&turn->users, 1);
  pthread_mutex_init(&c->order, NULL);
  pthread_mutex_init(&c->lock, NULL);
  rc = open(c, id);
  if (rc == LINA_OK) rc = lina_comm_watched(c);
  if (rc == LINA_OK)
    *out = c;
  else
    lina_comm_destroy(c);
  return rc;
}

/* ---- operations: locked, taken over and counted alike ---- */

static int usable(lina_comm *c) {
  int rc = lina_comm_check(c);
  if (rc != LINA_OK || !atomic_load(&c->closing)) return rc;
  return lina_error(LINA_EPEER, "%s: " LINA_COMM_CLOSED, c->options.name);
}

int lina_comm_begin(lina_comm *c) {
  pthread_mutex_lock(&c->order);
  int rc = usable(c);
  if (rc != LINA_OK) pthread_mutex_unlock(&c->order);
  return rc;
}

void lina_comm_end(lina_comm *c) { pthread_mutex_unlock(&c->order); }

int lina_comm_take(lina_comm *c, lina_nccl_comm *nccl) {
  pthread_mutex_lock(&c->lock);
  int rc = usable(c);
  *nccl = c->nccl;
  if (rc == LINA_OK) atomic_store(&c->turn->stage, LINA_COMM_INSIDE);
  pthread_mutex_unlock(&c->lock);
  return rc;
}

void lina_comm_may_wait(lina_comm *c) { atomic_store(&c->turn->stage, LINA_COMM_MAY_WAIT); }

/* An operation that `stream` has been given; one that is captured could not count on in replays. */
static int count(lina_comm *c, void *stream) {
  enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing((cudaStream_t)stream, &capture) != cudaSuccess)
    return lina_error(LINA_ECUDA, "%s: not a stream of device %d", c->options.name,
                      c->options.device);
  if (capture != cudaStreamCaptureStatusNone) return LINA_OK;
  /* Said first: the write may block the thread, and then must not look like idleness. */
  uint32_t issued = atomic_load(&c->issued) + 1;
  atomic_store(&c->issued, issued);
  int rc = lina_memop_write(stream, c->done_on_device, issued);
  if (rc != LINA_OK) atomic_store(&c->issued, issued - 1);
  return rc;
}

int lina_comm_took(lina_comm *c, int code, void *stream) {
  lina_comm_may_wait(c); /* NCCL is done with; outside only once it is counted */
  int rc = code == LINA_NCCL_SUCCESS ? lina_comm_check(c) : refused(c, code);
  if (rc == LINA_OK) rc = count(c, stream);
  atomic_store(&c->turn->stage, LINA_COMM_OUTSIDE);
  return rc;
}
#else
static int none(void) { return lina_error(LINA_ENOTSUP, "comm: lina is built without CUDA"); }
int lina_comm_id(char id[LINA_COMM_ID_BYTES]) { return (void)id, none(); }
int lina_comm_create(lina_comm **out, const lina_comm_options *options,
                     const char id[LINA_COMM_ID_BYTES]) {
  (void)options, (void)id;
  *out = 0;
  return none();
}
#endif
