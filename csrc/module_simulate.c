/* module_simulate.c - the simulator of csrc/plan, for Python. */
#include "module.h"

#include <stdlib.h>

#include "error.h"
#include "plan/simulate.h"

static PyObject *fail(void) {
  PyErr_SetString(PyExc_ValueError, lina_error_text());
  return NULL;
}

/* A tuple of int64 as a new array; NULL with an error set, or where it is empty. */
static int64_t *integers(PyObject *tuple, int64_t *count) {
  *count = PyTuple_Size(tuple);
  int64_t *values = *count > 0 ? malloc((size_t)*count * sizeof *values) : NULL;
  if (*count > 0 && !values) PyErr_NoMemory();
  for (int64_t i = 0; values && i < *count; i++) {
    values[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, (Py_ssize_t)i));
    if (values[i] != -1 || !PyErr_Occurred()) continue;
    free(values);
    return NULL;
  }
  return values;
}

static int parse_layer(PyObject *item, lina_sim_layer *l) {
  long long expert_bytes, tensors;
  if (!PyTuple_Check(item)) {
    PyErr_SetString(PyExc_TypeError, "simulate: a layer is a tuple");
    return 0;
  }
  if (!PyArg_ParseTuple(item, "(dd)p(dd)(dd)(dd)(dd)dd(dd)(dd)LL", &l->dense_s[0], &l->dense_s[1],
                        &l->moe, &l->glue_s[0], &l->glue_s[1], &l->pass[0].alpha_s,
                        &l->pass[0].beta_s, &l->pass[1].alpha_s, &l->pass[1].beta_s,
                        &l->late.alpha_s, &l->late.beta_s, &l->own_rows, &l->remote_rows,
                        &l->dispatch_bytes[0], &l->dispatch_bytes[1], &l->return_bytes[0],
                        &l->return_bytes[1], &expert_bytes, &tensors))
    return 0;
  l->expert_bytes = expert_bytes, l->tensors = tensors;
  return 1;
}

static lina_sim_layer *parse_layers(PyObject *tuple, int64_t *count) {
  *count = PyTuple_Size(tuple);
  lina_sim_layer *layers = calloc(*count > 0 ? (size_t)*count : 1, sizeof *layers);
  if (!layers) PyErr_NoMemory();
  for (int64_t i = 0; layers && i < *count; i++) {
    if (parse_layer(PyTuple_GetItem(tuple, (Py_ssize_t)i), &layers[i])) continue;
    free(layers);
    return NULL;
  }
  return layers;
}

static PyObject *spans_of(const lina_sim_result *r) {
  PyObject *list = PyList_New(0);
  for (int64_t i = 0; list && i < r->span_count; i++) {
    const lina_sim_span *s = &r->spans[i];
    PyObject *item = Py_BuildValue("(LLiiiddd)", (long long)s->rank, (long long)s->layer, s->stream,
                                   s->kind, s->phase, s->start_s, s->stop_s, s->bytes);
    if (!item || PyList_Append(list, item) != 0) Py_CLEAR(list);
    Py_XDECREF(item);
  }
  return list;
}

static PyObject *result_of(const lina_sim_result *r) {
  PyObject *spans = spans_of(r);
  if (!spans) return NULL;
  const double *s = r->state_s;
  return Py_BuildValue("{s:d,s:d,s:(dddddddd),s:d,s:d,s:d,s:L,s:L,s:L,s:d,s:L,s:L,s:L,s:(dd),s:N}",
                       "step_s", r->step_s, "first_s", r->first_s, "state_s", s[0], s[1], s[2],
                       s[3], s[4], s[5], s[6], s[7], "a2a_s", r->a2a_s, "a2a_alone_s",
                       r->a2a_alone_s, "stretch_s", r->stretch_s, "a2a_count",
                       (long long)r->a2a_count, "reduce_count", (long long)r->reduce_count,
                       "behind", (long long)r->behind, "waited_s", r->waited_s, "reduced_bytes",
                       (long long)r->reduced_bytes, "decisions", (long long)r->decisions, "events",
                       (long long)r->events, "degree", r->degree[0], r->degree[1], "spans", spans);
}

/* Everything is copied out of Python first, so that other threads run meanwhile. */
static PyObject *run(const lina_sim_args *args) {
  lina_sim_result result;
  int rc;
  Py_BEGIN_ALLOW_THREADS rc = lina_simulate(args, &result);
  Py_END_ALLOW_THREADS PyObject *found = rc == LINA_OK ? result_of(&result) : fail();
  lina_simulate_free(&result);
  return found;
}

static PyObject *simulate(PyObject *self, PyObject *args, PyObject *kwargs) {
  (void)self;
  static char *names[] = {"layers",
                          "tensor_bytes",
                          "ranks",
                          "ep",
                          "node",
                          "a2a",
                          "reduce",
                          "share",
                          "gated",
                          "micro_op_s",
                          "micro_op_bytes",
                          "unit",
                          "degree",
                          "max_degree",
                          "bucket_bytes",
                          "first_bucket_bytes",
                          "experts_last",
                          "optimizer_s",
                          "straggle_s",
                          "seed",
                          "fault",
                          "watch",
                          NULL};
  PyObject *layers, *tensors, *watch;
  long long ranks, ep, node, fixed, unit, degree[2], most, bucket, first;
  unsigned long long seed;
  lina_sim_args a = {0};
  if (!PyArg_ParseTupleAndKeywords(
          args, kwargs, "O!O!LLL((dd)(dd))((dd)(dd))dpdLL(LL)LLLpddKiO!:simulate", names,
          &PyTuple_Type, &layers, &PyTuple_Type, &tensors, &ranks, &ep, &node, &a.a2a[0].alpha_s,
          &a.a2a[0].beta_s, &a.a2a[1].alpha_s, &a.a2a[1].beta_s, &a.reduce[0].alpha_s,
          &a.reduce[0].beta_s, &a.reduce[1].alpha_s, &a.reduce[1].beta_s, &a.share, &a.gated,
          &a.micro_op_s, &fixed, &unit, &degree[0], &degree[1], &most, &bucket, &first,
          &a.experts_last, &a.optimizer_s, &a.straggle_s, &seed, &a.fault, &PyTuple_Type, &watch))
    return NULL;
  a.ranks = ranks, a.ep = ep, a.node = node, a.micro_op_bytes = fixed, a.unit = unit;
  a.degree[0] = degree[0], a.degree[1] = degree[1], a.max_degree = most;
  a.bucket_bytes = bucket, a.first_bucket_bytes = first, a.seed = seed;
  lina_sim_layer *list = parse_layers(layers, &a.layer_count);
  int64_t *bytes = list ? integers(tensors, &a.tensor_count) : NULL;
  int64_t *watched = PyErr_Occurred() ? NULL : integers(watch, &a.watch_count);
  a.layers = list, a.tensor_bytes = bytes, a.watch = watched;
  PyObject *found = PyErr_Occurred() ? NULL : run(&a);
  free(watched);
  free(bytes);
  free(list);
  return found;
}

static PyMethodDef methods[] = {
    {"simulate", (PyCFunction)(void (*)(void))simulate, METH_VARARGS | METH_KEYWORDS,
     "One training step on many ranks; the contract is csrc/plan/simulate.h."},
    {NULL, NULL, 0, NULL},
};

int lina_add_simulate(PyObject *module) { return PyModule_AddFunctions(module, methods); }
