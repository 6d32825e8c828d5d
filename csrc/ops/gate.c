/* gate.c - torch.ops.lina.gate_fwd and gate_bwd: checks, allocation, dispatch. */
#include "gate.h"

#include <stddef.h>

#include "../tensor.h"

#define LOGITS (1u << LINA_F32 | 1u << LINA_BF16 | 1u << LINA_F16)

/* What both passes ask of the logits; float64 is for the CPU only. */
static int check_logits(const lina_tensor *logits) {
  const unsigned mask = logits->device == LINA_ON_CUDA ? LOGITS : LOGITS | 1u << LINA_F64;
  int rc = lina_check("gate", "logits", logits, 2, mask);
  if (rc != LINA_OK) return rc;
  const int64_t T = logits->size[0], E = logits->size[1];
  if (E < 1 || E > LINA_GATE_MAX_E)
    return lina_error(LINA_EINVAL, "gate: logits have E=%lld experts, limit 1..%d", (long long)E,
                      LINA_GATE_MAX_E);
  if (T > (INT32_MAX / E))
    return lina_error(LINA_EINVAL, "gate: logits have T*E=%lld*%lld elements, limit 2^31-1",
                      (long long)T, (long long)E);
  return LINA_OK;
}

static int check_choice(int64_t k, int64_t E, int64_t score) {
  if (k < 1 || k > LINA_GATE_MAX_K || k > E)
    return lina_error(LINA_EINVAL, "gate: top_k=%lld of E=%lld experts, limit 1..min(E, %d)",
                      (long long)k, (long long)E, LINA_GATE_MAX_K);
  if (score < LINA_SOFTMAX || score > LINA_SIGMOID)
    return lina_error(LINA_EINVAL, "gate: score=%lld, limit 0..%d", (long long)score, LINA_SIGMOID);
  return LINA_OK;
}

static int check_groups(int64_t groups, int64_t top_groups, int64_t group_top, int64_t k,
                        int64_t E) {
  if (groups < 1 || groups > E || E % groups != 0)
    return lina_error(LINA_EINVAL, "gate: groups=%lld, must divide E=%lld", (long long)groups,
                      (long long)E);
  if (top_groups < 1 || top_groups > groups)
    return lina_error(LINA_EINVAL, "gate: top_groups=%lld, limit 1..groups=%lld",
                      (long long)top_groups, (long long)groups);
  if (top_groups * (E / groups) < k)
    return lina_error(LINA_EINVAL, "gate: top_groups=%lld hold %lld experts, fewer than top_k=%lld",
                      (long long)top_groups, (long long)(top_groups * (E / groups)), (long long)k);
  if (group_top != 1 && group_top != 2)
    return lina_error(LINA_EINVAL, "gate: group_top=%lld, limit 1..2", (long long)group_top);
  return LINA_OK;
}

/* A vector or matrix beside the logits: present, of `dtype`, [rows,] cols, contiguous afterwards. */
static int check_beside(const char *name, lina_tensor *t, const lina_tensor *logits, int dtype,
                        int dim, int64_t rows, int64_t cols) {
  int rc;
  LINA_TRY(lina_check("gate", name, t, dim, 1u << dtype));
  LINA_TRY(lina_check_device("gate", name, t, logits));
  if (dim == 2) LINA_TRY(lina_check_size("gate", name, t, 0, rows));
  LINA_TRY(lina_check_size("gate", name, t, dim - 1, cols));
  LINA_TRY(lina_make_contiguous(t));
done:
  return rc;
}

static int run_fwd(lina_gate_args *a, const lina_tensor *logits, void *stream) {
  if (logits->device == LINA_ON_CPU) return lina_gate_fwd_cpu(a);
#if LINA_CUDA
  lina_tensor partial = {0};
  int64_t bytes = a->load ? lina_gate_partial_bytes(a->T, a->E) : 0, count = (bytes + 3) / 4;
  int rc = LINA_OK;
  if (count > 0) {
    LINA_TRY(lina_empty(&partial, LINA_I32, logits, 1, &count));
    a->partial = partial.data;
  }
  LINA_TRY(lina_gate_fwd_cuda(a, stream));
done:
  lina_drop(&partial); /* the allocator reuses it on this stream only */
  return rc;
#else
  (void)stream;
  return lina_error(LINA_ENOTSUP, "gate: logits are not on the CPU, and this build has no CUDA");
#endif
}

