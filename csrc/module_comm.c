/* module_comm.c - csrc/comm over NCCL, for Python: class Communicator and the
 * priority word. Pointers and streams travel as integers; lina/parallel/transport/nccl.py keeps
 * the tensors alive and knows their dtypes. */
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "comm/priority.h"
#include "error.h"
#include "module.h"

typedef struct {
  PyObject_HEAD lina_comm *comm;
  int size;
  int users;                 /* calls that released the GIL: `comm` stays until none is left */
  bool closed;
  lina_policy policy;        /* micro-ops of reductions; size 0: none given */
} communicator;

/* ---- Communicator: everything in it is read and changed with the GIL held ---- */

static int init(PyObject *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"id", "rank", "size", "device", "name", "timeout_s", "max_ctas", NULL};
  communicator *c = (communicator *)self;
  lina_comm_options options = {0};
  const char *id, *name;
  Py_ssize_t id_length;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y#iiisd|i", names, &id, &id_length, &options.rank,
                                   &options.size, &options.device, &name, &options.timeout_s,
                                   &options.max_ctas))
    return -1;
  if (id_length != LINA_COMM_ID_BYTES) {
    PyErr_Format(PyExc_ValueError, "Communicator: id has %zd bytes, must have %d", id_length,
                 LINA_COMM_ID_BYTES);
    return -1;
  }
  if (c->comm || c->users || c->closed) {
    PyErr_SetString(PyExc_RuntimeError, "Communicator: made already");
    return -1;
  }
  strncpy(options.name, name, sizeof options.name - 1);
  lina_comm *made;
  c->users = 1;              /* a second init is refused from here on */
  PyThreadState *python = PyEval_SaveThread();
  int rc = lina_comm_create(&made, &options, id);
  PyEval_RestoreThread(python);
  c->users = 0, c->size = options.size, c->comm = made;
  if (rc != LINA_OK) lina_raise(rc);
  return rc == LINA_OK ? 0 : -1;
}

static lina_comm *open_comm(PyObject *self) {
  communicator *c = (communicator *)self;
  if (c->comm && !c->closed) return c->comm;
  PyErr_SetString(PyExc_RuntimeError, "Communicator: closed");
  return NULL;
}

/* Releases the GIL for a call with the communicator; leave() follows. */
static PyThreadState *enter(communicator *c) {
  c->users++;
  return PyEval_SaveThread();
}

static void leave(communicator *c, PyThreadState *python) {
  PyEval_RestoreThread(python);
  if (--c->users > 0 || !c->closed) return;
  lina_comm_free(c->comm);   /* closed: has nothing to wait for */
  c->comm = NULL;
}

static PyObject *close_comm(PyObject *self, PyObject *unused) {
  communicator *c = (communicator *)self;
  (void)unused;
  if (!c->comm || c->closed) Py_RETURN_NONE;
  c->closed = true;
  PyThreadState *python = enter(c);
  lina_comm_close(c->comm);
  leave(c, python);
  Py_RETURN_NONE;
}

static void dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  communicator *c = (communicator *)self;
  if (!c->closed) lina_comm_free(c->comm); /* not close: others wait for what is in flight */
  lina_policy_free(&c->policy);
  ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

/* `size` integers of a sequence; 0 on success. */
static int byte_counts(PyObject *sequence, int size, const char *name, int64_t *out) {
  Py_ssize_t length = PySequence_Size(sequence);
  if (length < 0) return -1;
  if (length != size) {
    PyErr_Format(PyExc_ValueError, "all_to_all: %s has %zd entries, must have %d", name, length,
                 size);
    return -1;
  }
  for (int i = 0; i < size; i++) {
    PyObject *item = PySequence_GetItem(sequence, i);
    if (!item) return -1;
    out[i] = PyLong_AsLongLong(item);
    Py_DECREF(item);
    if (out[i] == -1 && PyErr_Occurred()) return -1;
  }
  return 0;
}

