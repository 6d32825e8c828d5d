#define _GNU_SOURCE
#include "watch.h"

#include <pthread.h>
#include <stdbool.h>
#include <time.h>

#include "../error.h"
#include "comm.h"
#include "priority.h"

double lina_watch_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *watch(void *unused) {
  const struct timespec period = {0, (long)(1e9 * LINA_WATCH_PERIOD_S)};
  (void)unused;
  for (;;) {
    nanosleep(&period, NULL);
    double now = lina_watch_now();
    lina_comm_watch(now);
    lina_priority_watch(now, false);
  }
  return NULL;
}

int lina_watch_start(void) {
  static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;
  static bool started;
  pthread_t thread;
  int rc = LINA_OK;
  pthread_mutex_lock(&starting);
  if (!started) {
    if (pthread_create(&thread, NULL, watch, NULL) == 0)
      started = pthread_detach(thread) == 0;
    else
      rc = lina_error(LINA_ENOMEM, "comm: no thread for the watch");
  }
  pthread_mutex_unlock(&starting);
  return rc;
}
