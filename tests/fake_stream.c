/* fake_stream.c - streams and gates of fake_cuda.h. */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "splitmix.h"

/* ---- time, chance, verdict ---- */

double fake_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void fake_sleep(double seconds) {
  struct timespec t = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
  nanosleep(&t, NULL);
}

void fake_nap(void) {
  static _Atomic uint64_t threads;
  static _Thread_local uint64_t state;
  if (!state) state = atomic_fetch_add_explicit(&threads, 1, memory_order_relaxed) + 1;
  uint64_t kind = splitmix(&state) % 1000;
  double most_s = kind < 600 ? 0 : kind < 940 ? 3e-4 : kind < 995 ? 3e-3 : 5e-2;
  if (most_s > 0) fake_sleep(most_s * (double)(splitmix(&state) % 1000) * 1e-3);
}

void fake_broken(const char *format, ...) {
  char text[500];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  fprintf(stderr, "fuzz_comm: %s\n", text);
  _Exit(1);
}

/* ---- faults on purpose ---- */

static _Atomic int faults[FAKE_DEVICES];

void fake_break(int device, fake_fault fault) {
  atomic_store_explicit(&faults[device], (int)fault, memory_order_relaxed);
}

bool fake_breaks(int device, fake_fault fault) {
  int expected = (int)fault;
  if (fault == FAKE_ASYNC || fault == FAKE_STUCK)
    return atomic_load_explicit(&faults[device], memory_order_relaxed) == expected;
  return atomic_compare_exchange_strong_explicit(&faults[device], &expected, FAKE_NO_FAULT,
                                                 memory_order_relaxed, memory_order_relaxed);
}

/* ---- streams ---- */

typedef struct work {
  void (*run)(fake_stream *, void *);
  void *argument;
  struct work *next;
} work;

struct fake_stream {
  int device;
  _Atomic bool capturing;
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t more;
  work *first, **last;
  bool busy, ends;
  /* The stream's thread's own; others read when it is drained. */
  bool passed;                       /* a wait that no reduction has used */
  bool running_waited;
  fake_counts counts;
};

static void *serve(void *argument) {
  fake_stream *s = argument;
  pthread_mutex_lock(&s->lock);
  for (;;) {
    while (!s->first && !s->ends) pthread_cond_wait(&s->more, &s->lock);
    work *w = s->first;
    if (!w) break;
    if (!(s->first = w->next)) s->last = &s->first;
    s->busy = true;
    pthread_mutex_unlock(&s->lock);
    fake_nap();
    w->run(s, w->argument);
    free(w);
    pthread_mutex_lock(&s->lock);
    s->busy = false;
  }
  pthread_mutex_unlock(&s->lock);
  return NULL;
}

fake_stream *fake_stream_new(int device) {
  fake_stream *s = calloc(1, sizeof *s);
  s->device = device;
  s->last = &s->first;
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->more, NULL);
  if (pthread_create(&s->thread, NULL, serve, s) != 0) fake_broken("no thread for a stream");
  return s;
}

void fake_push(fake_stream *s, void (*run)(fake_stream *, void *), void *argument) {
  work *w = calloc(1, sizeof *w);
  w->run = run, w->argument = argument;
  pthread_mutex_lock(&s->lock);
  *s->last = w, s->last = &w->next;
  pthread_cond_signal(&s->more);
  pthread_mutex_unlock(&s->lock);
}

bool fake_stream_drain(fake_stream *s, double seconds) {
  double start = fake_now();
  for (;;) {
    pthread_mutex_lock(&s->lock);
    bool idle = !s->first && !s->busy;
    pthread_mutex_unlock(&s->lock);
    if (idle || fake_now() - start > seconds) return idle;
    fake_sleep(2e-4);
  }
}

void fake_stream_free(fake_stream *s) {
  pthread_mutex_lock(&s->lock);
  s->ends = true;
  pthread_cond_signal(&s->more);
  pthread_mutex_unlock(&s->lock);
  pthread_join(s->thread, NULL);
  pthread_mutex_destroy(&s->lock);
  pthread_cond_destroy(&s->more);
  free(s);
}

