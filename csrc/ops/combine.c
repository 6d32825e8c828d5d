/* combine on the CPU, and its boxed wrappers. Contract: combine.h. */
#include "combine.h"

#include <string.h>

#include "../vector.h"

enum {
  FLOATS = 1 << LINA_F32 | 1 << LINA_BF16 | 1 << LINA_F16 | 1 << LINA_F64,
  GRAIN = 1 << 14,                     /* values that are worth another thread */
  MAX_K = 1024
};

/* ---- CPU ---- */

/* sum[0:n] = sum over a token's K rows of columns i .. i+n. */
LINA_CLONES static void sum_float(const lina_combine_args *a, int64_t t, int64_t i, int64_t n,
                                  float *sum) {
  float buffer[LINA_CHUNK];
  memset(sum, 0, (size_t)n * sizeof *sum);
  for (int64_t k = t * a->K; k < (t + 1) * a->K; k++) {
    int64_t row = a->pair_row[k];
    if (row < 0) continue;
    float w = a->weight ? ((const float *)a->weight)[k] : 1;
    const float *y = lina_load(a->dtype, lina_at(a->y, a->dtype, row * a->D + i), n, buffer);
    for (int64_t j = 0; j < n; j++) sum[j] += w * y[j];
  }
  lina_store(a->dtype, lina_at_mutable(a->out, a->dtype, t * a->D + i), n, sum);
}

static void sum_double(const lina_combine_args *a, int64_t t) {
  double *out = (double *)a->out + t * a->D;
  memset(out, 0, (size_t)a->D * sizeof *out);
  for (int64_t k = t * a->K; k < (t + 1) * a->K; k++) {
    if (a->pair_row[k] < 0) continue;
    double w = a->weight ? ((const double *)a->weight)[k] : 1;
    const double *y = (const double *)a->y + a->pair_row[k] * a->D;
    for (int64_t j = 0; j < a->D; j++) out[j] += w * y[j];
  }
}

static void fwd(int64_t begin, int64_t end, void *context) {
  const lina_combine_args *a = context;
  float sum[LINA_CHUNK];
  for (int64_t t = begin; t < end; t++) {
    if (a->dtype == LINA_F64)
      sum_double(a, t);
    else
      for (int64_t i = 0; i < a->D; i += LINA_CHUNK)
        sum_float(a, t, i, a->D - i < LINA_CHUNK ? a->D - i : LINA_CHUNK, sum);
  }
}

int lina_combine_fwd_cpu(const lina_combine_args *a) {
  if (a->T == 0 || a->D == 0) return LINA_OK;
  return lina_parallel_for(a->T, GRAIN / (a->D * a->K) + 1, fwd, (void *)a);
}

/* dy = w * dout over a piece of a row; returns <dout, y>. */
LINA_CLONES static float row_float(int dtype, int64_t n, float w, const void *dout, const void *y,
                                   void *dy) {
  float bd[LINA_CHUNK], by[LINA_CHUNK], out[LINA_CHUNK], part[16] = {0}, dot = 0;
  const float *d = lina_load(dtype, dout, n, bd), *v = lina_load(dtype, y, n, by);
  int64_t j = 0;
  for (; j + 16 <= n; j += 16)           /* sixteen sums: one would forbid vectors */
    for (int l = 0; l < 16; l++) part[l] += d[j + l] * v[j + l];
  for (; j < n; j++) part[j & 15] += d[j] * v[j];
  for (int l = 0; l < 16; l++) dot += part[l];
  for (j = 0; j < n; j++) out[j] = w * d[j];
  lina_store(dtype, dy, n, out);
  return dot;
}

static void bwd(int64_t begin, int64_t end, void *context) {
  const lina_combine_bwd_args *a = context;
  int dtype = a->dtype;
  for (int64_t r = begin; r < end; r++) {
    int64_t pair = a->row_pair[r], t = pair / a->K;
    if (pair < 0) {
      if (a->D > 0)
        memset(lina_at_mutable(a->dy, dtype, r * a->D), 0,
               (size_t)(a->D * lina_dtype_bytes(dtype)));
    } else if (dtype == LINA_F64) {
      const double *d = (const double *)a->dout + t * a->D, *y = (const double *)a->y + r * a->D;
      double w = a->weight ? ((const double *)a->weight)[pair] : 1, dot = 0;
      for (int64_t i = 0; i < a->D; i++)
        dot += d[i] * y[i], ((double *)a->dy)[r * a->D + i] = w * d[i];
      if (a->dweight) ((double *)a->dweight)[pair] = dot;
    } else {
      float w = a->weight ? ((const float *)a->weight)[pair] : 1, dot = 0;
      for (int64_t i = 0; i < a->D; i += LINA_CHUNK)
        dot += row_float(dtype, a->D - i < LINA_CHUNK ? a->D - i : LINA_CHUNK, w,
                         lina_at(a->dout, dtype, t * a->D + i), lina_at(a->y, dtype, r * a->D + i),
                         lina_at_mutable(a->dy, dtype, r * a->D + i));
      if (a->dweight) ((float *)a->dweight)[pair] = dot;
    }
  }
}

