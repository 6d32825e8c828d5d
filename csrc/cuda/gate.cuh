/* gate.cuh - what the gate's kernels share: scores, and the keys a lane has left
 * to choose from.
 */
#ifndef LINA_CUDA_GATE_CUH
#define LINA_CUDA_GATE_CUH

#include "../ops/gate.h"
#include "common.cuh"

#define KEY_LOWEST 0x007fffffu /* rank_key(-inf) */

/* Sums over many terms of at least one 1: flushing tiny terms to 0 is exact enough. */
static __device__ __forceinline__ float exp_in_sum(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* A lane's remaining keys: `top` the largest and `id` its expert. */
template <int V, bool SORTED> struct remaining;

template <int V> struct remaining<V, true> {
  unsigned key[V];
  int ids[V];
  /* Odd-even transposition: neighbours change places only if strictly out of order, so equals keep theirs. */
  template <class Id> __device__ __forceinline__ void start(const unsigned (&k)[V], Id id_of) {
#pragma unroll
    for (int i = 0; i < V; i++) key[i] = k[i], ids[i] = id_of(i);
#pragma unroll
    for (int pass = 0; pass < V; pass++)
#pragma unroll
      for (int i = pass & 1; i + 1 < V; i += 2) {
        bool swap = key[i + 1] > key[i];
        unsigned a = swap ? key[i + 1] : key[i], b = swap ? key[i] : key[i + 1];
        int p = swap ? ids[i + 1] : ids[i], q = swap ? ids[i] : ids[i + 1];
        key[i] = a, key[i + 1] = b, ids[i] = p, ids[i + 1] = q;
      }
  }
  __device__ __forceinline__ unsigned top() const { return key[0]; }
  __device__ __forceinline__ int id() const { return ids[0]; }
  template <class Id> __device__ __forceinline__ void pop(Id) {
#pragma unroll
    for (int i = 0; i + 1 < V; i++) key[i] = key[i + 1], ids[i] = ids[i + 1];
    key[V - 1] = 0;
  }
};

template <int V> struct remaining<V, false> {
  unsigned key[V];
  unsigned best;
  int slot, best_id;
  template <class Id> __device__ __forceinline__ void search(Id id_of) {
    best = key[0], slot = 0;
#pragma unroll
    for (int i = 1; i < V; i++)
      if (key[i] > best) best = key[i], slot = i;
    best_id = id_of(slot);
  }
  template <class Id> __device__ __forceinline__ void start(const unsigned (&k)[V], Id id_of) {
#pragma unroll
    for (int i = 0; i < V; i++) key[i] = k[i];
    search(id_of);
  }
  __device__ __forceinline__ unsigned top() const { return best; }
  __device__ __forceinline__ int id() const { return best_id; }
  template <class Id> __device__ __forceinline__ void pop(Id id_of) {
#pragma unroll
    for (int i = 0; i < V; i++) key[i] = i == slot ? 0 : key[i];
    search(id_of);
  }
};

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

/* Softmax of a token's chosen logits, spread over its lanes; -inf where there is none. */
template <int LANES, int OUTS>
static __device__ __forceinline__ void softmax_of_chosen(float (&w)[OUTS]) {
  float largest = -INFINITY, sum = 0;
#pragma unroll
  for (int j = 0; j < OUTS; j++) largest = fmaxf(largest, w[j]);
  largest = key_value(lanes_max<LANES>(rank_key(largest)));
#pragma unroll
  for (int j = 0; j < OUTS; j++) w[j] = expf(w[j] - largest), sum += w[j];
  sum = lanes_sum<LANES>(sum);
#pragma unroll
  for (int j = 0; j < OUTS; j++) w[j] = __fdividef(w[j], sum);
}

/* ---- host ---- */

template <int L, int S> struct tile { static constexpr int lanes = L, slots = S; };
/* f(tile) with the smallest tile that holds E logits. */
template <class F> static int with_tile(int64_t E, F f) {
  if (E <= 8) return f(tile<8, 1>());
  if (E <= 32) return f(tile<8, 4>());
  if (E <= 64) return f(tile<16, 4>());
  if (E <= 128) return f(tile<32, 4>());
  if (E <= 256) return f(tile<32, 8>());
  if (E <= 512) return f(tile<32, 16>());
  return f(tile<32, 32>());
}

static inline int gate_check(const char *op, int64_t T, int64_t E, int64_t K, int score) {
  if (K < 1 || K > LINA_GATE_MAX_K || K > E || E > LINA_GATE_MAX_E || T < 0 || T > INT32_MAX / E)
    return lina_error(
        LINA_EINVAL, "%s: T=%lld, E=%lld, K=%lld; 1 <= K <= %d, K <= E <= %d, T*E < 2^31 needed",
        op, (long long)T, (long long)E, (long long)K, LINA_GATE_MAX_K, LINA_GATE_MAX_E);
  if (score < LINA_SOFTMAX || score > LINA_SIGMOID)
    return lina_error(LINA_EINVAL, "%s: score=%d, 0 to 2 needed", op, score);
  return LINA_OK;
}

#endif
