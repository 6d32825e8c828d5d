/* The experts' backward pass on CUDA: products by experts_products.h, between them lina's own
 * kernels.
 */
#if LINA_CUDA
#include <stddef.h>

#include "combine.h"                   /* dx is a combine of rows */
#include "experts_products.h"

static int zeros(lina_tensor *t, int dtype, const lina_tensor *like, const int64_t size[2]) {
  int rc = lina_empty(t, dtype, like, 2, size);
  return rc != LINA_OK ? rc : lina_zero(t);
}

/* Everything that is wanted, as zeros or empty: there are no rows. */
static int no_rows(lina_experts_bwd *p) {
  const lina_experts_shape *s = &p->s;
  const lina_tensor *weights[] = {&p->w_up, &p->w_down};
  lina_tensor *gradients[] = {&p->dw_up, &p->dw_down};
  const int needs[] = {LINA_NEED_DW_UP, LINA_NEED_DW_DOWN};
  int64_t dx[2] = {s->T, s->D}, dweight[2] = {s->T, s->K}, db_up[2] = {s->E, s->U},
          db_down[2] = {s->E, s->D}, dh[2] = {0, s->U}, a[2] = {0, s->F}, stride[3];
  int rc = LINA_OK;
  for (int i = 0; i < 2; i++)
    if (p->need & needs[i]) {
      lina_gradient_strides(weights[i], stride);
      LINA_TRY(lina_empty_strided(gradients[i], s->dtype, &p->x, 3, weights[i]->size, stride));
      LINA_TRY(lina_zero(gradients[i]));
    }
  if (p->need & LINA_NEED_DX) LINA_TRY(zeros(&p->dx, s->dtype, &p->x, dx));
  if (p->need & LINA_NEED_DWEIGHT) LINA_TRY(zeros(&p->dweight, LINA_F32, &p->x, dweight));
  if (p->need & LINA_NEED_DB_UP) LINA_TRY(zeros(&p->db_up, s->dtype, &p->x, db_up));
  if (p->need & LINA_NEED_DB_DOWN) LINA_TRY(zeros(&p->db_down, s->dtype, &p->x, db_down));
  if (p->need & LINA_NEED_KEPT) {
    LINA_TRY(lina_empty(&p->dh, s->dtype, &p->x, 2, dh));
    LINA_TRY(lina_empty(&p->a, s->dtype, &p->x, 2, a));
  }
done:
  return rc;
}

static int bias_gradient(const lina_products *c, const lina_experts_bwd *p, const lina_tensor *v,
                         bool by_token, int64_t width, lina_tensor *db) {
  int rc = lina_products_matrix(c, db, c->s->E, width);
  if (rc != LINA_OK) return rc;
  lina_bias_bwd_args args = {.s = *c->s,
                             .width = width,
                             .by_token = by_token,
                             .offset = p->offset.data,
                             .row_pair = p->row_pair.data,
                             .v = v->data,
                             .weight = by_token ? p->weight.data : NULL,
                             .db = db->data};
  return lina_bias_bwd_cuda(&args, c->stream);
}

/* dh and a from da, which becomes a; the router's gradient beside them. */
static int activate(const lina_products *c, lina_experts_bwd *p, lina_tensor *da, lina_tensor *dh) {
  const lina_experts_shape *s = c->s;
  int64_t size[2] = {s->T, s->K};
  bool by_token = p->weight.handle != NULL;
  int rc;
  LINA_TRY(lina_products_matrix(c, dh, s->N, s->U));
  if (p->need & LINA_NEED_DWEIGHT) {
    LINA_TRY(lina_empty(&p->dweight, LINA_F32, &p->x, 2, size));
    LINA_TRY(lina_zero(&p->dweight));              /* absent pairs */
  }
  lina_activate_bwd_args args = {.s = *s,
                                 .offset = p->offset.data,
                                 .row_pair = p->row_pair.data,
                                 .h = p->h.data,
                                 .da = da->data,
                                 .weight = by_token ? p->weight.data : NULL,
                                 .dout = by_token ? p->dy.data : NULL,
                                 .b_down = p->b_down.handle && by_token ? p->b_down.data : NULL,
                                 .dh = dh->data,
                                 .a = da->data,
                                 .dweight = p->need & LINA_NEED_DWEIGHT ? p->dweight.data : NULL};
  LINA_TRY(lina_activate_bwd_cuda(&args, c->stream));
done:
  return rc;
}