int lina_combine_bwd_cpu(const lina_combine_bwd_args *a) {
  if (a->dweight)                        /* absent pairs have no row to set theirs */
    memset(a->dweight, 0, (size_t)(a->T * a->K * (a->dtype == LINA_F64 ? 8 : 4)));
  if (a->N == 0) return LINA_OK;
  return lina_parallel_for(a->N, GRAIN / (a->D + 1) + 1, bwd, (void *)a);
}

/* ---- boxed ---- */

/* y, weight, pair_row fit together; sets what both passes share. */
static int check(const char *op, const lina_tensor *y, const lina_tensor *weight,
                 const lina_tensor *pair_row) {
  int rc;
  LINA_TRY(lina_check(op, "y", y, 2, FLOATS));
  if (y->dtype == LINA_F64 && y->device != LINA_ON_CPU)
    LINA_FAIL(LINA_ENOTSUP, "%s: y is of float64, which only the CPU takes", op);
  LINA_TRY(lina_check(op, "pair_row", pair_row, 2, 1 << LINA_I32));
  LINA_TRY(lina_check_device(op, "pair_row", pair_row, y));
  int64_t K = pair_row->size[1];
  if (K < 1 || K > MAX_K)
    LINA_FAIL(LINA_EINVAL, "%s: pair_row.shape[1] (K) is %lld, must be 1 to %d", op, (long long)K,
              MAX_K);
  if (pair_row->numel > INT32_MAX)
    LINA_FAIL(LINA_EINVAL, "%s: pair_row has %lld elements, must be below 2^31", op,
              (long long)pair_row->numel);
  if (y->size[0] > pair_row->numel)
    LINA_FAIL(LINA_EINVAL, "%s: y has %lld rows, must be at most the %lld pairs", op,
              (long long)y->size[0], (long long)pair_row->numel);
  if (weight->handle) {
    LINA_TRY(
        lina_check(op, "weight", weight, 2, y->dtype == LINA_F64 ? 1 << LINA_F64 : 1 << LINA_F32));
    LINA_TRY(lina_check_device(op, "weight", weight, y));
    LINA_TRY(lina_check_size(op, "weight", weight, 0, pair_row->size[0]));
    LINA_TRY(lina_check_size(op, "weight", weight, 1, K));
  }
  rc = LINA_OK;
done:
  return rc;
}

/* On the CPU an index outside its range is an error rather than a wild read. */
static int check_indices(const char *op, const char *name, const lina_tensor *index,
                         int64_t limit) {
  if (index->device != LINA_ON_CPU) return LINA_OK;
  const int32_t *v = index->data;
  for (int64_t i = 0; i < index->numel; i++)
    if (v[i] < -1 || v[i] >= limit)
      return lina_error(LINA_EINVAL, "%s: %s[%lld] is %d, must be -1 to %lld", op, name,
                        (long long)i, v[i], (long long)limit - 1);
  return LINA_OK;
}

static int on_gpu_fwd(const lina_combine_args *a, void *stream) {
#if LINA_CUDA
  return lina_combine_fwd_cuda(a, stream);
#else
  (void)a, (void)stream;
  return lina_error(LINA_ENOTSUP, "combine: lina was built without CUDA");
#endif
}
static int on_gpu_bwd(const lina_combine_bwd_args *a, void *stream) {
#if LINA_CUDA
  return lina_combine_bwd_cuda(a, stream);
#else
  (void)a, (void)stream;
  return lina_error(LINA_ENOTSUP, "combine_bwd: lina was built without CUDA");
#endif
}

/* combine_fwd(Tensor y, Tensor? weight, Tensor pair_row) -> Tensor */
void lina_combine_fwd_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts) {
  (void)nargs, (void)nouts;
  lina_tensor out = {0};
  lina_tensor y, weight, pair_row;
  lina_scope scope = {0};
  int rc = lina_take(stack[0], &y), rc1 = lina_take_optional(stack[1], &weight),
      rc2 = lina_take(stack[2], &pair_row);
  if (rc != LINA_OK || (rc = rc1) != LINA_OK || (rc = rc2) != LINA_OK) goto done;
  LINA_TRY(check("combine", &y, &weight, &pair_row));
  LINA_TRY(lina_enter(&y, &scope));
  LINA_TRY(lina_make_contiguous(&y));
  LINA_TRY(lina_make_contiguous(&pair_row));
  if (weight.handle) LINA_TRY(lina_make_contiguous(&weight));
  LINA_TRY(check_indices("combine", "pair_row", &pair_row, y.size[0]));
  int64_t size[2] = {pair_row.size[0], y.size[1]};
  LINA_TRY(lina_empty(&out, y.dtype, &y, 2, size));
  lina_combine_args args = {.T = size[0],
                            .K = pair_row.size[1],
                            .D = size[1],
                            .N = y.size[0],
                            .dtype = y.dtype,
                            .y = y.data,
                            .weight = weight.handle ? weight.data : NULL,
                            .pair_row = pair_row.data,
                            .out = out.data};
  if (out.numel > 0)
    LINA_TRY(y.device == LINA_ON_CPU ? lina_combine_fwd_cpu(&args)
                                     : on_gpu_fwd(&args, scope.stream));
  stack[0] = lina_give(&out);
done:
  lina_leave(&scope);
  lina_drop(&out);
  lina_drop(&pair_row);
  lina_drop(&weight);
  lina_drop(&y);
  if (rc != LINA_OK) lina_throw(rc);
}

