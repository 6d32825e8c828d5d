/* plain.h - memory that others write, for peers_reduce.cu: sequentially consistent. What fences
 * do is not tried here; exchange.cpp tries those of peers.cuh, which all kernels share.
 */
#ifndef LINA_TESTS_PLAIN_H
#define LINA_TESTS_PLAIN_H

#include "fibers.h"

static inline uint4 __ldcg(const uint4 *p) {
  perhaps();
  return *p;
}
static uint32_t load(const uint32_t *p) {
  others();
  return *(const volatile uint32_t *)p;
}
static void store(uint32_t *p, uint32_t v) {
  others();
  *(volatile uint32_t *)p = v;
}
static uint64_t peers_acquire(const uint64_t *p) {
  others();
  return *(const volatile uint64_t *)p;
}
static void peers_relaxed(uint64_t *p, uint64_t v) {
  others();
  if (v < *p) found("a flag is lowered");
  if (v != *p) moved = ticks;
  *p = v;
}
static uint32_t atomicCAS(uint32_t *p, uint32_t old, uint32_t v) {
  others();
  const uint32_t before = *p;
  if (before == old) *p = v;
  return before;
}
static void peers_fence() {}
static void __threadfence_system() {}
static uint64_t peers_time_ns() { return ticks; }
static void __nanosleep(int) { others(); }

#endif
