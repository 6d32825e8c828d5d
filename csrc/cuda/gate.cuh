/* gate.cuh - what the gate's forward and backward share: scores, tiles and checks. */
#ifndef LINA_CUDA_GATE_CUH
#define LINA_CUDA_GATE_CUH

#include "../ops/gate.h"
#include "common.cuh"

/* Sums over many terms of at least one 1: flushing tiny terms to 0 is exact enough. */
static __device__ __forceinline__ float exp_in_sum(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

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
/* f(tile) with the smallest tile that holds E logits. LANES_64: lanes to a token of 33 to 64
 * experts; the forward measures faster with 8 (8 slots to a lane), the backward with 16. */
template <int LANES_64, class F> static int with_tile(int64_t E, F f) {
  if (E <= 8) return f(tile<8, 1>());
  if (E <= 32) return f(tile<8, 4>());
  if (E <= 64) return f(tile<LANES_64, 64 / LANES_64>());
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
