/* The experts' forward pass on CUDA: products by experts_products.h, between them lina's own
 * kernels.
 */
#if LINA_CUDA
#include <stddef.h>

#include "experts_products.h"

int lina_experts_fwd_cuda(lina_experts_fwd *p, void *stream) {
  const lina_experts_shape *s = &p->s;
  lina_products c = {0};
  lina_tensor xr = {0}, a = {0};
  int rc;
  if (s->N == 0) {
    c.s = s, c.like = &p->x;
    LINA_TRY(lina_products_matrix(&c, &p->y, 0, s->D));
    LINA_TRY(lina_products_matrix(&c, &p->h, 0, s->U));
    goto done;
  }
  LINA_TRY(lina_products_start(&c, s, &p->x, &p->offset, &p->w_up, &p->w_down, stream));
  LINA_TRY(lina_products_gather(&c, &p->x, &p->row_pair, &xr));
  LINA_TRY(lina_products_rows(&c, &xr, &p->w_up, 2, &p->h));
  lina_drop(&xr);
  LINA_TRY(lina_products_matrix(&c, &a, s->N, s->F));
  lina_activate_args activate = {.s = *s,
                                 .offset = p->offset.data,
                                 .h = p->h.data,
                                 .b_up = p->b_up.handle ? p->b_up.data : NULL,
                                 .a = a.data};
  LINA_TRY(lina_activate_cuda(&activate, stream));
  if (!p->save) lina_drop(&p->h);
  LINA_TRY(lina_products_rows(&c, &a, &p->w_down, 2, &p->y));
  if (p->b_down.handle) {
    lina_bias_args bias = {
        .s = *s, .width = s->D, .offset = p->offset.data, .b = p->b_down.data, .y = p->y.data};
    LINA_TRY(lina_bias_cuda(&bias, stream));
  }
done:
  lina_drop(&a);
  lina_drop(&xr);
  lina_drop(&c.ends);
  return rc;
}
#else
typedef int lina_experts_cuda_is_empty; /* ISO C wants a declaration in every file */
#endif
