/* fuzz_plan.c - random calls of csrc/plan, built with AddressSanitizer and
 * UndefinedBehaviorSanitizer: no torch, CUDA or Python.
 *
 *   plan [calls [seed [first]]]
 *
 * Call i is drawn from seed and i alone, so `plan 1 SEED i` repeats call i. Half
 * of the arguments are valid. What a call promises is checked against a second
 * account of it kept here; a refusal must come with a text and change nothing.
 * At the end it prints what a decision costs.
 */
#include <math.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#include "fuzz_plan.h"
#include "plan/policy.h"
#include "splitmix.h"

const char *__asan_default_options(void) { return "abort_on_error=1"; }
const char *__ubsan_default_options(void) { return "abort_on_error=1:print_stacktrace=1"; }

static const char *subject = "";
static int64_t call;
static uint64_t seed, state;

static void on_abort(int number) {
  (void)number;
  fprintf(stderr, "plan: died in %s; repeat by: plan 1 %llu %lld\n", subject,
          (unsigned long long)seed, (long long)call);
}

/* ---- randomness ---- */

uint64_t draw(void) { return splitmix(&state); }
int64_t between(int64_t low, int64_t high) {
  return low + (int64_t)(draw() % (uint64_t)(high - low + 1));
}
bool once_in(int n) { return draw() % (uint64_t)n == 0; }

bool wild;

double amount(double low, double high) {
  static const double odd[] = {-0.0, -1, 1e-320, 1e-300, 1e300, 1.7e308, INFINITY, -INFINITY, NAN};
  if (wild && once_in(6)) return ONE_OF(odd);
  if (once_in(10)) return 0;
  return pow(10, low + (high - low) * (double)(draw() >> 11) * 0x1p-53);
}
int64_t whole(int64_t low, int64_t high) {
  static const int64_t odd[] = {0, -1, INT64_MAX, INT64_MIN, 1ll << 31, 1ll << 40};
  return wild && once_in(8) ? ONE_OF(odd) : between(low, high);
}
lina_link any_link(void) { return (lina_link){amount(-7, -2), amount(-13, -6)}; }

bool taken(int rc) {
  if (rc == LINA_OK) return true;
  MUST(rc == LINA_EINVAL);
  MUST(strncmp(lina_error_text(), "lina: ", 6) == 0 && strlen(lina_error_text()) > 20);
  MUST(wild); /* valid arguments are never refused */
  return false;
}
bool close_to(double a, double b) {
  return fabs(a - b) <= 1e-9 * fmax(fabs(a), fabs(b)) + 1e-300; /* subnormals are coarse */
}

/* ---- link ---- */

static double relative_error(const double *n, const double *t, int64_t count, lina_link link) {
  double sum = 0;
  for (int64_t i = 0; i < count; i++) {
    double e = 1 - (link.alpha_s + n[i] * link.beta_s) / t[i];
    sum += e * e;
  }
  return sum;
}

bool try_link(void) {
  double n[12], t[12], r2 = -1;
  int64_t count = wild ? whole(0, 12) : between(2, 12);
  lina_link truth = {pow(10, (double)between(-7, -3)), pow(10, (double)between(-12, -8))};
  lina_link line = {-1, -1};
  double noise = ONE_OF(((double[]){0, 0.1, 0.9}));
  if (count > 12 || count < 0) count = 1;
  for (int64_t i = 0; i < count; i++) {
    n[i] = i < 2 && !wild ? (double)(i + 1) : floor(amount(0, 9));
    t[i] = (truth.alpha_s + n[i] * truth.beta_s) * (1 + noise * (double)between(-9, 9) / 10);
    if (wild && once_in(20)) t[i] = amount(-300, 300);
  }
  if (!taken(lina_link_fit(n, t, count, &line, once_in(4) ? NULL : &r2))) {
    MUST(line.alpha_s == -1 && line.beta_s == -1 && r2 == -1);
    return false;
  }
  MUST(line.alpha_s >= 0 && line.beta_s >= 0);
  MUST(r2 == -1 || (r2 >= 0 && r2 <= 1));
  if (wild) return true;
  if (noise == 0) MUST(relative_error(n, t, count, line) < 1e-12);
  double best = relative_error(n, t, count, line);
  for (int i = 0; i < 8; i++) { /* no neighbour is better */
    double da = ONE_OF(((double[]){0.99, 1, 1.01})), db = ONE_OF(((double[]){0.99, 1, 1.01}));
    lina_link other = {line.alpha_s * da, line.beta_s * db};
    MUST(relative_error(n, t, count, other) >= best - 1e-9 * (best + 1e-3));
  }
  double seconds = amount(-7, 0), units = lina_link_units(line, seconds);
  MUST(units >= 0);
  if (units > 0 && isfinite(units)) MUST(close_to(lina_link_time(line, units), seconds));
  if (units == 0) MUST(seconds <= line.alpha_s);
  return true;
}

