/* simulate_check.c - the limits of simulate.h, checked before anything is built. */
#include <math.h>

#include "error.h"
#include "simulate_inner.h"

static int check_value(const char *name, int64_t layer, double value) {
  if (isfinite(value) && value >= 0) return LINA_OK;
  return lina_error(LINA_EINVAL, "simulate: layer %lld: %s=%g, finite and at least 0",
                    (long long)layer, name, value);
}

static int check_layer(const lina_sim_layer *layer, int64_t i) {
  int rc = LINA_OK;
  for (int phase = 0; phase < 2; phase++) {
    LINA_TRY(check_value("dense_s", i, layer->dense_s[phase]));
    if (!layer->moe) continue;
    LINA_TRY(check_value("glue_s", i, layer->glue_s[phase]));
    LINA_TRY(check_value("dispatch_bytes", i, layer->dispatch_bytes[phase]));
    LINA_TRY(check_value("return_bytes", i, layer->return_bytes[phase]));
    LINA_TRY(lina_link_check("simulate", "pass", layer->pass[phase]));
  }
  if (layer->moe) {
    LINA_TRY(lina_link_check("simulate", "late", layer->late));
    LINA_TRY(check_value("own_rows", i, layer->own_rows));
    LINA_TRY(check_value("remote_rows", i, layer->remote_rows));
    LINA_TRY(check_value("expert_bytes", i, (double)layer->expert_bytes));
  }
  LINA_TRY(check_value("tensors", i, (double)layer->tensors));
done:
  return rc;
}

static int check_count(const char *name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return LINA_OK;
  return lina_error(LINA_EINVAL, "simulate: %s=%lld, from %lld to %lld", name, (long long)value,
                    (long long)low, (long long)high);
}

static int check_seconds(const char *name, double value) {
  if (isfinite(value) && value >= 0) return LINA_OK;
  return lina_error(LINA_EINVAL, "simulate: %s=%g, finite and at least 0", name, value);
}

/* Sums of bytes stay exact far below this. */
#define MANY ((int64_t)1 << 50)

int lina_sim_check(const lina_sim_args *a) {
  int rc = LINA_OK;
  LINA_TRY(check_count("layers", a->layer_count, 1, LINA_SIM_MAX_LAYERS));
  LINA_TRY(check_count("ranks", a->ranks, 1, LINA_SIM_MAX_RANKS));
  LINA_TRY(check_count("ep", a->ep, 1, a->ranks));
  if (a->ranks % a->ep)
    LINA_FAIL(LINA_EINVAL, "simulate: ep=%lld, a divisor of ranks=%lld", (long long)a->ep,
              (long long)a->ranks);
  LINA_TRY(check_count("node", a->node, 1, MANY));
  LINA_TRY(check_count("max_degree", a->max_degree, 1, LINA_PIPELINE_MAX));
  for (int i = 0; i < 2; i++) {
    LINA_TRY(check_count("degree", a->degree[i], 0, a->max_degree));
    LINA_TRY(lina_link_check("simulate", "a2a", a->a2a[i]));
    LINA_TRY(lina_link_check("simulate", "reduce", a->reduce[i]));
  }
  if (!(a->share > 0 && a->share <= 1))
    LINA_FAIL(LINA_EINVAL, "simulate: share=%g, over 0 and at most 1", a->share);
  LINA_TRY(check_seconds("micro_op_s", a->micro_op_s));
  LINA_TRY(check_seconds("optimizer_s", a->optimizer_s));
  LINA_TRY(check_seconds("straggle_s", a->straggle_s));
  LINA_TRY(check_count("micro_op_bytes", a->micro_op_bytes, 0, MANY));
  LINA_TRY(check_count("unit", a->unit, 1, MANY));
  LINA_TRY(check_count("bucket_bytes", a->bucket_bytes, 1, MANY));
  LINA_TRY(check_count("first_bucket_bytes", a->first_bucket_bytes, 1, MANY));
  LINA_TRY(check_count("fault", a->fault, LINA_SIM_SOUND, LINA_SIM_ONE_AT_A_TIME));
  for (int64_t i = 0; i < a->watch_count; i++)
    LINA_TRY(check_count("watch", a->watch[i], 0, a->ranks - 1));
  int64_t tensors = 0, total = 0;
  for (int64_t i = 0; i < a->layer_count; i++) {
    LINA_TRY(check_layer(&a->layers[i], i));
    LINA_TRY(check_count("tensors", a->layers[i].tensors, 0, a->tensor_count - tensors));
    LINA_TRY(check_count("expert_bytes", a->layers[i].moe ? a->layers[i].expert_bytes : 0, 0,
                         MANY - total));
    tensors += a->layers[i].tensors;
    total += a->layers[i].moe ? a->layers[i].expert_bytes : 0;
  }
  if (tensors != a->tensor_count)
    LINA_FAIL(LINA_EINVAL, "simulate: %lld tensor_bytes, but the layers have %lld tensors",
              (long long)a->tensor_count, (long long)tensors);
  for (int64_t i = 0; i < a->tensor_count; i++) {
    LINA_TRY(check_count("tensor_bytes", a->tensor_bytes[i], 0, MANY - total));
    total += a->tensor_bytes[i];
  }
done:
  return rc;
}
