/* device.h - what stands in for CUDA in the text of peers_dispatch.cu and peers_collect.cu.
 *
 * The text is compiled with -fsanitize=thread, but linked with races.h in place of that
 * library: so each load and store of the text, as the compiler sees it, comes by there. What is
 * no load or store of C++ is a call declared here: barriers, what the lanes of a warp tell each
 * other (each lane waits for all 32, and nothing else is ordered by it), atomics, the four PTX
 * instructions with their orders, __ldg (memory that nobody may write while the kernel runs).
 */
#ifndef LINA_TESTS_DEVICE_H
#define LINA_TESTS_DEVICE_H

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "words.h"

typedef int cudaError_t;
struct uint2 { uint32_t x, y; };
struct float2 { float x, y; };
struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
typedef _Float16 __half;
struct __half2 { __half x, y; };

extern "C" {
void emulated_barrier();
const uint64_t *emulated_warp(uint64_t mine);
void *emulated_shared(int id, size_t bytes);
void emulated_constant(const void *p, size_t bytes);
uint32_t emulated_add(uint32_t *p, uint32_t v);
uint32_t emulated_swap(uint32_t *p, uint32_t old, uint32_t v);
uint64_t emulated_load(const void *p, size_t bytes, bool acquire);
void emulated_store(uint64_t *p, uint64_t v);
void emulated_fence();
uint64_t emulated_time();
void emulated_pause();
void emulated_launch(unsigned blocks, unsigned threads, void (*body)(const void *), const void *it,
                     size_t bytes);
}

/* ---- the block, the warp ---- */

static inline void __syncthreads() { emulated_barrier(); }
template <class S> static S &block_shared(int id) { return *(S *)emulated_shared(id, sizeof(S)); }
template <class T> static T __shfl_sync(unsigned, T v, int source) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  bits = emulated_warp(bits)[source % 32];
  memcpy(&v, &bits, sizeof(T));
  return v;
}
static unsigned __ballot_sync(unsigned, int v) {
  const uint64_t *all = emulated_warp(v != 0);
  unsigned mask = 0;
  for (int lane = 0; lane < 32; lane++) mask |= (unsigned)all[lane] << lane;
  return mask;
}
static bool __any_sync(unsigned, int v) { return __ballot_sync(~0u, v) != 0; }
static int __popc(unsigned v) { return __builtin_popcount(v); }

/* ---- memory ---- */

template <class T> static T __ldg(const T *p) {
  emulated_constant(p, sizeof(T));
  return *p;
}
template <class T> static T atomicAdd(T *p, T v) {
  return (T)emulated_add((uint32_t *)p, (uint32_t)v);
}
static uint32_t atomicCAS(uint32_t *p, uint32_t old, uint32_t v) {
  return emulated_swap(p, old, v);
}
static void __threadfence_system() { emulated_fence(); }
static void __nanosleep(int) { emulated_pause(); }

/* ---- numbers ---- */

static float __uint_as_float(uint32_t v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
static float2 make_float2(float x, float y) { return {x, y}; }
static float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float((uint32_t)v.bits << 16); }
static __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t v;
  memcpy(&v, &f, 4);
  if (f != f) return {0x7fff};
  return {(uint16_t)((v + 0x7fff + (v >> 16 & 1)) >> 16)};
}
static __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
static float __half2float(__half v) { return (float)v; }
static __half __float2half_rn(float f) { return (__half)f; }
static __half2 __floats2half2_rn(float x, float y) { return {(__half)x, (__half)y}; }
static float2 __half22float2(__half2 v) { return {(float)v.x, (float)v.y}; }

/* ---- host ---- */

static cudaError_t cudaGetLastError() { return cudaSuccess; }
static const char *cudaGetErrorString(cudaError_t) { return ""; }
template <class K, class... A>
static void launched(unsigned blocks, unsigned threads, K kernel, A... a) {
  const auto body = [=] { kernel(a...); };
  typedef decltype(body) Body;
  emulated_launch(
      blocks, threads, [](const void *it) { (*(const Body *)it)(); }, &body, sizeof body);
}

#endif
