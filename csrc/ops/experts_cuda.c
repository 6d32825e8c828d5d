/* The experts on CUDA: torch's grouped product over gathered rows where it
 * applies (bf16, 16-byte aligned rows), else lina's general grouped kernels;
 * between the products lina's own kernels. No host read either way, except in
 * torch's product on GPUs for which it has no kernel.
 */
#if LINA_CUDA
#include <stddef.h>

#include "combine.h"                   /* dx is a combine of rows */
#include "experts_pass.h"

/* ---- which product ---- */

/* Torch's product takes fewer than 1024 groups, base addresses and rows at
 * multiples of 16 bytes. */
#define GROUPED_MAX_E 1023
static bool aligned(const lina_tensor *t) { return ((uintptr_t)t->data & 15) == 0; }
static bool weight_fits(const lina_tensor *w) {
  int inner = w->stride[2] == 1 ? 2 : 1, outer = 3 - inner;
  return aligned(w) && w->stride[inner] == 1 && w->stride[outer] >= w->size[inner] &&
         w->stride[outer] % 8 == 0 && w->stride[0] % 8 == 0;
}
static bool takes_grouped(const lina_experts_shape *s, const lina_tensor *w_up,
                          const lina_tensor *w_down) {
  return s->dtype == LINA_BF16 && s->E <= GROUPED_MAX_E && s->D % 8 == 0 && s->F % 8 == 0 &&
         s->U % 8 == 0 && weight_fits(w_up) && weight_fits(w_down);
}

/* What the products of one pass share. `ends` is offset without its first. */
typedef struct {
  const lina_experts_shape *s;
  const lina_tensor *like, *offset;
  lina_tensor ends;
  bool grouped;
  void *stream;
} context;

static int start(context *c, const lina_experts_shape *s, const lina_tensor *like,
                 const lina_tensor *offset, const lina_tensor *w_up, const lina_tensor *w_down,
                 void *stream) {
  int64_t stride = 1;
  c->s = s, c->like = like, c->offset = offset, c->stream = stream;
  c->grouped = takes_grouped(s, w_up, w_down);
  return lina_view(&c->ends, offset, 1, 1, &s->E, &stride);
}

static int matrix(const context *c, lina_tensor *t, int64_t rows, int64_t width) {
  int64_t size[2] = {rows, width};
  return lina_empty(t, c->s->dtype, c->like, 2, size);
}

/* out[r,:] = in[r,:] @ w[e]^T over axis `in_axis` of w (2: as stored, 1: w[e]
 * itself). */
static int rows_product(const context *c, const lina_tensor *in, const lina_tensor *w, int in_axis,
                        lina_tensor *out) {
  const lina_experts_shape *s = c->s;
  int out_axis = 3 - in_axis, rc;
  lina_tensor b = {0};
  if (c->grouped) {
    int64_t size[3] = {s->E, w->size[in_axis], w->size[out_axis]};
    int64_t stride[3] = {w->stride[0], w->stride[in_axis], w->stride[out_axis]};
    LINA_TRY(lina_view(&b, w, 0, 3, size, stride));
    LINA_TRY(lina_grouped_mm(in, &b, &c->ends, out));
    LINA_TRY(lina_make_contiguous(out));
  } else {
    LINA_TRY(matrix(c, out, s->N, w->size[out_axis]));
    lina_grouped_rows_args args = {
        .N = s->N,
        .E = s->E,
        .in_width = w->size[in_axis],
        .out_width = w->size[out_axis],
        .dtype = s->dtype,
        .offset = c->offset->data,
        .in = in->data,
        .w = w->data,
        .w_stride = {w->stride[0], w->stride[out_axis], w->stride[in_axis]},
        .out = out->data};
    LINA_TRY(lina_grouped_rows_cuda(&args, c->stream));
  }
done:
  lina_drop(&b);
  return rc;
}

/* dw[e] = u[rows of e]^T @ v[rows of e], with the strides of a gradient of w. A
 * transposed w gets the transposed product, so that nothing is copied. */
static int inner_product(const context *c, const lina_tensor *u, const lina_tensor *v,
                         const lina_tensor *w, lina_tensor *dw) {
  const lina_experts_shape *s = c->s;
  lina_tensor left = {0};
  int64_t stride[3];
  int rc;
  lina_gradient_strides(w, stride);
  if (c->grouped) {
    bool flip = stride[2] != 1;
    const lina_tensor *a = flip ? v : u, *b = flip ? u : v;
    int64_t size[2] = {a->size[1], s->N}, turned[2] = {1, a->size[1]};
    LINA_TRY(lina_view(&left, a, 0, 2, size, turned));
    LINA_TRY(lina_grouped_mm(&left, b, &c->ends, dw));
    LINA_TRY(lina_make_contiguous(dw));
    lina_clear_empty_args args = {.E = s->E,
                                  .bytes = w->size[1] * w->size[2] * 2,
                                  .offset = c->offset->data,
                                  .out = dw->data};
    LINA_TRY(lina_clear_empty_cuda(&args, c->stream));
    if (flip) LINA_TRY(lina_restride(dw, 3, w->size, stride));
  } else {
    LINA_TRY(lina_empty_strided(dw, s->dtype, c->like, 3, w->size, stride));
    lina_grouped_inner_args args = {.N = s->N,
                                    .E = s->E,
                                    .u_width = w->size[1],
                                    .v_width = w->size[2],
                                    .dtype = s->dtype,
                                    .offset = c->offset->data,
                                    .u = u->data,
                                    .v = v->data,
                                    .out = dw->data,
                                    .out_stride = {stride[0], stride[1], stride[2]}};
    LINA_TRY(lina_grouped_inner_cuda(&args, c->stream));
  }
done:
  lina_drop(&left);
  return rc;
}

