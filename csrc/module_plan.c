/* module_plan.c - what csrc/plan offers, for Python. Signatures: lina/_C.pyi. */
#include "module.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>

#include "error.h"
#include "plan/link.h"
#include "plan/packing.h"
#include "plan/pipeline.h"
#include "plan/policy.h"

static PyObject *refuse(int code) {
  PyErr_SetString(code == LINA_ENOMEM ? PyExc_MemoryError : PyExc_ValueError, lina_error_text());
  return NULL;
}

/* ---- sequences ---- */

/* The items of `sequence` as doubles (or int64), to be freed; *count their number,
 * or the number wanted where it is >= 0. */
static void *items(PyObject *sequence, const char *name, int as_int, Py_ssize_t *count) {
  Py_ssize_t size = PySequence_Size(sequence);
  if (size < 0) return NULL;
  if (*count >= 0 && size != *count)
    return PyErr_Format(PyExc_ValueError, "lina: %s has %zd items, %zd needed", name, size, *count);
  void *data = malloc((size_t)(size + 1) * sizeof(int64_t)); /* never of 0 bytes */
  if (!data) return PyErr_NoMemory();
  for (Py_ssize_t i = 0; i < size; i++) {
    PyObject *item = PySequence_GetItem(sequence, i);
    if (item && as_int) ((int64_t *)data)[i] = PyLong_AsLongLong(item);
    if (item && !as_int) ((double *)data)[i] = PyFloat_AsDouble(item);
    Py_XDECREF(item);
    if (PyErr_Occurred()) {
      free(data);
      return NULL;
    }
  }
  *count = size;
  return data;
}

static PyObject *fit(PyObject *module, PyObject *args, PyObject *kwargs) {
  (void)module;
  static char *names[] = {"n", "t", NULL};
  PyObject *n_in, *t_in, *result = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:fit", names, &n_in, &t_in)) return NULL;
  Py_ssize_t count = -1;
  double *n = items(n_in, "fit: n", 0, &count);
  double *t = n ? items(t_in, "fit: t", 0, &count) : NULL;
  if (t) {
    lina_link link;
    double r2;
    int rc = lina_link_fit(n, t, count, &link, &r2);
    result = rc == LINA_OK ? Py_BuildValue("(ddd)", link.alpha_s, link.beta_s, r2) : refuse(rc);
  }
  free(n);
  free(t);
  return result;
}

static PyObject *fill(PyObject *module, PyObject *args, PyObject *kwargs) {
  (void)module;
  static char *names[] = {"reduce", "slack_s", "ready", NULL};
  PyObject *slack_in, *ready_in, *list = NULL;
  lina_link reduce;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "(dd)OO:fill", names, &reduce.alpha_s,
                                   &reduce.beta_s, &slack_in, &ready_in))
    return NULL;
  Py_ssize_t gaps = -1;
  int64_t left = 0;
  double *slack_s = items(slack_in, "fill: slack_s", 0, &gaps);
  int64_t *ready = slack_s ? items(ready_in, "fill: ready", 1, &gaps) : NULL;
  int64_t *take = ready ? malloc((size_t)(gaps + 1) * sizeof *take) : NULL;
  if (ready && !take) PyErr_NoMemory();
  int rc = take ? lina_policy_fill(reduce, gaps, slack_s, ready, take, &left) : LINA_OK;
  if (rc != LINA_OK) refuse(rc);
  if (take && rc == LINA_OK) list = PyList_New(gaps);
  for (Py_ssize_t i = 0; list && i < gaps; i++) {
    PyObject *item = PyLong_FromLongLong(take[i]);
    if (!item || PyList_SetItem(list, i, item) != 0) Py_CLEAR(list);
  }
  free(take);
  free(ready);
  free(slack_s);
  return list ? Py_BuildValue("(NL)", list, (long long)left) : NULL;
}

/* ---- Policy ---- */

typedef struct {
  PyObject head;
  lina_policy policy;
} policy_object;

static lina_policy *policy_of(PyObject *self) { return &((policy_object *)self)->policy; }

static PyObject *policy_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"reduce", "micro_op_s", "unit", NULL};
  lina_link reduce;
  double micro_op_s;
  long long unit = 1;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "(dd)d|L:Policy", names, &reduce.alpha_s,
                                   &reduce.beta_s, &micro_op_s, &unit))
    return NULL;
  lina_policy policy;
  int rc = lina_policy_init(&policy, reduce, micro_op_s, unit);
  if (rc != LINA_OK) return refuse(rc);
  PyObject *self = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
  if (self) *policy_of(self) = policy; /* owns no memory yet */
  return self;
}

static void policy_free(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
  lina_policy_free(policy_of(self));
  release(self);
  Py_DECREF(type);
}

