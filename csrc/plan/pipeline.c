/* pipeline.c - the recurrence of pipeline.h, and the best degree by trying them all. */
#include "pipeline.h"

#include <math.h>

#include "../error.h"

/* Gaps and gains smaller than this share of the whole are rounding. */
#define ROUNDING 1e-12

int lina_pipeline_chunks(int degree) { return degree > 2 ? degree - 2 : 1; }

void lina_pipeline_passes(const lina_pipeline_model *model, int degree, lina_pass *pass) {
  const double own = model->own_rows, remote = model->remote_rows;
  if (degree == 1) {
    pass[0] = (lina_pass){own + remote, 0};
    return;
  }
  pass[0] = (lina_pass){degree == 2 ? own : own / 2, -1};
  int chunks = lina_pipeline_chunks(degree);
  for (int c = 0; c < chunks; c++) pass[1 + c] = (lina_pass){remote / chunks, c};
  if (degree > 2) pass[degree - 1] = (lina_pass){own / 2, -1};
}

double lina_pipeline_late(const lina_pipeline_model *model, lina_pass pass) {
  if (pass.chunk < 0) return 0;
  return fmin(lina_link_cost(model->late, pass.rows), lina_link_cost(model->pass, pass.rows));
}

static int check(const lina_pipeline_model *model, const char *name, int degree) {
  const struct {
    const char *name;
    double value;
  } amounts[] = {{"dispatch_bytes", model->dispatch_bytes},
                 {"return_bytes", model->return_bytes},
                 {"own_rows", model->own_rows},
                 {"remote_rows", model->remote_rows},
                 {"own_rows + remote_rows", model->own_rows + model->remote_rows}};
  int rc = lina_link_check("pipeline", "a2a", model->a2a);
  if (rc == LINA_OK) rc = lina_link_check("pipeline", "pass", model->pass);
  if (rc == LINA_OK) rc = lina_link_check("pipeline", "late", model->late);
  if (rc != LINA_OK) return rc;
  for (int i = 0; i < 5; i++)
    if (!(amounts[i].value >= 0) || !isfinite(amounts[i].value))
      return lina_error(LINA_EINVAL, "pipeline: %s=%g, finite and >= 0 needed", amounts[i].name,
                        amounts[i].value);
  if (degree < 1 || degree > LINA_PIPELINE_MAX)
    return lina_error(LINA_EINVAL, "pipeline: %s=%d, limit 1..%d", name, degree, LINA_PIPELINE_MAX);
  return LINA_OK;
}

static void plan_of(const lina_pipeline_model *model, int degree, lina_pipeline *plan) {
  lina_pass pass[LINA_PIPELINE_MAX];
  const int chunks = lina_pipeline_chunks(degree);
  const double out_s = lina_link_cost(model->a2a, model->dispatch_bytes / chunks);
  const double back_s = lina_link_cost(model->a2a, model->return_bytes / chunks);
  double free_from[LINA_PIPELINE_MAX], free_to[LINA_PIPELINE_MAX];
  double ended = 0, carried = chunks * out_s; /* when either stream is free again */
  lina_pipeline_passes(model, degree, pass);
  *plan = (lina_pipeline){.degree = degree, .a2a_s = chunks * (out_s + back_s)};
  for (int p = 0; p < degree; p++) {
    double pass_s = lina_link_cost(model->pass, pass[p].rows);
    int c = pass[p].chunk;
    if (c >= 0) ended = fmax(ended, (c + 1) * out_s);
    ended += pass_s;
    plan->compute_s += pass_s;
    if (c < 0) continue;
    free_from[c] = carried;
    free_to[c] = back_s > 0 ? fmax(carried, ended - lina_pipeline_late(model, pass[p])) : carried;
    carried = free_to[c] + back_s;
  }
  plan->seconds = fmax(ended, carried);
  plan->exposed_s = fmax(0, plan->seconds - plan->compute_s);
  for (int g = 0; g <= chunks; g++) {
    lina_span gap =
        g < chunks ? (lina_span){free_from[g], free_to[g]} : (lina_span){carried, plan->seconds};
    if (gap.end_s - gap.start_s <= ROUNDING * plan->seconds) continue;
    plan->gap[plan->gaps++] = gap;
    plan->idle_s += gap.end_s - gap.start_s;
  }
}

static int too_long(const lina_pipeline *plan) {
  return lina_error(LINA_EINVAL, "pipeline: %g seconds at degree %d, finite needed", plan->seconds,
                    plan->degree);
}

int lina_pipeline_time(const lina_pipeline_model *model, int degree, lina_pipeline *plan) {
  lina_pipeline made;
  int rc = check(model, "degree", degree);
  if (rc != LINA_OK) return rc;
  plan_of(model, degree, &made);
  if (!isfinite(made.seconds)) return too_long(&made);
  *plan = made;
  return LINA_OK;
}

int lina_pipeline_best(const lina_pipeline_model *model, int max_degree, lina_pipeline *plan) {
  int rc = check(model, "max_degree", max_degree);
  if (rc != LINA_OK) return rc;
  lina_pipeline best, other;
  plan_of(model, 1, &best);
  for (int degree = 2; degree <= max_degree; degree++) {
    plan_of(model, degree, &other);
    if (other.seconds < best.seconds * (1 - ROUNDING)) best = other;
  }
  if (!isfinite(best.seconds)) return too_long(&best);
  *plan = best;
  return LINA_OK;
}
