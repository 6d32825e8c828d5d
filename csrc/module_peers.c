/* module_peers.c - what csrc/comm offers over peers' memory, for Python: functions on a
 * capsule, tensors as addresses. Only lina/parallel's p2p.py, peers.py, domain.py and
 * peer_reduce.py call them, and answer for what the addresses point to. What may wait for the driver runs without
 * the GIL; the call's own reference keeps the capsule alive meanwhile. */
#include "comm/peers.h"
#include "comm/peers_reduce.h"
#include "error.h"
#include "module.h"

#define CAPSULE "lina.peers"

static lina_peers *peers_of(PyObject *capsule) { return PyCapsule_GetPointer(capsule, CAPSULE); }

/* At exit the driver takes everything back. */
static void release(PyObject *capsule) {
  if (!Py_IsInitialized()) return;
  lina_peers *p = peers_of(capsule);
  PyThreadState *python = PyEval_SaveThread();
  lina_peers_free(p);
  PyEval_RestoreThread(python);
}

static PyObject *make(PyObject *self, PyObject *args) {
  int rank, ep, sms, beside, rc;
  long long out_bytes, back_bytes, tokens;
  double timeout_s;
  lina_peers *p, *with = NULL;
  PyObject *other;
  (void)self;
  if (!PyArg_ParseTuple(args, "iiLLLdipO", &rank, &ep, &out_bytes, &back_bytes, &tokens, &timeout_s,
                        &sms, &beside, &other))
    return NULL;
  if (other != Py_None && !(with = peers_of(other))) return NULL;
  PyThreadState *python = PyEval_SaveThread();
  rc = lina_peers_make(&p, rank, ep, out_bytes, back_bytes, tokens, timeout_s, sms, beside, with);
  PyEval_RestoreThread(python);
  if (rc != LINA_OK) return lina_raise(rc);
  PyObject *capsule = PyCapsule_New(p, CAPSULE, release);
  if (!capsule) lina_peers_free(p);
  return capsule;
}

static PyObject *reduce_make(PyObject *self, PyObject *args) {
  int rank, ep, blocks, scatter, rc;
  long long tile_bytes;
  double timeout_s;
  lina_peers *p;
  (void)self;
  if (!PyArg_ParseTuple(args, "iiiLpd", &rank, &ep, &blocks, &tile_bytes, &scatter, &timeout_s))
    return NULL;
  PyThreadState *python = PyEval_SaveThread();
  rc = lina_peers_reduce_make(&p, rank, ep, blocks, tile_bytes, scatter, timeout_s);
  PyEval_RestoreThread(python);
  if (rc != LINA_OK) return lina_raise(rc);
  PyObject *capsule = PyCapsule_New(p, CAPSULE, release);
  if (!capsule) lina_peers_free(p);
  return capsule;
}

static PyObject *export(PyObject *self, PyObject *capsule) {
  unsigned char handle[LINA_PEERS_HANDLE] = {0};
  lina_peers *p = peers_of(capsule);
  (void)self;
  if (!p) return NULL;
  lina_peers_export(p, handle);
  return PyBytes_FromStringAndSize((const char *)handle, sizeof handle);
}

static PyObject *open_all(PyObject *self, PyObject *args) {
  PyObject *capsule;
  char *handles;
  Py_ssize_t length;
  int ep;
  (void)self;
  if (!PyArg_ParseTuple(args, "Oiy#", &capsule, &ep, &handles, &length)) return NULL;
  lina_peers *p = peers_of(capsule);
  if (!p) return NULL;
  if (ep != lina_peers_ranks(p) || length != (Py_ssize_t)ep * LINA_PEERS_HANDLE) {
    PyErr_Format(PyExc_ValueError, "p2p: %zd bytes of exports of ep=%d ranks, must be %d of %d",
                 length, ep, lina_peers_ranks(p) * LINA_PEERS_HANDLE, lina_peers_ranks(p));
    return NULL;
  }
  PyThreadState *python = PyEval_SaveThread();
  int rc = lina_peers_open(p, (const unsigned char *)handles);
  PyEval_RestoreThread(python);
  return lina_none_or_raise(rc);
}

static PyObject *rows(PyObject *self, PyObject *capsule) {
  lina_peers *p = peers_of(capsule);
  (void)self;
  return p ? PyLong_FromVoidPtr(lina_peers_rows(p)) : NULL;
}

/* An address, or None for NULL. */
static int address(PyObject *object, void *out) {
  void *p = object == Py_None ? NULL : PyLong_AsVoidPtr(object);
  *(void **)out = p;
  return p == NULL && PyErr_Occurred() ? 0 : 1;
}