/* ---- cost of a decision ---- */

/* As in a simulation of 4,096 ranks, each with its own policy, in turn. */
static void time_decisions(void) {
  enum { RANKS = 4096, ROUNDS = 400 };
  lina_policy *policy = calloc(RANKS, sizeof *policy);
  lina_micro_op op;
  int64_t moved = 0;
  MUST(policy);
  for (int r = 0; r < RANKS; r++)
    MUST(lina_policy_init(&policy[r], (lina_link){3e-5, 5e-11}, 5e-4, 16) == LINA_OK);
  clock_t start = clock();
  for (int i = 0; i < ROUNDS * RANKS; i++) { /* a bucket, an a2a, then the bucket's two pieces */
    lina_policy *p = &policy[i % RANKS];
    MUST(lina_policy_submit(p, 2 * p->size, NULL) == LINA_OK);
    MUST(lina_policy_a2a(p, 1) == LINA_OK);
    MUST(lina_policy_next(p, &op) == 0);
    MUST(lina_policy_a2a(p, -1) == LINA_OK);
    while (lina_policy_next(p, &op)) {
      moved += op.bytes;
      MUST(lina_policy_finished(p) == LINA_OK);
    }
  }
  /* submit, 2 a2a, 4 next, 2 finished */
  double decision_s = (double)(clock() - start) / CLOCKS_PER_SEC / ROUNDS / RANKS / 9;
  MUST(moved == 2 * ROUNDS * RANKS * policy[0].size);
  printf("  a decision of the policy costs %.1f ns in this build\n", decision_s * 1e9);
  for (int r = 0; r < RANKS; r++) lina_policy_free(&policy[r]);
  free(policy);
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    bool (*run)(void);
  } subjects[] = {{"link", try_link},
                  {"policy", try_policy},
                  {"fill", try_fill},
                  {"pipeline", try_pipeline},
                  {"packing", try_packing}};
  enum { SUBJECTS = sizeof subjects / sizeof *subjects };
  int64_t calls = argc > 1 ? strtoll(argv[1], NULL, 10) : 100000;
  seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  int64_t first = argc > 3 ? strtoll(argv[3], NULL, 10) : 0;
  int64_t took[SUBJECTS] = {0}, total[SUBJECTS] = {0};
  signal(SIGABRT, on_abort);
  for (call = first; call < first + calls; call++) {
    state = splitmix_call(seed, call);
    int64_t i = between(0, SUBJECTS - 1);
    wild = once_in(2);
    subject = subjects[i].name;
    total[i]++;
    took[i] += subjects[i].run();
  }
  printf("plan: %lld calls, seed %llu\n", (long long)calls, (unsigned long long)seed);
  for (int i = 0; i < SUBJECTS; i++)
    printf("  %-8s %7lld calls, %7lld taken, %7lld refused\n", subjects[i].name,
           (long long)total[i], (long long)took[i], (long long)(total[i] - took[i]));
  time_decisions();
  return 0;
}
