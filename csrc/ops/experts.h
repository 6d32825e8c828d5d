/* experts.h - the experts' feed-forward networks over ragged rows.
 *
 * Row r belongs to expert e with offset[e] <= r < offset[e+1] and reads token
 * t = row_pair[r] / K:
 *   h[r,:] = x[t,:] @ w_up[e]^T + b_up[e]           [U]
 *   a[r,:] = activation(h[r,:])                     [F]
 *   y[r,:] = a[r,:] @ w_down[e]^T + b_down[e]       [D]
 * Gated activations have U = 2F: h holds F gate values g and F up values u,
 * gates first, or g0 u0 g1 u1 ... if `interleaved`. Others have U = F.
 *   LINA_SWIGLU          silu(g) * u
 *   LINA_GEGLU           gelu(g) * u            (erf form)
 *   LINA_SWIGLU_CLAMPED  (clamp(u, -limit, limit) + 1) * c * sigmoid(alpha * c),
 *                        c = min(g, limit)      (gpt-oss: alpha 1.702, limit 7)
 *   LINA_GELU, LINA_RELU, LINA_RELU2 (relu squared), LINA_SILU of h
 * Sources: Shazeer 2020, arXiv:2002.05202; So et al. 2021, arXiv:2109.08668
 * (relu squared); gpt-oss model card, arXiv:2508.10925 (clamped form).
 *
 * Backward, dY either given by row ([N,D], weight NULL), or by token with the
 * router's weights w, where dY[r,:] = w[p] * dout[p/K,:], p = row_pair[r]:
 *   da = dY @ w_down[e];  dh = activation'(h) * da
 *   dw_down[e] = sum_r dY[r]^T a[r];   db_down[e] = sum_r dY[r]
 *   dw_up[e]   = sum_r dh[r]^T x[t];   db_up[e]   = sum_r dh[r]
 *   dx[t,:]    = sum_k (dh @ w_up[e])[pair_row[t,k], :]
 *   dweight[p] = <dout[t] @ w_down[e], a[r]> + <dout[t], b_down[e]>
 *                so that y need not be saved; 0 for absent pairs
 * Saved between the passes: x and h. Backward may be had in two calls, so that dx travels
 * while the weights' gradients are computed: the first keeps dh and a, scaled by w, the second
 * is given them and computes no other dh; dweight is the first one's.
 *
 *   x       in  [T,D]    f32, bf16, f16, or (CPU only) f64
 *   offset  in  [E+1] i32;  row_pair in [N] i32;  pair_row in [T,K] i32 (sort.h)
 *   w_up    in  [E,U,D]  as x; any strides with 1 in one of the last two
 *   w_down  in  [E,D,F]  dimensions ([E,D,U] storage is a transposed view)
 *   b_up    in  [E,U], b_down in [E,D]  as x, or NULL
 *   y       out [N,D], h out [N,U] (or [0,U] when not saved)  as x
 *   dw_*    out  strides of w_* if those are [E,U,D] or [E,D,U] without gaps (for
 *                w_down [E,D,F] or [E,F,D]), else contiguous
 *
 * Rows from offset[E] on are not computed and hold unspecified values; nothing
 * in lina reads them. Experts without rows get zero gradients.
 * Products accumulate in float32 (float64 for f64) and round once to x's
 * dtype; activations are computed in float32 (float64).
 * Limits: 1 <= E <= 1024, 1 <= K <= 1024, T*K < 2^31, D and F at least 1.
 * offset[E] <= N <= T*K: who knows offset[E] passes the first so many of
 * row_pair, and memory and products shrink to the pairs that are present.
 * On the CPU indices outside their range are refused; CUDA trusts lina::sort.
 * Stream: asynchronous on torch's current stream; no host read for bf16.
 * Errors: LINA_EINVAL (limits), LINA_ENOTSUP (dtype), LINA_ECUDA (launch),
 *   LINA_ETORCH (a product of torch failed).
 */
#ifndef LINA_OPS_EXPERTS_H
#define LINA_OPS_EXPERTS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum lina_activation {
  LINA_SWIGLU,
  LINA_GEGLU,
  LINA_SWIGLU_CLAMPED,      /* gated: U = 2F */
  LINA_GELU,
  LINA_RELU,
  LINA_RELU2,
  LINA_SILU        /* plain: U = F */
};
static inline int lina_activation_is_gated(int activation) {
  return activation <= LINA_SWIGLU_CLAMPED;
}

