/* experts_grouped.cu - the general grouped products: any size, any stride, float32,
 * bf16, fp16, where torch's grouped product does not apply. Contract: ../ops/experts.h.
 *
 * Both products are tiles of C(i,j) = sum_k A(i,k) B(j,k), 64 x 64 to a block:
 *   rows   A = rows of one expert, B = its weight; C = rows of out
 *   inner  A(i,r) = u[r,i], B(j,r) = v[r,j] over one expert's rows r; C = out[e]
 * A and B are views with any strides. While a block multiplies one slice of k
 * out of shared memory it holds the next in registers, a 16-byte vector along
 * the view's unit stride where alignment allows, else single elements, zeros
 * outside the view. Two buffers, one barrier a slice.
 *   16 bits: slices of 32; 4 warps of 32 x 32; mma.sync m16n8k16 with float32
 *            sums; ldmatrix reads either orientation (.trans where k is not the
 *            unit stride); rows padded by 16 bytes, so without bank conflicts.
 *   float32: slices of 16; 256 threads of 4 x 4, fused multiply-adds in full float32.
 * Grids depend on N and E only: at most N/64 + E tiles of rows, each block finds
 * its own by a scan of the offsets. Sums run in order of k: repeatable.
 * Bound by shared memory's bandwidth, not by the tensor cores.
 */
#include "../ops/experts.h"
#include "common.cuh"
#include "mma.cuh"

#define TILE 64

template <class T> constexpr int depth = sizeof(T) == 2 ? 32 : 16;
template <class T> constexpr int threads_for = sizeof(T) == 2 ? 128 : 256;
/* Elements of one operand's buffer: either orientation with its padding. */
template <class T> constexpr int buffer_size = sizeof(T) == 2 ? TILE * (32 + 8) : 16 * (TILE + 4);

/* M(i,k) at p[i*i_stride + k*k_stride], 0 <= i < rows, 0 <= k < depth. K_UNIT:
 * vectors run along k, else along i; `vector`: they are aligned, stride 1. */
template <class T, bool K_UNIT> struct operand {
  static constexpr int N = in_16_bytes<T>, LOADS = TILE * depth<T> / N / threads_for<T>;
  const T *p;
  int64_t i_stride, k_stride;
  int rows, length;
  bool vector;
  uint4 held[LOADS];

  __device__ __forceinline__ operand(const T *p, int64_t i_stride, int64_t k_stride, int64_t rows,
                                     int64_t length, bool vector)
      : p(p),
        i_stride(i_stride),
        k_stride(k_stride),
        rows((int)min(rows, (int64_t)TILE)),
        length((int)length),
        vector(vector) {}
  static __device__ __forceinline__ void place(int q, int *i, int *k) {
    constexpr int across = (K_UNIT ? depth<T> : TILE) / N;
    *i = K_UNIT ? q / across : q % across * N;
    *k = K_UNIT ? q % across * N : q / across;
  }
  /* Slice [k0, k0 + depth) of rows from 0 on into registers. */
  __device__ __forceinline__ void fetch(int k0) {
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      int i, k;
      place(threadIdx.x + l * threads_for<T>, &i, &k);
      k += k0;
      const T *at = p + i * i_stride + k * k_stride;
      if (vector && (K_UNIT ? i < rows && k + N <= length : k < length && i + N <= rows)) {
        held[l] = __ldg(reinterpret_cast<const uint4 *>(at));
        continue;
      }
      T part[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        const bool in = K_UNIT ? i < rows && k + j < length : k < length && i + j < rows;
        part[j] = in ? at[j * (K_UNIT ? k_stride : i_stride)] : from_float<T>(0.0f);
      }
      memcpy(&held[l], part, 16);
    }
  }
  /* From registers to shared memory: 16 bits as they lie ([i][k] or [k][i]), float32 as [k][i]. */
  __device__ __forceinline__ void deposit(T *tile) const {
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      int i, k;
      place(threadIdx.x + l * threads_for<T>, &i, &k);
      if constexpr (sizeof(T) == 4 && K_UNIT) {
        const T part[4] = {__uint_as_float(held[l].x), __uint_as_float(held[l].y),
                           __uint_as_float(held[l].z), __uint_as_float(held[l].w)};
#pragma unroll
        for (int j = 0; j < 4; j++) tile[(k + j) * (TILE + 4) + i] = part[j];
      } else {
        constexpr int pitch = K_UNIT ? depth<T> + 8 : TILE + N;
        *reinterpret_cast<uint4 *>(tile + (K_UNIT ? i * pitch + k : k * pitch + i)) = held[l];
      }
    }
  }
};

/* Four 8 x 8 blocks as mma wants them: rows i0, i0+8, columns k0, k0+8. I_FIRST: in
 * the order of A (down i, then k), else of B (down k, then i). */
