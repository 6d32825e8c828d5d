/* dispatch.h - who gets which token of a layer whose experts are spread over ranks, and
 * what ranks tell each other of it before rows travel.
 *
 * Expert e lies on rank e / (E / ep). A token is one row to every rank that holds at least
 * one of its K experts; ids outside [0, E) are absent pairs. Rows to rank `me` do not
 * travel: its own tokens (me = -1: every row travels). A degree cuts the tokens into
 * chunks, max(1, degree - 2), and the own ones into ranges, 1, from degree 3 on 2; the
 * i-th of n begins at token ceil(i * T / n).
 *
 *   expert  in   [T,K]    i32  contiguous
 *   said    in   [F]      i64  on the host: what all ranks must have in common
 *   token   out  [R]      i32  token of each row that travels, by chunk, rank, token; -1
 *                              from their number S on. R = T * min(K, ep, less 1 for me)
 *   row     out  [T,ep]   i32  row of each token for each rank, -1: none; column me: S + t
 *   header  out  [ep, F + 2 * LINA_DISPATCH_COLUMNS]  i64, a line for each rank:
 *           said, then columns forward, then backward, each rows by chunk (first
 *           LINA_DISPATCH_CHUNKS), pairs by chunk; in line me pairs by range of own tokens,
 *           no rows; the rest 0
 *
 * Forward and backward have a degree, and token and row, each. Backward's degree 0: none is
 * wanted; its columns are 0. The operator takes a backward degree that equals forward's for
 * 0, and gives empty tensors for what is not wanted.
 *
 * Limits: 1 <= ep <= 1024, E a multiple of ep, E < 2^31, -1 <= me < ep, 1 <= K <= 1024,
 * T*K and T*ep < 2^31, F <= 16, degrees 1 to 8 (backward 0 to 8). T = 0 gives a header.
 * Stream: asynchronous on `stream`; no host read. Integers only: bitwise repeatable.
 * Errors: LINA_EINVAL (limits), LINA_ENOTSUP (dtype, device), LINA_ECUDA (launch).
 */
#ifndef LINA_OPS_DISPATCH_H
#define LINA_OPS_DISPATCH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LINA_DISPATCH_MAX_EP     1024
#define LINA_DISPATCH_MAX_K      1024
#define LINA_DISPATCH_MAX_SAID   16
#define LINA_DISPATCH_MAX_DEGREE 8
#define LINA_DISPATCH_CHUNKS     (LINA_DISPATCH_MAX_DEGREE - 2)
#define LINA_DISPATCH_COLUMNS    (2 * LINA_DISPATCH_CHUNKS)

typedef struct {
  int64_t T, K, E, R;
  int ep, me, facts;             /* facts: F */
  int degree[2];                 /* forward, backward */
  const int32_t *expert;
  int32_t *token[2], *row[2];
  int64_t *header;
  int32_t *partial;              /* scratch: lina_dispatch_partial_count int32 */
  int64_t said[LINA_DISPATCH_MAX_SAID];
} lina_dispatch_args;

/* Parts that a degree cuts other ranks' tokens and this rank's own ones into. */
static inline int lina_dispatch_chunks(int degree) { return degree > 3 ? degree - 2 : 1; }
static inline int lina_dispatch_ranges(int degree) { return degree > 2 ? 2 : 1; }

/* Scratch on the device, in int32: its per-block counts. */
int64_t lina_dispatch_partial_count(const lina_dispatch_args *a);
int lina_dispatch_cpu(const lina_dispatch_args *a);
int lina_dispatch_cuda(const lina_dispatch_args *a, void *stream);

#ifdef __cplusplus
}
#endif
#endif