static PyObject *all_to_all(PyObject *self, PyObject *args) {
  unsigned long long send, receive, stream;
  PyObject *send_bytes, *receive_bytes;
  int how, rc;
  if (!PyArg_ParseTuple(args, "KOKOiK", &send, &send_bytes, &receive, &receive_bytes, &how,
                        &stream))
    return NULL;
  communicator *c = (communicator *)self;
  if (!open_comm(self)) return NULL;
  int size = c->size;
  int64_t *counts = malloc(sizeof *counts * 2 * (size_t)size);
  if (!counts) return PyErr_NoMemory();
  lina_comm *comm = NULL;
  if (byte_counts(send_bytes, size, "send_bytes", counts) == 0 &&
      byte_counts(receive_bytes, size, "receive_bytes", counts + size) == 0)
    comm = open_comm(self); /* again: an item's __index__ may have closed it */
  if (!comm) {
    free(counts);
    return NULL;
  }
  lina_all_to_all a = {(const void *)(uintptr_t)send, (void *)(uintptr_t)receive, counts,
                       counts + size};
  PyThreadState *python = enter(c);
  rc = lina_comm_all_to_all(comm, &a, how, (void *)(uintptr_t)stream);
  leave(c, python);
  free(counts);
  return lina_none_or_raise(rc);
}

static bool has_policy(const communicator *c, const char *op) {
  if (c->policy.size > 0) return true;
  PyErr_Format(PyExc_RuntimeError, "%s: no policy set, which cuts micro-ops", op);
  return false;
}

static PyObject *all_reduce(PyObject *self, PyObject *args) {
  communicator *c = (communicator *)self;
  unsigned long long data, stream;
  long long count;
  int dtype, mean, gently, rc;
  if (!PyArg_ParseTuple(args, "KLippK", &data, &count, &dtype, &mean, &gently, &stream))
    return NULL;
  lina_comm *comm = open_comm(self);
  if (!comm) return NULL;
  if (gently && !has_policy(c, "all_reduce")) return NULL;
  const lina_policy policy = c->policy; /* a copy: another thread may set it meanwhile */
  lina_all_reduce a = {(void *)(uintptr_t)data, count, dtype, mean, gently ? &policy : NULL};
  PyThreadState *python = enter(c);
  rc = lina_comm_all_reduce(comm, &a, (void *)(uintptr_t)stream);
  leave(c, python);
  return lina_none_or_raise(rc);
}

static PyObject *reduce_scatter(PyObject *self, PyObject *args) {
  communicator *c = (communicator *)self;
  unsigned long long parts, out, scratch, stream;
  long long count, scratch_bytes;
  int dtype, mean, gently, rc;
  if (!PyArg_ParseTuple(args, "KKLKLippK", &parts, &out, &count, &scratch, &scratch_bytes, &dtype,
                        &mean, &gently, &stream))
    return NULL;
  lina_comm *comm = open_comm(self);
  if (!comm) return NULL;
  if (gently && !has_policy(c, "reduce_scatter")) return NULL;
  const lina_policy policy = c->policy;
  lina_reduce_scatter a = {.parts = (const void *)(uintptr_t)parts,
                           .out = (void *)(uintptr_t)out,
                           .scratch = (void *)(uintptr_t)scratch,
                           .count = count,
                           .scratch_bytes = scratch_bytes,
                           .dtype = dtype,
                           .mean = mean,
                           .policy = gently ? &policy : NULL};
  PyThreadState *python = enter(c);
  rc = lina_comm_reduce_scatter(comm, &a, (void *)(uintptr_t)stream);
  leave(c, python);
  return lina_none_or_raise(rc);
}

static PyObject *set_policy(PyObject *self, PyObject *args) {
  communicator *c = (communicator *)self;
  lina_link link;
  double micro_op_s;
  long long unit;
  lina_policy made;
  if (!PyArg_ParseTuple(args, "dddL", &link.alpha_s, &link.beta_s, &micro_op_s, &unit)) return NULL;
  int rc = lina_policy_init(&made, link, micro_op_s, unit);
  if (rc != LINA_OK) return lina_raise(rc);
  lina_policy_free(&c->policy);
  c->policy = made;
  return PyLong_FromLongLong(made.size);
}

static PyObject *check(PyObject *self, PyObject *unused) {
  lina_comm *comm = open_comm(self);
  (void)unused;
  return comm ? lina_none_or_raise(lina_comm_check(comm)) : NULL;
}

