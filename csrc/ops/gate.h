/* gate.h - each token's K best experts, their weights, and routing statistics.
 *
 * Scores s[t,e] of logits l[t,e]:
 *   LINA_SOFTMAX        s = softmax(l[t,:])          (top-k of a softmax)
 *   LINA_TOPK_SOFTMAX   s = softmax over the K chosen logits only
 *   LINA_SIGMOID        s = sigmoid(l)
 * Choice: the K largest keys, largest first; equal keys: lower id first.
 *   key = l without bias or groups; with either, key = s + bias[e], where the
 *   s of LINA_TOPK_SOFTMAX is l itself. NaN keys rank as -inf. -0 equals +0.
 *   With groups G > 1 the E experts form G runs of E/G; a group's score is the
 *   sum of its two largest keys (group_top = 2; its only key if E/G = 1) or
 *   its largest key (group_top = 1); only the best `top_groups` groups
 *   take part (equal scores: lower group first; a NaN score ranks as -inf).
 *   If they hold too few non--inf keys the rest is filled by rank as usual.
 * Weights: w[t,k] = s[t, expert[t,k]], divided by their sum (+ 1e-20 for
 *   LINA_SIGMOID) if `renorm`, then times `scale`. The bias never enters w.
 * Ids are always in [0, E) and distinct within a token, whatever the logits;
 *   weights follow IEEE arithmetic, so a NaN or +inf logit that takes part in
 *   a token's softmax makes that token's weights NaN.
 *
 * Statistics (stats != 0), for the losses and the bias update:
 *   load[0,e] = number of (t,k) with expert[t,k] = e;  load[1,e]: k = 0 only
 *   stat[e]   = sum_t p[t,e], p = softmax(l[t,:]), or for LINA_SIGMOID
 *               s[t,e] / sum_j s[t,j]
 *               (NaN for a token whose scores all underflow to 0)
 *   stat[E]   = sum_t logsumexp(l[t,:])^2
 *
 * Backward: dlogits from dweight and dstat (either may be absent), recomputing
 *   the scores from the logits. The choice itself has no gradient. An id outside
 *   [0, E), which the forward never gives, gets none; its token's other weights
 *   may lose theirs.
 *
 * Sources: Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5 (no noise term);
 *   Fedus et al. 2021, arXiv:2101.03961, eq. 2, 4-6; Zoph et al. 2022,
 *   arXiv:2202.08906, eq. 5; DeepSeek-V3, arXiv:2412.19437, eq. 12-16.
 *
 *   logits  in   [T,E]  f32, bf16, f16, or (CPU only) f64; rows contiguous
 *   bias    in   [E]    A, or NULL
 *   weight  out  [T,K]  A      A: float32; float64 for f64 logits
 *   expert  out  [T,K]  i32
 *   load    out  [2,E]  i32    only with stats
 *   stat    out  [E+1]  A      only with stats
 *   dweight in   [T,K]  A, or NULL;  dstat in [E+1] A, or NULL
 *   dlogits out  [T,E]  as logits
 *
 * All arithmetic is in A. Sums over tokens run in a fixed order: results are
 * bitwise repeatable on one machine and thread count.
 * Limits: 1 <= K <= 32, K <= E <= 1024, T*E < 2^31, G divides E,
 *   1 <= top_groups <= G, top_groups * E/G >= K. T = 0 launches nothing
 *   (statistics are then zero).
 * Stream: asynchronous on `stream`; never synchronises.
 * Errors: LINA_EINVAL (limits), LINA_ENOTSUP (dtype), LINA_ECUDA (launch).
 */
#ifndef LINA_OPS_GATE_H
#define LINA_OPS_GATE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum lina_score { LINA_SOFTMAX, LINA_TOPK_SOFTMAX, LINA_SIGMOID };

#define LINA_GATE_MAX_K 32
#define LINA_GATE_MAX_E 1024

typedef struct {
  int64_t T, E, K;
  int dtype;                     /* lina_dtype of logits */
  int score, renorm;             /* lina_score; 0 or 1 */
  int groups, top_groups, group_top;
  double scale;
  const void *logits, *bias;
  void *weight;
  int32_t *expert;
  int32_t *load;                 /* NULL: no statistics */
  void *stat;
  void *partial;                 /* CUDA: scratch of lina_gate_partial_bytes */
} lina_gate_args;

typedef struct {
  int64_t T, E, K;
  int dtype, score, renorm;
  double scale;
  const void *logits;
  const int32_t *expert;
  const void *dweight, *dstat;   /* each may be NULL */
  void *dlogits;
} lina_gate_bwd_args;

int lina_gate_fwd_cpu(const lina_gate_args *a);
int lina_gate_bwd_cpu(const lina_gate_bwd_args *a);

/* Device scratch that a forward with statistics needs. */
int64_t lina_gate_partial_bytes(int64_t T, int64_t E);
int lina_gate_fwd_cuda(const lina_gate_args *a, void *stream);
int lina_gate_bwd_cuda(const lina_gate_bwd_args *a, void *stream);

#ifdef __cplusplus
}
#endif
#endif
