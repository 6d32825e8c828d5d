/* experts_kernels.h - what the CPU does between an expert's products.
 *
 * Each function works on the n rows of one expert, in parallel over rows (the
 * sum over rows: over columns), on torch's threads. Pointers are to the first
 * of these rows; row_pair to the first one's pair. Formulas: experts.h.
 */
#ifndef LINA_OPS_EXPERTS_KERNELS_H
#define LINA_OPS_EXPERTS_KERNELS_H

#include "experts.h"

/* out[r,:] = x[row_pair[r] / K, :], both D wide. */
int lina_gather_rows(const lina_experts_shape *s, const void *x, const int32_t *row_pair, int64_t n,
                     void *out);

/* h += b (unless b is NULL), a = activation(h). */
int lina_activate_rows(const lina_experts_shape *s, int64_t n, const void *b, void *h, void *a);

/* y[r,:] += b */
int lina_add_bias(int dtype, int64_t n, int64_t width, const void *b, void *y);

/* out[:] = sum_r v[r,:] * weight[row_pair[r]], in order of the rows, rounded
 * once; weight NULL means 1. */
int lina_sum_rows(int dtype, int64_t n, int64_t width, const void *v, const int32_t *row_pair,
                  const void *weight, void *out);

/* w = weight[row_pair[r]], or 1 where weight is NULL:
 *   dh[r,:] = activation'(h[r,:]) * da[r,:] * w;  a[r,:] = activation(h[r,:]) * w
 *   dweight[row_pair[r]] = <da[r,:], activation(h[r,:])> + <dy[r,:], b_down>
 * da NULL: only a is wanted. a, dweight, b_down NULL: not wanted, absent. */
typedef struct {
  const lina_experts_shape *s;
  int64_t n;
  const int32_t *row_pair;
  const void *h, *da, *dy, *b_down, *weight;
  void *dh, *a, *dweight;
} lina_activate_bwd_rows_args;
int lina_activate_bwd_rows(const lina_activate_bwd_rows_args *args);

#endif
