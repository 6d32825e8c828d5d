/* experts_row.h - the loops of experts_kernels.c, for one real type.
 *
 * Included there once for float and once for double, with REAL, NAME(x),
 * EXP(x), NORMAL(x, &cdf, &pdf), LOAD, STORE and CLONES defined. A row is
 * worked on in pieces of at most LINA_CHUNK values, converted to REAL, by plain
 * loops which the compiler vectorises. Formulas: experts.h.
 */

/* value[i] = s(g[i]) and, unless NULL, slope[i] = s'(g[i]), where s is the
 * function of the gate values (of the only values, if not gated). */
LINA_INLINE void NAME(nonlinear)(int activation, int64_t n, const REAL *g, REAL alpha, REAL limit,
                                 REAL *restrict value, REAL *restrict slope) {
  REAL none[LINA_CHUNK];
  if (!slope) slope = none;
  switch (activation) {
    case LINA_SWIGLU:
    case LINA_SILU:
      for (int64_t i = 0; i < n; i++) {
        REAL s = 1 / (1 + EXP(-g[i]));
        value[i] = g[i] * s;
        slope[i] = s * (1 + g[i] * (1 - s));
      }
      break;
    case LINA_GEGLU:
    case LINA_GELU:
      for (int64_t i = 0; i < n; i++) {
        REAL cdf, pdf;
        NORMAL(g[i], &cdf, &pdf);
        value[i] = g[i] * cdf;
        slope[i] = cdf + g[i] * pdf;
      }
      break;
    case LINA_RELU:
      for (int64_t i = 0; i < n; i++) {
        value[i] = g[i] < 0 ? 0 : g[i];
        slope[i] = g[i] > 0 ? 1 : 0;
      }
      break;
    case LINA_RELU2:
      for (int64_t i = 0; i < n; i++) {
        REAL r = g[i] < 0 ? 0 : g[i];
        value[i] = r * r;
        slope[i] = 2 * r;
      }
      break;
    default: /* LINA_SWIGLU_CLAMPED */
      for (int64_t i = 0; i < n; i++) {
        REAL c = g[i] > limit ? limit : g[i];
        REAL s = 1 / (1 + EXP(-alpha * c));
        REAL d = s * (1 + alpha * c * (1 - s));
        value[i] = c * s;
        slope[i] = g[i] > limit ? 0 : d;
      }
  }
}

/* a[i] = activation(g[i], u[i]). */
LINA_INLINE void NAME(forward)(const lina_experts_shape *s, int64_t n, const REAL *g, const REAL *u,
                               REAL *restrict a) {
  REAL limit = (REAL)s->limit;
  NAME(nonlinear)(s->activation, n, g, (REAL)s->alpha, limit, a, NULL);
  if (s->activation == LINA_SWIGLU_CLAMPED)
    for (int64_t i = 0; i < n; i++) {
      REAL c = u[i] > limit ? limit : u[i];
      a[i] *= (c < -limit ? -limit : c) + 1;
    }
  else if (lina_activation_is_gated(s->activation))
    for (int64_t i = 0; i < n; i++) a[i] *= u[i];
}

/* From da: dg, du (gated only) and a; returns <da, a>. */
LINA_INLINE REAL NAME(backward)(const lina_experts_shape *s, int64_t n, const REAL *g,
                                const REAL *u, const REAL *da, REAL w, REAL *restrict dg,
                                REAL *restrict du, REAL *restrict a) {
  REAL limit = (REAL)s->limit, value[LINA_CHUNK], slope[LINA_CHUNK], part[16] = {0}, dot = 0;
  NAME(nonlinear)(s->activation, n, g, (REAL)s->alpha, limit, value, slope);
  if (s->activation == LINA_SWIGLU_CLAMPED)
    for (int64_t i = 0; i < n; i++) {
      REAL c = u[i] > limit ? limit : u[i];
      REAL up = (c < -limit ? -limit : c) + 1;
      REAL inside = u[i] > limit || u[i] < -limit ? 0 : value[i];
      a[i] = value[i] * up;
      dg[i] = slope[i] * up * da[i] * w;
      du[i] = inside * da[i] * w;
    }
  else if (lina_activation_is_gated(s->activation))
    for (int64_t i = 0; i < n; i++) {
      a[i] = value[i] * u[i];
      dg[i] = slope[i] * u[i] * da[i] * w;
      du[i] = value[i] * da[i] * w;
    }
  else
    for (int64_t i = 0; i < n; i++) {
      a[i] = value[i];
      dg[i] = slope[i] * da[i] * w;
    }
  /* Sixteen sums side by side: one would forbid vectors. */
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) part[j] += da[i + j] * a[i + j];
  for (; i < n; i++) part[i & 15] += da[i] * a[i];
  for (int j = 0; j < 16; j++) dot += part[j];
  for (i = 0; i < n; i++) a[i] *= w;
  return dot;
}

/* The gate values i .. i+n of a row of h, and its up values if it has any. */
typedef struct { REAL both[2 * LINA_CHUNK], g[LINA_CHUNK], u[LINA_CHUNK]; } NAME(piece);

