/* experts_products.h - the experts' products on CUDA, for experts_cuda.c and experts_bwd_cuda.c
 * alone: torch's grouped product over gathered rows where it applies (bf16, 16-byte aligned
 * rows), else lina's general grouped kernels. No host read either way, except in torch's
 * product on GPUs for which it has no kernel.
 */
#ifndef LINA_OPS_EXPERTS_PRODUCTS_H
#define LINA_OPS_EXPERTS_PRODUCTS_H

#include "experts_pass.h"

/* What the products of one pass share. `ends` is offset without its first. */
typedef struct {
  const lina_experts_shape *s;
  const lina_tensor *like, *offset;
  lina_tensor ends;
  bool grouped;
  void *stream;
} lina_products;

/* The caller drops c->ends. */
int lina_products_start(lina_products *c, const lina_experts_shape *s, const lina_tensor *like,
                        const lina_tensor *offset, const lina_tensor *w_up,
                        const lina_tensor *w_down, void *stream);

/* Whether torch's product takes the memory at its address. */
bool lina_products_aligned(const lina_tensor *t);

/* t = empty [rows, width]. */
int lina_products_matrix(const lina_products *c, lina_tensor *t, int64_t rows, int64_t width);

/* out[r,:] = in[r,:] @ w[e]^T over axis `in_axis` of w (2: as stored, 1: w[e]
 * itself). */
int lina_products_rows(const lina_products *c, const lina_tensor *in, const lina_tensor *w,
                       int in_axis, lina_tensor *out);

/* dw[e] = u[rows of e]^T @ v[rows of e], with the strides of a gradient of w. A
 * transposed w gets the transposed product, so that nothing is copied. */
int lina_products_inner(const lina_products *c, const lina_tensor *u, const lina_tensor *v,
                        const lina_tensor *w, lina_tensor *dw);

/* out[r,:] = x[row_pair[r] / K, :] */
int lina_products_gather(const lina_products *c, const lina_tensor *x, const lina_tensor *row_pair,
                         lina_tensor *out);

#endif
