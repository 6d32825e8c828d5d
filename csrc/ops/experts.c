/* Boxed wrappers of the experts: unbox, check everything, run the pass of the
 * device, give the results back. Contract: experts.h. The passes themselves:
 * experts_cpu.c, experts_cuda.c.
 */
#include "experts.h"

#include <stddef.h>

#include "experts_pass.h"

enum {
  FLOATS = 1 << LINA_F32 | 1 << LINA_BF16 | 1 << LINA_F16 | 1 << LINA_F64,
  MAX_E = 1024,
  MAX_K = 1024 /* that of combine.h: dx is a combine */
};

/* ---- checks ---- */

static bool has_unit_stride(const lina_tensor *w) { return w->stride[1] == 1 || w->stride[2] == 1; }

static int check_vector(const char *op, const char *name, const lina_tensor *t,
                        const lina_tensor *like, int dim, int dtype) {
  int rc = lina_check(op, name, t, dim, 1u << dtype);
  return rc != LINA_OK ? rc : lina_check_device(op, name, t, like);
}

static int check_matrix(const char *op, const char *name, const lina_tensor *t,
                        const lina_tensor *like, int dtype, int64_t rows, int64_t cols) {
  int rc = check_vector(op, name, t, like, 2, dtype);
  if (rc == LINA_OK) rc = lina_check_size(op, name, t, 0, rows);
  if (rc == LINA_OK) rc = lina_check_size(op, name, t, 1, cols);
  return rc;
}

static int check_activation(const char *op, int64_t activation, lina_experts_shape *s) {
  if (activation < 0 || activation > LINA_SILU)
    return lina_error(LINA_EINVAL, "%s: activation is %lld, must be 0 to %d", op,
                      (long long)activation, LINA_SILU);
  s->activation = (int)activation;
  return LINA_OK;
}

/* x, the indices and the weights fit together; fills `s`, K and activation of
 * which are already there. */
static int check(const char *op, lina_experts_shape *s, const lina_tensor *x,
                 const lina_tensor *offset, const lina_tensor *row_pair, const lina_tensor *w_up,
                 const lina_tensor *w_down) {
  int rc;
  LINA_TRY(lina_check(op, "x", x, 2, FLOATS));
  if (x->dtype == LINA_F64 && x->device != LINA_ON_CPU)
    LINA_FAIL(LINA_ENOTSUP, "%s: x is of float64, which only the CPU takes", op);
  LINA_TRY(check_vector(op, "w_up", w_up, x, 3, x->dtype));
  LINA_TRY(check_vector(op, "w_down", w_down, x, 3, x->dtype));
  LINA_TRY(check_vector(op, "offset", offset, x, 1, LINA_I32));
  LINA_TRY(check_vector(op, "row_pair", row_pair, x, 1, LINA_I32));
  s->T = x->size[0], s->D = x->size[1], s->dtype = x->dtype;
  s->E = w_up->size[0], s->U = w_up->size[1], s->F = w_down->size[2];
  if (s->E < 1 || s->E > MAX_E)
    LINA_FAIL(LINA_EINVAL, "%s: w_up.shape[0] (experts) is %lld, must be 1 to %d", op,
              (long long)s->E, MAX_E);
  if (s->D < 1 || s->F < 1)
    LINA_FAIL(LINA_EINVAL, "%s: widths D = %lld, F = %lld, must be at least 1", op, (long long)s->D,
              (long long)s->F);
  if (s->K < 1 || s->K > MAX_K || (s->T > 0 && s->K > INT32_MAX / s->T))
    LINA_FAIL(LINA_EINVAL,
              "%s: k is %lld with %lld tokens, must be 1 to 1024 and their "
              "product below 2^31",
              op, (long long)s->K, (long long)s->T);
  s->N = row_pair->size[0];
  if (s->N > s->T * s->K)
    LINA_FAIL(LINA_EINVAL, "%s: row_pair.shape[0] is %lld, must be at most the %lld pairs", op,
              (long long)s->N, (long long)(s->T * s->K));
  int64_t U = lina_activation_is_gated(s->activation) ? 2 * s->F : s->F;
  LINA_TRY(lina_check_size(op, "w_up", w_up, 1, U));
  LINA_TRY(lina_check_size(op, "w_up", w_up, 2, s->D));
  LINA_TRY(lina_check_size(op, "w_down", w_down, 0, s->E));
  LINA_TRY(lina_check_size(op, "w_down", w_down, 1, s->D));
  LINA_TRY(lina_check_size(op, "offset", offset, 0, s->E + 1));
done:
  return rc;
}

/* On the CPU an index outside its range is an error rather than a wild read.
 * The device's kernels trust what lina::sort wrote: checking would need a host
 * read. Needs contiguous indices; pair_row may be NULL. */
