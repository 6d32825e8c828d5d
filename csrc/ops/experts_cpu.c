/* The experts on the CPU: expert by expert, torch's own products of gathered rows,
 * with everything between the products in loops over rows that run on torch's
 * threads. An expert's rows are gathered just before they are multiplied, into
 * one scratch buffer that stays in the cache, rather than all rows at once.
 */
#define _DEFAULT_SOURCE                /* madvise */
#include <string.h>
#include <sys/mman.h>

#include "combine.h"                   /* dx is a combine of rows */
#include "experts_kernels.h"
#include "experts_pass.h"
#include "../vector.h"

/* ---- helpers ---- */

static lina_matrix rows_of(void *data, int dtype, int64_t first, int64_t n, int64_t width) {
  lina_matrix m = {lina_at_mutable(data, dtype, first * width), n, width, width, 1};
  return m;
}
/* The first n rows of a scratch buffer as lina_mm wants them: more rows, of zeros. */
static lina_matrix filled_up(const lina_tensor *t, int64_t n) {
  int64_t width = t->size[1], rows = lina_mm_rows(n, t->dtype);
  memset(lina_at_mutable(t->data, t->dtype, n * width), 0,
         (size_t)((rows - n) * width * lina_dtype_bytes(t->dtype)));
  return rows_of(t->data, t->dtype, 0, rows, width);
}
/* Matrix e of [E, rows, cols]. */
static lina_matrix slice(const lina_tensor *w, int64_t e) {
  lina_matrix m = {lina_at_mutable(w->data, w->dtype, e * w->stride[0]), w->size[1], w->size[2],
                   w->stride[1], w->stride[2]};
  return m;
}
static void zero_matrix(lina_matrix m, int dtype) {
  if (m.col_stride != 1) m = lina_transposed(m);
  for (int64_t i = 0; i < m.rows; i++)
    memset(lina_at_mutable(m.data, dtype, i * m.row_stride), 0,
           (size_t)(m.cols * lina_dtype_bytes(dtype)));
}
static int scratch(lina_tensor *t, int dtype, const lina_tensor *like, int64_t rows,
                   int64_t width) {
  int64_t size[2] = {rows, width};
  return lina_empty(t, dtype, like, 2, size);
}
/* Blocks of 32 MiB and more come fresh from the system at every call (glibc never
 * keeps them): in huge pages they cost a hundredth of the page faults. Advice
 * only; a system without huge pages ignores it. */
static void prefer_huge_pages(const lina_tensor *t) {
#ifdef MADV_HUGEPAGE
  uintptr_t page = 1 << 16, from = ((uintptr_t)t->data + page - 1) & ~(page - 1);
  uintptr_t to =
      ((uintptr_t)t->data + (uintptr_t)(t->numel * lina_dtype_bytes(t->dtype))) & ~(page - 1);
  if (t->data && to > from && to - from >= (31u << 20))
    (void)madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}
/* Rows that a scratch buffer of one expert needs. */
static int64_t most_rows(const int32_t *offset, int64_t E, int dtype) {
  int64_t most = 0;
  for (int64_t e = 0; e < E; e++)
    if (offset[e + 1] - offset[e] > most) most = offset[e + 1] - offset[e];
  return lina_mm_rows(most, dtype);
}

/* ---- forward ---- */

int lina_experts_fwd_cpu(lina_experts_fwd *p) {
  const lina_experts_shape *s = &p->s;
  const int32_t *offset = p->offset.data;
  lina_tensor xe = {0}, a = {0};
  int rc;
  int64_t most = most_rows(offset, s->E, s->dtype);
  LINA_TRY(scratch(&p->y, s->dtype, &p->x, s->N, s->D));
  LINA_TRY(scratch(&p->h, s->dtype, &p->x, p->save ? s->N : most, s->U));
  prefer_huge_pages(&p->h);
  LINA_TRY(scratch(&xe, s->dtype, &p->x, most, s->D));
  LINA_TRY(scratch(&a, s->dtype, &p->x, most, s->F));
  for (int64_t e = 0; e < s->E; e++) {
    int64_t first = offset[e], n = offset[e + 1] - first;
    if (n == 0) continue;
    lina_matrix mx = filled_up(&xe, n);
    lina_matrix mh = rows_of(p->h.data, s->dtype, p->save ? first : 0, n, s->U);
    lina_matrix ma = filled_up(&a, n);
    lina_matrix my = rows_of(p->y.data, s->dtype, first, n, s->D);
    LINA_TRY(lina_gather_rows(s, p->x.data, (const int32_t *)p->row_pair.data + first, n, mx.data));
    LINA_TRY(lina_mm(mh, mx, lina_transposed(slice(&p->w_up, e)), s->dtype));
    LINA_TRY(lina_activate_rows(
        s, n, p->b_up.handle ? lina_at(p->b_up.data, s->dtype, e * s->U) : NULL, mh.data, ma.data));
    LINA_TRY(lina_mm(my, ma, lina_transposed(slice(&p->w_down, e)), s->dtype));
    if (p->b_down.handle)
      LINA_TRY(
          lina_add_bias(s->dtype, n, s->D, lina_at(p->b_down.data, s->dtype, e * s->D), my.data));
  }
  if (!p->save) lina_drop(&p->h);
done:
  lina_drop(&a);
  lina_drop(&xe);
  return rc;
}