static PyObject *none_or_raise(int rc) {
  if (rc != LINA_OK) return refuse(rc);
  Py_RETURN_NONE;
}

static PyObject *policy_a2a(PyObject *self, PyObject *arg) {
  long long delta = PyLong_AsLongLong(arg);
  if (delta == -1 && PyErr_Occurred()) return NULL;
  return none_or_raise(lina_policy_a2a(policy_of(self), delta));
}

static PyObject *policy_submit(PyObject *self, PyObject *arg) {
  long long bytes = PyLong_AsLongLong(arg);
  int64_t id;
  if (bytes == -1 && PyErr_Occurred()) return NULL;
  int rc = lina_policy_submit(policy_of(self), bytes, &id);
  return rc == LINA_OK ? PyLong_FromLongLong(id) : refuse(rc);
}

static PyObject *policy_next(PyObject *self, PyObject *unused) {
  (void)unused;
  lina_micro_op op;
  if (!lina_policy_next(policy_of(self), &op)) Py_RETURN_NONE;
  return Py_BuildValue("(LLLO)", (long long)op.id, (long long)op.offset, (long long)op.bytes,
                       op.last ? Py_True : Py_False);
}

static PyObject *policy_finished(PyObject *self, PyObject *unused) {
  (void)unused;
  return none_or_raise(lina_policy_finished(policy_of(self)));
}

static PyObject *policy_cut(PyObject *self, PyObject *arg) {
  long long left = PyLong_AsLongLong(arg);
  if (left == -1 && PyErr_Occurred()) return NULL;
  return PyLong_FromLongLong(lina_policy_cut(policy_of(self), left));
}

/* The closure is the field's place in lina_policy. */
static PyObject *policy_get(PyObject *self, void *place) {
  return PyLong_FromLongLong(*(int64_t *)((char *)policy_of(self) + (size_t)place));
}

static PyObject *policy_running(PyObject *self, void *unused) {
  (void)unused;
  return PyBool_FromLong(policy_of(self)->running);
}

#define FIELD(name) {#name, policy_get, NULL, NULL, (void *)offsetof(lina_policy, name)}
static PyGetSetDef policy_fields[] = {
    FIELD(size),
    FIELD(outstanding),
    FIELD(pending),
    FIELD(pending_bytes),
    FIELD(started),
    {.name = "running", .get = policy_running},
    {0},
};

static PyMethodDef policy_methods[] = {
    {"a2a", policy_a2a, METH_O, "a2a(delta): so many more are queued, running or imminent"},
    {"submit", policy_submit, METH_O, "submit(bytes) -> id of the bucket"},
    {"next", policy_next, METH_NOARGS, "next() -> (id, offset, bytes, last), or None"},
    {"finished", policy_finished, METH_NOARGS, "finished(): the running micro-op ended"},
    {"cut", policy_cut, METH_O, "cut(left) -> bytes of the next micro-op"},
    {0},
};

static PyType_Slot policy_slots[] = {
    {Py_tp_doc, "Policy(reduce, micro_op_s, unit=1): which gradient micro-op may start now"},
    {Py_tp_new, (void *)policy_new},
    {Py_tp_dealloc, (void *)policy_free},
    {Py_tp_methods, policy_methods},
    {Py_tp_getset, policy_fields},
    {0, NULL},
};

