/* gate_choose.cuh - a token's K best experts: by codes, and by whole keys where
 * codes do not settle it; and the groups that take part. Contract: ../ops/gate.h.
 */
#ifndef LINA_CUDA_GATE_CHOOSE_CUH
#define LINA_CUDA_GATE_CHOOSE_CUH

#include "common.cuh"

#define KEY_LOWEST 0x007fffffu /* rank_key(-inf) */

/* Codes: a key with its low bits cleared, and there LOW - id, so that all codes of a
 * token differ and the larger is chosen first; 0 for none. They order as the keys do, but for
 * - keys that differ in the low bits only: 16-bit logits have none such;
 * - NaN, which must rank as -inf, and -0, which must equal +0: code_of ignores both.
 * Each shows among the K + 1 best: two of one code but for the low bits, or one out of the
 * range below, or a zero behind the first. */
template <int LANES, int V> constexpr unsigned code_low = LANES * V - 1;
#define CODE_FIRST 0x3a800000u /* codes from here, CODE_SPAN of them, are of -4096 < x < 4096: */
#define CODE_SPAN 0x8b000000u /* there the largest without its low bits serves as softmax's shift */
#define CODE_ZEROS 0x80000000u /* +0; -0 lies next below it */

/* The code of x, its low bits taken from `low`. Without the care for NaN and -0 that
 * rank_key takes: their codes are recognised later. */
template <unsigned LOW> static __device__ __forceinline__ unsigned code_of(float x, unsigned low) {
  unsigned b = __float_as_uint(x), key = b ^ ((unsigned)((int)b >> 31) | 0x80000000u), code;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;"
      : "=r"(code)
      : "r"(LOW), "r"(low), "r"(key)); /* LOW ? low : key */
  return code;
}
template <int V> static __device__ __forceinline__ void exchange(unsigned (&a)[V], int i, int j) {
  unsigned larger = max(a[i], a[j]);
  a[j] = min(a[i], a[j]);
  a[i] = larger;
}
/* a[first .. first + N), N a power of two, largest first: Batcher's odd-even merge sort. */
template <int N, int V> static __device__ __forceinline__ void sort_run(unsigned (&a)[V],
                                                                        int first) {
#pragma unroll
  for (int p = 1; p < N; p *= 2)
#pragma unroll
    for (int k = p; k > 0; k /= 2)
#pragma unroll
      for (int i = 0; i + k < N; i++)
        if (i >= k % p && (i - k % p) % (2 * k) < k && i / (2 * p) == (i + k) / (2 * p))
          exchange(a, first + i, first + i + k);
}
/* The largest of a[] in order in a[0 .. N): sorted runs of N are merged into the first,
 * where a run's best N are its larger of first and last, second and last but one ... */
template <int N, int V> static __device__ __forceinline__ void sort_best(unsigned (&a)[V]) {
  sort_run<N>(a, 0);
#pragma unroll
  for (int run = N; run < V; run += N) {
    sort_run<N>(a, run);
#pragma unroll
    for (int i = 0; i < N; i++) a[i] = max(a[i], a[run + N - 1 - i]);
#pragma unroll
    for (int k = N / 2; k > 0; k /= 2)
#pragma unroll
      for (int i = 0; i < N; i++)
        if (i % (2 * k) < k) exchange(a, i, i + k);
  }
}

/* Sorted codes that a lane keeps. With K up to SHORT_K it is rare that one lane holds as many
 * of the best K as a short list: 1 in 500 tokens at K = 8. */
#define SHORT_K 10
template <int V> constexpr int long_list = V < 8 ? V : 8;
template <int LANES, int V>
constexpr int short_list = V <= 4      ? V
                         : LANES == 32 ? 4
                                       : 6;
template <int N> struct count { static constexpr int value = N; };

/* Writes the codes of a token's K + 1 best and returns the first. `odd` becomes 1 on some
 * lane where they may not be the right ones; `whole_keys`: unless codes are equal only for
 * equal keys. */
