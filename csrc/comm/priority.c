#include "priority.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../error.h"

#if LINA_CUDA
#include <pthread.h>

#include "memop.h"
#include "watch.h"

typedef struct {
  _Atomic uint32_t *_Atomic word; /* pinned; NULL before the first use */
  uint32_t *on_device;
  _Atomic uint32_t generation;   /* each raise writes another value: the watch tells them apart */
  uint32_t seen;                 /* this and since_s: behind `watching` */
  double since_s;
  _Atomic int64_t releases;
} state;

static state devices[LINA_PRIORITY_MAX_DEVICES];
static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t watching = PTHREAD_MUTEX_INITIALIZER;

static int make(int device, state *s) {
  _Atomic uint32_t *word = NULL;
  int rc = lina_memop_load();
  if (rc == LINA_OK) rc = lina_memop_word(device, &word, &s->on_device);
  /* no word without the thread that releases it */
  if (rc == LINA_OK) rc = lina_watch(lina_priority_watch);
  if (rc == LINA_OK) atomic_store(&s->word, word);
  return rc;
}

static int find(int device, state **out) {
  if (device < 0 || device >= LINA_PRIORITY_MAX_DEVICES)
    return lina_error(LINA_EINVAL, "priority: device=%d, limit %d", device,
                      LINA_PRIORITY_MAX_DEVICES - 1);
  *out = &devices[device];
  if (atomic_load(&(*out)->word)) return LINA_OK;
  pthread_mutex_lock(&making);
  int rc = atomic_load(&(*out)->word) ? LINA_OK : make(device, *out);
  pthread_mutex_unlock(&making);
  return rc;
}

const char *lina_priority_off(void) {
  const char *connections = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  if (connections && strcmp(connections, "1") == 0)
    return "CUDA_DEVICE_MAX_CONNECTIONS=1: every stream would queue behind one that waits";
  return NULL;
}

static int set(int device, void *stream, bool raised) {
  state *s = NULL;
  int rc = find(device, &s);
  if (rc != LINA_OK || lina_priority_off()) return rc;
  uint32_t value = 0;
  while (raised && value == 0) value = atomic_fetch_add(&s->generation, 1) + 1;
  return lina_memop_write(stream, s->on_device, value);
}

int lina_priority_raise(int device, void *a2a_stream) { return set(device, a2a_stream, true); }
int lina_priority_lower(int device, void *a2a_stream) { return set(device, a2a_stream, false); }

int lina_priority_wait(int device, void *reduce_stream) {
  state *s = NULL;
  int rc = find(device, &s);
  if (rc != LINA_OK || lina_priority_off()) return rc;
  return lina_memop_wait_zero(reduce_stream, s->on_device);
}

uint32_t *lina_priority_word(int device) {
  state *s = NULL;
  return lina_priority_off() || find(device, &s) != LINA_OK ? NULL : s->on_device;
}

int lina_priority_read(int device, uint32_t *word, int64_t *releases) {
  state *s = NULL;
  int rc = find(device, &s);
  if (rc != LINA_OK) return rc;
  *word = atomic_load(atomic_load(&s->word));
  *releases = atomic_load(&s->releases);
  return LINA_OK;
}

void lina_priority_watch(double now_s, bool all) {
  pthread_mutex_lock(&watching); /* whoever sees a communicator fail calls it too */
  for (int d = 0; d < LINA_PRIORITY_MAX_DEVICES; d++) {
    state *s = &devices[d];
    _Atomic uint32_t *word = atomic_load(&s->word);
    if (!word) continue;
    uint32_t value = atomic_load(word);
    if (value == 0 || value != s->seen) {
      s->seen = value, s->since_s = now_s;
      if (!all) continue;
    }
    /* Compared again: the stream may have lowered and raised it since, which must hold. */
    if (value && (all || now_s - s->since_s > LINA_PRIORITY_HOLD_S) &&
        atomic_compare_exchange_strong(word, &value, 0))
      atomic_fetch_add(&s->releases, 1);
  }
  pthread_mutex_unlock(&watching);
}
#else
static int none(void) { return lina_error(LINA_ENOTSUP, "priority: lina is built without CUDA"); }
int lina_priority_raise(int device, void *stream) { return (void)device, (void)stream, none(); }
int lina_priority_lower(int device, void *stream) { return (void)device, (void)stream, none(); }
int lina_priority_wait(int device, void *stream) { return (void)device, (void)stream, none(); }
const char *lina_priority_off(void) { return "lina is built without CUDA"; }
uint32_t *lina_priority_word(int device) { return (void)device, NULL; }
int lina_priority_read(int device, uint32_t *word, int64_t *releases) {
  return (void)device, (void)word, (void)releases, none();
}
void lina_priority_watch(double now_s, bool all) { (void)now_s, (void)all; }
#endif
