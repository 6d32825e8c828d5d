/* fake_nccl.c - NCCL's functions, as lina declares them; what they do: fake_nccl_run.c. */
#define _GNU_SOURCE
#include "fake_nccl.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda_runtime_api.h>

#define REMOTE_FAILURE 6
#define GIVES_UP_S     3.0

static pthread_mutex_t registry = PTHREAD_MUTEX_INITIALIZER;
static group *groups;
static _Atomic int live;
static _Thread_local int depth;
static _Thread_local lina_nccl_comm opened;

int fake_nccl_live(void) { return atomic_load(&live); }

/* ---- life ---- */

int ncclGetVersion(int *version) { return *version = 22900, LINA_NCCL_SUCCESS; }
const char *ncclGetErrorString(int code) { return code == 5 ? "misuse" : "fake NCCL error"; }
const char *ncclGetLastError(lina_nccl_comm comm) { return comm ? "broken on purpose" : "none"; }

int ncclGetUniqueId(lina_nccl_id *id) {
  static _Atomic int made;
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "group %d", atomic_fetch_add(&made, 1));
  return LINA_NCCL_SUCCESS;
}

static group *join(const lina_nccl_id *id, int size) {
  group *g;
  pthread_mutex_lock(&registry);
  for (g = groups; g && memcmp(&g->id, id, sizeof *id) != 0;) g = g->next;
  if (!g) {
    g = calloc(1, sizeof *g);
    g->id = *id, g->size = size;
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    g->next = groups, groups = g;
  }
  if (g->size != size) fake_broken("a communicator of %d and of %d ranks", g->size, size);
  g->members++;
  pthread_mutex_unlock(&registry);
  return g;
}

static void leave(group *g) {
  pthread_mutex_lock(&registry);
  if (--g->members == 0) {
    group **at = &groups;
    while (*at != g) at = &(*at)->next;
    *at = g->next;
    pthread_mutex_destroy(&g->lock);
    pthread_cond_destroy(&g->changed);
    free(g);
  }
  pthread_mutex_unlock(&registry);
}

/* Blocks until all ranks are here; after some seconds NCCL itself gives up. */
int ncclCommInitRankConfig(lina_nccl_comm *comm, int size, lina_nccl_id id, int rank,
                           lina_nccl_config *config) {
  if (config->size != sizeof *config || config->magic != LINA_NCCL_MAGIC || config->blocking != 1)
    fake_broken("NCCL was given a wrong config");
  const double start = fake_now();
  bool complete = false;
  group *g = join(&id, size);
  atomic_fetch_add(&live, 1);
  pthread_mutex_lock(&g->lock);
  g->joined++;
  pthread_mutex_unlock(&g->lock);
  while (!complete && fake_now() - start < GIVES_UP_S) {
    pthread_mutex_lock(&g->lock);
    complete = g->joined == size;
    pthread_mutex_unlock(&g->lock);
    if (!complete) fake_sleep(1e-3);
  }
  if (!complete) {
    leave(g);
    atomic_fetch_sub(&live, 1);
    return REMOTE_FAILURE;
  }
  lina_nccl_comm c = calloc(1, sizeof *c);
  c->rank = rank, c->size = size, c->group = g;
  (void)cudaGetDevice(&c->device);
  *comm = c;
  return LINA_NCCL_SUCCESS;
}

int ncclCommGetAsyncError(lina_nccl_comm c, int *state) {
  *state = LINA_NCCL_SUCCESS;
  c->asked++; /* written, so that two threads at once are a race */
  if (fake_breaks(c->device, FAKE_ASYNC)) *state = REMOTE_FAILURE;
  return LINA_NCCL_SUCCESS;
}

/* Ends calls that block; frees once what is in flight has ended. (NCCL does not wait for the
 * threads that it wakes; here the memory stays until they have left.) */
int ncclCommAbort(lina_nccl_comm c) {
  group *g = c->group;
  pthread_mutex_lock(&g->lock);
  if (c->grouping) fake_broken("aborted under a thread that hands over parts of an operation");
  c->aborted = true;
  pthread_cond_broadcast(&g->changed);
  while (c->inside > 0 || c->ended < c->issued) pthread_cond_wait(&g->changed, &g->lock);
  pthread_mutex_unlock(&g->lock);
  if (fake_breaks(c->device, FAKE_SLOW_ABORT)) fake_sleep(0.1);
  leave(g);
  memset(c, 0xee, sizeof *c);
  free(c);
  atomic_fetch_sub(&live, 1);
  return LINA_NCCL_SUCCESS;
}