void lina_gate_fwd_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts) {
  (void)nargs, (void)nouts;
  lina_tensor logits = {0}, bias = {0}, weight = {0}, expert = {0}, load = {0}, stat = {0};
  lina_scope scope = {0};
  int taken[2] = {lina_take(stack[0], &logits), lina_take_optional(stack[1], &bias)};
  const int64_t K = lina_take_int(stack[2]), score = lina_take_int(stack[3]);
  const bool renorm = lina_take_bool(stack[4]), stats = lina_take_bool(stack[9]);
  const double scale = lina_take_double(stack[5]);
  const int64_t groups = lina_take_int(stack[6]), top_groups = lina_take_int(stack[7]);
  const int64_t group_top = lina_take_int(stack[8]);
  int rc;

  for (int i = 0; i < 2; i++) LINA_TRY(taken[i]);
  LINA_TRY(check_logits(&logits));
  const int64_t T = logits.size[0], E = logits.size[1];
  const int acc = lina_sum_dtype(logits.dtype);
  LINA_TRY(check_choice(K, E, score));
  LINA_TRY(check_groups(groups, top_groups, group_top, K, E));
  LINA_TRY(lina_enter(&logits, &scope));
  if (bias.handle) LINA_TRY(check_beside("bias", &bias, &logits, acc, 1, 0, E));
  LINA_TRY(lina_make_contiguous(&logits));
  LINA_TRY(lina_empty(&weight, acc, &logits, 2, (int64_t[]){T, K}));
  LINA_TRY(lina_empty(&expert, LINA_I32, &logits, 2, (int64_t[]){T, K}));
  LINA_TRY(lina_empty(&load, LINA_I32, &logits, 2, (int64_t[]){2, stats ? E : 0}));
  LINA_TRY(lina_empty(&stat, acc, &logits, 1, (int64_t[]){stats ? E + 1 : 0}));

  lina_gate_args args = {
      .T = T,
      .E = E,
      .K = K,
      .dtype = logits.dtype,
      .score = (int)score,
      .renorm = renorm,
      .groups = (int)groups,
      .top_groups = (int)top_groups,
      .group_top = (int)group_top,
      .scale = scale,
      .logits = logits.data,
      .bias = bias.handle ? bias.data : NULL,
      .weight = weight.data,
      .expert = expert.data,
      .load = stats ? load.data : NULL,
      .stat = stats ? stat.data : NULL,
  };
  LINA_TRY(run_fwd(&args, &logits, scope.stream));
  stack[0] = lina_give(&weight);
  stack[1] = lina_give(&expert);
  stack[2] = lina_give(&load);
  stack[3] = lina_give(&stat);
done:
  lina_drop(&stat);
  lina_drop(&load);
  lina_drop(&expert);
  lina_drop(&weight);
  lina_drop(&bias);
  lina_drop(&logits);
  lina_leave(&scope);
  if (rc != LINA_OK) lina_throw(rc);
}

static int run_bwd(const lina_gate_bwd_args *a, const lina_tensor *logits, void *stream) {
  if (logits->device == LINA_ON_CPU) return lina_gate_bwd_cpu(a);
#if LINA_CUDA
  return lina_gate_bwd_cuda(a, stream);
#else
  (void)stream;
  return lina_error(LINA_ENOTSUP, "gate: logits are not on the CPU, and this build has no CUDA");
#endif
}

void lina_gate_bwd_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts) {
  (void)nargs, (void)nouts;
  lina_tensor logits = {0}, expert = {0}, dweight = {0}, dstat = {0}, dlogits = {0};
  lina_scope scope = {0};
  int taken[4] = {lina_take(stack[0], &logits), lina_take(stack[1], &expert),
                  lina_take_optional(stack[2], &dweight), lina_take_optional(stack[3], &dstat)};
  const int64_t score = lina_take_int(stack[4]);
  const bool renorm = lina_take_bool(stack[5]);
  const double scale = lina_take_double(stack[6]);
  int rc;

  for (int i = 0; i < 4; i++) LINA_TRY(taken[i]);
  LINA_TRY(check_logits(&logits));
  const int64_t T = logits.size[0], E = logits.size[1];
  const int acc = lina_sum_dtype(logits.dtype);
  LINA_TRY(lina_check("gate", "expert", &expert, 2, 1u << LINA_I32));
  const int64_t K = expert.size[1];
  LINA_TRY(check_choice(K, E, score));
  LINA_TRY(lina_enter(&logits, &scope));
  LINA_TRY(check_beside("expert", &expert, &logits, LINA_I32, 2, T, K));
  if (dweight.handle) LINA_TRY(check_beside("dweight", &dweight, &logits, acc, 2, T, K));
  if (dstat.handle) LINA_TRY(check_beside("dstat", &dstat, &logits, acc, 1, 0, E + 1));
  LINA_TRY(lina_make_contiguous(&logits));
  LINA_TRY(lina_empty(&dlogits, logits.dtype, &logits, 2, (int64_t[]){T, E}));

  lina_gate_bwd_args args = {
      .T = T,
      .E = E,
      .K = K,
      .dtype = logits.dtype,
      .score = (int)score,
      .renorm = renorm,
      .scale = scale,
      .logits = logits.data,
      .expert = expert.data,
      .dweight = dweight.handle ? dweight.data : NULL,
      .dstat = dstat.handle ? dstat.data : NULL,
      .dlogits = dlogits.data,
  };
  LINA_TRY(run_bwd(&args, &logits, scope.stream));
  stack[0] = lina_give(&dlogits);
done:
  lina_drop(&dlogits);
  lina_drop(&dstat);
  lina_drop(&dweight);
  lina_drop(&expert);
  lina_drop(&logits);
  lina_leave(&scope);
  if (rc != LINA_OK) lina_throw(rc);
}