/* dh and a of all rows, where no earlier call kept them. */
static int through_activation(const lina_products *c, lina_experts_bwd *p, const lina_tensor *dy) {
  int rc;
  LINA_TRY(lina_products_rows(c, dy, &p->w_down, 1, &p->a));
  LINA_TRY(activate(c, p, &p->a, &p->dh));
done:
  return rc;
}

int lina_experts_bwd_cuda(lina_experts_bwd *p, void *stream) {
  const lina_experts_shape *s = &p->s;
  const int inner = LINA_NEED_DX | LINA_NEED_DWEIGHT | LINA_NEED_DW_UP | LINA_NEED_DB_UP;
  const bool by_token = p->weight.handle != NULL, given = p->kept_dh.handle != NULL;
  const bool keeps = p->need & LINA_NEED_KEPT;
  const lina_tensor *dy = &p->dy, *dh = given ? &p->kept_dh : &p->dh,
                    *a = given ? &p->kept_a : &p->a;
  lina_products c = {0};
  lina_tensor gathered = {0}, dx_rows = {0};
  int rc;
  if (s->N == 0) return no_rows(p);
  LINA_TRY(lina_products_start(&c, s, &p->x, &p->offset, &p->w_up, &p->w_down, stream));
  if (c.grouped && (!lina_products_aligned(&p->dy) || !lina_products_aligned(&p->h) ||
                    (given && !(lina_products_aligned(dh) && lina_products_aligned(a)))))
    c.grouped = false;
  if (p->need & LINA_NEED_DB_DOWN)
    LINA_TRY(bias_gradient(&c, p, &p->dy, by_token, s->D, &p->db_down));
  if (!(p->need & (inner | LINA_NEED_DW_DOWN | LINA_NEED_KEPT))) goto done;
  if (by_token && (!given || p->need & LINA_NEED_DW_DOWN)) {
    LINA_TRY(lina_products_gather(&c, &p->dy, &p->row_pair, &gathered));
    dy = &gathered;
  }
  if (!given) LINA_TRY(through_activation(&c, p, dy));
  if (p->need & LINA_NEED_DW_DOWN)
    LINA_TRY(lina_products_inner(&c, dy, a, &p->w_down, &p->dw_down));
  if (!keeps) lina_drop(&p->a);
  lina_drop(&gathered);
  if (p->need & LINA_NEED_DB_UP) LINA_TRY(bias_gradient(&c, p, dh, false, s->U, &p->db_up));
  if (p->need & LINA_NEED_DW_UP) {
    LINA_TRY(lina_products_gather(&c, &p->x, &p->row_pair, &gathered));
    LINA_TRY(lina_products_inner(&c, dh, &gathered, &p->w_up, &p->dw_up));
    lina_drop(&gathered);
  }
  if (p->need & LINA_NEED_DX) {
    LINA_TRY(lina_products_rows(&c, dh, &p->w_up, 1, &dx_rows));
    LINA_TRY(lina_products_matrix(&c, &p->dx, s->T, s->D));
    lina_combine_args args = {.T = s->T,
                              .K = s->K,
                              .D = s->D,
                              .N = s->N,
                              .dtype = s->dtype,
                              .y = dx_rows.data,
                              .pair_row = p->pair_row.data,
                              .out = p->dx.data};
    LINA_TRY(lina_combine_fwd_cuda(&args, stream));
  }
  if (!keeps) lina_drop(&p->dh);
done:
  lina_drop(&dx_rows);
  lina_drop(&gathered);
  lina_drop(&c.ends);
  return rc;
}
#else
typedef int lina_experts_bwd_cuda_is_empty; /* ISO C wants a declaration in every file */
#endif