static int gather(const context *c, const lina_tensor *x, const lina_tensor *row_pair,
                  lina_tensor *out) {
  int rc = matrix(c, out, c->s->N, c->s->D);
  if (rc != LINA_OK) return rc;
  lina_gather_args args = {.s = *c->s, .x = x->data, .row_pair = row_pair->data, .out = out->data};
  return lina_gather_cuda(&args, c->stream);
}

/* ---- forward ---- */

int lina_experts_fwd_cuda(lina_experts_fwd *p, void *stream) {
  const lina_experts_shape *s = &p->s;
  context c = {0};
  lina_tensor xr = {0}, a = {0};
  int rc;
  if (s->N == 0) {
    c.s = s, c.like = &p->x;
    LINA_TRY(matrix(&c, &p->y, 0, s->D));
    LINA_TRY(matrix(&c, &p->h, 0, s->U));
    goto done;
  }
  LINA_TRY(start(&c, s, &p->x, &p->offset, &p->w_up, &p->w_down, stream));
  LINA_TRY(gather(&c, &p->x, &p->row_pair, &xr));
  LINA_TRY(rows_product(&c, &xr, &p->w_up, 2, &p->h));
  lina_drop(&xr);
  LINA_TRY(matrix(&c, &a, s->N, s->F));
  lina_activate_args activate = {.s = *s,
                                 .offset = p->offset.data,
                                 .h = p->h.data,
                                 .b_up = p->b_up.handle ? p->b_up.data : NULL,
                                 .a = a.data};
  LINA_TRY(lina_activate_cuda(&activate, stream));
  if (!p->save) lina_drop(&p->h);
  LINA_TRY(rows_product(&c, &a, &p->w_down, 2, &p->y));
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

/* ---- backward ---- */

static int zeros(lina_tensor *t, int dtype, const lina_tensor *like, const int64_t size[2]) {
  int rc = lina_empty(t, dtype, like, 2, size);
  return rc != LINA_OK ? rc : lina_zero(t);
}

/* Everything that is wanted, as zeros: there are no rows. */
static int no_rows(lina_experts_bwd *p) {
  const lina_experts_shape *s = &p->s;
  const lina_tensor *weights[] = {&p->w_up, &p->w_down};
  lina_tensor *gradients[] = {&p->dw_up, &p->dw_down};
  const int needs[] = {LINA_NEED_DW_UP, LINA_NEED_DW_DOWN};
  int64_t dx[2] = {s->T, s->D}, dweight[2] = {s->T, s->K}, db_up[2] = {s->E, s->U},
          db_down[2] = {s->E, s->D}, stride[3];
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
done:
  return rc;
}

static int bias_gradient(const context *c, const lina_experts_bwd *p, const lina_tensor *v,
                         bool by_token, int64_t width, lina_tensor *db) {
  int rc = matrix(c, db, c->s->E, width);
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
static int activate(const context *c, lina_experts_bwd *p, lina_tensor *da, lina_tensor *dh) {
  const lina_experts_shape *s = c->s;
  int64_t size[2] = {s->T, s->K};
  bool by_token = p->weight.handle != NULL;
  int rc;
  LINA_TRY(matrix(c, dh, s->N, s->U));
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

int lina_experts_bwd_cuda(lina_experts_bwd *p, void *stream) {
  const lina_experts_shape *s = &p->s;
  const int inner = LINA_NEED_DX | LINA_NEED_DWEIGHT | LINA_NEED_DW_UP | LINA_NEED_DB_UP;
  context c = {0};
  lina_tensor gathered = {0}, da = {0}, dh = {0}, dx_rows = {0};
  lina_tensor *dy = &p->dy;
  bool by_token = p->weight.handle != NULL;
  int rc;
  if (s->N == 0) return no_rows(p);
  LINA_TRY(start(&c, s, &p->x, &p->offset, &p->w_up, &p->w_down, stream));
  if (c.grouped && (!aligned(&p->dy) || !aligned(&p->h))) c.grouped = false;
  if (p->need & LINA_NEED_DB_DOWN)
    LINA_TRY(bias_gradient(&c, p, &p->dy, by_token, s->D, &p->db_down));
  if (!(p->need & (inner | LINA_NEED_DW_DOWN))) goto done;
  if (by_token) {
    LINA_TRY(gather(&c, &p->dy, &p->row_pair, &gathered));
    dy = &gathered;
  }
  LINA_TRY(rows_product(&c, dy, &p->w_down, 1, &da));
  LINA_TRY(activate(&c, p, &da, &dh));
  if (p->need & LINA_NEED_DW_DOWN) LINA_TRY(inner_product(&c, dy, &da, &p->w_down, &p->dw_down));
  lina_drop(&da);
  lina_drop(&gathered);
  if (p->need & LINA_NEED_DB_UP) LINA_TRY(bias_gradient(&c, p, &dh, false, s->U, &p->db_up));
  if (p->need & LINA_NEED_DW_UP) {
    LINA_TRY(gather(&c, &p->x, &p->row_pair, &gathered));
    LINA_TRY(inner_product(&c, &dh, &gathered, &p->w_up, &p->dw_up));
    lina_drop(&gathered);
  }
  if (p->need & LINA_NEED_DX) {
    LINA_TRY(rows_product(&c, &dh, &p->w_up, 1, &dx_rows));
    LINA_TRY(matrix(&c, &p->dx, s->T, s->D));
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
done:
  lina_drop(&dx_rows);
  lina_drop(&dh);
  lina_drop(&da);
  lina_drop(&gathered);
  lina_drop(&c.ends);
  return rc;
}
#else
typedef int lina_experts_cuda_is_empty; /* ISO C wants a declaration in every file */
#endif