static int check_indices(const char *op, const lina_experts_shape *s, const lina_tensor *offset,
                         const lina_tensor *row_pair, const lina_tensor *pair_row) {
  if (offset->device != LINA_ON_CPU) return LINA_OK;
  const int32_t *o = offset->data, *p = row_pair->data;
  for (int64_t e = 0; e <= s->E; e++)
    if (o[e] < (e ? o[e - 1] : 0) || o[e] > s->N || (e == 0 && o[e] != 0))
      return lina_error(LINA_EINVAL, "%s: offset[%lld] is %d, must rise from 0 to at most %lld", op,
                        (long long)e, o[e], (long long)s->N);
  for (int64_t r = 0; r < o[s->E]; r++)
    if (p[r] < 0 || p[r] >= s->T * s->K)
      return lina_error(LINA_EINVAL, "%s: row_pair[%lld] is %d, must be 0 to %lld", op,
                        (long long)r, p[r], (long long)(s->T * s->K) - 1);
  const int32_t *q = pair_row ? pair_row->data : NULL;
  for (int64_t i = 0; q && i < s->T * s->K; i++)
    if (q[i] < -1 || q[i] >= o[s->E])
      return lina_error(LINA_EINVAL, "%s: pair_row[%lld] is %d, must be -1 to %d", op, (long long)i,
                        q[i], o[s->E] - 1);
  return LINA_OK;
}

static int make_usable(lina_tensor *w) {
  return has_unit_stride(w) ? LINA_OK : lina_make_contiguous(w);
}

#if !LINA_CUDA
static int on_gpu(const char *op) {
  return lina_error(LINA_ENOTSUP, "%s: lina was built without CUDA", op);
}
#endif

/* ---- boxed ---- */

/* Argument order: register.c. */
void lina_experts_fwd_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts) {
  (void)nargs, (void)nouts;
  static const char op[] = "experts";
  lina_experts_fwd p = {0};
  lina_scope scope = {0};
  int taken[] = {lina_take(stack[0], &p.x),
                 lina_take(stack[1], &p.offset),
                 lina_take(stack[2], &p.row_pair),
                 lina_take(stack[3], &p.w_up),
                 lina_take_optional(stack[4], &p.b_up),
                 lina_take(stack[5], &p.w_down),
                 lina_take_optional(stack[6], &p.b_down)};
  int64_t activation = lina_take_int(stack[8]), none[2] = {0, 0};
  int rc = LINA_OK;
  for (unsigned i = 0; i < sizeof taken / sizeof *taken && rc == LINA_OK; i++) rc = taken[i];
  if (rc != LINA_OK) goto done;
  p.s.K = lina_take_int(stack[7]);
  LINA_TRY(check_activation(op, activation, &p.s));
  p.s.interleaved = lina_take_bool(stack[9]);
  p.s.alpha = lina_take_double(stack[10]);
  p.s.limit = lina_take_double(stack[11]);
  p.save = lina_take_bool(stack[12]);
  LINA_TRY(check(op, &p.s, &p.x, &p.offset, &p.row_pair, &p.w_up, &p.w_down));
  if (p.b_up.handle) LINA_TRY(check_matrix(op, "b_up", &p.b_up, &p.x, p.s.dtype, p.s.E, p.s.U));
  if (p.b_down.handle)
    LINA_TRY(check_matrix(op, "b_down", &p.b_down, &p.x, p.s.dtype, p.s.E, p.s.D));
  LINA_TRY(lina_enter(&p.x, &scope));
  LINA_TRY(lina_make_contiguous(&p.x));
  LINA_TRY(lina_make_contiguous(&p.offset));
  LINA_TRY(lina_make_contiguous(&p.row_pair));
  LINA_TRY(make_usable(&p.w_up));
  LINA_TRY(make_usable(&p.w_down));
  if (p.b_up.handle) LINA_TRY(lina_make_contiguous(&p.b_up));
  if (p.b_down.handle) LINA_TRY(lina_make_contiguous(&p.b_down));
  LINA_TRY(check_indices(op, &p.s, &p.offset, &p.row_pair, NULL));
  if (p.x.device == LINA_ON_CPU)
    LINA_TRY(lina_experts_fwd_cpu(&p));
  else
#if LINA_CUDA
    LINA_TRY(lina_experts_fwd_cuda(&p, scope.stream));
#else
    LINA_TRY(on_gpu(op));
#endif
  none[1] = p.s.U;
  if (!p.h.handle) LINA_TRY(lina_empty(&p.h, p.s.dtype, &p.x, 2, none));
  stack[0] = lina_give(&p.y);
  stack[1] = lina_give(&p.h);
done:
  lina_leave(&scope);
  lina_drop(&p.h);
  lina_drop(&p.y);
  lina_drop(&p.b_down);
  lina_drop(&p.w_down);
  lina_drop(&p.b_up);
  lina_drop(&p.w_up);
  lina_drop(&p.row_pair);
  lina_drop(&p.offset);
  lina_drop(&p.x);
  if (rc != LINA_OK) lina_throw(rc);
}