/* ---- backward ---- */

static int allocate(lina_experts_bwd *p) {
  const lina_experts_shape *s = &p->s;
  int64_t stride[3];
  int rc = LINA_OK;
  if (p->need & LINA_NEED_DX) LINA_TRY(scratch(&p->dx, s->dtype, &p->x, s->T, s->D));
  if (p->need & LINA_NEED_DWEIGHT) {
    LINA_TRY(scratch(&p->dweight, lina_sum_dtype(s->dtype), &p->x, s->T, s->K));
    LINA_TRY(lina_zero(&p->dweight));              /* absent pairs */
  }
  if (p->need & LINA_NEED_DW_UP) {
    lina_gradient_strides(&p->w_up, stride);
    LINA_TRY(lina_empty_strided(&p->dw_up, s->dtype, &p->x, 3, p->w_up.size, stride));
    prefer_huge_pages(&p->dw_up);
  }
  if (p->need & LINA_NEED_DB_UP) LINA_TRY(scratch(&p->db_up, s->dtype, &p->x, s->E, s->U));
  if (p->need & LINA_NEED_DW_DOWN) {
    lina_gradient_strides(&p->w_down, stride);
    LINA_TRY(lina_empty_strided(&p->dw_down, s->dtype, &p->x, 3, p->w_down.size, stride));
    prefer_huge_pages(&p->dw_down);
  }
  if (p->need & LINA_NEED_DB_DOWN) LINA_TRY(scratch(&p->db_down, s->dtype, &p->x, s->E, s->D));
  if (p->need & LINA_NEED_KEPT) {
    LINA_TRY(scratch(&p->dh, s->dtype, &p->x, s->N, s->U));
    LINA_TRY(scratch(&p->a, s->dtype, &p->x, s->N, s->F));
  }
done:
  return rc;
}

/* Scratch for the rows of one expert at a time; dx_rows holds those of all. */
typedef struct { lina_tensor x, dy, da, dh, a, dx_rows; } buffers;

static void copy_rows(void *to, int64_t to_row, const void *from, int64_t from_row, int64_t n,
                      int64_t width, int dtype) {
  memcpy(lina_at_mutable(to, dtype, to_row * width), lina_at(from, dtype, from_row * width),
         (size_t)(n * width * lina_dtype_bytes(dtype)));
}

