#define _GNU_SOURCE
#include "comm.h"

#include "../error.h"

#if LINA_CUDA
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../nccl_abi.h"
#include "comm_private.h"
#include "memop.h"
#include "priority.h"
#include "watch.h"

static lina_comm *all;                                   /* live communicators */
static pthread_mutex_t list = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int aborts;                               /* under way */

/* ---- failure ---- */

#define CLOSED   "closed by another thread"
#define INSIDE_S 5.0 /* most that an abort waits for a thread that does not wait itself */
#define ABORTS_S 2.0 /* most that the end of the process waits for aborts; a graph holds one up */

static void leave_turn(lina_comm_turn *turn) {
  if (atomic_fetch_sub(&turn->users, 1) == 1) free(turn);
}

typedef struct {
  lina_nccl_comm nccl;
  lina_comm_turn *turn;
} aborting;

/* NCCL may not be aborted under a thread that hands it parts of an operation, which takes
 * microseconds; one that waits inside NCCL is what an abort is to end. */
static void *abort_comm(void *argument) {
  const struct timespec nap = {0, 1000000}, moment = {0, 50000000};
  aborting *a = argument;
  double start = lina_watch_now();
  while (atomic_load(&a->turn->stage) == LINA_COMM_INSIDE && lina_watch_now() - start < INSIDE_S)
    nanosleep(&nap, NULL);
  if (atomic_load(&a->turn->stage) == LINA_COMM_MAY_WAIT) nanosleep(&moment, NULL);
  (void)lina_nccl.ncclCommAbort(a->nccl);
  leave_turn(a->turn);
  free(a);
  atomic_fetch_sub(&aborts, 1);
  return NULL;
}

/* On a thread of its own: NCCL frees pinned memory once its own kernels have ended,
 * for which CUDA waits for all kernels, those of other communicators that are still
 * to be aborted among them. */
static void abort_apart(lina_comm *c) {
  pthread_t thread;
  if (!c->nccl) return;
  aborting *a = malloc(sizeof *a); /* without memory or a thread its kernels are left alone */
  if (a) {
    *a = (aborting){c->nccl, c->turn};
    atomic_fetch_add(&c->turn->users, 1);
    atomic_fetch_add(&aborts, 1);
    if (pthread_create(&thread, NULL, abort_comm, a) == 0) {
      (void)pthread_detach(thread);
    } else {
      leave_turn(c->turn);
      free(a);
      atomic_fetch_sub(&aborts, 1);
    }
  }
  c->nccl = NULL;
}

/* `c` being locked. Keeps the first reason; aborting tells the kernels in flight to end. */
static void fail(lina_comm *c, const char *reason) {
  if (atomic_load(&c->failed)) return;
  snprintf(c->reason, sizeof c->reason, "%s: rank %d of %d: %s", c->options.name, c->options.rank,
           c->options.size, reason);
  atomic_store(&c->failed, true);
  lina_priority_watch(lina_watch_now(), true); /* no stream may wait while NCCL ends its kernels */
  abort_apart(c);
}

int lina_comm_check(lina_comm *c) {
  return atomic_load(&c->failed) ? lina_error(LINA_EPEER, "%s", c->reason) : LINA_OK;
}

/* `c` being locked. */
static void fail_by_nccl(lina_comm *c, int code) {
  char text[400];
  snprintf(text, sizeof text, "NCCL: %s: %s", lina_nccl.ncclGetErrorString(code),
           lina_nccl.ncclGetLastError(c->nccl)); /* takes NULL */
  fail(c, text);
}

static int refused(lina_comm *c, int code) {
  pthread_mutex_lock(&c->lock);
  fail_by_nccl(c, code);
  pthread_mutex_unlock(&c->lock);
  return lina_comm_check(c);
}

/* ---- the watch ---- */

