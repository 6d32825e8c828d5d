/* fuzz_plan_layers.c - random pipelines and packings. */
#include <math.h>
#include <string.h>

#include "fuzz_plan.h"
#include "plan/packing.h"
#include "plan/pipeline.h"

bool try_pipeline(void) {
  lina_pipeline_model m = {any_link(), amount(0, 9), amount(0, 9), any_link(),
                           any_link(), amount(0, 6), amount(0, 6)};
  int most = (int)whole(1, wild ? 70 : LINA_PIPELINE_MAX) % 1000;
  lina_pipeline best = {.degree = -7}, plan;
  if (!taken(lina_pipeline_best(&m, most, &best))) {
    MUST(best.degree == -7);
    return false;
  }
  double least = INFINITY;
  for (int degree = 1; degree <= most; degree++) {
    lina_pass pass[LINA_PIPELINE_MAX];
    if (!taken(lina_pipeline_time(&m, degree, &plan))) continue;
    lina_pipeline_passes(&m, degree, pass);
    double rows = 0, idle_s = 0, at = 0;
    int chunk = 0;
    for (int p = 0; p < degree; p++) {
      rows += pass[p].rows;
      if (pass[p].chunk >= 0) MUST(pass[p].chunk == chunk++);
    }
    MUST(chunk == lina_pipeline_chunks(degree));
    MUST(close_to(rows, m.own_rows + m.remote_rows));
    for (int g = 0; g < plan.gaps; g++) {
      MUST(plan.gap[g].start_s >= at && plan.gap[g].end_s > plan.gap[g].start_s);
      at = plan.gap[g].end_s;
      idle_s += plan.gap[g].end_s - plan.gap[g].start_s;
    }
    MUST(plan.degree == degree && at <= plan.seconds);
    MUST(plan.seconds >= fmax(plan.compute_s, plan.a2a_s) * (1 - 1e-9));
    MUST(plan.seconds <= (plan.compute_s + plan.a2a_s) * (1 + 1e-9));
    MUST(close_to(plan.idle_s, idle_s));
    MUST(fabs(plan.seconds - plan.a2a_s - idle_s) <= 1e-9 * plan.seconds);
    MUST(close_to(plan.seconds, plan.compute_s + plan.exposed_s));
    if (plan.seconds < least) least = plan.seconds;
    if (degree == best.degree) MUST(memcmp(&plan.seconds, &best.seconds, sizeof(double)) == 0);
  }
  MUST(best.seconds >= least && best.seconds <= least * (1 + 1e-9));
  return true;
}

static lina_packing_way any_way(void) {
  return (lina_packing_way){amount(2, 5), amount(2, 5), any_link(), amount(-7, -4)};
}

bool try_packing(void) {
  int64_t node = whole(1, 9), ep_now = 0;
  lina_packing_model m = {.world = wild ? whole(1, 40) : node * between(1, 9),
                          .node = node,
                          .layers = whole(1, 60),
                          .E = whole(1, 256),
                          .K = 1,
                          .tokens = amount(0, 5),
                          .a2a_near = any_link(),
                          .a2a_far = any_link(),
                          .reduce_near = any_link(),
                          .reduce_far = any_link(),
                          .forward = any_way(),
                          .backward = any_way(),
                          .slack_s = amount(-5, -1),
                          .expert_params = amount(3, 8),
                          .gradient_bytes = 2,
                          .state_bytes = 16,
                          .move_bytes = 12,
                          .memory_bytes = wild ? amount(6, 12) : INFINITY,
                          .steps = once_in(3) ? INFINITY : 1 + amount(0, 5),
                          .max_degree = (int)between(1, 9)};
  m.K = whole(1, m.E > 0 && m.E < 1000 ? m.E : 1);
  if (once_in(2)) ep_now = once_in(2) || m.world <= 0 || m.world > 1000 ? 1 : between(1, m.world);
  if (wild || (ep_now && m.world % ep_now == 0 && m.E % ep_now == 0)) m.ep_now = ep_now;
  lina_packing_row row[LINA_PACKING_MAX];
  int count = -7, best = -7, at = 0;
  if (!taken(lina_packing(&m, row, &count, &best))) {
    MUST(count == -7 && best == -7);
    return false;
  }
  for (int64_t ep = 1; ep <= m.world; ep++) {
    if (m.world % ep || m.E % ep) continue;
    MUST(at < count && row[at].ep == ep);
    MUST(row[at].copies >= 0 && row[at].copies <= (double)(ep - 1));
    MUST(row[at].copies <= (double)m.K * (double)(ep - 1) / (double)ep * (1 + 1e-9));
    MUST(row[at].exposed_s <= row[at].reduce_s && row[at].exposed_s >= 0);
    if (ep == 1) MUST(row[at].a2a_s == 0);
    if (ep == m.world) MUST(row[at].reduce_s == 0);
    if (ep == m.ep_now) MUST(row[at].move_s == 0);
    MUST(!row[at].fits || row[best].step_s + row[best].move_s / m.steps <=
                              row[at].step_s + row[at].move_s / m.steps);
    at++;
  }
  MUST(at == count && row[best].fits);
  return true;
}