static PyType_Spec policy_spec = {
    .name = "lina._C.Policy",
    .basicsize = sizeof(policy_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = policy_slots,
};

/* ---- pipeline and packing ---- */

static PyObject *pipeline(PyObject *module, PyObject *args, PyObject *kwargs) {
  (void)module;
  static char *names[] = {"a2a",         "dispatch_bytes", "return_bytes", "expert", "own_rows",
                          "remote_rows", "degree",         "max_degree",   "late",   NULL};
  lina_pipeline_model m = {.late = {0, 0}};
  lina_pipeline plan;
  int degree = 0, max_degree = 8;
  if (!PyArg_ParseTupleAndKeywords(
          args, kwargs, "(dd)dd(dd)dd|ii(dd):pipeline", names, &m.a2a.alpha_s, &m.a2a.beta_s,
          &m.dispatch_bytes, &m.return_bytes, &m.pass.alpha_s, &m.pass.beta_s, &m.own_rows,
          &m.remote_rows, &degree, &max_degree, &m.late.alpha_s, &m.late.beta_s))
    return NULL;
  int rc =
      degree ? lina_pipeline_time(&m, degree, &plan) : lina_pipeline_best(&m, max_degree, &plan);
  if (rc != LINA_OK) return refuse(rc);
  PyObject *gaps = PyList_New(plan.gaps);
  for (int g = 0; gaps && g < plan.gaps; g++) {
    PyObject *gap = Py_BuildValue("(dd)", plan.gap[g].start_s, plan.gap[g].end_s);
    if (!gap || PyList_SetItem(gaps, g, gap) != 0) Py_CLEAR(gaps);
  }
  if (!gaps) return NULL;
  return Py_BuildValue("{s:i,s:d,s:d,s:d,s:d,s:d,s:N}", "degree", plan.degree, "seconds",
                       plan.seconds, "compute_s", plan.compute_s, "a2a_s", plan.a2a_s, "exposed_s",
                       plan.exposed_s, "idle_s", plan.idle_s, "gaps", gaps);
}

static PyObject *packing_row(const lina_packing_row *row) {
  return Py_BuildValue(
      "{s:L,s:d,s:i,s:i,s:d,s:d,s:d,s:d,s:d,s:d,s:d,s:d,s:O}", "ep", (long long)row->ep, "copies",
      row->copies, "forward_degree", row->forward_degree, "backward_degree", row->backward_degree,
      "forward_s", row->forward_s, "backward_s", row->backward_s, "a2a_s", row->a2a_s, "reduce_s",
      row->reduce_s, "exposed_s", row->exposed_s, "step_s", row->step_s, "move_s", row->move_s,
      "memory_bytes", row->memory_bytes, "fits", row->fits ? Py_True : Py_False);
}

static PyObject *packing(PyObject *module, PyObject *args, PyObject *kwargs) {
  (void)module;
  static char *names[] = {
      "world",         "node",           "layers",      "experts",    "top_k",        "tokens",
      "a2a_near",      "a2a_far",        "reduce_near", "reduce_far", "forward",      "backward",
      "expert_params", "gradient_bytes", "state_bytes", "move_bytes", "memory_bytes", "slack_s",
      "ep_now",        "steps",          "max_degree",  NULL};
  lina_packing_model m = {.memory_bytes = INFINITY, .steps = INFINITY, .max_degree = 8};
  lina_packing_way *f = &m.forward, *b = &m.backward;
  long long world, node, layers, E, K, ep_now = 0;
  if (!PyArg_ParseTupleAndKeywords(
          args, kwargs, "LLLLLd(dd)(dd)(dd)(dd)(dd(dd)d)(dd(dd)d)dddd|ddLdi:packing", names, &world,
          &node, &layers, &E, &K, &m.tokens, &m.a2a_near.alpha_s, &m.a2a_near.beta_s,
          &m.a2a_far.alpha_s, &m.a2a_far.beta_s, &m.reduce_near.alpha_s, &m.reduce_near.beta_s,
          &m.reduce_far.alpha_s, &m.reduce_far.beta_s, &f->out_bytes, &f->back_bytes,
          &f->pass.alpha_s, &f->pass.beta_s, &f->expert_s, &b->out_bytes, &b->back_bytes,
          &b->pass.alpha_s, &b->pass.beta_s, &b->expert_s, &m.expert_params, &m.gradient_bytes,
          &m.state_bytes, &m.move_bytes, &m.memory_bytes, &m.slack_s, &ep_now, &m.steps,
          &m.max_degree))
    return NULL;
  m.world = world, m.node = node, m.layers = layers, m.E = E, m.K = K, m.ep_now = ep_now;
  lina_packing_row row[LINA_PACKING_MAX];
  int count = 0, best = 0;
  int rc = lina_packing(&m, row, &count, &best);
  if (rc != LINA_OK) return refuse(rc);
  PyObject *rows = PyList_New(count);
  for (int i = 0; rows && i < count; i++) {
    PyObject *item = packing_row(&row[i]);
    if (!item || PyList_SetItem(rows, i, item) != 0) Py_CLEAR(rows);
  }
  return rows ? Py_BuildValue("{s:L,s:N}", "ep", (long long)row[best].ep, "rows", rows) : NULL;
}

/* ---- the table ---- */

#define KEYWORDS METH_VARARGS | METH_KEYWORDS
static PyMethodDef functions[] = {
    {"fit", (PyCFunction)(void (*)(void))fit, KEYWORDS, "fit(n, t) -> (alpha_s, beta_s, r2)"},
    {"fill", (PyCFunction)(void (*)(void))fill, KEYWORDS,
     "fill(reduce, slack_s, ready) -> (take, left)"},
    {"pipeline", (PyCFunction)(void (*)(void))pipeline, KEYWORDS, "pipeline(**model) -> dict"},
    {"packing", (PyCFunction)(void (*)(void))packing, KEYWORDS, "packing(**model) -> dict"},
    {0},
};

int lina_add_plan(PyObject *module) {
  PyObject *type = PyType_FromSpec(&policy_spec);
  int rc = type ? PyModule_AddObjectRef(module, "Policy", type) : -1;
  Py_XDECREF(type);
  return rc == 0 ? PyModule_AddFunctions(module, functions) : -1;
}
