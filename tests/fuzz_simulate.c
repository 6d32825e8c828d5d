/* fuzz_simulate.c - random training steps through the simulator, under
 * AddressSanitizer and UndefinedBehaviorSanitizer.
 *
 *   simulate [calls [seed [first]]]
 *
 * Call i is drawn from seed and i alone. After each step: every gradient was
 * reduced once and every a2a took place; with the gate no rank started a
 * micro-op while it had an a2a queued, running or imminent, and none waited once
 * its members were ready; the step took no less than any stream's work and no
 * more than all of it one after the other. Steps whose order is broken on purpose
 * must be found out. At the end: what a decision of the policy costs.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "error.h"
#include "plan/policy.h"
#include "plan/simulate.h"
#include "splitmix.h"

static uint64_t state, seed;
static int64_t call;

static uint64_t draw(void) { return splitmix(&state); }

static int64_t below(int64_t n) { return (int64_t)(draw() % (uint64_t)n); }

/* 0 sometimes, else over four decades up to `most`. */
static double amount(double most) {
  if (below(8) == 0) return 0;
  return most * pow(10, -4 * (double)below(1 << 20) / (1 << 20));
}

static void broken(const char *what) {
  fprintf(stderr, "simulate: %s; repeat by: simulate 1 %llu %lld\n", what, (unsigned long long)seed,
          (long long)call);
  fprintf(stderr, "  last error: %s\n", lina_error_text());
  exit(1);
}

/* ---- a random step ---- */

enum { MAX_LAYERS = 6, MAX_TENSORS = 4 };
static lina_sim_layer layers[MAX_LAYERS];
static int64_t tensor_bytes[MAX_LAYERS * MAX_TENSORS], watch[2];

static lina_link line(double alpha_s, double bytes_s) {
  return (lina_link){amount(alpha_s), amount(1 / bytes_s)};
}

static void draw_layer(lina_sim_layer *l, int64_t *tensors) {
  *l = (lina_sim_layer){.moe = below(4) != 0, .tensors = below(MAX_TENSORS + 1)};
  for (int i = 0; i < 2; i++) {
    l->dense_s[i] = amount(5e-3);
    l->glue_s[i] = amount(1e-4);
    l->pass[i] = line(1e-4, 1e6);
    l->dispatch_bytes[i] = amount(1e8), l->return_bytes[i] = amount(1e8);
  }
  if (below(2))
    l->late = line(1e-4, 2e6); /* it may be more than the pass: then all of it is late */
  l->own_rows = amount(1e4), l->remote_rows = amount(1e4);
  l->expert_bytes = (int64_t)amount(1e8);
  for (int64_t t = 0; t < l->tensors; t++) tensor_bytes[(*tensors)++] = (int64_t)amount(1e8);
}

static lina_sim_args draw_args(void) {
  lina_sim_args a = {
      .layers = layers, .layer_count = 1 + below(MAX_LAYERS), .ranks = 2 + below(15)};
  a.tensor_bytes = tensor_bytes;
  for (int64_t i = 0; i < a.layer_count; i++) draw_layer(&layers[i], &a.tensor_count);
  do a.ep = 1 + below(a.ranks);
  while (a.ranks % a.ep);
  a.node = 1 + below(a.ranks + 2);
  for (int i = 0; i < 2; i++) a.a2a[i] = line(5e-5, 1e9), a.reduce[i] = line(5e-5, 1e9);
  a.share = below(2) ? 0.5 : (1 + (double)below(100)) / 100;
  a.gated = below(3) != 0;
  a.micro_op_s = below(4) ? amount(1e-2) + 2e-4 : 0;
  a.micro_op_bytes = below(4) ? 0 : 1000000 + below(50000000);
  a.unit = 1 + below(1024);
  a.max_degree = 1 + below(8);
  for (int i = 0; i < 2; i++) a.degree[i] = below(a.max_degree + 1);
  a.bucket_bytes = 1 + below(50000000), a.first_bucket_bytes = 1 + below(2000000);
  a.experts_last = (int)below(2);
  a.optimizer_s = amount(1e-3);
  a.straggle_s = below(3) ? amount(5e-2) : 0;
  a.seed = draw();
  a.watch = watch, a.watch_count = below(3);
  for (int i = 0; i < 2; i++) watch[i] = below(a.ranks);
  return a;
}

/* ---- what must hold ---- */

