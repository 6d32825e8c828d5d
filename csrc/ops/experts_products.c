/* The experts' products on CUDA. Contract: experts_products.h. */
#if LINA_CUDA
#include "experts_products.h"

/* Torch's product takes fewer than 1024 groups, base addresses and rows at
 * multiples of 16 bytes. */
#define GROUPED_MAX_E 1023
bool lina_products_aligned(const lina_tensor *t) { return ((uintptr_t)t->data & 15) == 0; }
static bool weight_fits(const lina_tensor *w) {
  int inner = w->stride[2] == 1 ? 2 : 1, outer = 3 - inner;
  return lina_products_aligned(w) && w->stride[inner] == 1 && w->stride[outer] >= w->size[inner] &&
         w->stride[outer] % 8 == 0 && w->stride[0] % 8 == 0;
}
static bool takes_grouped(const lina_experts_shape *s, const lina_tensor *w_up,
                          const lina_tensor *w_down) {
  return s->dtype == LINA_BF16 && s->E <= GROUPED_MAX_E && s->D % 8 == 0 && s->F % 8 == 0 &&
         s->U % 8 == 0 && weight_fits(w_up) && weight_fits(w_down);
}

int lina_products_start(lina_products *c, const lina_experts_shape *s, const lina_tensor *like,
                        const lina_tensor *offset, const lina_tensor *w_up,
                        const lina_tensor *w_down, void *stream) {
  int64_t stride = 1;
  c->s = s, c->like = like, c->offset = offset, c->stream = stream;
  c->grouped = takes_grouped(s, w_up, w_down);
  return lina_view(&c->ends, offset, 1, 1, &s->E, &stride);
}

int lina_products_matrix(const lina_products *c, lina_tensor *t, int64_t rows, int64_t width) {
  int64_t size[2] = {rows, width};
  return lina_empty(t, c->s->dtype, c->like, 2, size);
}

int lina_products_rows(const lina_products *c, const lina_tensor *in, const lina_tensor *w,
                       int in_axis, lina_tensor *out) {
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
    LINA_TRY(lina_products_matrix(c, out, s->N, w->size[out_axis]));
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

int lina_products_inner(const lina_products *c, const lina_tensor *u, const lina_tensor *v,
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

int lina_products_gather(const lina_products *c, const lina_tensor *x, const lina_tensor *row_pair,
                         lina_tensor *out) {
  int rc = lina_products_matrix(c, out, c->s->N, c->s->D);
  if (rc != LINA_OK) return rc;
  lina_gather_args args = {.s = *c->s, .x = x->data, .row_pair = row_pair->data, .out = out->data};
  return lina_gather_cuda(&args, c->stream);
}
#else
typedef int lina_experts_products_is_empty; /* ISO C wants a declaration in every file */
#endif