static PyObject *dispatch(PyObject *self, PyObject *args) {
  PyObject *capsule;
  void *stream;
  lina_peers_dispatch_args a = {0};
  int tag, priority;
  long long T, C, K, E, row_bytes;
  (void)self;
  if (!PyArg_ParseTuple(args, "OO&ipLLLLLO&O&O&O&O&O&O&O&", &capsule, address, &stream, &tag,
                        &priority, &T, &C, &K, &E, &row_bytes, address, &a.x, address, &a.expert,
                        address, &a.weight, address, &a.slot, address, &a.count, address, &a.x_out,
                        address, &a.weight_out, address, &a.expert_out))
    return NULL;
  lina_peers *p = peers_of(capsule);
  if (!p) return NULL;
  a.links.tag = (uint32_t)tag;
  a.T = T, a.C = C, a.K = K, a.E = E, a.row_bytes = row_bytes;
  PyThreadState *python = PyEval_SaveThread();
  int rc = lina_peers_dispatch(p, &a, priority, stream);
  PyEval_RestoreThread(python);
  return lina_none_or_raise(rc);
}

static PyObject *collect(PyObject *self, PyObject *args) {
  PyObject *capsule;
  void *stream;
  lina_peers_collect_args a = {0};
  int tag, priority;
  long long T, C, K, E, D;
  (void)self;
  if (!PyArg_ParseTuple(args, "OO&ipLLLLLiO&O&O&O&O&O&O&O&O&", &capsule, address, &stream, &tag,
                        &priority, &T, &C, &K, &E, &D, &a.dtype, address, &a.y, address,
                        &a.pair_row, address, &a.weight, address, &a.dweight, address, &a.slot,
                        address, &a.count, address, &a.expert, address, &a.out, address,
                        &a.dweight_out))
    return NULL;
  lina_peers *p = peers_of(capsule);
  if (!p) return NULL;
  a.links.tag = (uint32_t)tag;
  a.T = T, a.C = C, a.K = K, a.E = E, a.D = D;
  PyThreadState *python = PyEval_SaveThread();
  int rc = lina_peers_collect(p, &a, priority, stream);
  PyEval_RestoreThread(python);
  return lina_none_or_raise(rc);
}

static PyObject *reduce(PyObject *self, PyObject *args) {
  PyObject *capsule;
  void *stream;
  lina_peers_reduce_args a = {0};
  long long tile_bytes, count;
  int scatter, mean, gently;
  (void)self;
  if (!PyArg_ParseTuple(args, "OO&iLpO&Lipp", &capsule, address, &stream, &a.blocks, &tile_bytes,
                        &scatter, address, &a.data, &count, &a.dtype, &mean, &gently))
    return NULL;
  lina_peers *p = peers_of(capsule);
  if (!p) return NULL;
  a.tile_bytes = tile_bytes, a.count = count, a.scatter = scatter, a.mean = mean;
  PyThreadState *python = PyEval_SaveThread();
  int rc = lina_peers_reduce(p, &a, gently, stream);
  PyEval_RestoreThread(python);
  return lina_none_or_raise(rc);
}

static PyObject *check(PyObject *self, PyObject *capsule) {
  lina_peers *p = peers_of(capsule);
  (void)self;
  return p ? lina_none_or_raise(lina_peers_check(p)) : NULL;
}

static PyObject *lost(PyObject *self, PyObject *capsule) {
  lina_peers *p = peers_of(capsule);
  (void)self;
  return p ? PyBool_FromLong(lina_peers_lost(p)) : NULL;
}

static PyObject *stop(PyObject *self, PyObject *args) {
  PyObject *capsule;
  void *stream;
  int overflow;
  (void)self;
  if (!PyArg_ParseTuple(args, "OO&p", &capsule, address, &stream, &overflow)) return NULL;
  lina_peers *p = peers_of(capsule);
  if (!p) return NULL;
  PyThreadState *python = PyEval_SaveThread();
  int rc = lina_peers_stop(p, overflow ? LINA_PEERS_OVERFLOW : LINA_PEERS_FAILED, stream);
  PyEval_RestoreThread(python);
  return lina_none_or_raise(rc);
}

static PyObject *abort_waits(PyObject *self, PyObject *capsule) {
  lina_peers *p = peers_of(capsule);
  (void)self;
  if (!p) return NULL;
  lina_peers_abort(p);
  Py_RETURN_NONE;
}

static PyObject *close_all(PyObject *self, PyObject *capsule) {
  lina_peers *p = peers_of(capsule);
  (void)self;
  if (!p) return NULL;
  PyThreadState *python = PyEval_SaveThread();
  lina_peers_close(p);
  PyEval_RestoreThread(python);
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"peers_make", make, METH_VARARGS, NULL},
    {"peers_export", export, METH_O, NULL},
    {"peers_open", open_all, METH_VARARGS, NULL},
    {"peers_rows", rows, METH_O, NULL},
    {"peers_dispatch", dispatch, METH_VARARGS, NULL},
    {"peers_collect", collect, METH_VARARGS, NULL},
    {"peers_reduce_make", reduce_make, METH_VARARGS, NULL},
    {"peers_reduce", reduce, METH_VARARGS, NULL},
    {"peers_check", check, METH_O, NULL},
    {"peers_lost", lost, METH_O, NULL},
    {"peers_stop", stop, METH_VARARGS, NULL},
    {"peers_abort", abort_waits, METH_O, NULL},
    {"peers_close", close_all, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

int lina_add_peers(PyObject *module) { return PyModule_AddFunctions(module, methods); }
