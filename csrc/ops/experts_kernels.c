/* Contract: experts_kernels.h. The loops themselves are in experts_row.h. */
#include "experts_kernels.h"

#include <math.h>
#include <string.h>

#include "../vector.h"

#define REAL                float
#define NAME(x)             x##_float
#define EXP(x)              lina_expf(x)
#define NORMAL(x, cdf, pdf) lina_normalf(x, cdf, pdf)
#define LOAD                lina_load
#define STORE               lina_store
#define CLONES              LINA_CLONES
#include "experts_row.h"
#undef REAL
#undef NAME
#undef EXP
#undef NORMAL
#undef LOAD
#undef STORE
#undef CLONES

static inline void normal_double(double x, double *cdf, double *pdf) {
  *cdf = 0.5 * erfc(-x * 0.70710678118654752);
  *pdf = 0.39894228040143268 * exp(-0.5 * x * x);
}

#define REAL                double
#define NAME(x)             x##_double
#define EXP(x)              exp(x)
#define NORMAL(x, cdf, pdf) normal_double(x, cdf, pdf)
#define LOAD                lina_load_double
#define STORE               lina_store_double
#define CLONES
#include "experts_row.h"

/* Values that are worth another thread. */
enum { GRAIN = 1 << 14 };
static int64_t grain(int64_t width) { return width < GRAIN ? GRAIN / (width + 1) + 1 : 1; }

/* ---- gather ---- */

typedef struct {
  int64_t K, bytes;
  const char *x;
  const int32_t *row_pair;
  char *out;
} gather_context;

static void gather(int64_t begin, int64_t end, void *context) {
  const gather_context *c = context;
  for (int64_t r = begin; r < end; r++)
    memcpy(c->out + r * c->bytes, c->x + c->row_pair[r] / c->K * c->bytes, (size_t)c->bytes);
}

int lina_gather_rows(const lina_experts_shape *s, const void *x, const int32_t *row_pair, int64_t n,
                     void *out) {
  gather_context c = {s->K, s->D * lina_dtype_bytes(s->dtype), x, row_pair, out};
  return lina_parallel_for(n, grain(s->D), gather, &c);
}

/* ---- bias, activation ---- */

typedef struct {
  const lina_experts_shape *s;
  const void *b;
  void *h, *a;
} activate_context;

static void activate(int64_t begin, int64_t end, void *context) {
  const activate_context *c = context;
  const lina_experts_shape *s = c->s;
  for (int64_t r = begin; r < end; r++) {
    void *h = lina_at_mutable(c->h, s->dtype, r * s->U);
    void *a = lina_at_mutable(c->a, s->dtype, r * s->F);
    if (s->dtype == LINA_F64) {
      if (c->b) add_double(s->dtype, s->U, c->b, h);
      activate_double(s, h, a);
    } else {
      if (c->b) add_float(s->dtype, s->U, c->b, h);
      activate_float(s, h, a);
    }
  }
}

int lina_activate_rows(const lina_experts_shape *s, int64_t n, const void *b, void *h, void *a) {
  activate_context c = {s, b, h, a};
  return lina_parallel_for(n, grain(s->U), activate, &c);
}

typedef struct {
  int dtype;
  int64_t width;
  const void *b;
  void *y;
} bias_context;

static void bias(int64_t begin, int64_t end, void *context) {
  const bias_context *c = context;
  for (int64_t r = begin; r < end; r++) {
    void *y = lina_at_mutable(c->y, c->dtype, r * c->width);
    if (c->dtype == LINA_F64)
      add_double(c->dtype, c->width, c->b, y);
    else
      add_float(c->dtype, c->width, c->b, y);
  }
}

int lina_add_bias(int dtype, int64_t n, int64_t width, const void *b, void *y) {
  bias_context c = {dtype, width, b, y};
  return lina_parallel_for(n, grain(width), bias, &c);
}

/* ---- backward ---- */

static void activate_bwd(int64_t begin, int64_t end, void *context) {
  const lina_activate_bwd_rows_args *c = context;
  const lina_experts_shape *s = c->s;
  int dtype = s->dtype;
  for (int64_t r = begin; r < end; r++) {
    const void *h = lina_at(c->h, dtype, r * s->U);
    const void *da = c->da ? lina_at(c->da, dtype, r * s->F) : NULL;
    void *dh = lina_at_mutable(c->dh, dtype, r * s->U);
    void *a = c->a ? lina_at_mutable(c->a, dtype, r * s->F) : NULL;
    const void *dy = c->b_down && c->dweight ? lina_at(c->dy, dtype, r * s->D) : NULL;
    int32_t pair = c->row_pair[r];
    if (dtype == LINA_F64) {
      double w = c->weight ? ((const double *)c->weight)[pair] : 1;
      double dot = activate_bwd_double(s, h, da, w, dh, a);
      if (dy) dot += dot_double(dtype, s->D, dy, c->b_down);
      if (c->dweight) ((double *)c->dweight)[pair] = dot;
    } else {
      float w = c->weight ? ((const float *)c->weight)[pair] : 1;
      float dot = activate_bwd_float(s, h, da, w, dh, a);
      if (dy) dot += dot_float(dtype, s->D, dy, c->b_down);
      if (c->dweight) ((float *)c->dweight)[pair] = dot;
    }
  }
}

int lina_activate_bwd_rows(const lina_activate_bwd_rows_args *args) {
  return lina_parallel_for(args->n, grain(args->s->U), activate_bwd, (void *)args);
}

typedef struct {
  int dtype;
  int64_t rows, width;
  const void *v, *weight;
  const int32_t *row_pair;
  void *out;
} sum_context;

static void sum(int64_t begin, int64_t end, void *context) {
  const sum_context *c = context;
  for (int64_t i = begin; i < end; i += LINA_CHUNK) {
    int64_t n = end - i < LINA_CHUNK ? end - i : LINA_CHUNK;
    if (c->dtype == LINA_F64)
      sum_double(c->dtype, c->rows, c->width, i, n, c->v, c->row_pair, c->weight, c->out);
    else
      sum_float(c->dtype, c->rows, c->width, i, n, c->v, c->row_pair, c->weight, c->out);
  }
}

int lina_sum_rows(int dtype, int64_t n, int64_t width, const void *v, const int32_t *row_pair,
                  const void *weight, void *out) {
  sum_context c = {dtype, n, width, v, weight, row_pair, out};
  return lina_parallel_for(width, grain(n), sum, &c);
}
