/* policy.h - which piece of which gradient may travel now.
 *
 * Gradients (buckets) are cut into micro-ops. Buckets go first-in first-out,
 * the pieces of one in order, one micro-op at a time:
 *
 *   size   = the most bytes that `reduce` moves in max(micro_op_s, 2 * alpha),
 *            rounded down to a multiple of `unit`, at least one `unit`
 *   piece  = size, or all that is left where less than size/2 would remain
 *   start  when no micro-op runs and no a2a is queued, running or imminent
 *
 * A running micro-op is not interrupted: an a2a waits for at most one. The same
 * code decides for a queue on the host, cuts for a queue on the device and runs
 * in the simulator. What to cut depends on the arguments of lina_policy_init
 * alone, which all ranks must share; when to start is each rank's own.
 *
 * Source: Lina's training scheduler, arXiv:2210.17223. Differs: micro-ops are
 * sized in time (the paper: 30 MB on every link); the last takes up a small
 * remainder; a bucket may hold several gradients. The bound 2 * alpha keeps a
 * micro-op from spending more on latency than on bytes.
 *
 * Cost: every decision takes constant time; submit grows its ring by doubling.
 * One thread at a time.
 */
#ifndef LINA_PLAN_POLICY_H
#define LINA_PLAN_POLICY_H

#include <stdint.h>

#include "link.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  /* What init was given, and what follows from it. */
  lina_link reduce;              /* seconds of a reduction over its bytes */
  double micro_op_s;
  int64_t unit;                  /* bytes */
  int64_t size;                  /* bytes of a full micro-op; INT64_MAX: never cut */
  /* For reading. */
  int64_t outstanding;           /* a2a's queued, running or imminent */
  int64_t pending;               /* buckets that have not finished */
  int64_t pending_bytes;         /* bytes that no micro-op has taken yet */
  int64_t started;               /* micro-ops since init */
  int running;                   /* 1 while a micro-op runs */
  /* The ring of pending buckets: bucket `first_id` is bytes[head]. */
  int64_t *bytes;
  int64_t capacity, head, first_id;
  int64_t offset;                /* bytes of the first bucket already taken */
} lina_policy;

typedef struct {
  int64_t id;                    /* the bucket's, as submit gave it */
  int64_t offset, bytes;         /* a multiple of unit; the piece is offset .. offset + bytes */
  int last;                      /* 1: the bucket finishes with it */
} lina_micro_op;

/* micro_op_s > 0 and finite, unit >= 1, else LINA_EINVAL and *policy is empty:
 * lina_policy_free may follow either way. */
int lina_policy_init(lina_policy *policy, lina_link reduce, double micro_op_s, int64_t unit);
void lina_policy_free(lina_policy *policy);

/* Bytes of the next micro-op of a bucket with `left` bytes to go; 0 for left <= 0. */
int64_t lina_policy_cut(const lina_policy *policy, int64_t left);

/* delta a2a's more outstanding: +1 when one is imminent or queued, -1 when it is
 * done. Below 0 or over INT64_MAX is LINA_EINVAL; nothing changes. */
int lina_policy_a2a(lina_policy *policy, int64_t delta);

/* Queues a bucket. A bucket of 0 bytes is one micro-op of 0 bytes, started and
 * finished in its turn like any other. *id counts from 0, and may be NULL.
 * Errors: LINA_EINVAL (bytes < 0, or pending_bytes past INT64_MAX), LINA_ENOMEM;
 * nothing changes. */
int lina_policy_submit(lina_policy *policy, int64_t bytes, int64_t *id);

/* 1 and *op, which now runs, if a micro-op may start; else 0. */
int lina_policy_next(lina_policy *policy, lina_micro_op *op);

/* The running micro-op ended. LINA_EINVAL if none runs. */
int lina_policy_finished(lina_policy *policy);

/* FSMoE's adaptive gradient partition: which gap of the backward pass takes how
 * many bytes, so that reductions are hidden while the link idles.
 *
 *   take[i] = g^-1(min(t(waiting), slack_s[i]))
 *   waiting = ready[i] + what the gaps before i left over
 *
 * Source: FSMoE, arXiv:2501.10714. Differs: ready[i] counts what is
 * ready when gap i opens, so that gradients of a layer's own may be placed in
 * the layer's gap or, by the caller's shift, in the next; the remainder is
 * returned and not spread over the layers by differential evolution (their step
 * 2), for what hides in no gap costs the same wherever it is put. A gap's bytes
 * are one reduction: they pay alpha once.
 *
 *   slack_s  in   [gaps]  seconds the link idles, in backward order; finite, >= 0
 *   ready    in   [gaps]  bytes, >= 0
 *   take     out  [gaps]  bytes, >= 0
 *   left     out  bytes that no gap hides; sum(take) + left = sum(ready)
 *
 * Errors: LINA_EINVAL (gaps < 0, values outside the limits above); outputs are
 * then untouched.
 */
int lina_policy_fill(lina_link reduce, int64_t gaps, const double *slack_s, const int64_t *ready,
                     int64_t *take, int64_t *left);

#ifdef __cplusplus
}
#endif
#endif
