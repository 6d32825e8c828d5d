/* combine.h - each token's weighted sum of its rows.
 *
 *   out[t,:] = sum_k weight[t,k] * y[pair_row[t,k], :]      k = 0 .. K-1 in order
 *   A row of -1 adds nothing; weight NULL means 1. N <= T*K.
 * Backward:
 *   dy[r,:]      = weight[p] * dout[p / K, :],  p = row_pair[r]
 *   dweight[t,k] = <dout[t,:], y[pair_row[t,k], :]>;  0 where the row is -1
 *   rows with row_pair = -1 get dy = 0.
 *
 *   y         in   [N,D]  f32, bf16, f16, f64 (CPU only); rows contiguous
 *   weight    in   [T,K]  A (float32; float64 for f64 y), or NULL
 *   pair_row  in   [T,K]  i32;  row_pair in [N] i32  (sort.h)
 *   out, dout      [T,D]  as y
 *   dy        out  [N,D]  as y;  dweight out [T,K] A
 *
 * Sums in A, in a fixed order, rounded once: no atomics, bitwise repeatable.
 * The CPU checks every index; the device's kernels trust what lina::sort wrote.
 * Limits: K <= 1024, T*K < 2^31. T = 0 or D = 0 launches nothing.
 * Stream: asynchronous on `stream`.
 * Errors: LINA_EINVAL (limits), LINA_ENOTSUP (dtype), LINA_ECUDA (launch).
 */
#ifndef LINA_OPS_COMBINE_H
#define LINA_OPS_COMBINE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t T, K, D, N;
  int dtype;
  const void *y, *weight;
  const int32_t *pair_row;
  void *out;
} lina_combine_args;

typedef struct {
  int64_t T, K, D, N;
  int dtype;
  const void *dout, *y, *weight;
  const int32_t *pair_row, *row_pair;
  void *dy, *dweight;            /* dweight NULL: not wanted */
} lina_combine_bwd_args;

int lina_combine_fwd_cpu(const lina_combine_args *a);
int lina_combine_bwd_cpu(const lina_combine_bwd_args *a);
int lina_combine_fwd_cuda(const lina_combine_args *a, void *stream);
int lina_combine_bwd_cuda(const lina_combine_bwd_args *a, void *stream);

#ifdef __cplusplus
}
#endif
#endif