static double larger(double a, double b) { return a > b ? a : b; }

/* Operations on one rank, computed again from the layers: their number bounds the delays. */
typedef struct {
  int64_t bytes, moe;
  double compute_s, a2a_s;       /* a2a_s: at most, pieces and all */
} work;

static work work_of(const lina_sim_args *a) {
  work w = {0};
  w.compute_s = a->optimizer_s;
  int spreads = a->ep > 1;
  for (int64_t i = 0; i < a->layer_count; i++) {
    const lina_sim_layer *l = &a->layers[i];
    for (int p = 0; p < 2; p++) {
      w.compute_s += l->dense_s[p];
      if (!l->moe) continue;
      w.compute_s += l->glue_s[p] + l->pass[p].beta_s * (l->own_rows + l->remote_rows);
      double pieces = (double)a->max_degree;
      for (int level = 0; level < 2 && spreads; level++)
        w.a2a_s += 2 * pieces * a->a2a[level].alpha_s +
                   (l->dispatch_bytes[p] + l->return_bytes[p]) * a->a2a[level].beta_s;
    }
    w.moe += l->moe && spreads;
    if (l->moe && a->ep < a->ranks) w.bytes += l->expert_bytes;
  }
  for (int64_t t = 0; t < a->tensor_count; t++) w.bytes += a->tensor_bytes[t];
  return w;
}

static void check_times(const lina_sim_args *a, const lina_sim_result *r, const work *w) {
  double sum = 0, compute = 0, a2a = 0;
  for (int i = 0; i < 8; i++) {
    sum += r->state_s[i];
    if (r->state_s[i] < 0) broken("a negative time");
    if (i & 1) compute += r->state_s[i];
    if (i & 2) a2a += r->state_s[i];
  }
  double slack = 1e-9 * r->step_s + 1e-12;
  if (fabs(sum - r->step_s) > slack) broken("states do not add up to the step");
  if (compute < w->compute_s - slack) broken("less computing than the layers need");
  if (fabs(a2a * (double)a->ranks - r->a2a_s * (double)a->ep) > slack * (double)a->ranks)
    broken("a2a streams busy for another time than the a2a's took");
  if (r->a2a_s < r->a2a_alone_s - slack * (double)r->a2a_count)
    broken("an a2a faster than its link");
  /* One group of all: its a2a's and reductions share the links of every rank or of none. */
  double both_s = r->state_s[6] + r->state_s[7];
  if (a->ep == a->ranks && fabs(r->a2a_s - r->a2a_alone_s - (1 - a->share) * both_s) >
                               slack * (double)(1 + r->a2a_count))
    broken("sharing did not slow an a2a by its share");
  if (r->first_s > r->step_s) broken("the first rank ends last");
  /* Nothing idles on every stream but for delays: a2a's and reductions at their slowest. */
  double passes = 0, reduce = 0;
  for (int64_t i = 0; i < a->layer_count; i++)
    for (int p = 0; p < 2; p++)
      if (a->layers[i].moe) passes += (double)a->max_degree * a->layers[i].pass[p].alpha_s;
  for (int level = 0; level < 2; level++)
    reduce += (double)r->reduce_count * a->reduce[level].alpha_s +
              2 * (double)w->bytes * a->reduce[level].beta_s;
  double late = 0;
  if (a->straggle_s > 0)         /* each operation of the slowest rank, and each it waits for */
    late = a->straggle_s *
           (double)(8 + 4 * a->layer_count * (10 + 4 * a->max_degree) + r->reduce_count) *
           (double)a->ranks;
  if (r->step_s > w->compute_s + passes + (w->a2a_s + reduce) / a->share + late + slack)
    broken("slower than everything one after the other");
}

static void check(const lina_sim_args *a, const lina_sim_result *r) {
  work w = work_of(a);
  if (r->reduced_bytes != w.bytes * a->ranks) broken("not every gradient was reduced once");
  int64_t least = 4 * w.moe * (a->ranks / a->ep);
  if (r->a2a_count < least || r->a2a_count > least * larger(1, (double)a->max_degree - 2))
    broken("not every a2a took place");
  if (a->gated && r->behind) broken("a micro-op went ahead of an a2a");
  if (r->waited_s != 0) broken("an a2a waited though its members were ready");
  if (r->span_count && !a->watch_count) broken("spans that nobody asked for");
  for (int64_t i = 0; i < r->span_count; i++)
    if (!(r->spans[i].start_s >= 0 && r->spans[i].start_s <= r->spans[i].stop_s &&
          r->spans[i].stop_s <= r->step_s))
      broken("a span outside the step");
  check_times(a, r, &w);
}

