/* combine.cu - each token's weighted sum of its rows, and its gradients.
 * Contract: ../ops/combine.h.
 *
 * Forward: a row of threads to a token, each owning 16-byte columns; it starts
 * the loads of up to 8 rows before it adds the first, then adds in order of k.
 * Backward: a warp to a token, so that dout is read once for all of its rows:
 * each lane multiplies its columns into 8 running dot products and writes dy;
 * the dot products meet by shuffles. Rows without a pair are zeroed by the
 * warps in whose K rows they lie.
 * Bound by memory: N*D + T*D elements forward, 2*N*D + T*D backward.
 */
#include "../ops/combine.h"
#include "common.cuh"

#define THREADS 256
#define AT_ONCE 8

/* T tokens of K rows; `per_row` threads to a token (a power of two). The bound
 * of 3 blocks lets the compiler keep 8 loads in flight rather than save registers. */
template <class T, int N, int ROWS>
static __global__ void __launch_bounds__(THREADS, 3)
    combine(const __grid_constant__ lina_combine_args a, int per_row) {
  const T *y = (const T *)a.y;
  const float *weight = (const float *)a.weight;
  const int64_t t = (int64_t)blockIdx.x * (THREADS / per_row) + threadIdx.x / per_row;
  if (t >= a.T) return;
  const int32_t *pair_row = a.pair_row + t * a.K;
  for (int64_t c = (int64_t)(threadIdx.x & (per_row - 1)) * N; c < a.D; c += per_row * N) {
    float sum[N] = {};
    for (int first = 0; first < a.K; first += ROWS) {
      int row[ROWS];
      float w[ROWS];
      lina_raw<T, N> v[ROWS];
#pragma unroll
      for (int k = 0; k < ROWS; k++) {
        row[k] = first + k < a.K ? __ldg(pair_row + first + k) : -1;
        w[k] = row[k] < 0 ? 0.0f : weight ? __ldg(weight + t * a.K + first + k) : 1.0f;
      }
#pragma unroll
      for (int k = 0; k < ROWS; k++) v[k] = load_once<T, N>(row[k] >= 0, y + row[k] * a.D + c);
#pragma unroll
      for (int k = 0; k < ROWS; k++) { /* absent rows add 0 * 0 */
        float f[N];
        lina_vector<T, N>::widen(v[k], f);
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] = fmaf(w[k], f[i], sum[i]);
      }
    }
    store_floats<T, N>((T *)a.out + t * a.D + c, sum);
  }
}

template <class T, int N>
static __global__ void __launch_bounds__(THREADS)
    combine_bwd(const __grid_constant__ lina_combine_bwd_args a) {
  const T *y = (const T *)a.y, *dout = (const T *)a.dout;
  T *dy = (T *)a.dy;
  const float *weight = (const float *)a.weight;
  float *dweight = (float *)a.dweight;
  const int lane = threadIdx.x % 32;
  const int64_t t = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (t >= a.T) return;
  for (int first = 0; first < a.K; first += AT_ONCE) {
    int row[AT_ONCE];
    float w[AT_ONCE], dot[AT_ONCE] = {};
    const int64_t pair = t * a.K + first;
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      row[k] = first + k < a.K ? __ldg(a.pair_row + pair + k) : -1;
      w[k] = row[k] >= 0 && weight ? __ldg(weight + pair + k) : 1.0f;
    }
    for (int64_t c = lane * N; c < a.D; c += 32 * N) {
      float g[N];
      lina_raw<T, N> v[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
        v[k] = load_once<T, N>(dweight && row[k] >= 0, y + row[k] * a.D + c);
      lina_vector<T, N>::widen(load_const<T, N>(dout + t * a.D + c), g);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        float f[N];
        lina_vector<T, N>::widen(v[k], f);
#pragma unroll
        for (int i = 0; i < N; i++) dot[k] = fmaf(g[i], f[i], dot[k]);
#pragma unroll
        for (int i = 0; i < N; i++) f[i] = w[k] * g[i];
        if (row[k] >= 0) store_floats<T, N>(dy + row[k] * a.D + c, f);
      }
    }
    if (dweight) {
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        float d = lanes_sum<32>(dot[k]);
        if (lane == 0 && first + k < a.K)
          dweight[pair + k] = row[k] < 0 ? 0 : d; /* 0 * inf is no 0 */
      }
    }
    for (int k = first; k < a.K && k < first + AT_ONCE; k++) {
      const int64_t r = t * a.K + k; /* a row here, not a pair: N = T*K */
      if (r >= a.N || __ldg(a.row_pair + r) >= 0) continue;
      for (int64_t c = lane * N; c < a.D; c += 32 * N) store<T, N>(dy + r * a.D + c, {});
    }
  }
}

template <class T, int N> static int launch_fwd(const lina_combine_args *a, cudaStream_t stream) {
  const int per_row = lina_row_threads(lina_ceil_div(a->D, N));
  const unsigned blocks = (unsigned)lina_ceil_div(a->T, THREADS / per_row);
  if (a->K <= 2)
    combine<T, N, 2><<<blocks, THREADS, 0, stream>>>(*a, per_row);
  else if (a->K <= 4)
    combine<T, N, 4><<<blocks, THREADS, 0, stream>>>(*a, per_row);
  else
    combine<T, N, AT_ONCE><<<blocks, THREADS, 0, stream>>>(*a, per_row);
  return lina_launched("combine");
}

template <class T> static int forward(const lina_combine_args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  if (a->D % N == 0 && lina_aligned(a->y, 16) && lina_aligned(a->out, 16))
    return launch_fwd<T, N>(a, stream);
  return launch_fwd<T, 1>(a, stream);
}

template <class T> static int backward(const lina_combine_bwd_args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  const unsigned blocks = (unsigned)lina_ceil_div(a->T, THREADS / 32);
  if (a->D % N == 0 && lina_aligned(a->y, 16) && lina_aligned(a->dout, 16) &&
      lina_aligned(a->dy, 16))
    combine_bwd<T, N><<<blocks, THREADS, 0, stream>>>(*a);
  else
    combine_bwd<T, 1><<<blocks, THREADS, 0, stream>>>(*a);
  return lina_launched("combine backward");
}

static int check(const char *op, int64_t T, int64_t K, int64_t D, int64_t N) {
  if (T < 0 || K < 1 || K > 1024 || D < 0 || N < 0 || T > INT32_MAX / K)
    return lina_error(LINA_EINVAL,
                      "%s: T=%lld, K=%lld, D=%lld, N=%lld; 1 <= K <= 1024, T*K < 2^31 needed", op,
                      (long long)T, (long long)K, (long long)D, (long long)N);
  return LINA_OK;
}

extern "C" int lina_combine_fwd_cuda(const lina_combine_args *a, void *stream) {
  int rc = check("combine", a->T, a->K, a->D, a->N);
  if (rc != LINA_OK || a->T == 0 || a->D == 0) return rc;
  switch (a->dtype) {
    case LINA_F32: return forward<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return forward<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return forward<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("combine", a->dtype);
}

extern "C" int lina_combine_bwd_cuda(const lina_combine_bwd_args *a, void *stream) {
  int rc = check("combine backward", a->T, a->K, a->D, a->N);
  if (rc != LINA_OK || a->T == 0 || a->D == 0) return rc;
  switch (a->dtype) {
    case LINA_F32: return backward<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return backward<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return backward<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("combine backward", a->dtype);
}
