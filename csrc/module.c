/* module.c - the CPython module lina._C. Importing it registers lina's
 * operators with the torch that this process has imported. */
#include "module.h"

#include "error.h"
#include "register.h"

static int exec(PyObject *module) {
  if (lina_register() != LINA_OK) {
    PyErr_SetString(PyExc_ImportError, lina_error_text());
    return -1;
  }
  PyObject *cuda = PyBool_FromLong(LINA_CUDA);
  int rc = PyModule_AddObjectRef(module, "CUDA", cuda);
  Py_XDECREF(cuda);
  if (rc != 0) return rc;
  if (lina_add_plan(module) || lina_add_simulate(module)) return -1;
  return lina_add_comm(module) || lina_add_peers(module) ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)exec}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lina._C",
    .m_doc =
        "Registers torch.ops.lina.*; CUDA tells whether the GPU kernels were built. Plans, and\n"
        "communicators between GPUs.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
