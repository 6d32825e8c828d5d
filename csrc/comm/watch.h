/* watch.h - the one thread of csrc/comm: it looks every few milliseconds for
 * communicators that make no progress or report an error, and aborts them, and for
 * priority words that stay raised. It calls no CUDA function while all is well, so
 * it never waits for a lock that a blocked host thread holds.
 */
#ifndef LINA_COMM_WATCH_H
#define LINA_COMM_WATCH_H

#define LINA_WATCH_PERIOD_S 0.01

/* Starts the thread if it is not running; it lives as long as the process. */
int lina_watch_start(void);

/* Seconds on the monotonic clock. */
double lina_watch_now(void);

#endif
