/* How communicators end: by failure, closed, dropped, and with the process. Contract: comm.h. */
#define _GNU_SOURCE
#include "comm.h"

#include "../error.h"

#if LINA_CUDA
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "../nccl_abi.h"
#include "comm_private.h"
#include "priority.h"
#include "watch.h"

static lina_comm *all; /* live communicators */
static pthread_mutex_t list = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int aborts; /* under way */

/* ---- failure ---- */

#define INSIDE_S 5.0 /* most that an abort waits for a thread that does not wait itself */
#define DRAIN_S  5.0 /* most that the end of the process waits for what is in flight, */
#define ABORTS_S 2.0 /* and then for aborts; a graph holds one up */
enum { QUIET = 5 };  /* rounds of the watch without work, after which a dropped one is closed */

/* Of an operation whose kernels have ended NCCL's own threads may still be sending the last bytes. */
static const struct timespec moment = {0, 50000000};

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
  const struct timespec nap = {0, 1000000};
  aborting *a = argument;
  double start = lina_watch_now();
  while (atomic_load(&a->turn->stage) == LINA_COMM_INSIDE && lina_watch_now() - start < INSIDE_S)
    nanosleep(&nap, NULL);
  nanosleep(&moment, NULL);
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
void lina_comm_fail(lina_comm *c, const char *reason) {
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
void lina_comm_fail_by_nccl(lina_comm *c, int code) {
  char text[400];
  snprintf(text, sizeof text, "NCCL: %s: %s", lina_nccl.ncclGetErrorString(code),
           lina_nccl.ncclGetLastError(c->nccl)); /* takes NULL */
  lina_comm_fail(c, text);
}

/* ---- the watch ---- */

static bool in_flight(lina_comm *c) {
  return atomic_load(c->done) != atomic_load(&c->issued) ||
         atomic_load(&c->turn->stage) != LINA_COMM_OUTSIDE;
}

static void watch_one(lina_comm *c, double now_s) {
  int state = LINA_NCCL_SUCCESS;
  uint32_t done = atomic_load(c->done);
  bool dropped = atomic_load(&c->dropped); /* first: nothing is issued after it */
  bool idle = !in_flight(c);
  c->quiet = dropped && idle ? c->quiet + 1 : 0;
  if (atomic_load(&c->failed)) return;
  if (idle || done != c->seen) c->seen = done, c->progress_s = now_s;
  /* NCCL's own state is asked for only while something is outstanding for long. */
  if (now_s - c->progress_s < 0.5) return;
  pthread_mutex_lock(&c->lock);
  if (c->nccl && lina_nccl.ncclCommGetAsyncError(c->nccl, &state) != LINA_NCCL_SUCCESS) state = 3;
  if (state != LINA_NCCL_SUCCESS && state != LINA_NCCL_IN_PROGRESS) {
    lina_comm_fail_by_nccl(c, state);
  } else if (now_s - c->progress_s > c->options.timeout_s) {
    char text[160];
    snprintf(text, sizeof text, "no progress for %.0f s; another rank has stopped, or hangs",
             c->options.timeout_s);
    lina_comm_fail(c, text);
  }
  pthread_mutex_unlock(&c->lock);
}

/* Any that has not failed and has work in flight, which `fails` it. */
static bool busy(bool fails) {
  bool found = false;
  pthread_mutex_lock(&list);
  for (lina_comm *c = all; c; c = c->next) {
    if (atomic_load(&c->failed) || !in_flight(c)) continue;
    found = true;
    if (!fails) continue;
    pthread_mutex_lock(&c->lock);
    lina_comm_fail(c, "the process ends");
    pthread_mutex_unlock(&c->lock);
  }
  pthread_mutex_unlock(&list);
  return found;
}

/* One that was dropped and is done, or any that was dropped; NULL if there is none. */
static lina_comm *over(bool any) {
  pthread_mutex_lock(&list);
  lina_comm *c = all;
  while (c && !(atomic_load(&c->dropped) && (any || c->quiet >= QUIET || atomic_load(&c->failed))))
    c = c->next;
  pthread_mutex_unlock(&list);
  return c; /* nobody else frees it */
}

static void close_dropped(bool every) {
  for (lina_comm *c; (c = over(every));) lina_comm_destroy(c);
}

/* Before the driver and NCCL go: other ranks wait for what is in flight, so it may end; what does
 * not waits for a rank that does not come, and the driver would wait for it in turn. */
static void end_of_process(double now_s) {
  const struct timespec nap = {0, 200000};
  while (busy(false) && lina_watch_now() - now_s < DRAIN_S) {
    lina_priority_watch(lina_watch_now(), true); /* nobody else releases them any more */
    nanosleep(&nap, NULL);
  }
  (void)busy(true);
  nanosleep(&moment, NULL); /* for those that nobody aborts */
  close_dropped(true);
  now_s = lina_watch_now();
  while (atomic_load(&aborts) > 0 && lina_watch_now() - now_s < ABORTS_S) nanosleep(&nap, NULL);
}

static void watch(double now_s, bool last) {
  if (last) {
    end_of_process(now_s);
    return;
  }
  pthread_mutex_lock(&list);
  for (lina_comm *c = all; c; c = c->next) watch_one(c, now_s);
  pthread_mutex_unlock(&list);
  close_dropped(false);
}

int lina_comm_watched(lina_comm *c) {
  int rc = lina_watch(watch);
  if (rc != LINA_OK) return rc;
  c->progress_s = lina_watch_now();
  pthread_mutex_lock(&list);
  c->next = all, all = c;
  pthread_mutex_unlock(&list);
  return LINA_OK;
}

/* ---- closed, dropped ---- */

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
    lina_comm_fail(c, LINA_COMM_CLOSED);
    pthread_mutex_unlock(&c->lock);
    pthread_mutex_lock(&c->order);
  }
  pthread_mutex_lock(&c->lock);
  abort_apart(c);
  pthread_mutex_unlock(&c->lock);
  pthread_mutex_unlock(&c->order);
}

void lina_comm_destroy(lina_comm *c) {
  lina_comm_close(c); /* the word stays: a stream may still write it */
  pthread_mutex_destroy(&c->order);
  pthread_mutex_destroy(&c->lock);
  leave_turn(c->turn);
  free(c);
}

/* An abort under kernels in flight would make them store what is no result, and the next ones send
 * that to ranks which cannot know. */
void lina_comm_free(lina_comm *c) {
  if (!c || getpid() != c->owner) return; /* a fork's copy: NCCL's threads are the parent's */
  if (!atomic_load(&c->failed) && !atomic_load(&c->closing) &&
      pthread_mutex_trylock(&c->order) == 0) {
    pthread_mutex_unlock(&c->order);
    atomic_store(&c->dropped, true); /* the watch's from here on */
  } else {
    lina_comm_destroy(c);
  }
}

#else
void lina_comm_close(lina_comm *c) { (void)c; }
void lina_comm_free(lina_comm *c) { (void)c; }
int lina_comm_check(lina_comm *c) {
  (void)c;
  return lina_error(LINA_ENOTSUP, "comm: lina is built without CUDA");
}
#endif
