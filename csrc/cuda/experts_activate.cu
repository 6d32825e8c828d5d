/* experts_activate.cu - the experts' activations and their derivatives.
 * Contract: ../ops/experts.h.
 *
 * Forward: a row of threads (a power of two) to a row, each with 16 bytes of
 * the gates and of the up values. Backward: a warp to a row, since the router's
 * gradient is a sum over the row; each lane reads h and da before it writes the
 * same places, so that dh may be h and a may be da.
 * One activation is chosen for a whole vector, outside the loop over elements.
 * Rows from offset[E] on are left alone. Bound by memory: N*(U + F) elements
 * forward, N*(2U + 2F) backward; in 16 bits exp and division are the fast ones
 * (errors far below a 16-bit rounding), in float32 the accurate ones.
 */
#include "../ops/experts.h"
#include "common.cuh"

#define THREADS 256

template <bool FAST> static __device__ __forceinline__ float sigmoid(float x) {
  return FAST ? __fdividef(1.0f, 1.0f + __expf(-x)) : 1.0f / (1.0f + expf(-x));
}
/* The normal distribution function and its density; gelu(x) = x * phi(x). Not 1 + erf, which
 * cancels for negative x. FAST: with z = |x| / sqrt 2, erfc(z) exp(z^2) is a polynomial in
 * t = 1 / (1 + 0.44 z) without a constant, fitted by reweighted least squares for 0 <= z <= 12
 * (relative error 5.2e-6): one exp serves both results. */
template <bool FAST> static __device__ __forceinline__ float normal(float x, float *density) {
  if (!FAST) {
    *density = 0.39894228040143268f * expf(-0.5f * x * x);
    return normcdff(x);
  }
  const float t = __fdividef(1.0f, fmaf(0.44f * 0.70710678f, fabsf(x), 1.0f));
  const float gauss = __expf(-0.5f * x * x);
  float p = fmaf(-0.1461058f, t, 0.35065323f);
  p = fmaf(p, t, 0.040729914f);
  p = fmaf(p, t, 0.26358721f);
  p = fmaf(p, t, 0.24256926f);
  p = fmaf(p, t, 0.24856105f);
  const float tail = 0.5f * gauss * t * p;
  *density = 0.39894228f * gauss;
  return x < 0.0f ? tail : 1.0f - tail;
}
/* As torch's clamp: NaN stays NaN. */
static __device__ __forceinline__ float clamp_max(float x, float most) {
  return x > most ? most : x;
}
static __device__ __forceinline__ float clamp(float x, float limit) {
  return x < -limit ? -limit : clamp_max(x, limit);
}

/* a of one element; with BWD also dg and du of da. Plain activations have only g. */
template <int KIND, bool FAST, bool BWD>
static __device__ __forceinline__ float element(float g, float u, float da, float alpha,
                                                float limit, float *dg, float *du) {
  if (KIND == LINA_SWIGLU || KIND == LINA_SILU) {
    const float s = sigmoid<FAST>(g), silu = g * s, up = KIND == LINA_SWIGLU ? u : 1.0f;
    if (BWD) *dg = da * up * (s + silu * (1.0f - s)), *du = da * silu;
    return silu * up;
  }
  if (KIND == LINA_GEGLU || KIND == LINA_GELU) {
    float density;
    const float phi = normal<FAST>(g, &density), up = KIND == LINA_GEGLU ? u : 1.0f;
    if (BWD) *dg = da * up * fmaf(g, density, phi), *du = da * (g * phi);
    return g * phi * up;
  }
  if (KIND == LINA_SWIGLU_CLAMPED) {
    const float c = clamp_max(g, limit), up = clamp(u, limit) + 1.0f, s = sigmoid<FAST>(alpha * c);
    if (BWD) {
      *dg = g > limit ? 0.0f : da * up * (s + alpha * c * s * (1.0f - s));
      *du = u > limit || u < -limit ? 0.0f : da * c * s;
    }
    return up * c * s;
  }
  const float r = g <= 0.0f ? 0.0f : g;
  if (BWD) *dg = g <= 0.0f ? 0.0f : KIND == LINA_RELU ? da : 2.0f * r * da;
  return KIND == LINA_RELU ? r : r * r;
}

template <int KIND, bool FAST, bool BWD, int N>
static __device__ __forceinline__ void elements(float *g, float *u, const float *da, float alpha,
                                                float limit, float *a) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    float dg = 0, du = 0;
    a[i] = element<KIND, FAST, BWD>(g[i], u[i], BWD ? da[i] : 0, alpha, limit, &dg, &du);
    if (BWD) g[i] = dg, u[i] = du;
  }
}