template <bool K_UNIT, bool I_FIRST, class T>
static __device__ __forceinline__ void load_blocks(const T *tile, int i0, int k0,
                                                   unsigned (&r)[4]) {
  const int lane = threadIdx.x % 32, within = lane % 8, low = lane / 8 % 2 * 8,
            high = lane / 16 * 8;
  const int i = i0 + (I_FIRST ? low : high), k = k0 + (I_FIRST ? high : low);
  const T *at =
      K_UNIT ? tile + (i + within) * (depth<T> + 8) + k : tile + (k + within) * (TILE + 8) + i;
  ldmatrix<!K_UNIT>(at, r);
}

/* One slice's products into the thread's sums, and where those sums belong. */
template <class T, bool A_UNIT, bool B_UNIT> struct multiplier { /* 16 bits */
  float c[2][4][4] = {};
  __device__ __forceinline__ void add(const T *a, const T *b) {
    const int warp = threadIdx.x / 32, i0 = warp / 2 * 32, j0 = warp % 2 * 32;
#pragma unroll
    for (int k = 0; k < depth<T>; k += 16) {
      unsigned fa[2][4], fb[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        load_blocks<A_UNIT, true>(a, i0 + m * 16, k, fa[m]);
        load_blocks<B_UNIT, false>(b, j0 + m * 16, k, fb[m]);
      }
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++) mma(c[m][n], fa[m], &fb[n / 2][n % 2 * 2], T());
    }
  }
  template <class Put> __device__ __forceinline__ void each(Put put) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int i0 = warp / 2 * 32 + lane / 4, j0 = warp % 2 * 32 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          put(i0 + m * 16 + half * 8, j0 + n * 8, c[m][n][half * 2], c[m][n][half * 2 + 1]);
  }
};
template <bool A_UNIT, bool B_UNIT> struct multiplier<float, A_UNIT, B_UNIT> {
  float c[4][4] = {};
  __device__ __forceinline__ void add(const float *a, const float *b) {
    const int i = threadIdx.x / 16 * 4, j = threadIdx.x % 16 * 4;
#pragma unroll
    for (int k = 0; k < depth<float>; k++) {
      float x[4], y[4];
      load_floats<float, 4>(a + k * (TILE + 4) + i, x);
      load_floats<float, 4>(b + k * (TILE + 4) + j, y);
#pragma unroll
      for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 4; n++) c[m][n] = fmaf(x[m], y[n], c[m][n]);
    }
  }
  template <class Put> __device__ __forceinline__ void each(Put put) const {
    const int i = threadIdx.x / 16 * 4, j = threadIdx.x % 16 * 4;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
      for (int n = 0; n < 4; n += 2) put(i + m, j + n, c[m][n], c[m][n + 1]);
  }
};

/* C(i,j) for the block's tile; out[i*i_stride + j*j_stride] for i < a.rows, j < b.rows. */
template <class T, bool A_UNIT, bool B_UNIT>
static __device__ __forceinline__ void product(operand<T, A_UNIT> &a, operand<T, B_UNIT> &b, T *out,
                                               int64_t i_stride, int64_t j_stride) {
  __shared__ __align__(16) T tiles[2][2][buffer_size<T>];
  multiplier<T, A_UNIT, B_UNIT> sums;
  a.fetch(0), b.fetch(0);
  int buffer = 0;
  for (int k = 0; k < a.length; k += depth<T>) {
    a.deposit(tiles[buffer][0]), b.deposit(tiles[buffer][1]);
    __syncthreads(); /* also: all have left the buffer that the next turn overwrites */
    if (k + depth<T> < a.length) a.fetch(k + depth<T>), b.fetch(k + depth<T>);
    sums.add(tiles[buffer][0], tiles[buffer][1]);
    buffer ^= 1;
  }
  sums.each([&](int i, int j, float x, float y) {
    if (i >= a.rows || j >= b.rows) return;
    T *at = out + i * i_stride + j * j_stride;
    at[0] = from_float<T>(x);
    if (j + 1 < b.rows) at[j_stride] = from_float<T>(y);
  });
}

/* The expert of row tile `tile` and its first row and end; false past the last tile. */
static __device__ __forceinline__ bool find_tile(const int32_t *offset, int E, int tile,
                                                 int *expert, int *first, int *end) {
  __shared__ int found[3];
  const int lane = threadIdx.x;
  if (lane < 32) {
    if (lane == 0) found[0] = -1;
    __syncwarp();
    int before = 0;
    for (int base = 0; base < E && before <= tile; base += 32) {
      const int e = base + lane, begin = e < E ? __ldg(offset + e) : 0,
                stop = e < E ? __ldg(offset + e + 1) : 0;
      const int count = (stop - begin + TILE - 1) / TILE, up_to = warp_prefix(count, lane);
      const int index = tile - before - (up_to - count);
      if (index >= 0 && index < count)
        found[0] = e, found[1] = begin + index * TILE, found[2] = stop;
      before += __shfl_sync(LINA_FULL, up_to, 31);
    }
  }
  __syncthreads();
  *expert = found[0], *first = found[1], *end = found[2];
  return *expert >= 0;
}

