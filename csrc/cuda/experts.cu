/* experts.cu - what surrounds the experts' products: gathering rows, adding
 * biases and summing their gradients. Contract: ../ops/experts.h.
 *
 * gather, bias: a row of threads (a power of two, chosen so that few idle) to a
 * row, 16 bytes to a thread where width and addresses allow, else one element;
 * gather starts four rows' loads before it stores the first and leaves rows without
 * a pair alone: nothing reads them, and over peers' memory they can be most.
 * bias_bwd: a block to 32 vectors of columns of one expert; its warps stride
 * over the expert's rows, four loads in flight, then add up in order.
 * All bound by memory; bias_bwd by latency where one expert has most rows.
 */
#include "../ops/experts.h"
#include "common.cuh"

#define THREADS   256
#define ROWS      4
#define SUM_WARPS 16

/* Moves bytes only, in units of R: width units to a row. */
template <class R>
static __global__ void __launch_bounds__(THREADS)
    gather(const R *x, const int32_t *row_pair, R *out, int64_t N, int K, int64_t width,
           int per_row) {
  const int rows = THREADS / per_row;
  const int64_t first = (int64_t)blockIdx.x * rows * ROWS + threadIdx.x / per_row;
  const R *from[ROWS];
#pragma unroll
  for (int j = 0; j < ROWS; j++) {
    const int64_t r = first + j * rows;
    const int pair = r < N ? __ldg(row_pair + r) : -1;
    from[j] = pair < 0 ? NULL : x + pair / K * width;
  }
  if (!from[0]) return; /* present rows come first, so no later row is one */
  for (int64_t c = threadIdx.x & (per_row - 1); c < width; c += per_row) {
    R v[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++) v[j] = from[j] ? __ldg(from[j] + c) : R{};
#pragma unroll
    for (int j = 0; j < ROWS; j++)
      if (from[j]) out[(first + j * rows) * width + c] = v[j];
  }
}

template <class T, int N>
static __global__ void __launch_bounds__(THREADS)
    add_bias(const __grid_constant__ lina_bias_args a, int per_row) {
  const int64_t r = (int64_t)blockIdx.x * (THREADS / per_row) + threadIdx.x / per_row;
  if (r >= __ldg(a.offset + a.s.E)) return;
  const T *b = (const T *)a.b + expert_of(a.offset, (int)a.s.E, r) * a.width;
  T *y = (T *)a.y + r * a.width;
  for (int64_t c = (int64_t)(threadIdx.x & (per_row - 1)) * N; c < a.width; c += per_row * N) {
    float f[N], g[N];
    load_floats<T, N>(y + c, f);
    lina_vector<T, N>::widen(load_const<T, N>(b + c), g);
#pragma unroll
    for (int i = 0; i < N; i++) f[i] += g[i];
    store_floats<T, N>(y + c, f);
  }
}

