/* common.cuh - what lina's kernels share: vectors of elements, reductions
 * inside a warp, slots of a row held by its lanes, and the host's launch checks.
 *
 * A "vector" is N neighbouring elements moved by one load or store (16 bytes
 * where the caller found the addresses aligned) and computed on as float.
 */
#ifndef LINA_CUDA_COMMON_CUH
#define LINA_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "../dtype.h"
#include "../error.h"

#define LINA_FULL 0xffffffffu

typedef __nv_bfloat16 lina_bf16;
typedef __half lina_f16;

/* ---- vectors ---- */

template <int BYTES> struct lina_raw_of;
template <> struct lina_raw_of<2> { typedef unsigned short type; };
template <> struct lina_raw_of<4> { typedef unsigned type; };
template <> struct lina_raw_of<8> { typedef uint2 type; };
template <> struct lina_raw_of<16> { typedef uint4 type; };
template <class T, int N> using lina_raw = typename lina_raw_of<(int)sizeof(T) * N>::type;

template <class T> constexpr int in_16_bytes = 16 / (int)sizeof(T);

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(lina_bf16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ float to_float(lina_f16 x) { return __half2float(x); }
template <class T> static __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ lina_bf16 from_float<lina_bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ lina_f16 from_float<lina_f16>(float x) {
  return __float2half_rn(x);
}

template <class T> struct lina_pair;
template <> struct lina_pair<lina_bf16> {
  static __device__ __forceinline__ float2 widen(unsigned w) {
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
  }
  static __device__ __forceinline__ unsigned narrow(float a, float b) {
    __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<unsigned *>(&h);
  }
};
template <> struct lina_pair<lina_f16> {
  static __device__ __forceinline__ float2 widen(unsigned w) {
    return __half22float2(*reinterpret_cast<__half2 *>(&w));
  }
  static __device__ __forceinline__ unsigned narrow(float a, float b) {
    __half2 h = __floats2half2_rn(a, b);
    return *reinterpret_cast<unsigned *>(&h);
  }
};

/* N elements of T, in registers, as floats and back. */
template <class T, int N> struct lina_vector {
  static __device__ __forceinline__ void widen(lina_raw<T, N> r, float *f) {
    const unsigned *w = reinterpret_cast<const unsigned *>(&r);
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      float2 p = lina_pair<T>::widen(w[i]);
      f[2 * i] = p.x, f[2 * i + 1] = p.y;
    }
  }
  static __device__ __forceinline__ lina_raw<T, N> narrow(const float *f) {
    lina_raw<T, N> r;
    unsigned *w = reinterpret_cast<unsigned *>(&r);
#pragma unroll
    for (int i = 0; i < N / 2; i++) w[i] = lina_pair<T>::narrow(f[2 * i], f[2 * i + 1]);
    return r;
  }
};
template <class T> struct lina_vector<T, 1> {
  static __device__ __forceinline__ void widen(lina_raw<T, 1> r, float *f) {
    f[0] = to_float(*reinterpret_cast<T *>(&r));
  }
  static __device__ __forceinline__ lina_raw<T, 1> narrow(const float *f) {
    T t = from_float<T>(f[0]);
    return *reinterpret_cast<lina_raw<T, 1> *>(&t);
  }
};
template <int N> struct lina_vector_f32 {
  static __device__ __forceinline__ void widen(lina_raw<float, N> r, float *f) {
    const float *w = reinterpret_cast<const float *>(&r);
#pragma unroll
    for (int i = 0; i < N; i++) f[i] = w[i];
  }
  static __device__ __forceinline__ lina_raw<float, N> narrow(const float *f) {
    lina_raw<float, N> r;
    float *w = reinterpret_cast<float *>(&r);
#pragma unroll
    for (int i = 0; i < N; i++) w[i] = f[i];
    return r;
  }
};
template <> struct lina_vector<float, 2> : lina_vector_f32<2> {};
template <> struct lina_vector<float, 4> : lina_vector_f32<4> {};

/* Plain and read-only (the kernel writes nowhere near it) loads. */
template <class T, int N> static __device__ __forceinline__ lina_raw<T, N> load(const T *p) {
  return *reinterpret_cast<const lina_raw<T, N> *>(p);
}
template <class T, int N> static __device__ __forceinline__ lina_raw<T, N> load_const(const T *p) {
  return __ldg(reinterpret_cast<const lina_raw<T, N> *>(p));
}
/* Read once, zeros unless `wanted`: a predicate instead of a branch, and volatile,
 * so that a run of these stays a run of loads in flight before the first use. */
static __device__ __forceinline__ uint4 load_once_if(bool wanted, const uint4 *p) {
  uint4 r;
  asm volatile(
      "{.reg .pred q; setp.ne.s32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 "
      "%3, 0;"
      " @q ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(r.x), "=&r"(r.y), "=&r"(r.z), "=&r"(r.w)
      : "l"(p), "r"((int)wanted));
  return r;
}
template <class R> static __device__ __forceinline__ R load_once_if(bool wanted, const R *p) {
  return wanted ? __ldg(p) : R{};
}
template <class T, int N> static __device__ __forceinline__ lina_raw<T, N> load_once(bool wanted,
                                                                                     const T *p) {
  return load_once_if(wanted, reinterpret_cast<const lina_raw<T, N> *>(p));
}
template <class T, int N> static __device__ __forceinline__ void store(T *p, lina_raw<T, N> r) {
  *reinterpret_cast<lina_raw<T, N> *>(p) = r;
}
template <class T, int N> static __device__ __forceinline__ void load_floats(const T *p, float *f) {
  lina_vector<T, N>::widen(load<T, N>(p), f);
}
template <class T, int N> static __device__ __forceinline__ void store_floats(T *p,
                                                                              const float *f) {
  store<T, N>(p, lina_vector<T, N>::narrow(f));
}

