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

/* Raises the last error's text, ValueError for LINA_EINVAL and RuntimeError for
 * the rest; returns NULL. */
PyObject *lina_raise(int code);

/* None, or what lina_raise does. */
PyObject *lina_none_or_raise(int code);

#endif