void fake_stream_capture(fake_stream *s, bool on) { atomic_store(&s->capturing, on); }
bool fake_stream_captures(const fake_stream *s) { return atomic_load(&s->capturing); }
int fake_stream_device(const fake_stream *s) { return s->device; }
fake_counts fake_stream_counts(const fake_stream *s) { return s->counts; }

/* ---- gates ---- */

typedef struct {
  pthread_mutex_t lock;
  _Atomic uint32_t *word;            /* NULL until a stream waits for it */
  bool written;                      /* raised, as the streams wrote it */
  bool raised;                       /* not yet seen to be opened by somebody else */
  double since_s;
  int running, overlaps;             /* reductions that waited: now, and under this raise */
} gate;
static gate gates[FAKE_DEVICES] = {[0 ... FAKE_DEVICES - 1] = {.lock = PTHREAD_MUTEX_INITIALIZER}};
static _Atomic double hold_s;

void fake_hold(double seconds) { atomic_store(&hold_s, seconds); }

/* At most the one that had passed the wait when the gate was raised. */
static void check_overlap(const gate *g, int device) {
  if (g->overlaps > 1) fake_broken("device %d: %d micro-ops under one raise", device, g->overlaps);
}

void fake_reduction(fake_stream *s, bool begins) {
  gate *g = &gates[s->device];
  if (begins) {
    s->running_waited = s->passed;
    *(s->passed ? &s->counts.waited : &s->counts.at_once) += 1;
    s->passed = false;
  }
  if (!s->running_waited) return;
  pthread_mutex_lock(&g->lock);
  g->running += begins ? 1 : -1;
  if (begins && g->raised) g->overlaps++;
  check_overlap(g, s->device);
  pthread_mutex_unlock(&g->lock);
}

void fake_exchange(fake_stream *s) {
  gate *g = &gates[s->device];
  pthread_mutex_lock(&g->lock);
  s->counts.raised += g->written;
  pthread_mutex_unlock(&g->lock);
}

typedef struct {
  _Atomic uint32_t *word;
  uint32_t value;
} word_value;

static void run_write(fake_stream *s, void *argument) {
  word_value *w = argument;
  gate *g = &gates[s->device];
  pthread_mutex_lock(&g->lock);
  if (w->word == g->word) {
    if (w->value) g->since_s = fake_now(), g->overlaps = g->running;
    g->raised = g->written = w->value != 0;
  }
  atomic_store_explicit(w->word, w->value, memory_order_relaxed);
  pthread_mutex_unlock(&g->lock);
  s->counts.writes++;
  free(w);
}

/* Whether the stream may go on. */
static bool passes(const fake_stream *s, const word_value *w) {
  gate *g = &gates[s->device];
  pthread_mutex_lock(&g->lock);
  bool open = atomic_load_explicit(w->word, memory_order_relaxed) == w->value;
  if (open && g->raised) { /* not by a stream, then */
    double after_s = fake_now() - g->since_s;
    if (after_s < atomic_load(&hold_s))
      fake_broken("device %d: the gate was opened %g s after its raise", s->device, after_s);
    g->raised = false;
  }
  pthread_mutex_unlock(&g->lock);
  return open;
}

static void run_wait(fake_stream *s, void *argument) {
  while (!passes(s, argument)) fake_sleep(2e-5);
  s->passed = true;
  free(argument);
}

static word_value *pair(_Atomic uint32_t *word, uint32_t value) {
  word_value *w = malloc(sizeof *w);
  *w = (word_value){word, value};
  return w;
}

void fake_push_write(fake_stream *s, _Atomic uint32_t *word, uint32_t value) {
  fake_push(s, run_write, pair(word, value));
}

void fake_push_wait(fake_stream *s, _Atomic uint32_t *word, uint32_t value) {
  gate *g = &gates[s->device];
  pthread_mutex_lock(&g->lock);
  if (!g->word) g->word = word;
  if (g->word != word) fake_broken("device %d: waits for two words", s->device);
  pthread_mutex_unlock(&g->lock);
  fake_push(s, run_wait, pair(word, value));
}