/* a from g and u; with BWD, g and u become their gradients. */
template <bool FAST, bool BWD, int N>
static __device__ __forceinline__ void apply(int kind, float *g, float *u, const float *da,
                                             float alpha, float limit, float *a) {
  switch (kind) {
    case LINA_SWIGLU: return elements<LINA_SWIGLU, FAST, BWD, N>(g, u, da, alpha, limit, a);
    case LINA_GEGLU: return elements<LINA_GEGLU, FAST, BWD, N>(g, u, da, alpha, limit, a);
    case LINA_SWIGLU_CLAMPED:
      return elements<LINA_SWIGLU_CLAMPED, FAST, BWD, N>(g, u, da, alpha, limit, a);
    case LINA_GELU: return elements<LINA_GELU, FAST, BWD, N>(g, u, da, alpha, limit, a);
    case LINA_RELU: return elements<LINA_RELU, FAST, BWD, N>(g, u, da, alpha, limit, a);
    case LINA_RELU2: return elements<LINA_RELU2, FAST, BWD, N>(g, u, da, alpha, limit, a);
    default: return elements<LINA_SILU, FAST, BWD, N>(g, u, da, alpha, limit, a);
  }
}

/* Columns c .. c+N of one row of h, gates and up values, as they lie in memory:
 * two vectors, apart by F, or neighbours that mix both if interleaved. */
template <class T, int N> struct columns {
  lina_raw<T, N> first, second;
  static __device__ __forceinline__ int64_t at(int64_t c, bool interleaved) {
    return interleaved ? 2 * c : c;
  }
  static __device__ __forceinline__ int64_t next(int64_t c, int64_t F, bool interleaved) {
    return interleaved ? 2 * c + N : F + c;
  }
  __device__ __forceinline__ columns(const T *h, int64_t c, int64_t F, bool gated, bool interleaved)
      : first(load<T, N>(h + at(c, interleaved))),
        second(gated ? load<T, N>(h + next(c, F, interleaved)) : lina_raw<T, N>{}) {}
  __device__ __forceinline__ void widen(bool interleaved, float *g, float *u) const {
    float both[2 * N];
    lina_vector<T, N>::widen(first, both);
    lina_vector<T, N>::widen(second, both + N);
#pragma unroll
    for (int i = 0; i < N; i++) {
      g[i] = interleaved ? both[2 * i] : both[i];
      u[i] = interleaved ? both[2 * i + 1] : both[N + i];
    }
  }
  static __device__ __forceinline__ void write(T *h, int64_t c, int64_t F, bool gated,
                                               bool interleaved, const float *g, const float *u) {
    float both[2 * N];
#pragma unroll
    for (int i = 0; i < 2 * N; i++)
      both[i] = interleaved ? i % 2 ? u[i / 2] : g[i / 2] : i < N ? g[i] : u[i - N];
    store_floats<T, N>(h + at(c, interleaved), both);
    if (gated) store_floats<T, N>(h + next(c, F, interleaved), both + N);
  }
};
/* Rounds to T, so that what follows sees what was stored. */
template <class T, int N> static __device__ __forceinline__ void rounded(float *f) {
  lina_vector<T, N>::widen(lina_vector<T, N>::narrow(f), f);
}

template <class T, int N>
static __global__ void __launch_bounds__(THREADS)
    activate(const __grid_constant__ lina_activate_args a, int per_row) {
  constexpr bool FAST = sizeof(T) == 2;
  const int64_t r = (int64_t)blockIdx.x * (THREADS / per_row) + threadIdx.x / per_row, F = a.s.F;
  const bool gated = a.s.U != F, interleaved = gated && a.s.interleaved;
  if (r >= __ldg(a.offset + a.s.E)) return;
  T *h = (T *)a.h + r * a.s.U;
  const T *b = a.b_up ? (const T *)a.b_up + expert_of(a.offset, (int)a.s.E, r) * a.s.U : NULL;
  for (int64_t c = (int64_t)(threadIdx.x & (per_row - 1)) * N; c < F; c += per_row * N) {
    float g[N], u[N], out[N];
    columns<T, N>(h, c, F, gated, interleaved).widen(interleaved, g, u);
    if (b) {
      float bg[N], bu[N];
      columns<T, N>(b, c, F, gated, interleaved).widen(interleaved, bg, bu);
#pragma unroll
      for (int i = 0; i < N; i++) g[i] += bg[i], u[i] += bu[i];
      rounded<T, N>(g);
      rounded<T, N>(u);
      columns<T, N>::write(h, c, F, gated, interleaved, g, u);
    }
    apply<FAST, false, N>(a.s.activation, g, u, NULL, (float)a.s.alpha, (float)a.s.limit, out);
    store_floats<T, N>((T *)a.a + r * F + c, out);
  }
}