static void watch_one(lina_comm *c, double now_s) {
  int state = LINA_NCCL_SUCCESS;
  uint32_t done = atomic_load(c->done);
  bool idle = done == atomic_load(&c->issued) && atomic_load(&c->turn->stage) == LINA_COMM_OUTSIDE;
  if (atomic_load(&c->failed)) return;
  if (idle || done != c->seen) c->seen = done, c->progress_s = now_s;
  /* NCCL's own state is asked for only while something is outstanding for long. */
  if (now_s - c->progress_s < 0.5) return;
  pthread_mutex_lock(&c->lock);
  if (c->nccl && lina_nccl.ncclCommGetAsyncError(c->nccl, &state) != LINA_NCCL_SUCCESS) state = 3;
  if (state != LINA_NCCL_SUCCESS && state != LINA_NCCL_IN_PROGRESS) {
    fail_by_nccl(c, state);
  } else if (now_s - c->progress_s > c->options.timeout_s) {
    char text[160];
    snprintf(text, sizeof text, "no progress for %.0f s; another rank has stopped, or hangs",
             c->options.timeout_s);
    fail(c, text);
  }
  pthread_mutex_unlock(&c->lock);
}

/* Aborts communicators that failed or stand still. At the process's end waits for those that are
 * being aborted, before the driver and NCCL go. */
static void watch(double now_s, bool last) {
  const struct timespec nap = {0, 200000};
  while (last && atomic_load(&aborts) > 0 && lina_watch_now() - now_s < ABORTS_S)
    nanosleep(&nap, NULL);
  if (last) return;
  pthread_mutex_lock(&list);
  for (lina_comm *c = all; c; c = c->next) watch_one(c, now_s);
  pthread_mutex_unlock(&list);
}

/* ---- life ---- */

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
    fail(c, "the other ranks did not answer in time; one has stopped, or hangs");
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
  if (rc == LINA_OK) rc = lina_watch(watch);
  if (rc != LINA_OK) {
    lina_comm_free(c);
    return rc;
  }
  c->progress_s = lina_watch_now();
  pthread_mutex_lock(&list);
  c->next = all, all = c;
  pthread_mutex_unlock(&list);
  *out = c;
  return LINA_OK;
}

void lina_comm_close(lina_comm *c) {
  if (getpid() != c->owner) return;
  pthread_mutex_lock(&list);
  for (lina_comm **at = &all; *at; at = &(*at)->next)
    if (*at == c) {
      *at = c->next;
      break;
    }
  pthread_mutex_unlock(&list);
  atomic_store(&c->closing, true);
  if (pthread_mutex_trylock(&c->order) != 0) { /* a call may wait for what only an abort ends */
    pthread_mutex_lock(&c->lock);
    fail(c, CLOSED);
    pthread_mutex_unlock(&c->lock);
    pthread_mutex_lock(&c->order);
  }
  pthread_mutex_lock(&c->lock);
  abort_apart(c);
  pthread_mutex_unlock(&c->lock);
  pthread_mutex_unlock(&c->order);
}

void lina_comm_free(lina_comm *c) {
  if (!c || getpid() != c->owner) return; /* a fork's copy: NCCL's threads are the parent's */
  lina_comm_close(c); /* the word stays: a stream may still write it */
  pthread_mutex_destroy(&c->order);
  pthread_mutex_destroy(&c->lock);
  leave_turn(c->turn);
  free(c);
}

/* ---- operations: locked, taken over and counted alike ---- */

static int usable(lina_comm *c) {
  int rc = lina_comm_check(c);
  if (rc != LINA_OK || !atomic_load(&c->closing)) return rc;
  return lina_error(LINA_EPEER, "%s: " CLOSED, c->options.name);
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

int lina_comm_took(lina_comm *c, int code, void *stream) {
  enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  atomic_store(&c->turn->stage, LINA_COMM_OUTSIDE);
  int rc = code == LINA_NCCL_SUCCESS ? lina_comm_check(c) : refused(c, code);
  if (rc != LINA_OK) return rc;
  if (cudaStreamIsCapturing((cudaStream_t)stream, &capture) != cudaSuccess)
    return lina_error(LINA_ECUDA, "%s: not a stream of device %d", c->options.name,
                      c->options.device);
  if (capture != cudaStreamCaptureStatusNone) return LINA_OK; /* a replay could not count on */
  /* Said first: the write may block the thread, and then must not look like idleness. */
  uint32_t count = atomic_load(&c->issued) + 1;
  atomic_store(&c->issued, count);
  rc = lina_memop_write(stream, c->done_on_device, count);
  if (rc != LINA_OK) atomic_store(&c->issued, count - 1);
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
void lina_comm_close(lina_comm *c) { (void)c; }
void lina_comm_free(lina_comm *c) { (void)c; }
int lina_comm_check(lina_comm *c) { return (void)c, none(); }
#endif