static int one_expert(lina_experts_bwd *p, buffers *b, int64_t e, int64_t first, int64_t n) {
  const lina_experts_shape *s = &p->s;
  const int32_t *row_pair = (const int32_t *)p->row_pair.data + first;
  const int inner =
      LINA_NEED_DX | LINA_NEED_DWEIGHT | LINA_NEED_DW_UP | LINA_NEED_DB_UP | LINA_NEED_KEPT;
  int rc;
  lina_matrix dy = rows_of(p->dy.data, s->dtype, first, n, s->D);
  lina_matrix da = rows_of(b->da.data, s->dtype, 0, n, s->F);
  lina_matrix dh = filled_up(&b->dh, n);
  lina_matrix a = filled_up(&b->a, n);
  if (p->weight.handle || lina_mm_rows(n, s->dtype) != n) {
    dy = filled_up(&b->dy, n);
    if (p->weight.handle)
      LINA_TRY(lina_gather_rows(s, p->dy.data, row_pair, n, dy.data));
    else
      copy_rows(dy.data, 0, p->dy.data, first, n, s->D, s->dtype);
  }
  if (p->kept_dh.handle) {
    copy_rows(dh.data, 0, p->kept_dh.data, first, n, s->U, s->dtype);
    copy_rows(a.data, 0, p->kept_a.data, first, n, s->F, s->dtype);
  } else if (p->need & (inner | LINA_NEED_DW_DOWN)) {
    if (p->need & inner) LINA_TRY(lina_mm(da, dy, slice(&p->w_down, e), s->dtype));
    lina_activate_bwd_rows_args args = {
        .s = s,
        .n = n,
        .row_pair = row_pair,
        .h = lina_at(p->h.data, s->dtype, first * s->U),
        .da = p->need & inner ? da.data : NULL,
        .dy = dy.data,
        .b_down = p->b_down.handle ? lina_at(p->b_down.data, s->dtype, e * s->D) : NULL,
        .weight = p->weight.handle ? p->weight.data : NULL,
        .dh = dh.data,
        .a = p->need & (LINA_NEED_DW_DOWN | LINA_NEED_KEPT) ? a.data : NULL,
        .dweight = p->need & LINA_NEED_DWEIGHT ? p->dweight.data : NULL};
    LINA_TRY(lina_activate_bwd_rows(&args));
  }
  if (p->need & LINA_NEED_KEPT) {
    copy_rows(p->dh.data, first, dh.data, 0, n, s->U, s->dtype);
    copy_rows(p->a.data, first, a.data, 0, n, s->F, s->dtype);
  }
  if (p->need & LINA_NEED_DW_DOWN)
    LINA_TRY(lina_mm(slice(&p->dw_down, e), lina_transposed(dy), a, s->dtype));
  if (p->need & LINA_NEED_DB_DOWN)
    LINA_TRY(lina_sum_rows(s->dtype, n, s->D, dy.data, row_pair,
                           p->weight.handle ? p->weight.data : NULL,
                           lina_at_mutable(p->db_down.data, s->dtype, e * s->D)));
  if (p->need & LINA_NEED_DW_UP) {
    lina_matrix x = filled_up(&b->x, n);
    LINA_TRY(lina_gather_rows(s, p->x.data, row_pair, n, x.data));
    LINA_TRY(lina_mm(slice(&p->dw_up, e), lina_transposed(dh), x, s->dtype));
  }
  if (p->need & LINA_NEED_DB_UP)
    LINA_TRY(lina_sum_rows(s->dtype, n, s->U, dh.data, row_pair, NULL,
                           lina_at_mutable(p->db_up.data, s->dtype, e * s->U)));
  if (p->need & LINA_NEED_DX)
    LINA_TRY(lina_mm(rows_of(b->dx_rows.data, s->dtype, first, n, s->D), dh, slice(&p->w_up, e),
                     s->dtype));
  rc = LINA_OK;
done:
  return rc;
}

/* An expert without rows has zero gradients; torch is not asked. */
static void no_rows(lina_experts_bwd *p, int64_t e) {
  const lina_experts_shape *s = &p->s;
  int64_t bytes = lina_dtype_bytes(s->dtype);
  if (p->need & LINA_NEED_DW_UP) zero_matrix(slice(&p->dw_up, e), s->dtype);
  if (p->need & LINA_NEED_DW_DOWN) zero_matrix(slice(&p->dw_down, e), s->dtype);
  if (p->need & LINA_NEED_DB_UP)
    memset((char *)p->db_up.data + e * s->U * bytes, 0, (size_t)(s->U * bytes));
  if (p->need & LINA_NEED_DB_DOWN)
    memset((char *)p->db_down.data + e * s->D * bytes, 0, (size_t)(s->D * bytes));
}

int lina_experts_bwd_cpu(lina_experts_bwd *p) {
  const lina_experts_shape *s = &p->s;
  const int32_t *offset = p->offset.data;
  buffers b = {0};
  int rc;
  int64_t most = most_rows(offset, s->E, s->dtype);
  LINA_TRY(allocate(p));
  LINA_TRY(scratch(&b.da, s->dtype, &p->x, most, s->F));
  LINA_TRY(scratch(&b.dh, s->dtype, &p->x, most, s->U));
  LINA_TRY(scratch(&b.a, s->dtype, &p->x, most, s->F));
  LINA_TRY(scratch(&b.dy, s->dtype, &p->x, most, s->D));
  if (p->need & LINA_NEED_DW_UP) LINA_TRY(scratch(&b.x, s->dtype, &p->x, most, s->D));
  if (p->need & LINA_NEED_DX) LINA_TRY(scratch(&b.dx_rows, s->dtype, &p->x, s->N, s->D));
  for (int64_t e = 0; e < s->E; e++) {
    int64_t n = offset[e + 1] - offset[e];
    if (n > 0)
      LINA_TRY(one_expert(p, &b, e, offset[e], n));
    else
      no_rows(p, e);
  }
  if (p->need & LINA_NEED_DX) {
    lina_combine_args args = {.T = s->T,
                              .K = s->K,
                              .D = s->D,
                              .N = s->N,
                              .dtype = s->dtype,
                              .y = b.dx_rows.data,
                              .pair_row = p->pair_row.data,
                              .out = p->dx.data};
    LINA_TRY(lina_combine_fwd_cpu(&args));
  }
done:
  lina_drop(&b.dx_rows);
  lina_drop(&b.a);
  lina_drop(&b.dh);
  lina_drop(&b.da);
  lina_drop(&b.dy);
  lina_drop(&b.x);
  return rc;
}