template <class T, int N>
static __global__ void __launch_bounds__(SUM_WARPS * 32, 2)
    sum_rows(const __grid_constant__ lina_bias_bwd_args a) {
  __shared__ float part[SUM_WARPS][32 * N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, e = blockIdx.y;
  const int64_t c = ((int64_t)blockIdx.x * 32 + lane) * N;
  const int64_t begin = __ldg(a.offset + e), end = __ldg(a.offset + e + 1);
  const T *v = (const T *)a.v;
  const float *weight = (const float *)a.weight;
  float sum[N] = {};
  for (int64_t r = begin + warp; r < end; r += SUM_WARPS * ROWS) {
    float w[ROWS];
    lina_raw<T, N> x[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
      const int64_t at = r + j * SUM_WARPS;
      const bool in = at < end;
      const int64_t pair = in && (a.by_token || weight) ? __ldg(a.row_pair + at) : 0;
      w[j] = !in ? 0 : weight ? __ldg(weight + pair) : 1;
      x[j] = load_once<T, N>(in && c < a.width, v + (a.by_token ? pair / a.s.K : at) * a.width + c);
    }
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
      float f[N];
      lina_vector<T, N>::widen(x[j], f);
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] = fmaf(w[j], f[i], sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) part[warp][i * 32 + lane] = sum[i];
  __syncthreads();
  for (int at = threadIdx.x; at < 32 * N; at += SUM_WARPS * 32) {
    const int64_t column = ((int64_t)blockIdx.x * 32 + at % 32) * N + at / 32;
    float total = 0;
#pragma unroll
    for (int w = 0; w < SUM_WARPS; w++) total += part[w][at];
    if (column < a.width) ((T *)a.db)[e * a.width + column] = from_float<T>(total);
  }
}

static int check(const char *op, const lina_experts_shape *s) {
  if (s->E < 1 || s->E > 1024 || s->K < 1 || s->T < 0 || s->N < 0 || s->N > INT32_MAX ||
      s->T > INT32_MAX / s->K)
    return lina_error(
        LINA_EINVAL,
        "%s: T=%lld, K=%lld, E=%lld, N=%lld; 1 <= E <= 1024, 1 <= K, T*K < 2^31 needed", op,
        (long long)s->T, (long long)s->K, (long long)s->E, (long long)s->N);
  return LINA_OK;
}

template <class R> static int launch_gather(const lina_gather_args *a, int64_t bytes,
                                            cudaStream_t stream) {
  const int64_t width = bytes / (int64_t)sizeof(R);
  const int per_row = lina_row_threads(width);
  const unsigned blocks = (unsigned)lina_ceil_div(a->s.N, THREADS / per_row * ROWS);
  gather<R><<<blocks, THREADS, 0, stream>>>((const R *)a->x, a->row_pair, (R *)a->out, a->s.N,
                                            (int)a->s.K, width, per_row);
  return lina_launched("gather");
}

extern "C" int lina_gather_cuda(const lina_gather_args *a, void *stream) {
  int rc = check("gather", &a->s);
  if (rc != LINA_OK || a->s.N == 0 || a->s.D == 0) return rc;
  const int size = a->s.dtype == LINA_F32                            ? 4
                 : a->s.dtype == LINA_BF16 || a->s.dtype == LINA_F16 ? 2
                                                                     : 0;
  if (size == 0) return lina_unsupported("gather", a->s.dtype);
  const int64_t bytes = a->s.D * size;
  if (bytes % 16 == 0 && lina_aligned(a->x, 16) && lina_aligned(a->out, 16))
    return launch_gather<uint4>(a, bytes, (cudaStream_t)stream);
  if (size == 4) return launch_gather<unsigned>(a, bytes, (cudaStream_t)stream);
  return launch_gather<unsigned short>(a, bytes, (cudaStream_t)stream);
}

template <class T, int N> static int launch_bias(const lina_bias_args *a, cudaStream_t stream) {
  const int per_row = lina_row_threads(lina_ceil_div(a->width, N));
  add_bias<T, N>
      <<<(unsigned)lina_ceil_div(a->s.N, THREADS / per_row), THREADS, 0, stream>>>(*a, per_row);
  return lina_launched("bias");
}
template <class T> static int bias(const lina_bias_args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  if (a->width % N == 0 && lina_aligned(a->y, 16) && lina_aligned(a->b, 16))
    return launch_bias<T, N>(a, stream);
  return launch_bias<T, 1>(a, stream);
}

extern "C" int lina_bias_cuda(const lina_bias_args *a, void *stream) {
  int rc = check("bias", &a->s);
  if (rc != LINA_OK || a->s.N == 0 || a->width == 0) return rc;
  switch (a->s.dtype) {
    case LINA_F32: return bias<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return bias<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return bias<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("bias", a->s.dtype);
}

template <class T, int N> static int launch_bias_bwd(const lina_bias_bwd_args *a,
                                                     cudaStream_t stream) {
  const dim3 grid((unsigned)lina_ceil_div(a->width, 32 * N), (unsigned)a->s.E);
  sum_rows<T, N><<<grid, SUM_WARPS * 32, 0, stream>>>(*a);
  return lina_launched("bias backward");
}
template <class T> static int bias_bwd(const lina_bias_bwd_args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  if (a->width % N == 0 && lina_aligned(a->v, 16)) return launch_bias_bwd<T, N>(a, stream);
  return launch_bias_bwd<T, 1>(a, stream);
}

/* Without rows the gradients are zero: nothing but the offsets is then read. */
extern "C" int lina_bias_bwd_cuda(const lina_bias_bwd_args *a, void *stream) {
  int rc = check("bias backward", &a->s);
  if (rc != LINA_OK || a->width == 0) return rc;
  switch (a->s.dtype) {
    case LINA_F32: return bias_bwd<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return bias_bwd<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return bias_bwd<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("bias backward", a->s.dtype);
}
