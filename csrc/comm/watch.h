/* watch.h - the one thread of csrc/comm: it looks every few milliseconds for
 * communicators that make no progress or report an error, and aborts them, and for
 * priority words that stay raised. It calls no CUDA function while all is well, so
 * it never waits for a lock that a blocked host thread holds.
 */
#ifndef LINA_COMM_WATCH_H
#define LINA_COMM_WATCH_H

#include <stdbool.h>

#define LINA_WATCH_PERIOD_S 0.01

/* What the thread calls in each round; `last`: the process ends, and nobody will look any more. */
typedef void lina_watcher(double now_s, bool last);

/* Has `watcher` called from now on, in order of their coming; starts the thread if it is not
 * running. Telling it again does nothing. The thread ends when the process exits, before the
 * driver unmaps the memory that it reads; so the driver must be up when this is called. */
int lina_watch(lina_watcher *watcher);

/* Seconds on the monotonic clock. */
double lina_watch_now(void);

#endif