template <class T, bool W_UNIT>
static __global__ void __launch_bounds__(threads_for<T>)
    grouped_rows(const __grid_constant__ lina_grouped_rows_args a, bool in_vector, bool w_vector) {
  int e, first, end;
  if (!find_tile(a.offset, (int)a.E, blockIdx.x, &e, &first, &end)) return;
  const int64_t column = (int64_t)blockIdx.y * TILE;
  operand<T, true> rows((const T *)a.in + first * a.in_width, a.in_width, 1, end - first,
                        a.in_width, in_vector);
  operand<T, W_UNIT> weight((const T *)a.w + e * a.w_stride[0] + column * a.w_stride[1],
                            a.w_stride[1], a.w_stride[2], a.out_width - column, a.in_width,
                            w_vector);
  product(rows, weight, (T *)a.out + first * a.out_width + column, a.out_width, 1);
}

template <class T>
static __global__ void __launch_bounds__(threads_for<T>)
    grouped_inner(const __grid_constant__ lina_grouped_inner_args a, bool u_vector, bool v_vector) {
  const int e = blockIdx.z, begin = __ldg(a.offset + e), count = __ldg(a.offset + e + 1) - begin;
  const int64_t i = (int64_t)blockIdx.x * TILE, j = (int64_t)blockIdx.y * TILE;
  operand<T, false> u((const T *)a.u + begin * a.u_width + i, 1, a.u_width, a.u_width - i, count,
                      u_vector);
  operand<T, false> v((const T *)a.v + begin * a.v_width + j, 1, a.v_width, a.v_width - j, count,
                      v_vector);
  product(u, v, (T *)a.out + e * a.out_stride[0] + i * a.out_stride[1] + j * a.out_stride[2],
          a.out_stride[1], a.out_stride[2]);
}

static int check(const char *op, int64_t N, int64_t E, int64_t width, int64_t other) {
  const int64_t most = 65535 * TILE; /* a grid's second dimension */
  if (N < 0 || N > INT32_MAX || E < 1 || E > 1024 || width < 0 || width > INT32_MAX - TILE ||
      other < 0 || other > most)
    return lina_error(
        LINA_EINVAL,
        "%s: N=%lld, E=%lld, widths %lld and %lld; N < 2^31, 1 <= E <= 1024, widths to %lld needed",
        op, (long long)N, (long long)E, (long long)width, (long long)other, (long long)most);
  return LINA_OK;
}

template <class T> static int rows(const lina_grouped_rows_args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  const dim3 grid((unsigned)(a->N / TILE + a->E), (unsigned)lina_ceil_div(a->out_width, TILE));
  const int64_t *s = a->w_stride;
  const bool w_unit = s[2] == 1 || s[1] != 1; /* of two unit strides the inner one; of none, any */
  const bool in_vector = a->in_width % N == 0 && lina_aligned(a->in, 16);
  const bool w_vector = (s[2] == 1 || s[1] == 1) && s[0] % N == 0 && s[w_unit ? 1 : 2] % N == 0 &&
                        lina_aligned(a->w, 16);
  if (w_unit)
    grouped_rows<T, true><<<grid, threads_for<T>, 0, stream>>>(*a, in_vector, w_vector);
  else
    grouped_rows<T, false><<<grid, threads_for<T>, 0, stream>>>(*a, in_vector, w_vector);
  return lina_launched("grouped rows");
}

template <class T> static int inner(const lina_grouped_inner_args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  const dim3 grid((unsigned)lina_ceil_div(a->u_width, TILE),
                  (unsigned)lina_ceil_div(a->v_width, TILE), (unsigned)a->E);
  grouped_inner<T>
      <<<grid, threads_for<T>, 0, stream>>>(*a, a->u_width % N == 0 && lina_aligned(a->u, 16),
                                            a->v_width % N == 0 && lina_aligned(a->v, 16));
  return lina_launched("grouped inner");
}

extern "C" int lina_grouped_rows_cuda(const lina_grouped_rows_args *a, void *stream) {
  int rc = check("grouped rows", a->N, a->E, a->in_width, a->out_width);
  if (rc != LINA_OK || a->N == 0 || a->out_width == 0) return rc;
  switch (a->dtype) {
    case LINA_F32: return rows<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return rows<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return rows<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("grouped rows", a->dtype);
}

/* Without rows the products are zero: only the offsets are then read. */
extern "C" int lina_grouped_inner_cuda(const lina_grouped_inner_args *a, void *stream) {
  int rc = check("grouped inner", a->N, a->E, a->u_width, a->v_width);
  if (rc != LINA_OK || a->u_width == 0 || a->v_width == 0) return rc;
  switch (a->dtype) {
    case LINA_F32: return inner<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return inner<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return inner<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("grouped inner", a->dtype);
}