/* combine_bwd(Tensor dout, Tensor y, Tensor? weight, Tensor pair_row,
 *   Tensor row_pair) -> (Tensor dy, Tensor dweight) */
void lina_combine_bwd_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts) {
  (void)nargs, (void)nouts;
  lina_tensor dout, y, weight, pair_row, row_pair, dy = {0}, dweight = {0};
  lina_scope scope = {0};
  int taken[5] = {lina_take(stack[0], &dout), lina_take(stack[1], &y),
                  lina_take_optional(stack[2], &weight), lina_take(stack[3], &pair_row),
                  lina_take(stack[4], &row_pair)};
  int rc = LINA_OK;
  for (int i = 0; i < 5 && rc == LINA_OK; i++) rc = taken[i];
  if (rc != LINA_OK) goto done;
  LINA_TRY(check("combine_bwd", &y, &weight, &pair_row));
  int64_t T = pair_row.size[0], K = pair_row.size[1], N = y.size[0], D = y.size[1];
  LINA_TRY(lina_check("combine_bwd", "dout", &dout, 2, 1u << y.dtype));
  LINA_TRY(lina_check_device("combine_bwd", "dout", &dout, &y));
  LINA_TRY(lina_check_size("combine_bwd", "dout", &dout, 0, T));
  LINA_TRY(lina_check_size("combine_bwd", "dout", &dout, 1, D));
  LINA_TRY(lina_check("combine_bwd", "row_pair", &row_pair, 1, 1 << LINA_I32));
  LINA_TRY(lina_check_device("combine_bwd", "row_pair", &row_pair, &y));
  LINA_TRY(lina_check_size("combine_bwd", "row_pair", &row_pair, 0, N));
  LINA_TRY(lina_enter(&y, &scope));
  LINA_TRY(lina_make_contiguous(&dout));
  LINA_TRY(lina_make_contiguous(&y));
  LINA_TRY(lina_make_contiguous(&pair_row));
  LINA_TRY(lina_make_contiguous(&row_pair));
  if (weight.handle) LINA_TRY(lina_make_contiguous(&weight));
  LINA_TRY(check_indices("combine_bwd", "pair_row", &pair_row, N));
  LINA_TRY(check_indices("combine_bwd", "row_pair", &row_pair, T * K));
  int64_t size[2] = {N, D}, weight_size[2] = {T, K}, none[1] = {0};
  int sum_dtype = lina_sum_dtype(y.dtype);
  LINA_TRY(lina_empty(&dy, y.dtype, &y, 2, size));
  if (weight.handle)
    LINA_TRY(lina_empty(&dweight, sum_dtype, &y, 2, weight_size));
  else
    LINA_TRY(lina_empty(&dweight, sum_dtype, &y, 1, none));
  lina_combine_bwd_args args = {.T = T,
                                .K = K,
                                .D = D,
                                .N = N,
                                .dtype = y.dtype,
                                .dout = dout.data,
                                .y = y.data,
                                .weight = weight.handle ? weight.data : NULL,
                                .pair_row = pair_row.data,
                                .row_pair = row_pair.data,
                                .dy = dy.data,
                                .dweight = weight.handle ? dweight.data : NULL};
  if (D == 0) LINA_TRY(lina_zero(&dweight)); /* a sum of nothing; the kernels launch nothing */
  LINA_TRY(y.device == LINA_ON_CPU ? lina_combine_bwd_cpu(&args) : on_gpu_bwd(&args, scope.stream));
  stack[0] = lina_give(&dy);
  stack[1] = lina_give(&dweight);
done:
  lina_leave(&scope);
  lina_drop(&dweight);
  lina_drop(&dy);
  lina_drop(&row_pair);
  lina_drop(&pair_row);
  lina_drop(&weight);
  lina_drop(&y);
  lina_drop(&dout);
  if (rc != LINA_OK) lina_throw(rc);
}
