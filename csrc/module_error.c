/* module_error.c - lina's errors as Python's. Contract: module.h. */
#include "error.h"
#include "module.h"

PyObject *lina_raise(int code) {
  PyErr_SetString(code == LINA_EINVAL ? PyExc_ValueError : PyExc_RuntimeError, lina_error_text());
  return NULL;
}

PyObject *lina_none_or_raise(int code) {
  if (code != LINA_OK) return lina_raise(code);
  Py_RETURN_NONE;
}