template <class T, int N>
static __global__ void __launch_bounds__(THREADS, 3)
    activate_bwd(const __grid_constant__ lina_activate_bwd_args a) {
  constexpr bool FAST = sizeof(T) == 2;
  const int lane = threadIdx.x % 32;
  const int64_t r = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, F = a.s.F;
  const bool gated = a.s.U != F, interleaved = gated && a.s.interleaved;
  if (r >= __ldg(a.offset + a.s.E)) return;
  const T *h = (const T *)a.h + r * a.s.U, *da = (const T *)a.da + r * F;
  const int64_t pair = a.weight || a.dweight ? __ldg(a.row_pair + r) : 0;
  const float weight = a.weight ? __ldg((const float *)a.weight + pair) : 1.0f;
  float dot = 0;
  for (int64_t c = lane * N; c < F; c += 32 * N) {
    const columns<T, N> raw(h, c, F, gated, interleaved); /* all three loads before the first use */
    const lina_raw<T, N> raw_da = load<T, N>(da + c);
    float g[N], u[N], d[N], out[N];
    raw.widen(interleaved, g, u);
    lina_vector<T, N>::widen(raw_da, d);
    apply<FAST, true, N>(a.s.activation, g, u, d, (float)a.s.alpha, (float)a.s.limit, out);
    rounded<T, N>(out); /* y was made from the rounded a */
#pragma unroll
    for (int i = 0; i < N; i++) {
      dot = fmaf(d[i], out[i], dot);
      g[i] *= weight, u[i] *= weight, out[i] *= weight;
    }
    columns<T, N>::write((T *)a.dh + r * a.s.U, c, F, gated, interleaved, g, u);
    store_floats<T, N>((T *)a.a + r * F + c, out);
  }
  if (!a.dweight) return;
  if (a.dout && a.b_down) {
    const T *dout = (const T *)a.dout + pair / a.s.K * a.s.D;
    const T *b = (const T *)a.b_down + expert_of(a.offset, (int)a.s.E, r) * a.s.D;
    for (int64_t c = lane * N; c < a.s.D; c += 32 * N) {
      float x[N], y[N];
      load_floats<T, N>(dout + c, x);
      load_floats<T, N>(b + c, y);
#pragma unroll
      for (int i = 0; i < N; i++) dot = fmaf(x[i], y[i], dot);
    }
  }
  dot = lanes_sum<32>(dot);
  if (lane == 0) ((float *)a.dweight)[pair] = dot;
}

static int check(const char *op, const lina_experts_shape *s) {
  if (s->E < 1 || s->E > 1024 || s->K < 1 || s->N < 0 || s->N > INT32_MAX)
    return lina_error(LINA_EINVAL,
                      "%s: K=%lld, E=%lld, N=%lld; 1 <= E <= 1024, 1 <= K, N < 2^31 needed", op,
                      (long long)s->K, (long long)s->E, (long long)s->N);
  if (s->activation < LINA_SWIGLU || s->activation > LINA_SILU)
    return lina_error(LINA_EINVAL, "%s: activation=%d, 0 to %d needed", op, s->activation,
                      LINA_SILU);
  if (s->U != s->F * (lina_activation_is_gated(s->activation) ? 2 : 1))
    return lina_error(LINA_EINVAL, "%s: U=%lld with F=%lld and activation=%d", op, (long long)s->U,
                      (long long)s->F, s->activation);
  return LINA_OK;
}

template <class T, int N> static int launch_fwd(const lina_activate_args *a, cudaStream_t stream) {
  const int per_row = lina_row_threads(lina_ceil_div(a->s.F, N));
  activate<T, N>
      <<<(unsigned)lina_ceil_div(a->s.N, THREADS / per_row), THREADS, 0, stream>>>(*a, per_row);
  return lina_launched("activate");
}
template <class T> static int forward(const lina_activate_args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  if (a->s.F % N == 0 && lina_aligned(a->h, 16) && lina_aligned(a->a, 16) &&
      lina_aligned(a->b_up, 16))
    return launch_fwd<T, N>(a, stream);
  return launch_fwd<T, 1>(a, stream);
}

template <class T> static int backward(const lina_activate_bwd_args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  const bool bias = a->dweight && a->dout && a->b_down;
  const unsigned blocks = (unsigned)lina_ceil_div(a->s.N, THREADS / 32);
  if (a->s.F % N == 0 && lina_aligned(a->h, 16) && lina_aligned(a->da, 16) &&
      lina_aligned(a->dh, 16) && lina_aligned(a->a, 16) &&
      (!bias || (a->s.D % N == 0 && lina_aligned(a->dout, 16) && lina_aligned(a->b_down, 16))))
    activate_bwd<T, N><<<blocks, THREADS, 0, stream>>>(*a);
  else
    activate_bwd<T, 1><<<blocks, THREADS, 0, stream>>>(*a);
  return lina_launched("activate backward");
}

extern "C" int lina_activate_cuda(const lina_activate_args *a, void *stream) {
  int rc = check("activate", &a->s);
  if (rc != LINA_OK || a->s.N == 0 || a->s.F == 0) return rc;
  switch (a->s.dtype) {
    case LINA_F32: return forward<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return forward<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return forward<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("activate", a->s.dtype);
}

/* dweight of absent pairs is the caller's to zero: they have no row here. */
extern "C" int lina_activate_bwd_cuda(const lina_activate_bwd_args *a, void *stream) {
  int rc = check("activate backward", &a->s);
  if (rc != LINA_OK || a->s.N == 0) return rc;
  switch (a->s.dtype) {
    case LINA_F32: return backward<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return backward<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return backward<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("activate backward", a->s.dtype);
}