/* ---- steps broken on purpose ---- */

static int break_order(lina_sim_args *a) {
  lina_sim_result r;
  a->fault = LINA_SIM_SWAPPED + (int)below(2);
  int rc = lina_simulate(a, &r);
  int found = rc == LINA_EINVAL && strstr(lina_error_text(), "deadlock") != NULL;
  if (rc != LINA_OK && !found) broken("a broken order gave another error");
  if (found && !strstr(lina_error_text(), "waits for rank")) broken("a deadlock names no ranks");
  lina_simulate_free(&r);
  return found;
}

static int refuse(lina_sim_args *a) {
  lina_sim_result r;
  switch (below(9)) {
    case 0: a->ep = a->ranks + 1; break;
    case 1: a->ranks = LINA_SIM_MAX_RANKS + 1; break;
    case 2: a->share = 0; break;
    case 3: a->straggle_s = NAN; break;
    case 4: layers[0].dense_s[1] = -1; break;
    case 5: a->degree[0] = a->max_degree + 1; break;
    case 6: a->tensor_count++; break;
    case 7: a->reduce[0].beta_s = INFINITY; break;
    case 8: a->unit = 0; break;
  }
  int rc = lina_simulate(a, &r);
  if (rc != LINA_EINVAL || strncmp(lina_error_text(), "lina: ", 6) != 0) broken("bad input taken");
  if (r.spans) broken("a refusal with spans");
  return 1;
}

/* ---- what a decision costs ---- */

static double now_ns(void) {
  struct timespec t;
  timespec_get(&t, TIME_UTC);
  return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* Each rank's policy in turn, as when 4,096 ranks simulate: none stays in the nearest cache. */
static void time_decisions(void) {
  enum { RANKS = 4096, ROUNDS = 200 };
  static lina_policy policy[RANKS];
  lina_micro_op op;
  int64_t bytes = 0, asked = 0;
  for (int r = 0; r < RANKS; r++) {
    lina_policy_init(&policy[r], (lina_link){1e-5, 1e-10}, 5e-4, 512);
    lina_policy_submit(&policy[r], (int64_t)1 << 40, NULL);
  }
  double start_ns = now_ns();
  for (int i = 0; i < ROUNDS; i++) {
    for (int r = 0; r < RANKS; r++, asked++) {
      if (!lina_policy_next(&policy[r], &op)) broken("a policy without an a2a starts nothing");
      bytes += op.bytes;
      lina_policy_finished(&policy[r]);
    }
  }
  double each_ns = (now_ns() - start_ns) / (double)asked;
  printf("simulate: a decision with its end, %d ranks: %.0f ns (%lld bytes)\n", RANKS, each_ns,
         (long long)bytes);
  for (int r = 0; r < RANKS; r++) lina_policy_free(&policy[r]);
}

int main(int argc, char **argv) {
  int64_t calls = argc > 1 ? strtoll(argv[1], NULL, 10) : 100000;
  seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  int64_t first = argc > 3 ? strtoll(argv[3], NULL, 10) : 0;
  int64_t found = 0, broke = 0, gated = 0, events = 0, decisions = 0, refused = 0;
  for (call = first; call < first + calls; call++) {
    state = splitmix_call(seed, call);
    lina_sim_args a = draw_args();
    lina_sim_result r;
    if (lina_simulate(&a, &r) != LINA_OK) broken("a sound step failed");
    check(&a, &r);
    gated += a.gated, events += r.events, decisions += r.decisions;
    lina_simulate_free(&r);
    if (call % 8 == 0) broke++, found += break_order(&a);
    if (call % 16 == 1) refused += refuse(&a);
  }
  printf(
      "simulate: %lld steps (%lld gated, %lld events, %lld decisions), seed %llu: no deadlock; of "
      "%lld broken ones %lld deadlocks found; %lld refusals\n",
      (long long)calls, (long long)gated, (long long)events, (long long)decisions,
      (unsigned long long)seed, (long long)broke, (long long)found, (long long)refused);
  if (calls >= 1000 && found * 4 < broke) broken("broken orders are not found out");
  time_decisions();
  return 0;
}
