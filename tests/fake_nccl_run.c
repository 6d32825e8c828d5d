/* fake_nccl_run.c - what operations of NCCL do, once their stream comes to them. */
#define _GNU_SOURCE
#include "fake_nccl.h"

#include <stdlib.h>
#include <string.h>

size_t fake_element_bytes(int dtype) {
  switch (dtype) {
    case LINA_NCCL_F64: return 8;
    case LINA_NCCL_F32: return 4;
    case LINA_NCCL_BF16: return 2;
  }
  fake_broken("a reduction of dtype %d", dtype);
}

static double load(const void *from, int dtype, size_t i) {
  if (dtype == LINA_NCCL_F64) return ((const double *)from)[i];
  if (dtype == LINA_NCCL_F32) return ((const float *)from)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static void store(void *to, int dtype, size_t i, double value) {
  float narrow = (float)value;
  uint32_t bits;
  memcpy(&bits, &narrow, sizeof bits);
  if (dtype == LINA_NCCL_F64)
    ((double *)to)[i] = value;
  else if (dtype == LINA_NCCL_F32)
    ((float *)to)[i] = narrow;
  else
    ((uint16_t *)to)[i] = (uint16_t)(bits >> 16); /* exact for what fuzz_comm sends */
}

static double sum(operation **all, int size, size_t i, bool mean) {
  double total = 0;
  for (int r = 0; r < size; r++) total += load(all[r]->from, all[r]->dtype, i);
  return mean ? total / size : total;
}

static void reduce(operation **all, int size) {
  const operation *a = all[0];
  bool mean = a->op == LINA_NCCL_AVG;
  for (int r = 1; r < size; r++)
    if (all[r]->kind != a->kind || all[r]->count != a->count || all[r]->dtype != a->dtype ||
        all[r]->op != a->op)
      fake_broken("ranks 0 and %d reduce differently: %zu and %zu elements", r, a->count,
                  all[r]->count);
  for (size_t i = 0; i < a->count; i++) {
    if (a->kind == ALL_REDUCE) {
      double total = sum(all, size, i, mean);
      for (int r = 0; r < size; r++) store(all[r]->to, a->dtype, i, total);
    } else {
      for (int r = 0; r < size; r++)
        store(all[r]->to, a->dtype, i, sum(all, size, (size_t)r * a->count + i, mean));
    }
  }
}

/* Runs the collective if all ranks have come to it. */
static void try_reduce(group *g, operation *mine) {
  operation *all[MAX_RANKS] = {0};
  int found = 0;
  for (operation *o = g->posted; o; o = o->next)
    if (o->kind != EXCHANGE && o->number == mine->number) all[o->comm->rank] = o, found++;
  if (found < g->size) return;
  reduce(all, g->size);
  for (int r = 0; r < g->size; r++) all[r]->done = true;
}

static void deliver(parcel *out, parcel *in) {
  if (out->bytes != in->bytes)
    fake_broken("rank %d sends %zu bytes, rank %d expects %zu", out->source, out->bytes,
                out->target, in->bytes);
  memcpy(in->to, out->from, in->bytes);
  out->remaining = in->remaining = 0;
}

static void try_exchange(group *g, operation *mine) {
  for (int i = 0; i < mine->parcel_count; i++) {
    parcel *p = &mine->parcels[i];
    for (operation *o = g->posted; o && p->remaining; o = o->next)
      for (int j = 0; j < o->parcel_count && p->remaining; j++) {
        parcel *q = &o->parcels[j];
        if (q->remaining && q->source == p->source && q->target == p->target &&
            q->number == p->number && !q->to != !p->to)
          deliver(p->to ? q : p, p->to ? p : q);
      }
  }
  for (operation *o = g->posted; o; o = o->next) {
    int left = o->kind != EXCHANGE;
    for (int j = 0; j < o->parcel_count; j++) left += o->parcels[j].remaining;
    if (left == 0) o->done = true;
  }
}

void fake_nccl_run(fake_stream *s, void *argument) {
  operation *o = argument, **at;
  lina_nccl_comm c = o->comm;
  group *g = c->group;
  if (fake_stream_device(s) != c->device)
    fake_broken("device %d's communicator on a stream of device %d", c->device,
                fake_stream_device(s));
  if (o->kind == EXCHANGE)
    fake_exchange(s);
  else
    fake_reduction(s, true);
  fake_nap();
  pthread_mutex_lock(&g->lock);
  if (c->run++ != o->issue) fake_broken("%s: operations out of order", g->id.internal);
  o->next = g->posted, g->posted = o;
  if (!c->aborted) {
    if (o->kind == EXCHANGE)
      try_exchange(g, o);
    else
      try_reduce(g, o);
    pthread_cond_broadcast(&g->changed);
  }
  while (!o->done && !c->aborted) pthread_cond_wait(&g->changed, &g->lock);
  for (at = &g->posted; *at != o;) at = &(*at)->next;
  *at = o->next;
  pthread_mutex_unlock(&g->lock);
  fake_nap();
  if (o->kind != EXCHANGE) fake_reduction(s, false);
  pthread_mutex_lock(&g->lock);
  c->ended++;                        /* the last use of `c`, which an abort waits for */
  pthread_cond_broadcast(&g->changed);
  pthread_mutex_unlock(&g->lock);
  free(o);
}
