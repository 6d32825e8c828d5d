/* sort.h - token-expert pairs in order of their expert: a stable counting sort.
 *
 * Pair p = t*K + k goes to expert[t,k]. Rows are the pairs with
 * 0 <= expert < E, ordered by expert, then by p. Any other id is an absent
 * pair, which gets no row (expert parallelism marks foreign experts by -1).
 *
 *   expert    in   [T,K]  i32  contiguous
 *   offset    out  [E+1]  i32  rows of expert e: offset[e] .. offset[e+1]
 *   row_pair  out  [T*K]  i32  pair of each row; -1 from offset[E] on
 *   pair_row  out  [T,K]  i32  row of each pair; -1 if absent
 *
 * Limits: 1 <= E <= 1024, 1 <= K <= 1024, T*K < 2^31. T = 0 gives zero offsets.
 * Stream: asynchronous on `stream`; no host read.
 * Errors: LINA_EINVAL (limits), LINA_ECUDA (launch).
 */
#ifndef LINA_OPS_SORT_H
#define LINA_OPS_SORT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LINA_SORT_MAX_E 1024

typedef struct {
  int64_t T, K, E;
  const int32_t *expert;
  int32_t *offset, *row_pair, *pair_row;
  int32_t *partial;              /* scratch: lina_sort_partial_count int32 */
} lina_sort_args;

/* Scratch of the device's sort, in int32: its per-block counts. */
int64_t lina_sort_partial_count(int64_t T, int64_t K, int64_t E);
int lina_sort_cpu(const lina_sort_args *a);
int lina_sort_cuda(const lina_sort_args *a, void *stream);

#ifdef __cplusplus
}
#endif
#endif
