#include "tensor.h"

#include <stdio.h>
#include <string.h>

#include "tensor_torch.h"

/* ---- errors ---- */

int lina_torch_failed(const char *call) {
  const char *what = NULL;
  if (lina_torch.torch_exception_get_what_without_backtrace)
    what = lina_torch.torch_exception_get_what_without_backtrace();
  return lina_error(LINA_ETORCH, "%s: %.300s", call, what && *what ? what : "see stderr");
}

void lina_throw(int code) {
  (void)code;
  lina_torch.aoti_torch_check(false, "lina", "csrc", 0, lina_error_text());
}

/* ---- torch's numbers for dtypes and devices ---- */

int32_t lina_torch_dtype(int dtype) {
  switch (dtype) {
    case LINA_F32: return lina_torch.aoti_torch_dtype_float32();
    case LINA_BF16: return lina_torch.aoti_torch_dtype_bfloat16();
    case LINA_F16: return lina_torch.aoti_torch_dtype_float16();
    case LINA_F64: return lina_torch.aoti_torch_dtype_float64();
    case LINA_I32: return lina_torch.aoti_torch_dtype_int32();
    default: return lina_torch.aoti_torch_dtype_int64();
  }
}

static int lina_dtype_of(int32_t number) {
  for (int d = LINA_F32; d < LINA_DTYPE_OTHER; d++)
    if (lina_torch_dtype(d) == number) return d;
  return LINA_DTYPE_OTHER;
}

int32_t lina_torch_device(int device) {
  return device == LINA_ON_CUDA ? lina_torch.aoti_torch_device_type_cuda()
                                : lina_torch.aoti_torch_device_type_cpu();
}

static int lina_device_of(int32_t number) {
  if (number == lina_torch.aoti_torch_device_type_cpu()) return LINA_ON_CPU;
  if (number == lina_torch.aoti_torch_device_type_cuda()) return LINA_ON_CUDA;
  return LINA_ON_OTHER;
}

const char *lina_dtype_name(int dtype) {
  static const char *const names[] = {"float32", "bfloat16", "float16",
                                      "float64", "int32",    "int64"};
  return dtype >= 0 && dtype < LINA_DTYPE_OTHER ? names[dtype] : "another dtype";
}

/* ---- the stack ---- */

int lina_read_geometry(lina_tensor *t) {
  int64_t dim, *size, *stride;
  int32_t dtype, device, index;
  TORCH(aoti_torch_get_dim(t->handle, &dim));
  TORCH(aoti_torch_get_numel(t->handle, &t->numel));
  TORCH(aoti_torch_get_sizes(t->handle, &size));
  TORCH(aoti_torch_get_strides(t->handle, &stride));
  TORCH(aoti_torch_get_dtype(t->handle, &dtype));
  TORCH(aoti_torch_get_device_type(t->handle, &device));
  TORCH(aoti_torch_get_device_index(t->handle, &index));
  TORCH(aoti_torch_get_data_ptr(t->handle, &t->data));
  t->dim = (int)dim;
  for (int i = 0; i < t->dim && i < LINA_MAX_DIM; i++)
    t->size[i] = size[i], t->stride[i] = stride[i];
  t->dtype = lina_dtype_of(dtype);
  t->device = lina_device_of(device);
  t->index = index;
  return LINA_OK;
}

int lina_take(lina_value cell, lina_tensor *t) {
  memset(t, 0, sizeof *t);
  t->handle = (void *)(uintptr_t)cell;
  if (!t->handle) return lina_error(LINA_EINVAL, "undefined tensor");
  return lina_read_geometry(t);
}

/* An optional is a cell of its own made by C++ new; torch offers a function to
 * free it only from 2.13 on. */
static void free_cell(uint64_t *cell) {
  if (lina_torch.torch_delete_stable_ivalue)
    lina_torch.torch_delete_stable_ivalue(cell);
  else
    lina_torch.operator_delete(cell);
}

int lina_take_optional(lina_value cell, lina_tensor *t) {
  memset(t, 0, sizeof *t);
  uint64_t *inner = (uint64_t *)(uintptr_t)cell;
  if (!inner) return LINA_OK;
  uint64_t handle = *inner;
  free_cell(inner);
  return lina_take(handle, t);
}

double lina_take_double(lina_value cell) {
  double value;
  memcpy(&value, &cell, sizeof value);
  return value;
}

lina_value lina_give(lina_tensor *t) {
  lina_value cell = (lina_value)(uintptr_t)t->handle;
  t->handle = NULL;
  return cell;
}

void lina_drop(lina_tensor *t) {
  if (t->handle) lina_torch.aoti_torch_delete_tensor_object(t->handle);
  t->handle = NULL;
}

/* ---- checks ---- */

int lina_check(const char *op, const char *name, const lina_tensor *t, int dim, unsigned mask) {
  if (t->dim != dim)
    return lina_error(LINA_EINVAL, "%s: %s has %d dimensions, must have %d", op, name, t->dim, dim);
  if (t->dtype != LINA_DTYPE_OTHER && (mask >> t->dtype & 1)) return LINA_OK;
  char list[96] = "";
  for (int d = LINA_F32; d < LINA_DTYPE_OTHER; d++)
    if (mask >> d & 1) {
      size_t used = strlen(list);
      snprintf(list + used, sizeof list - used, "%s%s", used ? ", " : "", lina_dtype_name(d));
    }
  return lina_error(LINA_ENOTSUP, "%s: %s is of %s, must be one of %s", op, name,
                    lina_dtype_name(t->dtype), list);
}

