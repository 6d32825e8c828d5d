/* experts_pass.h - one pass of the experts as its devices see it: experts.c
 * checks and fills the inputs, experts_cpu.c or experts_cuda.c allocates and
 * computes the outputs. Inputs other than the weights are contiguous; weights
 * have stride 1 in one of the last two dimensions. Whatever a pass leaves in
 * its outputs, experts.c gives to torch or drops.
 */
#ifndef LINA_OPS_EXPERTS_PASS_H
#define LINA_OPS_EXPERTS_PASS_H

#include "../tensor.h"
#include "experts.h"

enum {
  LINA_NEED_DX = 1,
  LINA_NEED_DWEIGHT = 2,
  LINA_NEED_DW_UP = 4,
  LINA_NEED_DB_UP = 8,
  LINA_NEED_DW_DOWN = 16,
  LINA_NEED_DB_DOWN = 32,
  LINA_NEED_KEPT = 64 /* dh and a, from which the weights' gradients can be had later */
};

typedef struct {
  lina_experts_shape s;
  bool save;                                          /* h is wanted */
  lina_tensor x, offset, row_pair, w_up, b_up, w_down, b_down;
  lina_tensor y, h;
} lina_experts_fwd;

typedef struct {
  lina_experts_shape s;
  int need;                                           /* LINA_NEED_* */
  lina_tensor dy, weight, x, h, offset, row_pair, pair_row, w_up, w_down, b_down;
  lina_tensor kept_dh, kept_a;                        /* of an earlier call, or neither */
  lina_tensor dx, dweight, dw_up, db_up, dw_down, db_down, dh, a;
} lina_experts_bwd;

/* LINA_ENOTSUP where float64 comes to CUDA; otherwise what experts.h says. */
int lina_experts_fwd_cpu(lina_experts_fwd *p);
int lina_experts_bwd_cpu(lina_experts_bwd *p);
int lina_experts_fwd_cuda(lina_experts_fwd *p, void *stream);
int lina_experts_bwd_cuda(lina_experts_bwd *p, void *stream);

#endif
