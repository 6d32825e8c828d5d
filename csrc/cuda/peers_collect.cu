/* peers_collect.cu - rows back to their tokens' ranks, and their sums. Contract: peers.h.
 *
 * Every block first stores its share of y's rows to the peers, then waits for
 * theirs, then sums its share of the tokens: a warp to a piece of a token, the
 * loads of all ranks' rows in flight before the first is added. This rank's own
 * rows do not travel; they are read where they are. Rows by expert are summed
 * over a row's experts on the way, so that this hides behind the stores.
 * Bound by NVLink from about 4 MB on, below that by the round trip of the flags.
 */
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

template <class T, int N, bool WEIGH>
static __device__ __forceinline__ void send_back(const Args &a) {
  const int ep = a.links.ep, rank = a.links.rank, lane = threadIdx.x % 32;
  const int64_t row_bytes = a.D * (int64_t)sizeof(T), vectors = a.D / N, rows = (int64_t)ep * a.C;
  const unsigned pieces = (unsigned)((vectors + 32 * PEERS_DEPTH - 1) / (32 * PEERS_DEPTH));
  const unsigned warps = gridDim.x * PEERS_WARPS;
  const unsigned warp = blockIdx.x * PEERS_WARPS + threadIdx.x / 32;
  for (int i = 0; i < ep - 1; i++) { /* blocks begin with different ranks */
    int d = rank + 1 + (i + (int)blockIdx.x) % (ep - 1);
    if (d >= ep) d -= ep;
    const int64_t n = __ldg(a.count + ep + d);
    char *back = a.links.buffer[d] + a.links.back_at;
    char *to = back + (int64_t)rank * a.C * row_bytes;
    for (unsigned u = warp; u < (unsigned)n * pieces; u += warps) {
      const int64_t row = u / pieces, first = (int64_t)(u % pieces) * 32 * PEERS_DEPTH + lane;
      peers_piece<lina_raw<T, N>> p;
      if (WEIGH)
        weigh<T, N, PEERS_DEPTH>(a, d * a.C + row, first, p.v);
      else
        p.load((const char *)a.y + (d * a.C + row) * row_bytes, first, vectors);
      p.store(to + row * row_bytes, first, vectors);
    }
    if (a.dweight) {
      float *dweight = (float *)(back + lina_peers_weights_at(rows, row_bytes)) + rank * a.C * a.K;
      for (int64_t j = (int64_t)warp * 32 + lane; j < n * a.K; j += (int64_t)warps * 32)
        dweight[j] = a.dweight[d * a.C * a.K + j];
    }
  }
}

/* Where rank e's row of a token lies. */
static __device__ __forceinline__ const char *part_of(const Args &a, int e, int64_t row_bytes) {
  const char *from =
      e == a.links.rank ? (const char *)a.y : a.links.buffer[a.links.rank] + a.links.back_at;
  return from + (int64_t)e * a.C * row_bytes;
}

/* DEPTH vectors of up to RANKS ranks at a time. Ordinary loads: peers wrote this
 * memory while the kernel ran. */
template <class T, int N, bool WEIGH, int RANKS, int DEPTH>
static __device__ __forceinline__ void sum_tokens(const Args &a, bool lost) {
  const int ep = a.links.ep, lane = threadIdx.x % 32;
  const int64_t row_bytes = a.D * (int64_t)sizeof(T), vectors = a.D / N;
  const unsigned pieces = (unsigned)((vectors + 32 * DEPTH - 1) / (32 * DEPTH));
  for (unsigned u = blockIdx.x * PEERS_WARPS + threadIdx.x / 32; u < (unsigned)a.T * pieces;
       u += gridDim.x * PEERS_WARPS) {
    const int64_t t = u / pieces, first = (int64_t)(u % pieces) * 32 * DEPTH + lane;
    const int my_slot = lane < ep ? __ldg(a.slot + t * ep + lane) : -1;
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

template <class T, int N, bool WEIGH, int RANKS, int DEPTH>
static __global__ void __launch_bounds__(PEERS_THREADS, 1)
    peers_collect(const __grid_constant__ Args a) {
  __shared__ uint32_t received[LINA_PEERS_MAX];
  const int ep = a.links.ep;
  const uint32_t read = peers_read(a.links.state, LINA_PEERS_BACK);
  const int64_t row_bytes = a.D * (int64_t)sizeof(T);
  send_back<T, N, WEIGH>(a);
  const peers_turn turn = peers_begin(a.links.state, read);
  const uint32_t epoch = turn.epoch;
  if (peers_all_sent(a.links.state)) peers_announce(a.links, LINA_PEERS_BACK, epoch, NULL, false);
  if (threadIdx.x < ep)
    received[threadIdx.x] =
        threadIdx.x == a.links.rank ? 0 : peers_wait(a.links, LINA_PEERS_BACK, threadIdx.x, epoch);
  __syncthreads();
  bool lost = *(const volatile uint32_t *)&a.links.state->failed != 0;
  for (int e = 0; e < ep; e++) lost |= received[e] == PEERS_LOST;
  sum_tokens<T, N, WEIGH, RANKS, DEPTH>(a, lost);
  if (a.dweight_out) pick_dweight(a, row_bytes, lost);
  peers_end(a.links.state, LINA_PEERS_BACK, turn);
}

template <class T, int N, bool WEIGH> static int launch(const Args *a, cudaStream_t stream) {
  const int64_t pieces = peers_pieces(a->D / N);
  int rc = peers_check_pieces("p2p collect", a->links.ep, a->C, PEERS_DEPTH * pieces);
  if (rc != LINA_OK) return rc;
  const unsigned blocks = peers_blocks(&a->links, a->C * pieces);
  if (a->links.ep == 2)
    peers_collect<T, N, WEIGH, 2, PEERS_DEPTH><<<blocks, PEERS_THREADS, 0, stream>>>(*a);
  else
    peers_collect<T, N, WEIGH, LINA_PEERS_MAX, 1><<<blocks, PEERS_THREADS, 0, stream>>>(*a);
  return lina_launched("p2p collect");
}

template <class T> static int collect(const Args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  const bool wide = a->D % N == 0 && lina_aligned(a->y, 16) && lina_aligned(a->out, 16);
  if (a->pair_row) return wide ? launch<T, N, true>(a, stream) : launch<T, 1, true>(a, stream);
  return wide ? launch<T, N, false>(a, stream) : launch<T, 1, false>(a, stream);
}

extern "C" int lina_peers_collect_cuda(const Args *a, void *stream) {
  switch (a->dtype) {
    case LINA_F32: return collect<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return collect<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return collect<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("p2p collect", a->dtype);
}
