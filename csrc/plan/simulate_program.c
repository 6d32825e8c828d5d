/* simulate_program.c - what every rank does in a step: the compute stream's
 * program, the exchanges it queues, the buckets it hands to the policy. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "pipeline.h"
#include "simulate_inner.h"

/* ---- lists that grow ---- */

static int room(void **items, int64_t *held, int64_t count, size_t size) {
  if (count < *held) return LINA_OK;
  int64_t more = *held ? 2 * *held : 64;
  void *grown = realloc(*items, (size_t)more * size);
  if (!grown) return lina_error(LINA_ENOMEM, "simulate: a program of %lld", (long long)more);
  *items = grown, *held = more;
  return LINA_OK;
}

static int add_step(sim_program *p, sim_step step) {
  int rc = room((void **)&p->steps, &p->step_room, p->step_count, sizeof step);
  if (rc == LINA_OK) p->steps[p->step_count++] = step;
  return rc;
}

static int add_bucket(sim_program *p, sim_bucket bucket) {
  int rc = room((void **)&p->buckets, &p->bucket_room, p->bucket_count, sizeof bucket);
  if (rc != LINA_OK) return rc;
  p->buckets[p->bucket_count++] = bucket;
  return add_step(p, (sim_step){.op = SIM_SUBMIT, .arg = p->bucket_count - 1});
}

/* Only notes the exchange: SIM_ISSUE comes where its rows are there. */
static int add_exchange(sim_program *p, sim_exchange exchange, int64_t *id) {
  int rc = room((void **)&p->exchanges, &p->exchange_room, p->exchange_count, sizeof exchange);
  if (rc == LINA_OK) p->exchanges[ *id = p->exchange_count++] = exchange;
  return rc;
}

static int run_step(sim_program *p, int kind, int phase, int64_t layer, double seconds) {
  return add_step(
      p,
      (sim_step){.op = SIM_RUN, .kind = kind, .phase = phase, .layer = layer, .seconds = seconds});
}

static int plain_step(sim_program *p, int op, int64_t arg) {
  return add_step(p, (sim_step){.op = op, .arg = arg});
}

/* ---- one MoE layer, one phase ---- */

/* `count` equal exchanges; ids from *first on. */
static int add_chunks(sim_program *p, sim_exchange whole, int64_t count, int64_t *first) {
  int rc = LINA_OK;
  whole.bytes /= (double)count;
  for (int64_t i = 0; i < count; i++) {
    int64_t id;
    LINA_TRY(add_exchange(p, whole, &id));
    if (i == 0) *first = id;
  }
done:
  return rc;
}

/* The layer as pipeline.h plans it: on the first group's links, for all ranks. */
static lina_pipeline_model pipeline_of(const lina_sim_args *a, const lina_sim_layer *layer,
                                       int phase) {
  sim_flow group;
  lina_sim_flow_init(a, &group, LINA_SIM_A2A, 0, 1, a->ep);
  double bytes = fmax(layer->dispatch_bytes[phase], layer->return_bytes[phase]);
  return (lina_pipeline_model){.a2a = lina_sim_a2a_link(a, &group, bytes),
                               .dispatch_bytes = layer->dispatch_bytes[phase],
                               .return_bytes = layer->return_bytes[phase],
                               .pass = layer->pass[phase],
                               .late = phase == LINA_SIM_BACKWARD ? layer->late : (lina_link){0, 0},
                               .own_rows = layer->own_rows,
                               .remote_rows = layer->remote_rows};
}

/* The passes of one phase in pipeline.h's order, between their exchanges. */
static int add_passes(sim_program *p, const lina_pipeline_model *model, int degree, int phase,
                      int64_t i) {
  int rc = LINA_OK;
  int64_t out = 0, back = 0;
  const int chunks = lina_pipeline_chunks(degree);
  lina_pass pass[LINA_PIPELINE_MAX];
  lina_pipeline_passes(model, degree, pass);
  LINA_TRY(add_chunks(p, (sim_exchange){LINA_SIM_DISPATCH, phase, i, model->dispatch_bytes}, chunks,
                      &out));
  LINA_TRY(
      add_chunks(p, (sim_exchange){LINA_SIM_RETURN, phase, i, model->return_bytes}, chunks, &back));
  for (int c = 0; c < chunks; c++) LINA_TRY(plain_step(p, SIM_ISSUE, out + c));
  for (int n = 0; n < degree; n++) {
    const int c = pass[n].chunk;
    if (c >= 0) LINA_TRY(plain_step(p, SIM_WAIT, out + c));
    const double late_s = lina_pipeline_late(model, pass[n]);
    LINA_TRY(
        run_step(p, LINA_SIM_PASS, phase, i, lina_link_cost(model->pass, pass[n].rows) - late_s));
    if (c < 0) continue;
    LINA_TRY(plain_step(p, SIM_RAISE, 1));
    LINA_TRY(plain_step(p, SIM_ISSUE, back + c));
    if (late_s > 0) LINA_TRY(run_step(p, LINA_SIM_PASS, phase, i, late_s));
  }
  LINA_TRY(plain_step(p, SIM_WAIT, back + chunks - 1));
done:
  return rc;
}