/* What only the backward pass takes. */
static int check_bwd(const char *op, const lina_experts_bwd *p) {
  const lina_experts_shape *s = &p->s;
  int rc;
  LINA_TRY(check_matrix(op, "h", &p->h, &p->x, s->dtype, s->N, s->U));
  LINA_TRY(check_matrix(op, "dy", &p->dy, &p->x, s->dtype, p->weight.handle ? s->T : s->N, s->D));
  if (p->weight.handle)
    LINA_TRY(check_matrix(op, "weight", &p->weight, &p->x, lina_sum_dtype(s->dtype), s->T, s->K));
  else if (p->need & LINA_NEED_DWEIGHT)
    LINA_FAIL(LINA_EINVAL, "%s: need asks for dweight, but weight is None", op);
  if (p->b_down.handle)
    LINA_TRY(check_matrix(op, "b_down", &p->b_down, &p->x, s->dtype, s->E, s->D));
  if (!p->kept_dh.handle != !p->kept_a.handle)
    LINA_FAIL(LINA_EINVAL, "%s: one of dh and a is None, both or neither must be", op);
  if (p->kept_dh.handle) {
    LINA_TRY(check_matrix(op, "dh", &p->kept_dh, &p->x, s->dtype, s->N, s->U));
    LINA_TRY(check_matrix(op, "a", &p->kept_a, &p->x, s->dtype, s->N, s->F));
    if (p->need & (LINA_NEED_DWEIGHT | LINA_NEED_KEPT))
      LINA_FAIL(LINA_EINVAL, "%s: need is %d, must be without %d and %d where dh and a are given",
                op, p->need, LINA_NEED_DWEIGHT, LINA_NEED_KEPT);
  }
  rc = LINA_OK;
done:
  return rc;
}

void lina_experts_bwd_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts) {
  (void)nargs, (void)nouts;
  static const char op[] = "experts_bwd";
  lina_experts_bwd p = {0};
  lina_tensor *const in[] = {&p.dy,       &p.weight, &p.x,      &p.h,      &p.offset,  &p.row_pair,
                             &p.pair_row, &p.w_up,   &p.w_down, &p.b_down, &p.kept_dh, &p.kept_a};
  lina_tensor *const out[] = {&p.dx,      &p.dweight, &p.dw_up, &p.db_up,
                              &p.dw_down, &p.db_down, &p.dh,    &p.a};
  enum { IN = sizeof in / sizeof *in, OUT = sizeof out / sizeof *out };
  lina_scope scope = {0};
  int64_t activation = lina_take_int(stack[12]), need = lina_take_int(stack[16]), none = 0;
  int rc = LINA_OK;
  for (int i = 0; i < IN; i++) {
    bool optional = in[i] == &p.weight || in[i] == &p.b_down || i >= IN - 2;
    int one = optional ? lina_take_optional(stack[i], in[i]) : lina_take(stack[i], in[i]);
    if (rc == LINA_OK) rc = one;
  }
  if (rc != LINA_OK) goto done;
  LINA_TRY(check_activation(op, activation, &p.s));
  p.s.interleaved = lina_take_bool(stack[13]);
  p.s.alpha = lina_take_double(stack[14]);
  p.s.limit = lina_take_double(stack[15]);
  if (need < 0 || need > 127)
    LINA_FAIL(LINA_EINVAL, "%s: need is %lld, must be 0 to 127", op, (long long)need);
  p.need = (int)need;
  LINA_TRY(check_vector(op, "pair_row", &p.pair_row, &p.x, 2, LINA_I32));
  p.s.K = p.pair_row.size[1];
  LINA_TRY(check(op, &p.s, &p.x, &p.offset, &p.row_pair, &p.w_up, &p.w_down));
  LINA_TRY(lina_check_size(op, "pair_row", &p.pair_row, 0, p.s.T));
  LINA_TRY(check_bwd(op, &p));
  LINA_TRY(lina_enter(&p.x, &scope));
  for (int i = 0; i < IN; i++)
    if (in[i]->handle)
      LINA_TRY(in[i] == &p.w_up || in[i] == &p.w_down ? make_usable(in[i])
                                                      : lina_make_contiguous(in[i]));
  LINA_TRY(check_indices(op, &p.s, &p.offset, &p.row_pair, &p.pair_row));
  if (p.x.device == LINA_ON_CPU)
    LINA_TRY(lina_experts_bwd_cpu(&p));
  else
#if LINA_CUDA
    LINA_TRY(lina_experts_bwd_cuda(&p, scope.stream));
#else
    LINA_TRY(on_gpu(op));
#endif
  for (int i = 0; i < OUT; i++)
    if (!out[i]->handle)
      LINA_TRY(lina_empty(out[i], out[i] == &p.dweight ? lina_sum_dtype(p.s.dtype) : p.s.dtype,
                          &p.x, 1, &none));
  for (int i = 0; i < OUT; i++) stack[i] = lina_give(out[i]);
done:
  lina_leave(&scope);
  for (int i = 0; i < OUT; i++) lina_drop(out[i]);
  for (int i = 0; i < IN; i++) lina_drop(in[i]);
  if (rc != LINA_OK) lina_throw(rc);
}
