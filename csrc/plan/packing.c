/* packing.c - a prediction for every expert-parallel degree, and the best of them. */
#include "packing.h"

#include <math.h>
#include <stddef.h>

#include "../error.h"
#include "pipeline.h"

static int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t higher(int64_t a, int64_t b) { return a > b ? a : b; }

/* C(E-m, K) / C(E, K): a token needs none of m experts. */
static double needs_none(int64_t E, int64_t K, int64_t m) {
  double share = 1;
  for (int64_t k = 0; k < K && share > 0; k++)
    share *= (double)higher(0, E - m - k) / (double)(E - k);
  return share;
}

/* Copies of a token sent to other ranks. */
static double copies_of(const lina_packing_model *model, int64_t ep) {
  return (double)(ep - 1) * (1 - needs_none(model->E, model->K, model->E / ep));
}

/* ---- who is near ---- */

/* Members of a rank's group in its node, for the rank that has fewest. Groups and
 * nodes are intervals of ranks, so it is the shortest piece they cut each other into. */
static int64_t near_ranks(const lina_packing_model *model, int64_t ep) {
  int64_t least = lower(ep, model->node);
  for (int64_t start = 0; start < model->world;) {
    int64_t end = lower(start - start % ep + ep, start - start % model->node + model->node);
    least = lower(least, end - start);
    start = end;
  }
  return least;
}

/* Experts that a rank holds are an interval of ids, first .. first + E/ep. */
static int64_t first_expert(const lina_packing_model *model, int64_t rank, int64_t ep) {
  return rank % ep * (model->E / ep);
}

static int64_t lacking(const lina_packing_model *model, int64_t rank, int64_t ep) {
  int64_t m = model->E / ep, old_m = model->E / model->ep_now;
  int64_t first = first_expert(model, rank, ep);
  int64_t old_first = first_expert(model, rank, model->ep_now);
  int64_t both = lower(first + m, old_first + old_m) - higher(first, old_first);
  return m - higher(0, both);
}

/* What a rank holds under both degrees repeats after their least common multiple,
 * which divides both E and world. */
static int64_t experts_to_fetch(const lina_packing_model *model, int64_t ep) {
  int64_t most = 0;
  if (model->ep_now == 0) return 0;
  for (int64_t rank = 0; rank < lower(model->world, model->E); rank++)
    most = higher(most, lacking(model, rank, ep));
  return most;
}

/* ---- one degree ---- */

/* Both links as one: that which takes longer sets the pace. */
static lina_link pace(const lina_packing_model *model, double near, double far, double bytes) {
  double near_bytes = bytes * near, far_bytes = bytes * far, all = near_bytes + far_bytes;
  lina_link link = model->a2a_near;
  double share = near_bytes;
  if (lina_link_cost(model->a2a_far, far_bytes) > lina_link_cost(link, near_bytes))
    link = model->a2a_far, share = far_bytes;
  if (all > 0) link.beta_s *= share / all;
  return link;
}

static int plan_way(const lina_packing_model *model, const lina_packing_way *way, int64_t ep,
                    lina_pipeline *plan) {
  const int64_t m = model->E / ep, near = near_ranks(model, ep) - 1;
  const double copies = model->tokens * copies_of(model, ep);
  const double pairs = model->tokens * (double)model->K, own = pairs / (double)ep;
  lina_pipeline_model pipeline = {
      .dispatch_bytes = copies * way->out_bytes,
      .return_bytes = copies * way->back_bytes,
      .pass = {way->pass.alpha_s + (double)m * way->expert_s, way->pass.beta_s},
      .own_rows = own,
      .remote_rows = pairs - own,
  };
  double bytes = fmax(pipeline.dispatch_bytes, pipeline.return_bytes);
  if (ep > 1)
    pipeline.a2a = pace(model, (double)near / (double)(ep - 1),
                        (double)(ep - 1 - near) / (double)(ep - 1), bytes);
  return lina_pipeline_best(&pipeline, model->max_degree, plan);
}

static int plan_row(const lina_packing_model *model, int64_t ep, lina_packing_row *row) {
  const double params = (double)(model->E / ep) * model->expert_params;
  const double n = (double)(model->world / ep), layers = (double)model->layers;
  lina_pipeline forward, backward;
  int rc;
  LINA_TRY(plan_way(model, &model->forward, ep, &forward));
  LINA_TRY(plan_way(model, &model->backward, ep, &backward));
  lina_link reduce = model->world > model->node ? model->reduce_far : model->reduce_near;
  double fetch_bytes =
      layers * (double)experts_to_fetch(model, ep) * model->expert_params * model->move_bytes;
  int near = model->ep_now == 0 || near_ranks(model, model->ep_now) == model->ep_now;
  *row = (lina_packing_row){
      .ep = ep,
      .copies = copies_of(model, ep),
      .forward_degree = forward.degree,
      .backward_degree = backward.degree,
      .forward_s = forward.seconds,
      .backward_s = backward.seconds,
      .a2a_s = forward.a2a_s + backward.a2a_s,
      .reduce_s = lina_link_cost(reduce, 2 * (n - 1) / n * params * model->gradient_bytes),
      .move_s = lina_link_cost(near ? model->a2a_near : model->a2a_far, fetch_bytes),
      .memory_bytes = layers * params * model->state_bytes,
  };
  row->exposed_s = fmax(0, row->reduce_s - (model->slack_s + backward.idle_s));
  row->step_s = layers * (row->forward_s + row->backward_s + row->exposed_s);
  row->fits = row->memory_bytes <= model->memory_bytes;
  if (!isfinite(row->step_s) || !isfinite(row->move_s))
    LINA_FAIL(LINA_EINVAL, "packing: step of %g and move of %g seconds at ep=%lld, finite needed",
              row->step_s, row->move_s, (long long)ep);
done:
  return rc;
}