int lina_check_device(const char *op, const char *name, const lina_tensor *t,
                      const lina_tensor *other) {
  static const char *const names[] = {"cpu", "cuda", "another device"};
  if (t->device == other->device && t->index == other->index) return LINA_OK;
  return lina_error(LINA_EINVAL, "%s: %s lies on %s:%d, must lie on %s:%d", op, name,
                    names[t->device], t->index, names[other->device], other->index);
}

int lina_check_size(const char *op, const char *name, const lina_tensor *t, int axis,
                    int64_t want) {
  if (t->size[axis] == want) return LINA_OK;
  return lina_error(LINA_EINVAL, "%s: %s.shape[%d] is %lld, must be %lld", op, name, axis,
                    (long long)t->size[axis], (long long)want);
}

bool lina_is_contiguous(const lina_tensor *t) {
  int64_t expected = 1;
  if (t->numel == 0) return true;
  for (int i = t->dim - 1; i >= 0; i--) {
    if (t->size[i] != 1 && t->stride[i] != expected) return false;
    expected *= t->size[i];
  }
  return true;
}

/* ---- allocation ---- */

int lina_empty_strided(lina_tensor *t, int dtype, const lina_tensor *like, int dim,
                       const int64_t *size, const int64_t *stride) {
  void *handle = NULL;
  memset(t, 0, sizeof *t);
  TORCH(aoti_torch_empty_strided(dim, size, stride, lina_torch_dtype(dtype),
                                 lina_torch_device(like->device), like->index, &handle));
  t->handle = handle;
  return lina_read_geometry(t);
}

int lina_empty(lina_tensor *t, int dtype, const lina_tensor *like, int dim, const int64_t *size) {
  int64_t stride[LINA_MAX_DIM], step = 1;
  for (int i = dim - 1; i >= 0; i--) {
    stride[i] = step;
    step *= size[i] > 0 ? size[i] : 1;
  }
  return lina_empty_strided(t, dtype, like, dim, size, stride);
}

int lina_make_contiguous(lina_tensor *t) {
  if (lina_is_contiguous(t)) return LINA_OK;
  lina_tensor copy;
  int rc = lina_empty(&copy, t->dtype, t, t->dim, t->size);
  if (rc == LINA_OK && lina_torch.aoti_torch_copy_(copy.handle, t->handle, 1) != 0)
    rc = lina_torch_failed("aoti_torch_copy_");
  if (rc != LINA_OK) {
    lina_drop(&copy);
    return rc;
  }
  lina_drop(t);
  *t = copy;
  return LINA_OK;
}

void lina_gradient_strides(const lina_tensor *w, int64_t stride[3]) {
  /* Inner axis, the other one, experts: dense if each steps over the last. */
  int inner = w->stride[2] == 1 ? 2 : 1, outer = 3 - inner;
  if (w->stride[inner] == 1 && w->stride[outer] == w->size[inner] &&
      w->stride[0] == w->size[1] * w->size[2]) {
    for (int i = 0; i < 3; i++) stride[i] = w->stride[i];
    return;
  }
  stride[0] = w->size[1] * w->size[2];
  stride[1] = w->size[2];
  stride[2] = 1;
}

int lina_restride(lina_tensor *t, int dim, const int64_t *size, const int64_t *stride) {
  void *handle = NULL;
  TORCH(aoti_torch__reinterpret_tensor(t->handle, dim, size, stride, 0, &handle));
  lina_drop(t);
  t->handle = handle;
  return lina_read_geometry(t);
}

int lina_zero(lina_tensor *t) {
  TORCH(aoti_torch_zero_(t->handle));
  return LINA_OK;
}

int lina_view(lina_tensor *t, const lina_tensor *base, int64_t first, int dim, const int64_t *size,
              const int64_t *stride) {
  static const int bytes[] = {4, 2, 2, 8, 4, 8};
  void *handle = NULL;
  memset(t, 0, sizeof *t);
  char *data = (char *)base->data + first * bytes[base->dtype];
  TORCH(aoti_torch_create_tensor_from_blob(data, dim, size, stride, 0,
                                           lina_torch_dtype(base->dtype),
                                           lina_torch_device(base->device), base->index, &handle));
  t->handle = handle;
  return lina_read_geometry(t);
}

/* ---- device scope ---- */

int lina_enter(const lina_tensor *t, lina_scope *scope) {
  scope->guard = scope->stream = NULL;
  if (t->device == LINA_ON_CPU) return LINA_OK;
#if LINA_CUDA
  if (t->device == LINA_ON_CUDA && lina_torch.has_cuda) {
    TORCH(aoti_torch_create_cuda_guard(t->index, &scope->guard));
    TORCH(aoti_torch_get_current_cuda_stream(t->index, &scope->stream));
    return LINA_OK;
  }
#endif
  return lina_error(LINA_ENOTSUP,
                    t->device == LINA_ON_CUDA
                        ? "tensor on a GPU, but lina was built without CUDA (LINA_CUDA=0)"
                        : "tensor is neither on the CPU nor on a CUDA device");
}

void lina_leave(lina_scope *scope) {
  if (scope->guard) lina_torch.aoti_torch_delete_cuda_guard(scope->guard);
  scope->guard = NULL;
}
