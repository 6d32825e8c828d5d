#define _GNU_SOURCE
#include "watch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "../error.h"

enum { MAX_WATCHERS = 4 };
#define EXIT_S 1.0 /* most that the end of the process waits for a round of the watch */

static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;
static bool started;
static pid_t starter;
static _Atomic bool ends, ended;
static lina_watcher *_Atomic watchers[MAX_WATCHERS]; /* NULL from the first free one on */

double lina_watch_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void look(bool last) {
  const double now = lina_watch_now();
  for (int i = 0; i < MAX_WATCHERS; i++) {
    lina_watcher *watcher = atomic_load(&watchers[i]);
    if (watcher) watcher(now, last);
  }
}

static void *watch(void *unused) {
  const struct timespec period = {0, (long)(1e9 * LINA_WATCH_PERIOD_S)};
  (void)unused;
  while (!atomic_load(&ends)) {
    look(false);
    nanosleep(&period, NULL);
  }
  atomic_store(&ended, true);
  return NULL;
}

/* Handlers run in reverse order: before the driver's, which unmaps what the watch looks at. */
static void stop(void) {
  const struct timespec nap = {0, 200000};
  const double start = lina_watch_now();
  if (!started || getpid() != starter) return; /* a fork has no such thread */
  atomic_store(&ends, true);
  while (!atomic_load(&ended) && lina_watch_now() - start < EXIT_S) nanosleep(&nap, NULL);
  if (atomic_load(&ended)) look(true);
}

static int start_thread(void) {
  pthread_t thread;
  if (started) return LINA_OK;
  starter = getpid();
  if (atexit(stop) != 0 || pthread_create(&thread, NULL, watch, NULL) != 0)
    return lina_error(LINA_ENOMEM, "comm: no thread for the watch");
  started = pthread_detach(thread) == 0;
  return LINA_OK;
}

int lina_watch(lina_watcher *watcher) {
  int i = 0;
  pthread_mutex_lock(&starting);
  int rc = start_thread();
  while (i < MAX_WATCHERS && atomic_load(&watchers[i]) && atomic_load(&watchers[i]) != watcher) i++;
  if (rc == LINA_OK && i == MAX_WATCHERS)
    rc = lina_error(LINA_EINVAL, "comm: more than %d watchers", MAX_WATCHERS);
  if (rc == LINA_OK) atomic_store(&watchers[i], watcher);
  pthread_mutex_unlock(&starting);
  return rc;
}
