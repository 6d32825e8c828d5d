/* peers_sums.cuh - what collect sums: a row over its experts, a token over its ranks. */
#ifndef LINA_CUDA_PEERS_SUMS_CUH
#define LINA_CUDA_PEERS_SUMS_CUH

#include "peers.cuh"

#define EXPERTS 8 /* rows of y in flight to one sum */

typedef lina_peers_collect_args Args;

/* Vectors first + 32 i of row r, summed over its experts in order of k and rounded;
 * the whole warp. The rows of up to 8 experts are in flight at once. */
template <class T, int N, int DEPTH>
static __device__ __forceinline__ void weigh(const Args &a, int64_t r, int64_t first,
                                             lina_raw<T, N> (&out)[DEPTH]) {
  const int lane = threadIdx.x % 32, K = (int)a.K;
  const int64_t vectors = a.D / N;
  int near_row = -1;
  float near_weight = 0;
  if (lane < EXPERTS && lane < K) {
    near_row = __ldg(a.pair_row + r * K + lane);
    near_weight = near_row < 0 ? 0 : __ldg(a.weight + r * K + lane);
  }
#pragma unroll
  for (int i = 0; i < DEPTH; i++) {
    const int64_t c = (first + 32 * i) * N;
    float sum[N] = {};
    for (int base = 0; base < K; base += EXPERTS) {
      int row = near_row;
      float weight = near_weight;
      if (base > 0) {
        row = lane < EXPERTS && base + lane < K ? __ldg(a.pair_row + r * K + base + lane) : -1;
        weight = row < 0 ? 0 : __ldg(a.weight + r * K + base + lane);
      }
      lina_raw<T, N> v[EXPERTS];
      float w[EXPERTS];
#pragma unroll
      for (int k = 0; k < EXPERTS; k++) {
        const int64_t from = __shfl_sync(LINA_FULL, row, k);
        w[k] = __shfl_sync(LINA_FULL, weight, k);
        v[k] =
            load_once<T, N>(from >= 0 && first + 32 * i < vectors, (const T *)a.y + from * a.D + c);
      }
#pragma unroll
      for (int k = 0; k < EXPERTS; k++) { /* absent rows add 0 * 0 */
        float f[N];
        lina_vector<T, N>::widen(v[k], f);
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] = fmaf(w[k], f[j], sum[j]);
      }
    }
    out[i] = lina_vector<T, N>::narrow(sum);
  }
}

/* Where rank e's row of a token lies. */
static __device__ __forceinline__ const char *part_of(const Args &a, int e, int64_t row_bytes) {
  const char *from =
      e == a.links.rank ? (const char *)a.y : a.links.buffer[a.links.rank] + a.links.back_at;
  return from + (int64_t)e * a.C * row_bytes;
}

/* Vectors first + 32 i of token t: the sum of up to RANKS ranks' rows; the whole warp. Ordinary
 * loads: peers wrote this memory while the kernel ran. */
template <class T, int N, bool WEIGH, int RANKS, int DEPTH>
static __device__ __forceinline__ void sum_piece(const Args &a, int64_t t, int64_t first,
                                                 int my_slot, bool lost) {
  const int64_t row_bytes = a.D * (int64_t)sizeof(T), vectors = a.D / N;
  lina_raw<T, N> v[RANKS][DEPTH] = {};
#pragma unroll
  for (int e = 0; e < RANKS; e++) {
    const int slot = __shfl_sync(LINA_FULL, my_slot, e);
    if (slot < 0) continue;
    if (WEIGH && e == a.links.rank) {
      weigh<T, N, DEPTH>(a, e * a.C + slot, first, v[e]);
      continue;
    }
    const T *row = (const T *)(part_of(a, e, row_bytes) + slot * row_bytes);
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
      if (first + 32 * i < vectors) v[e][i] = load<T, N>(row + (first + 32 * i) * N);
  }
#pragma unroll
  for (int i = 0; i < DEPTH; i++) {
    float sum[N];
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] = lost ? __uint_as_float(0x7fffffffu) : 0;
#pragma unroll
    for (int e = 0; e < RANKS; e++) {
      float f[N];
      lina_vector<T, N>::widen(v[e][i], f);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += f[j];
    }
    if (first + 32 * i < vectors)
      store_floats<T, N>((T *)a.out + t * a.D + (first + 32 * i) * N, sum);
  }
}

/* Of n rows of rank d's, the gradients of their weights; the whole grid. */
static __device__ __forceinline__ void send_dweight(const Args &a, int d, int64_t n,
                                                    int64_t row_bytes) {
  const int64_t rows = (int64_t)a.links.ep * a.C;
  float *dweight =
      (float *)(a.links.buffer[d] + a.links.back_at + lina_peers_weights_at(rows, row_bytes)) +
      a.links.rank * a.C * a.K;
  for (int64_t j = (int64_t)blockIdx.x * PEERS_THREADS + threadIdx.x; j < n * a.K;
       j += (int64_t)gridDim.x * PEERS_THREADS)
    dweight[j] = a.dweight[d * a.C * a.K + j];
}

/* Each weight's gradient from the rank that has its expert. */
static __device__ __forceinline__ void pick_dweight(const Args &a, int64_t row_bytes, bool lost) {
  const int ep = a.links.ep, rank = a.links.rank;
  const int64_t rows = (int64_t)ep * a.C;
  const float *back = (const float *)(a.links.buffer[rank] + a.links.back_at +
                                      lina_peers_weights_at(rows, row_bytes));
  const unsigned local = (unsigned)(a.E / ep);
  for (int64_t p = (int64_t)blockIdx.x * PEERS_THREADS + threadIdx.x; p < a.T * a.K;
       p += (int64_t)gridDim.x * PEERS_THREADS) {
    const int64_t t = p / a.K, k = p - t * a.K;
    const unsigned e = (unsigned)__ldg(a.expert + p);
    float g = 0;
    if (e < (unsigned)a.E) {
      const int d = (int)(e / local);
      const int64_t row = (int64_t)d * a.C + __ldg(a.slot + t * ep + d);
      g = (d == rank ? a.dweight : back)[row * a.K + k];
    }
    a.dweight_out[p] = lost ? __uint_as_float(0x7fffffffu) : g;
  }
}

#endif