/* ---- checks ---- */

static int check_amounts(const lina_packing_model *m) {
  const struct {
    const char *name;
    double value;
  } amounts[] = {
      {"tokens", m->tokens},
      {"forward out_bytes", m->forward.out_bytes},
      {"forward back_bytes", m->forward.back_bytes},
      {"forward expert_s", m->forward.expert_s},
      {"backward out_bytes", m->backward.out_bytes},
      {"backward back_bytes", m->backward.back_bytes},
      {"backward expert_s", m->backward.expert_s},
      {"slack_s", m->slack_s},
      {"expert_params", m->expert_params},
      {"gradient_bytes", m->gradient_bytes},
      {"state_bytes", m->state_bytes},
      {"move_bytes", m->move_bytes},
  };
  const struct {
    const char *name;
    lina_link link;
  } links[] = {
      {"a2a_near", m->a2a_near},         {"a2a_far", m->a2a_far},
      {"reduce_near", m->reduce_near},   {"reduce_far", m->reduce_far},
      {"forward pass", m->forward.pass}, {"backward pass", m->backward.pass},
  };
  for (size_t i = 0; i < sizeof amounts / sizeof *amounts; i++)
    if (!(amounts[i].value >= 0) || !isfinite(amounts[i].value))
      return lina_error(LINA_EINVAL, "packing: %s=%g, finite and >= 0 needed", amounts[i].name,
                        amounts[i].value);
  for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
    int rc = lina_link_check("packing", links[i].name, links[i].link);
    if (rc != LINA_OK) return rc;
  }
  if (!(m->memory_bytes >= 0))
    return lina_error(LINA_EINVAL, "packing: memory_bytes=%g, >= 0 needed", m->memory_bytes);
  if (!(m->steps > 0)) return lina_error(LINA_EINVAL, "packing: steps=%g, > 0 needed", m->steps);
  return LINA_OK;
}

static int in_limits(const char *name, int64_t value, int64_t least, int64_t most) {
  if (least <= value && value <= most) return LINA_OK;
  return lina_error(LINA_EINVAL, "packing: %s=%lld, limit %lld..%lld", name, (long long)value,
                    (long long)least, (long long)most);
}

static int check(const lina_packing_model *m) {
  int rc;
  LINA_TRY(in_limits("world", m->world, 1, LINA_PACKING_MAX_WORLD));
  LINA_TRY(in_limits("node", m->node, 1, m->world));
  LINA_TRY(in_limits("layers", m->layers, 1, 1 << 20));
  LINA_TRY(in_limits("experts", m->E, 1, LINA_PACKING_MAX_E));
  LINA_TRY(in_limits("top_k", m->K, 1, m->E));
  LINA_TRY(in_limits("max_degree", m->max_degree, 1, LINA_PIPELINE_MAX));
  if (m->world % m->node != 0)
    LINA_FAIL(LINA_EINVAL, "packing: node=%lld does not divide world=%lld", (long long)m->node,
              (long long)m->world);
  if (m->ep_now < 0 || (m->ep_now && (m->world % m->ep_now || m->E % m->ep_now)))
    LINA_FAIL(LINA_EINVAL, "packing: ep_now=%lld divides not both world=%lld and experts=%lld",
              (long long)m->ep_now, (long long)m->world, (long long)m->E);
  LINA_TRY(check_amounts(m));
done:
  return rc;
}

int lina_packing(const lina_packing_model *model, lina_packing_row row[LINA_PACKING_MAX],
                 int *count, int *best) {
  int rows = 0, found = -1;
  double least = 0;
  int rc = check(model);
  if (rc != LINA_OK) return rc;
  for (int64_t ep = 1; ep <= lower(model->E, model->world); ep++) {
    if (model->world % ep || model->E % ep) continue;
    lina_packing_row *next = &row[rows++];
    rc = plan_row(model, ep, next);
    if (rc != LINA_OK) return rc;
    double cost = next->step_s + next->move_s / model->steps;
    if (next->fits && (found < 0 || cost < least)) least = cost, found = rows - 1;
  }
  if (found < 0)
    return lina_error(LINA_EINVAL, "packing: memory_bytes=%g, but ep=%lld needs %g",
                      model->memory_bytes, (long long)row[rows - 1].ep, row[rows - 1].memory_bytes);
  *count = rows;
  *best = found;
  return LINA_OK;
}
