/* vector.h - what the CPU kernels' loops share: clones for wider vectors, rows
 * of any float dtype as float32, and a branch-free exp and normal distribution.
 *
 * Everything here is plain C that the compiler vectorises. A function marked
 * LINA_CLONES is built for plain x86-64, AVX2 and AVX-512; the loader takes the
 * widest that the machine has. What it calls from here is inlined, so that it
 * is built for the same vectors. Only float32 is computed here: float64 uses
 * the C library's functions, since it exists for checking gradients.
 */
#ifndef LINA_VECTOR_H
#define LINA_VECTOR_H

#include <stdint.h>
#include <string.h>

#include "tensor.h"

/* The resolver of a clone runs before a sanitizer is ready for it. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(LINA_NO_CLONES)
#define LINA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define LINA_CLONES
#endif
#define LINA_INLINE static inline __attribute__((always_inline))

/* Values that a kernel converts at a time: fits the first-level cache. */
#define LINA_CHUNK 256

static inline int64_t lina_dtype_bytes(int dtype) {
  return dtype == LINA_F32 || dtype == LINA_I32  ? 4
       : dtype == LINA_BF16 || dtype == LINA_F16 ? 2
                                                 : 8;
}
/* Address of element i. */
static inline const void *lina_at(const void *data, int dtype, int64_t i) {
  return (const char *)data + i * lina_dtype_bytes(dtype);
}
static inline void *lina_at_mutable(void *data, int dtype, int64_t i) {
  return (char *)data + i * lina_dtype_bytes(dtype);
}

/* ---- conversions, one value; round to nearest even ---- */

LINA_INLINE float lina_float_of_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
LINA_INLINE uint32_t lina_bits_of_float(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}
LINA_INLINE float lina_from_bf16(uint16_t v) { return lina_float_of_bits((uint32_t)v << 16); }
LINA_INLINE uint16_t lina_to_bf16(float f) {
  uint32_t u = lina_bits_of_float(f);
  uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
  uint32_t nan = u >> 16 | 0x40;         /* rounding could carry a NaN to infinity */
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}
LINA_INLINE float lina_from_f16(uint16_t v) {
  /* Exponent and mantissa in place, then a product moves the bias: exact, and
   * right for subnormal numbers too. */
  uint32_t magnitude = (uint32_t)(v & 0x7fff) << 13;
  uint32_t scaled = lina_bits_of_float(lina_float_of_bits(magnitude) * 0x1p112f);
  uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;
  return lina_float_of_bits(bits | (uint32_t)(v & 0x8000) << 16);
}
LINA_INLINE uint16_t lina_to_f16(float f) {
  uint32_t u = lina_bits_of_float(f), sign = u >> 16 & 0x8000;
  u &= 0x7fffffffu;
  uint32_t normal = (u - 0x38000000u + 0xfffu + (u >> 13 & 1)) >> 13;
  /* Adding 1/2 lets the adder round a subnormal result at its last bit. */
  uint32_t tiny = lina_bits_of_float(lina_float_of_bits(u) + 0.5f) - 0x3f000000u;
  uint32_t finite = u < 0x38800000u ? tiny : normal;
  uint32_t large = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (uint16_t)(sign | (u >= 0x477ff000u ? large : finite));
}

/* ---- rows ---- */

/* `n` values as float32: `from` itself where it is float32, else `buffer`. */
LINA_INLINE const float *lina_load(int dtype, const void *from, int64_t n, float *buffer) {
  const uint16_t *half = from;
  if (dtype == LINA_F32) return from;
  if (dtype == LINA_BF16)
    for (int64_t i = 0; i < n; i++) buffer[i] = lina_from_bf16(half[i]);
  else
    for (int64_t i = 0; i < n; i++) buffer[i] = lina_from_f16(half[i]);
  return buffer;
}
LINA_INLINE void lina_store(int dtype, void *to, int64_t n, const float *from) {
  uint16_t *half = to;
  if (dtype == LINA_F32)
    memcpy(to, from, (size_t)n * sizeof *from);
  else if (dtype == LINA_BF16)
    for (int64_t i = 0; i < n; i++) half[i] = lina_to_bf16(from[i]);
  else
    for (int64_t i = 0; i < n; i++) half[i] = lina_to_f16(from[i]);
}
LINA_INLINE const double *lina_load_double(int dtype, const void *from, int64_t n, double *buffer) {
  (void)dtype, (void)n, (void)buffer;
  return from;
}
LINA_INLINE void lina_store_double(int dtype, void *to, int64_t n, const double *from) {
  (void)dtype;
  memcpy(to, from, (size_t)n * sizeof *from);
}

/* ---- functions ---- */

/* exp to 2 units in the last place; 0 below -87.7, where it is no normal number, and
 * infinity above 88.37. NaN gives NaN. */
LINA_INLINE float lina_expf(float x) {
  x = x < -88.0f ? -88.0f : x;                       /* its power of 2 below is 0, */
  x = x > 89.0f ? 89.0f : x;                         /* and here infinity */
  float shifted = x * 1.44269504f + 12582912.0f;     /* 1.5 * 2^23: rounds to an integer */
  float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  uint32_t power = (lina_bits_of_float(shifted) + 127u) << 23;
  return p * lina_float_of_bits(power);
}

/* The standard normal distribution and its density:
 *   *cdf = (1 + erf(x / sqrt 2)) / 2,  *pdf = exp(-x^2 / 2) / sqrt(2 pi)
 * With z = |x| / sqrt 2, erfc(z) exp(z^2) is a polynomial of degree 10 in
 * (z - 3) / (z + 3), fitted by reweighted least squares at 200 Chebyshev nodes
 * of 0 <= z <= 10.2 (relative error 1.4e-9): one exp serves both results. */
LINA_INLINE void lina_normalf(float x, float *cdf, float *pdf) {
  static const float c[] = {0.17900115f,    -0.32623357f,  0.24560380f,   -0.15011579f,
                            0.071665861f,   -0.024394231f, 0.0042688759f, 7.1573077e-4f,
                            -5.9456949e-4f, 2.8880797e-5f, 5.5916171e-5f};
  float z = (x < 0 ? -x : x) * 0.70710678f;
  z = z > 10.2f ? 10.2f : z;
  float t = (z - 3.0f) / (z + 3.0f), gauss = lina_expf(-z * z), p = c[10];
  for (int i = 9; i >= 0; i--) p = p * t + c[i];
  float tail = 0.5f * gauss * p;
  *cdf = x < 0 ? tail : 1.0f - tail;
  *pdf = 0.39894228f * gauss;
}

#endif