static int add_spread(const lina_sim_args *a, sim_program *p, int phase, int64_t i) {
  int rc = LINA_OK;
  const lina_pipeline_model model = pipeline_of(a, &a->layers[i], phase);
  int degree = (int)a->degree[phase];
  if (!degree) {
    lina_pipeline best;
    LINA_TRY(lina_pipeline_best(&model, (int)a->max_degree, &best));
    degree = best.degree;
  }
  p->degree_sum[phase] += degree;
  /* Every dispatch is imminent from here on. */
  LINA_TRY(plain_step(p, SIM_RAISE, lina_pipeline_chunks(degree)));
  LINA_TRY(run_step(p, LINA_SIM_GLUE, phase, i, a->layers[i].glue_s[phase]));
  LINA_TRY(add_passes(p, &model, degree, phase, i));
done:
  return rc;
}

static int add_moe(const lina_sim_args *a, sim_program *p, int phase, int64_t i) {
  const lina_sim_layer *layer = &a->layers[i];
  p->moe_layers += phase == LINA_SIM_FORWARD;
  if (a->ep > 1) return add_spread(a, p, phase, i);
  int rc = run_step(p, LINA_SIM_GLUE, phase, i, layer->glue_s[phase]); /* nothing travels */
  if (rc != LINA_OK) return rc;
  double rows = layer->own_rows + layer->remote_rows;
  return run_step(p, LINA_SIM_PASS, phase, i, lina_link_cost(layer->pass[phase], rows));
}

/* ---- the step ---- */

static int add_experts(const lina_sim_args *a, sim_program *p, int64_t i) {
  const lina_sim_layer *layer = &a->layers[i];
  if (!layer->moe || a->ep == a->ranks) return LINA_OK;
  return add_bucket(p, (sim_bucket){layer->expert_bytes, i, 1});
}

/* Closes the bucket once it is full: at the first tensor that fills it. */
static int add_gradients(const lina_sim_args *a, sim_program *p, int64_t layer, const int64_t *last,
                         int64_t *open, int *closed) {
  int rc = LINA_OK;
  if (a->ranks == 1) return LINA_OK;
  for (int64_t t = 0; t < a->layers[layer].tensors; t++) {
    *open += *--last;
    if (*open < (*closed ? a->bucket_bytes : a->first_bucket_bytes)) continue;
    LINA_TRY(add_bucket(p, (sim_bucket){*open, layer, 0}));
    *open = 0, *closed = 1;
  }
done:
  return rc;
}

static int add_backward(const lina_sim_args *a, sim_program *p) {
  int rc = LINA_OK, closed = 0;
  int64_t open = 0;
  const int64_t *last = a->tensor_count ? a->tensor_bytes + a->tensor_count : NULL;
  for (int64_t i = a->layer_count - 1; i >= 0; i--) {
    const lina_sim_layer *layer = &a->layers[i];
    if (layer->moe) LINA_TRY(add_moe(a, p, LINA_SIM_BACKWARD, i));
    if (!a->experts_last) LINA_TRY(add_experts(a, p, i));
    LINA_TRY(run_step(p, LINA_SIM_DENSE, LINA_SIM_BACKWARD, i, layer->dense_s[LINA_SIM_BACKWARD]));
    LINA_TRY(add_gradients(a, p, i, last, &open, &closed));
    last = last ? last - layer->tensors : NULL;
  }
  if (open) LINA_TRY(add_bucket(p, (sim_bucket){open, 0, 0}));
  for (int64_t i = a->layer_count - 1; a->experts_last && i >= 0; i--)
    LINA_TRY(add_experts(a, p, i));
done:
  return rc;
}

static void plan_cuts(const lina_sim_args *a, sim_program *p) {
  sim_flow world;
  lina_sim_flow_init(a, &world, LINA_SIM_REDUCE, 0, 1, a->ranks);
  p->unit = a->unit;
  if (a->micro_op_bytes) {       /* a link on which a second is one byte */
    p->cut = (lina_link){0, 1}, p->micro_op_s = (double)a->micro_op_bytes;
  } else if (a->micro_op_s > 0) {
    p->cut = lina_sim_reduce_link(a, &world), p->micro_op_s = a->micro_op_s;
  } else {                       /* a link that takes no time is never cut for */
    p->cut = (lina_link){0, 0}, p->micro_op_s = 1;
  }
}

int lina_sim_build(const lina_sim_args *a, sim_program *p) {
  int rc = LINA_OK;
  memset(p, 0, sizeof *p);
  plan_cuts(a, p);
  for (int64_t i = 0; i < a->layer_count; i++) {
    double dense_s = a->layers[i].dense_s[LINA_SIM_FORWARD];
    LINA_TRY(run_step(p, LINA_SIM_DENSE, LINA_SIM_FORWARD, i, dense_s));
    if (a->layers[i].moe) LINA_TRY(add_moe(a, p, LINA_SIM_FORWARD, i));
  }
  LINA_TRY(add_backward(a, p));
  LINA_TRY(plain_step(p, SIM_DRAIN, 0));
  LINA_TRY(run_step(p, LINA_SIM_OPTIMIZER, LINA_SIM_BACKWARD, -1, a->optimizer_s));
done:
  return rc;
}

void lina_sim_program_free(sim_program *p) {
  free(p->steps);
  free(p->exchanges);
  free(p->buckets);
  memset(p, 0, sizeof *p);
}