/* ---- reductions over the LANES (8, 16 or 32) lanes that share a row ---- */

template <int LANES> static __device__ __forceinline__ unsigned lanes_max(unsigned v) {
  if constexpr (LANES == 32) {
    return __reduce_max_sync(LINA_FULL, v);
  } else {
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) v = max(v, __shfl_xor_sync(LINA_FULL, v, o));
    return v;
  }
}
/* Same bits on every lane: each step adds the same two numbers on both sides. */
template <int LANES> static __device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
  for (int o = LANES / 2; o > 0; o /= 2) v += __shfl_xor_sync(LINA_FULL, v, o);
  return v;
}

/* Sum of v over the warp's lanes up to and with this one. */
static __device__ __forceinline__ int warp_prefix(int v, int lane) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    int below = __shfl_up_sync(LINA_FULL, v, o);
    if (lane >= o) v += below;
  }
  return v;
}

/* ---- a row of E values, V to a lane ----
 * Slots come in runs of `run` neighbours so that a lane loads vectors; slot i
 * of lane l is element (i / run) * LANES * run + l * run + i % run. */

template <class T, int V> constexpr int slot_run = V < in_16_bytes<T> ? V : in_16_bytes<T>;
template <class T, int LANES, int V> static __device__ __forceinline__ int slot_id(int lane,
                                                                                   int i) {
  constexpr int run = slot_run<T, V>;
  return (i / run) * LANES * run + lane * run + i % run;
}
/* `aligned`: E is a multiple of the run and `row` is aligned to it. Slots past
 * E become `pad`. */
template <class T, int LANES, int V>
static __device__ __forceinline__ void load_slots(const T *row, int E, int lane, bool aligned,
                                                  float pad, float (&f)[V]) {
  constexpr int run = slot_run<T, V>;
#pragma unroll
  for (int c = 0; c < V; c += run) {
    int id = slot_id<T, LANES, V>(lane, c);
    if (aligned && id < E) {
      lina_vector<T, run>::widen(load_const<T, run>(row + id), f + c);
    } else {
#pragma unroll
      for (int i = 0; i < run; i++) f[c + i] = id + i < E ? to_float(row[id + i]) : pad;
    }
  }
}
template <class T, int LANES, int V>
static __device__ __forceinline__ void store_slots(T *row, int E, int lane, bool aligned,
                                                   const float (&f)[V]) {
  constexpr int run = slot_run<T, V>;
#pragma unroll
  for (int c = 0; c < V; c += run) {
    int id = slot_id<T, LANES, V>(lane, c);
    if (aligned && id < E) {
      store_floats<T, run>(row + id, f + c);
    } else {
#pragma unroll
      for (int i = 0; i < run; i++)
        if (id + i < E) row[id + i] = from_float<T>(f[c + i]);
    }
  }
}

/* Unsigned integers in the order of the floats: NaN as -inf, -0 as +0. Every
 * key is above 0, which stands for "no value". */
static __device__ __forceinline__ unsigned rank_key(float x) {
  unsigned b = __float_as_uint(fmaxf(x, -INFINITY) + 0.0f);
  return b ^ ((unsigned)((int)b >> 31) | 0x80000000u);
}
static __device__ __forceinline__ float key_value(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

/* First expert whose rows end behind `row`: its own, experts without rows passed over. */
static __device__ __forceinline__ int expert_of(const int32_t *offset, int E, int64_t row) {
  int low = 0, high = E;
  while (low < high) {
    int middle = (low + high) / 2;
    if (__ldg(offset + middle + 1) <= row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/* ---- host ---- */

static inline int lina_launched(const char *op) {
  cudaError_t rc = cudaGetLastError();
  if (rc == cudaSuccess) return LINA_OK;
  return lina_error(LINA_ECUDA, "%s: CUDA: %s", op, cudaGetErrorString(rc));
}
static inline int lina_unsupported(const char *op, int dtype) {
  if (dtype == LINA_F64)
    return lina_error(LINA_ENOTSUP, "%s: float64 is supported on the CPU only", op);
  return lina_error(LINA_ENOTSUP, "%s: dtype code %d; float32, bfloat16 or float16 needed", op,
                    dtype);
}
static inline bool lina_aligned(const void *p, size_t bytes) {
  return ((uintptr_t)p & (bytes - 1)) == 0;
}
static inline int64_t lina_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Threads (a power of two, 1 to 256) that share a row of `vectors` vectors so
 * that fewest idle; of equals the most threads, for the most loads in flight. */
static inline int lina_row_threads(int64_t vectors) {
  int best = 32;
  int64_t least = INT64_MAX;
  for (int n = 256; n >= 32; n /= 2) {
    int64_t used = lina_ceil_div(vectors, n) * n;
    if (used < least) least = used, best = n;
  }
  while (best > 1 && best / 2 >= vectors) best /= 2;
  return best;
}

#endif
