/* policy.c - the queue of gradient micro-ops: when one may start, and how big. */
#include "policy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../error.h"

#define FIRST_CAPACITY 16         /* a power of two, as all later ones */

/* Whole bytes, at most `most`. A double holds INT64_MAX only as 2^63. */
static int64_t whole(double bytes, int64_t most) {
  if (!(bytes > 0)) return 0;
  return bytes >= (double)most ? most : (int64_t)bytes;
}

int lina_policy_init(lina_policy *policy, lina_link reduce, double micro_op_s, int64_t unit) {
  memset(policy, 0, sizeof *policy);
  int rc = lina_link_check("policy", "reduce", reduce);
  if (rc != LINA_OK) return rc;
  if (!(micro_op_s > 0) || !isfinite(micro_op_s))
    return lina_error(LINA_EINVAL, "policy: micro_op_s=%g seconds, finite and > 0 needed",
                      micro_op_s);
  if (unit < 1)
    return lina_error(LINA_EINVAL, "policy: unit=%lld bytes, at least 1 needed", (long long)unit);
  policy->reduce = reduce;
  policy->micro_op_s = micro_op_s;
  policy->unit = unit;
  double seconds = fmax(micro_op_s, 2 * reduce.alpha_s);
  int64_t size = whole(lina_link_units(reduce, seconds), INT64_MAX);
  policy->size = size == INT64_MAX ? size : size < unit ? unit : size - size % unit;
  return LINA_OK;
}

void lina_policy_free(lina_policy *policy) {
  free(policy->bytes);
  memset(policy, 0, sizeof *policy);
}

int64_t lina_policy_cut(const lina_policy *policy, int64_t left) {
  if (left <= policy->size) return left > 0 ? left : 0;
  int64_t rest = left - policy->size;
  return rest < policy->size && rest < policy->size - rest ? left : policy->size;
}

int lina_policy_a2a(lina_policy *policy, int64_t delta) {
  /* outstanding >= 0, so the sum with a negative delta cannot wrap. */
  if (delta > 0 ? policy->outstanding > INT64_MAX - delta : policy->outstanding + delta < 0)
    return lina_error(LINA_EINVAL, "policy: %lld a2a's more, with %lld outstanding",
                      (long long)delta, (long long)policy->outstanding);
  policy->outstanding += delta;
  return LINA_OK;
}

/* Twice the ring, its buckets from the front. */
static int grow(lina_policy *policy) {
  int64_t capacity = policy->capacity ? 2 * policy->capacity : FIRST_CAPACITY;
  int64_t *bytes = malloc((size_t)capacity * sizeof *bytes);
  if (!bytes)
    return lina_error(LINA_ENOMEM, "policy: no memory for %lld buckets", (long long)capacity);
  int64_t first = policy->capacity - policy->head;
  if (policy->capacity) {
    memcpy(bytes, policy->bytes + policy->head, (size_t)first * sizeof *bytes);
    memcpy(bytes + first, policy->bytes, (size_t)policy->head * sizeof *bytes);
  }
  free(policy->bytes);
  policy->bytes = bytes;
  policy->capacity = capacity;
  policy->head = 0;
  return LINA_OK;
}

int lina_policy_submit(lina_policy *policy, int64_t bytes, int64_t *id) {
  if (bytes < 0 || bytes > INT64_MAX - policy->pending_bytes)
    return lina_error(LINA_EINVAL, "policy: bucket of %lld bytes, limit 0..%lld", (long long)bytes,
                      (long long)(INT64_MAX - policy->pending_bytes));
  if (policy->pending == policy->capacity) {
    int rc = grow(policy);
    if (rc != LINA_OK) return rc;
  }
  policy->bytes[(policy->head + policy->pending) & (policy->capacity - 1)] = bytes;
  if (id) *id = policy->first_id + policy->pending;
  policy->pending++;
  policy->pending_bytes += bytes;
  return LINA_OK;
}

int lina_policy_next(lina_policy *policy, lina_micro_op *op) {
  if (policy->running || policy->outstanding || !policy->pending) return 0;
  int64_t left = policy->bytes[policy->head] - policy->offset;
  op->id = policy->first_id;
  op->offset = policy->offset;
  op->bytes = lina_policy_cut(policy, left);
  op->last = op->bytes == left;
  policy->offset += op->bytes;
  policy->pending_bytes -= op->bytes;
  policy->started++;
  policy->running = 1;
  return 1;
}

int lina_policy_finished(lina_policy *policy) {
  if (!policy->running) return lina_error(LINA_EINVAL, "policy: finished, but no micro-op runs");
  policy->running = 0;
  if (policy->offset == policy->bytes[policy->head]) {
    policy->head = (policy->head + 1) & (policy->capacity - 1);
    policy->first_id++;
    policy->pending--;
    policy->offset = 0;
  }
  return LINA_OK;
}

int lina_policy_fill(lina_link reduce, int64_t gaps, const double *slack_s, const int64_t *ready,
                     int64_t *take, int64_t *left) {
  int64_t waiting = 0;
  int rc = lina_link_check("fill", "reduce", reduce);
  if (rc != LINA_OK) return rc;
  if (gaps < 0) return lina_error(LINA_EINVAL, "fill: %lld gaps", (long long)gaps);
  for (int64_t i = 0; i < gaps; i++) {
    if (!(slack_s[i] >= 0) || !isfinite(slack_s[i]))
      return lina_error(LINA_EINVAL, "fill: slack_s[%lld]=%g seconds, finite and >= 0 needed",
                        (long long)i, slack_s[i]);
    if (ready[i] < 0 || ready[i] > INT64_MAX - waiting)
      return lina_error(LINA_EINVAL, "fill: ready[%lld]=%lld bytes, limit 0..%lld", (long long)i,
                        (long long)ready[i], (long long)(INT64_MAX - waiting));
    waiting += ready[i];
  }
  waiting = 0;
  for (int64_t i = 0; i < gaps; i++) {
    waiting += ready[i];
    take[i] = lina_link_time(reduce, (double)waiting) <= slack_s[i]
                ? waiting
                : whole(lina_link_units(reduce, slack_s[i]), waiting);
    waiting -= take[i];
  }
  *left = waiting;
  return LINA_OK;
}