/* What the passes share, as plain values. */
typedef struct {
  int64_t T, K, D, F, U, E, N;
  int dtype, activation, interleaved;
  double alpha, limit;
} lina_experts_shape;

/* x rows gathered by pair: out[r,:] = x[row_pair[r]/K, :]. Rows of -1, all behind the
 * others, are neither read nor written. */
typedef struct {
  lina_experts_shape s;
  const void *x;                 /* [T,D] rows contiguous */
  const int32_t *row_pair;
  void *out;                     /* [N,D] */
} lina_gather_args;

/* a = activation(h + b_up[e]); h is updated in place by the bias. */
typedef struct {
  lina_experts_shape s;
  const int32_t *offset;
  void *h;                       /* [N,U] */
  const void *b_up;              /* [E,U] or NULL */
  void *a;                       /* [N,F] */
} lina_activate_args;

/* From da' = dY_token @ w_down (before the router's weight w):
 * dh = activation'(h) * w * da';  a = activation(h) * w;
 * dweight[p] = <da', a> + <dout[p/K], b_down[e]>.   w = 1 if weight is NULL. */
typedef struct {
  lina_experts_shape s;
  const int32_t *offset, *row_pair;
  const void *h, *da;            /* [N,U], [N,F] */
  const void *weight;            /* [T,K] float32/float64, or NULL */
  const void *dout, *b_down;     /* for dweight's bias term, or NULL */
  void *dh, *a;                  /* [N,U], [N,F]; dh may be h, a may be da */
  void *dweight;                 /* [T,K] float32/float64, or NULL */
} lina_activate_bwd_args;

/* db[e,:] = sum over rows of expert e of v[r,:] * w; `v` by row, or by token
 * through row_pair when `by_token`. Fixed order. */
typedef struct {
  lina_experts_shape s;
  int64_t width;
  int by_token;
  const int32_t *offset, *row_pair;
  const void *v, *weight;
  void *db;                      /* [E,width] */
} lina_bias_bwd_args;

/* y[r,:] += b[e,:] for every row. */
typedef struct {
  lina_experts_shape s;
  int64_t width;
  const int32_t *offset;
  const void *b;
  void *y;
} lina_bias_args;

int lina_gather_cuda(const lina_gather_args *a, void *stream);
int lina_activate_cuda(const lina_activate_args *a, void *stream);
int lina_activate_bwd_cuda(const lina_activate_bwd_args *a, void *stream);
int lina_bias_cuda(const lina_bias_args *a, void *stream);
int lina_bias_bwd_cuda(const lina_bias_bwd_args *a, void *stream);

/* Zeroes the slices of out [E, bytes] whose expert has no rows: torch's grouped
 * product leaves them as they were on some GPUs (seen on Blackwell, pytorch issue
 * 172439). bytes is a multiple of 16, out aligned to 16. */
typedef struct {
  int64_t E, bytes;
  const int32_t *offset;
  void *out;
} lina_clear_empty_args;
int lina_clear_empty_cuda(const lina_clear_empty_args *a, void *stream);

/* General grouped products, every dtype, size and stride, one warp tile a
 * block: where torch's grouped product does not apply. All row-major views:
 *   rows:  out[r,:] = in[r,:] @ w[e]^T      w [E, out_width, in_width], strided
 *   inner: out[e]   = u[rows of e]^T @ v[rows of e]   [E, u_width, v_width], strided */
typedef struct {
  int64_t N, E, in_width, out_width;
  int dtype;
  const int32_t *offset;
  const void *in;                /* [N, in_width] contiguous */
  const void *w;
  int64_t w_stride[3];           /* of e, out, in; in elements */
  void *out;                     /* [N, out_width] contiguous */
} lina_grouped_rows_args;
typedef struct {
  int64_t N, E, u_width, v_width;
  int dtype;
  const int32_t *offset;
  const void *u, *v;             /* [N, u_width], [N, v_width] contiguous */
  void *out;
  int64_t out_stride[3];
} lina_grouped_inner_args;
int lina_grouped_rows_cuda(const lina_grouped_rows_args *a, void *stream);
int lina_grouped_inner_cuda(const lina_grouped_inner_args *a, void *stream);

#ifdef __cplusplus
}
#endif
#endif