/* ---- calls ---- */

static void enter(lina_nccl_comm c, bool grouping) {
  pthread_mutex_lock(&c->group->lock);
  c->inside++;
  c->grouping = grouping;
  pthread_mutex_unlock(&c->group->lock);
}
static int leave_call(lina_nccl_comm c, int code) {
  group *g = c->group;
  pthread_mutex_lock(&g->lock);
  c->inside--;
  pthread_cond_broadcast(&g->changed);
  pthread_mutex_unlock(&g->lock);
  return code;
}

/* Takes `o` and leaves the call; one that is stuck ends by an abort alone. */
static int issue(lina_nccl_comm c, operation *o, lina_nccl_stream stream) {
  if (fake_breaks(c->device, FAKE_COLLECTIVE)) return free(o), leave_call(c, 3);
  bool stuck = fake_breaks(c->device, FAKE_STUCK);
  pthread_mutex_lock(&c->group->lock);
  while (stuck && !c->aborted) pthread_cond_wait(&c->group->changed, &c->group->lock);
  bool aborted = c->aborted;
  if (!aborted) o->issue = c->issued++;
  pthread_mutex_unlock(&c->group->lock);
  if (aborted) return free(o), leave_call(c, 5);
  fake_push(stream, fake_nccl_run, o);
  return leave_call(c, LINA_NCCL_SUCCESS);
}

static int collective(op_kind kind, const void *from, void *to, size_t count, int dtype, int op,
                      lina_nccl_comm c, lina_nccl_stream stream) {
  if (depth) fake_broken("a reduction inside a group");
  enter(c, false);
  (void)fake_element_bytes(dtype);
  operation *o = calloc(1, sizeof *o);
  o->comm = c, o->kind = kind, o->from = from, o->to = to, o->count = count;
  o->dtype = dtype, o->op = op, o->number = c->collectives++;
  return issue(c, o, stream);
}

int ncclAllReduce(const void *from, void *to, size_t count, int dtype, int op, lina_nccl_comm c,
                  lina_nccl_stream s) {
  return collective(ALL_REDUCE, from, to, count, dtype, op, c, s);
}

int ncclReduceScatter(const void *from, void *to, size_t count, int dtype, int op, lina_nccl_comm c,
                      lina_nccl_stream s) {
  return collective(REDUCE_SCATTER, from, to, count, dtype, op, c, s);
}

int ncclGroupStart(void) { return depth++, LINA_NCCL_SUCCESS; }

static int add(lina_nccl_comm c, parcel p, lina_nccl_stream stream) {
  if (!depth || (opened && opened != c)) fake_broken("a send outside a group of its own");
  if (!opened) {
    enter(c, true);
    opened = c, c->open = calloc(1, sizeof *c->open), c->open_stream = stream;
    c->open->comm = c, c->open->kind = EXCHANGE;
  }
  c->open->parcels[c->open->parcel_count++] = p;
  return LINA_NCCL_SUCCESS;
}

int ncclSend(const void *from, size_t count, int dtype, int peer, lina_nccl_comm c,
             lina_nccl_stream s) {
  if (dtype != LINA_NCCL_UINT8 || !count || !from) return 4;
  return add(c, (parcel){c->rank, peer, 1, from, NULL, count, c->sent[peer]++}, s);
}

int ncclRecv(void *to, size_t count, int dtype, int peer, lina_nccl_comm c, lina_nccl_stream s) {
  if (dtype != LINA_NCCL_UINT8 || !count || !to) return 4;
  return add(c, (parcel){peer, c->rank, 1, NULL, to, count, c->received[peer]++}, s);
}

int ncclGroupEnd(void) {
  lina_nccl_comm c = opened;
  if (--depth != 0) fake_broken("ncclGroupEnd without its start");
  opened = NULL;
  if (!c) return LINA_NCCL_SUCCESS;
  operation *o = c->open;
  pthread_mutex_lock(&c->group->lock);
  c->grouping = false;
  pthread_mutex_unlock(&c->group->lock);
  c->open = NULL;
  return issue(c, o, c->open_stream);
}
