/* fake_module.c - csrc/module_comm.c over the fakes of fake_cuda.h, as a Python module of its
 * own, with what a test needs of the fakes. Built and called by test_comm.py. */
#include "fake_cuda.h"
#include "module.h"

static PyObject *stream(PyObject *module, PyObject *args) {
  int device;
  (void)module;
  if (!PyArg_ParseTuple(args, "i", &device)) return NULL;
  return PyLong_FromVoidPtr(fake_stream_new(device));
}

static PyObject *drain(PyObject *module, PyObject *args) {
  unsigned long long on;
  double seconds;
  (void)module;
  if (!PyArg_ParseTuple(args, "Kd", &on, &seconds)) return NULL;
  PyThreadState *python = PyEval_SaveThread();
  bool drained = fake_stream_drain((fake_stream *)(uintptr_t)on, seconds);
  PyEval_RestoreThread(python);
  return PyBool_FromLong(drained);
}

static PyObject *waited(PyObject *module, PyObject *args) {
  unsigned long long on;
  (void)module;
  if (!PyArg_ParseTuple(args, "K", &on)) return NULL;
  return PyLong_FromLongLong(fake_stream_counts((fake_stream *)(uintptr_t)on).waited);
}

static PyObject *stick(PyObject *module, PyObject *args) {
  int device, sticks;
  (void)module;
  if (!PyArg_ParseTuple(args, "ip", &device, &sticks)) return NULL;
  fake_break(device, sticks ? FAKE_STUCK : FAKE_NO_FAULT);
  Py_RETURN_NONE;
}

static PyObject *live(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  return PyLong_FromLong(fake_nccl_live());
}

static PyMethodDef functions[] = {
    {"stream", stream, METH_VARARGS, "stream(device) -> a stream"},
    {"drain", drain, METH_VARARGS, "drain(stream, seconds) -> whether its work ended"},
    {"waited", waited, METH_VARARGS, "waited(stream) -> reductions that gave way; drained before"},
    {"stick", stick, METH_VARARGS, "stick(device, sticks): NCCL says in progress from now on"},
    {"live", live, METH_NOARGS, "live() -> communicators that NCCL has not freed"},
    {NULL, NULL, 0, NULL}};

static int exec(PyObject *module) {
  return lina_add_comm(module) || PyModule_AddFunctions(module, functions) ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)exec}, {0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "fake_module",
                                        .m_slots = slots};
PyMODINIT_FUNC PyInit_fake_module(void) { return PyModuleDef_Init(&definition); }