static PyMethodDef methods[] = {
    {"all_to_all", all_to_all, METH_VARARGS,
     "all_to_all(send, send_bytes, receive, receive_bytes, how, stream): how is A2A_RAISE | "
     "A2A_LOWER"},
    {"all_reduce", all_reduce, METH_VARARGS,
     "all_reduce(data, count, dtype, mean, gently, stream): in place; gently: in micro-ops that "
     "wait\n"
     "for the priority word"},
    {"reduce_scatter", reduce_scatter, METH_VARARGS,
     "reduce_scatter(parts, out, count, scratch, scratch_bytes, dtype, mean, gently, stream): out "
     "[count]\n"
     "of parts [ranks, count]; gently: in micro-ops, packed in scratch, that wait for the priority "
     "word"},
    {"set_policy", set_policy, METH_VARARGS,
     "set_policy(alpha_s, beta_s, micro_op_s, unit) -> bytes of a micro-op"},
    {"check", check, METH_NOARGS, "check(): raises RuntimeError once the communicator has failed"},
    {"close", close_comm, METH_NOARGS,
     "close(): aborts what is in flight; calls that other threads are in raise RuntimeError"},
    {NULL, NULL, 0, NULL}};

static PyType_Slot slots[] = {
    {Py_tp_doc,
     "Communicator(id, rank, size, device, name, timeout_s, max_ctas=0): GPUs over NCCL."},
    {Py_tp_new, (void *)PyType_GenericNew},
    {Py_tp_init, (void *)init},
    {Py_tp_dealloc, (void *)dealloc},
    {Py_tp_methods, methods},
    {0, NULL}};

static PyType_Spec spec = {"lina._C.Communicator", sizeof(communicator), 0, Py_TPFLAGS_DEFAULT,
                           slots};

/* ---- functions ---- */

static PyObject *nccl_id(PyObject *module, PyObject *unused) {
  char id[LINA_COMM_ID_BYTES];
  (void)module, (void)unused;
  PyThreadState *python = PyEval_SaveThread();
  int rc = lina_comm_id(id);
  PyEval_RestoreThread(python);
  return rc == LINA_OK ? PyBytes_FromStringAndSize(id, sizeof id) : lina_raise(rc);
}

static PyObject *set_priority(PyObject *module, PyObject *args) {
  unsigned long long stream;
  int device, raised;
  (void)module;
  if (!PyArg_ParseTuple(args, "ipK", &device, &raised, &stream)) return NULL;
  void *on = (void *)(uintptr_t)stream;
  PyThreadState *python = PyEval_SaveThread();
  int rc = raised ? lina_priority_raise(device, on) : lina_priority_lower(device, on);
  PyEval_RestoreThread(python);
  return lina_none_or_raise(rc);
}

static PyObject *read_priority(PyObject *module, PyObject *args) {
  uint32_t word = 0;
  int64_t releases = 0;
  int device;
  (void)module;
  if (!PyArg_ParseTuple(args, "i", &device)) return NULL;
  int rc = lina_priority_read(device, &word, &releases);
  if (rc != LINA_OK) return lina_raise(rc);
  return Py_BuildValue("OL", word ? Py_True : Py_False, (long long)releases);
}

static PyObject *priority_off(PyObject *module, PyObject *unused) {
  const char *reason = lina_priority_off();
  (void)module, (void)unused;
  if (!reason) Py_RETURN_NONE;
  return PyUnicode_FromString(reason);
}

static PyMethodDef functions[] = {
    {"nccl_id", nccl_id, METH_NOARGS, "nccl_id() -> bytes: names a communicator to be made"},
    {"set_priority", set_priority, METH_VARARGS, "set_priority(device, raised, stream)"},
    {"read_priority", read_priority, METH_VARARGS,
     "read_priority(device) -> (raised, releases): as the host sees it now"},
    {"priority_off", priority_off, METH_NOARGS,
     "priority_off() -> why nothing is held back, or None"},
    {NULL, NULL, 0, NULL}};

int lina_add_comm(PyObject *module) {
  PyObject *type = PyType_FromSpec(&spec);
  int rc = type ? PyModule_AddObjectRef(module, "Communicator", type) : -1;
  Py_XDECREF(type);
  if (rc == 0) rc = PyModule_AddFunctions(module, functions);
  if (rc == 0) rc = PyModule_AddIntConstant(module, "A2A_RAISE", LINA_A2A_RAISE);
  if (rc == 0) rc = PyModule_AddIntConstant(module, "A2A_LOWER", LINA_A2A_LOWER);
  return rc;
}
