/* module.h - the parts of lina._C: each adds its functions and types to the
 * module, and returns -1 with a Python error set on failure. */
#ifndef LINA_MODULE_H
#define LINA_MODULE_H

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

int lina_add_plan(PyObject *module);
int lina_add_simulate(PyObject *module);
int lina_add_comm(PyObject *module);
int lina_add_peers(PyObject *module);

#endif
