/* fuzz_plan_policy.c - random schedules of micro-ops, against an account of what
 * has been submitted, started and finished. */
#include <math.h>
#include <string.h>

#include "fuzz_plan.h"
#include "plan/policy.h"

enum { BUCKETS = 80 };

bool try_policy(void) {
  lina_policy policy, before;
  int64_t bytes[BUCKETS], submitted = 0, id = 0, offset = 0, outstanding = 0, left_over = 0;
  bool running = false, last = false;
  lina_link reduce = any_link();
  double micro_op_s = amount(-6, -2);
  int64_t unit = whole(1, 4096);
  if (!wild && micro_op_s == 0) micro_op_s = 1e-3;
  if (!taken(lina_policy_init(&policy, reduce, micro_op_s, unit))) {
    lina_policy_free(&policy);
    return false;
  }
  MUST(policy.size == INT64_MAX || policy.size % unit == 0);
  MUST(policy.size >= unit);
  if (policy.size > unit)
    MUST(lina_link_time(reduce, (double)policy.size) <=
         fmax(micro_op_s, 2 * reduce.alpha_s) * (1 + 1e-9));
  for (int step = 0; step < 120; step++) {
    lina_micro_op op;
    before = policy;
    switch (between(0, 3)) {
      case 0: {
        int64_t delta = wild ? whole(-2, 2) : outstanding > 0 ? -1 : once_in(3);
        if (outstanding == 0 && delta == -1) MUST(lina_policy_a2a(&policy, -1) == LINA_EINVAL);
        bool valid = delta > 0 ? outstanding <= INT64_MAX - delta : outstanding + delta >= 0;
        MUST(lina_policy_a2a(&policy, delta) == (valid ? LINA_OK : LINA_EINVAL));
        if (valid) outstanding += delta;
        if (!valid) MUST(memcmp(&policy, &before, sizeof policy) == 0);
        break;
      }
      case 1: {
        if (submitted == BUCKETS) break;
        int64_t size = once_in(5) ? between(0, 1) : whole(0, 200000), given = -1;
        bool valid = size >= 0 && size <= INT64_MAX - left_over;
        MUST(lina_policy_submit(&policy, size, &given) == (valid ? LINA_OK : LINA_EINVAL));
        if (valid) {
          MUST(given == submitted);
          bytes[submitted++] = size;
          left_over += size;
        } else {
          MUST(given == -1 && memcmp(&policy, &before, sizeof policy) == 0);
        }
        break;
      }
      case 2: {
        if (!lina_policy_next(&policy, &op)) {
          MUST(running || outstanding > 0 || id == submitted);
          MUST(memcmp(&policy, &before, sizeof policy) == 0);
          break;
        }
        /* Never beside another or an a2a; in order; each byte once. */
        MUST(!running && outstanding == 0 && id < submitted);
        MUST(op.id == id && op.offset == offset && op.offset % unit == 0);
        MUST(op.bytes == lina_policy_cut(&policy, bytes[id] - offset));
        MUST(op.bytes >= 0 && op.bytes <= bytes[id] - offset);
        MUST(op.bytes > 0 || bytes[id] == 0);
        int64_t rest = bytes[id] - offset - op.bytes;
        if (rest > 0) MUST(op.bytes == policy.size && rest >= policy.size - policy.size / 2);
        if (rest == 0) MUST(op.bytes - policy.size <= (policy.size - 1) / 2);
        MUST(op.last == (rest == 0));
        running = true, last = op.last;
        offset += op.bytes, left_over -= op.bytes;
        break;
      }
      case 3:
        MUST(lina_policy_finished(&policy) == (running ? LINA_OK : LINA_EINVAL));
        if (running && last) id++, offset = 0;
        running = false;
        break;
    }
    MUST(policy.running == running && policy.outstanding == outstanding);
    MUST(policy.pending == submitted - id && policy.pending_bytes == left_over);
  }
  lina_policy_free(&policy);
  return true;
}

bool try_fill(void) {
  double slack_s[16];
  int64_t ready[16], take[16], left = -7, sum = 0, taken_bytes = 0;
  int64_t gaps = wild && once_in(9) ? -1 : between(0, 16);
  lina_link reduce = any_link();
  for (int64_t i = 0; i < 16; i++)
    slack_s[i] = amount(-6, -1), ready[i] = whole(0, 50000000), take[i] = -7;
  if (!taken(lina_policy_fill(reduce, gaps, slack_s, ready, take, &left))) {
    MUST(left == -7 && take[0] == -7);
    return false;
  }
  for (int64_t i = 0; i < gaps; i++) {
    sum += ready[i], taken_bytes += take[i];
    MUST(take[i] >= 0 && taken_bytes <= sum);
    if (take[i] > 0) MUST(lina_link_time(reduce, (double)take[i]) <= slack_s[i] * (1 + 1e-9));
    /* Greedy: what waits on would not have fitted. */
    if (taken_bytes < sum)
      MUST(lina_link_time(reduce, (double)take[i] + 1) >= slack_s[i] * (1 - 1e-9));
  }
  MUST(left == sum - taken_bytes);
  return true;
}