template <class T, int LANES, int V, int LIST>
static __device__ __forceinline__ unsigned choose_by_code(const float (&x)[V], int K, int lane,
                                                          bool whole_keys, unsigned *chosen,
                                                          int *odd) {
  constexpr unsigned LOW = code_low<LANES, V>;
  unsigned code[V];
#pragma unroll
  for (int i = 0; i < V; i++)
    code[i] = code_of<LOW>(x[i], LOW - slot_id<T, LANES, V>(LANES - 1, i));
  sort_best<long_list<V>>(code);
#pragma unroll
  for (int i = 0; i < LIST; i++) code[i] += (LANES - 1 - lane) * slot_run<T, V>;
  const unsigned first = lanes_max<LANES>(code[0]);
  unsigned best = first;
#pragma unroll 4
  for (int k = 0; k < K; k++) {
    if (code[0] == best) {
      chosen[k] = best;
#pragma unroll
      for (int i = 0; i < LIST; i++) code[i] = i + 1 < LIST ? code[i + 1] : 0;
    }
    best = lanes_max<LANES>(code[0]);
  }
  chosen[K] = best;
  __syncwarp();
  if (LIST < V && code[0] == 0) *odd = 1;
  for (int k = lane; k < K; k += LANES) {
    unsigned c = chosen[k], next = chosen[k + 1];
    if (c - CODE_FIRST >= CODE_SPAN || next - (CODE_ZEROS - LOW - 1) <= 2 * LOW + 1) *odd = 1;
    if (whole_keys && (c ^ next) <= LOW) *odd = 1;
  }
  return first;
}

/* The K best of a token by whole keys, lowest id first among equals. A lane's keys are
 * searched anew each round. All lanes of the warp come here together. */
template <class T, int LANES, int V>
static __device__ __forceinline__ void choose_exactly(const float (&x)[V], int E, int K, int lane,
                                                      unsigned *chosen, float *largest) {
  unsigned key[V];
#pragma unroll
  for (int i = 0; i < V; i++) key[i] = slot_id<T, LANES, V>(lane, i) < E ? rank_key(x[i]) : 0;
#pragma unroll 1
  for (int k = 0; k < K; k++) {
    unsigned best = 0, not_id = 0;
#pragma unroll
    for (int i = 0; i < V; i++) best = max(best, key[i]);
    best = lanes_max<LANES>(best);
#pragma unroll
    for (int i = V - 1; i >= 0; i--)
      if (key[i] == best) not_id = ~slot_id<T, LANES, V>(lane, i);
    not_id = lanes_max<LANES>(not_id);
#pragma unroll
    for (int i = 0; i < V; i++)
      if (~slot_id<T, LANES, V>(lane, i) == not_id) key[i] = 0;
    if (lane == 0) chosen[k] = not_id;
    if (k == 0) *largest = key_value(best);
  }
}

/* Lowers the keys of all but the `kept` best of G groups to -inf. `keys` holds a
 * token's E keys, then room for G. All lanes of the warp come here together. */
template <int LANES>
static __device__ void drop_groups(unsigned *keys, int E, int G, int kept, int group_top,
                                   int lane) {
  const int size = E / G;
  unsigned *scores = keys + E;
  for (int g = lane; g < G; g += LANES) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0, j = g % size; i < size;
         i++, j = j + 1 < size ? j + 1 : 0) { /* rotated: other banks */
      float x = key_value(keys[g * size + j]);
      second = fmaxf(second, fminf(first, x));
      first = fmaxf(first, x);
    }
    scores[g] = rank_key(group_top == 1 || size == 1 ? first : first + second);
  }
  __syncwarp();
  for (int g = lane; g < G; g += LANES) {
    unsigned mine = scores[g];
    int better = 0;
    for (int o = 0; o < G; o++) better += scores[o] > mine || (scores[o] == mine && o < g);
    if (better >= kept)
      for (int i = 0; i < size; i++) keys[g * size + i] = KEY_LOWEST;
  }
  __syncwarp();
}

#endif