LINA_INLINE void NAME(read)(const lina_experts_shape *s, const void *h, int64_t i, int64_t n,
                            NAME(piece) * b, const REAL **g, const REAL **u) {
  int dtype = s->dtype;
  if (!lina_activation_is_gated(s->activation)) {
    *g = *u = LOAD(dtype, lina_at(h, dtype, i), n, b->g);
  } else if (s->interleaved) {
    const REAL *both = LOAD(dtype, lina_at(h, dtype, 2 * i), 2 * n, b->both);
    for (int64_t j = 0; j < n; j++) b->g[j] = both[2 * j], b->u[j] = both[2 * j + 1];
    *g = b->g, *u = b->u;
  } else {
    *g = LOAD(dtype, lina_at(h, dtype, i), n, b->g);
    *u = LOAD(dtype, lina_at(h, dtype, s->F + i), n, b->u);
  }
}

LINA_INLINE void NAME(write)(const lina_experts_shape *s, void *h, int64_t i, int64_t n,
                             NAME(piece) * b) {
  int dtype = s->dtype;
  if (lina_activation_is_gated(s->activation) && s->interleaved) {
    for (int64_t j = 0; j < n; j++) b->both[2 * j] = b->g[j], b->both[2 * j + 1] = b->u[j];
    STORE(dtype, lina_at_mutable(h, dtype, 2 * i), 2 * n, b->both);
    return;
  }
  STORE(dtype, lina_at_mutable(h, dtype, i), n, b->g);
  if (lina_activation_is_gated(s->activation))
    STORE(dtype, lina_at_mutable(h, dtype, s->F + i), n, b->u);
}

CLONES static void NAME(add)(int dtype, int64_t n, const void *b, void *y) {
  REAL bb[LINA_CHUNK], by[LINA_CHUNK];
  for (int64_t i = 0; i < n; i += LINA_CHUNK) {
    int64_t m = n - i < LINA_CHUNK ? n - i : LINA_CHUNK;
    void *to = lina_at_mutable(y, dtype, i);
    const REAL *pb = LOAD(dtype, lina_at(b, dtype, i), m, bb), *py = LOAD(dtype, to, m, by);
    for (int64_t j = 0; j < m; j++) by[j] = py[j] + pb[j];
    STORE(dtype, to, m, by);
  }
}

CLONES static void NAME(activate)(const lina_experts_shape *s, const void *h, void *a) {
  NAME(piece) b;
  REAL out[LINA_CHUNK];
  const REAL *g, *u;
  for (int64_t i = 0; i < s->F; i += LINA_CHUNK) {
    int64_t n = s->F - i < LINA_CHUNK ? s->F - i : LINA_CHUNK;
    NAME(read)(s, h, i, n, &b, &g, &u);
    NAME(forward)(s, n, g, u, out);
    STORE(s->dtype, lina_at_mutable(a, s->dtype, i), n, out);
  }
}

/* One row; returns <da, activation(h)>. da NULL: as zeros, dh is not written. */
CLONES static REAL NAME(activate_bwd)(const lina_experts_shape *s, const void *h, const void *da,
                                      REAL w, void *dh, void *a) {
  NAME(piece) b, d;
  REAL bda[LINA_CHUNK], out[LINA_CHUNK], dot = 0;
  const REAL *g, *u;
  int dtype = s->dtype;
  for (int64_t i = 0; i < s->F; i += LINA_CHUNK) {
    int64_t n = s->F - i < LINA_CHUNK ? s->F - i : LINA_CHUNK;
    NAME(read)(s, h, i, n, &b, &g, &u);
    if (da) {
      const REAL *pda = LOAD(dtype, lina_at(da, dtype, i), n, bda);
      dot += NAME(backward)(s, n, g, u, pda, w, d.g, d.u, out);
      NAME(write)(s, dh, i, n, &d);
    } else {
      NAME(forward)(s, n, g, u, out);
      for (int64_t j = 0; j < n; j++) out[j] *= w;
    }
    if (a) STORE(dtype, lina_at_mutable(a, dtype, i), n, out);
  }
  return dot;
}

CLONES static REAL NAME(dot)(int dtype, int64_t n, const void *v, const void *b) {
  REAL bv[LINA_CHUNK], bb[LINA_CHUNK], part[16] = {0}, sum = 0;
  for (int64_t i = 0; i < n; i += LINA_CHUNK) {
    int64_t m = n - i < LINA_CHUNK ? n - i : LINA_CHUNK, j = 0;
    const REAL *pv = LOAD(dtype, lina_at(v, dtype, i), m, bv);
    const REAL *pb = LOAD(dtype, lina_at(b, dtype, i), m, bb);
    for (; j + 16 <= m; j += 16)
      for (int k = 0; k < 16; k++) part[k] += pv[j + k] * pb[j + k];
    for (; j < m; j++) part[j & 15] += pv[j] * pb[j];
  }
  for (int k = 0; k < 16; k++) sum += part[k];
  return sum;
}

/* Columns begin .. end of the sum over rows, at most LINA_CHUNK of them. */
CLONES static void NAME(sum)(int dtype, int64_t rows, int64_t width, int64_t begin, int64_t n,
                             const void *v, const int32_t *row_pair, const REAL *weight,
                             void *out) {
  REAL sum[LINA_CHUNK] = {0}, buffer[LINA_CHUNK];
  for (int64_t r = 0; r < rows; r++) {
    const REAL *p = LOAD(dtype, lina_at(v, dtype, r * width + begin), n, buffer);
    REAL w = weight ? weight[row_pair[r]] : 1;
    for (int64_t j = 0; j < n; j++) sum[j] += p[j] * w;
  }
  STORE(dtype, lina_at_mutable(out, dtype, begin), n, sum);
}
