/* fake_torch.c - see fake_torch.h. Built as libtorch_cpu.so; FAKE_OLD leaves
 * out what torch has only since 2.13, and oneDNN. */
#include "fake_torch.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "splitmix.h"

/* ---- failures on purpose ---- */

static uint64_t state, one_in;
static bool has_failed;

void fake_fail(uint64_t seed, uint64_t n) { state = seed, one_in = n, has_failed = false; }
bool fake_has_failed(void) { return has_failed; }

static uint64_t draw(void) { return splitmix(&state); }

static bool fails(void) {
  if (one_in == 0 || draw() % one_in != 0) return false;
  return has_failed = true;
}
#define MAY_FAIL() \
  if (fails()) return 1

/* ---- tensors ---- */

static int64_t live;
int64_t fake_live(void) { return live; }

int fake_element_bytes(int32_t dtype) {
  switch (dtype) {
    case FAKE_F64:
    case FAKE_I64: return 8;
    case FAKE_F32:
    case FAKE_I32: return 4;
    case FAKE_F16:
    case FAKE_BF16: return 2;
  }
  return 1;
}

static fake_tensor *describe(int32_t dtype, int32_t device, int64_t dim, const int64_t *size,
                             const int64_t *stride) {
  fake_tensor *t = calloc(1, sizeof *t);
  t->dim = dim, t->dtype = dtype, t->device = device;
  t->index = device == FAKE_CUDA ? 0 : -1;
  t->numel = 1;
  for (int64_t i = 0; i < dim; i++) {
    t->size[i] = size[i], t->stride[i] = stride[i];
    t->numel *= size[i];
  }
  live++;
  return t;
}

fake_tensor *fake_new(int32_t dtype, int32_t device, int64_t dim, const int64_t *size,
                      const int64_t *stride) {
  int64_t last = 0, numel = 1;
  bool empty = false;
  for (int64_t i = 0; i < dim; i++) {
    if (size[i] < 0 || stride[i] < 0) return NULL;
    if (size[i] == 0) empty = true;
    int64_t step;
    if (__builtin_mul_overflow(numel, size[i], &numel)) return NULL; /* torch refuses it too */
    if (size[i] > 0 && (__builtin_mul_overflow(size[i] - 1, stride[i], &step) ||
                        __builtin_add_overflow(last, step, &last)))
      return NULL;
  }
  if (!empty && last >= FAKE_MAX_BYTES / fake_element_bytes(dtype)) return NULL;
  fake_tensor *t = describe(dtype, device, dim, size, stride);
  if (!empty && device != FAKE_META) {
    t->storage = calloc(last + 1, fake_element_bytes(dtype));
    t->owners = calloc(1, sizeof *t->owners);
    *t->owners = 1;
    /* Reading a device's memory from the host must crash, as it would. */
    t->data = device == FAKE_CPU ? t->storage : (char *)0x10;
  }
  return t;
}

void fake_delete(fake_tensor *t) {
  if (t->owners && --*t->owners == 0) {
    free(t->storage);
    free(t->owners);
  }
  free(t);
  live--;
}

uint64_t fake_optional(fake_tensor *t) {
  if (!t) return 0;
  uint64_t *cell = malloc(sizeof *cell);
  *cell = (uint64_t)(uintptr_t)t;
  live++;
  return (uint64_t)(uintptr_t)cell;
}

/* ---- registration and calls ---- */

static fake_op ops[64];
static char names[64][64];
static int op_count;

const fake_op *fake_ops(int *count) {
  *count = op_count;
  return ops;
}

int32_t aoti_torch_library_init_fragment(const char *ns, const char *file, uint32_t line,
                                         void **library) {
  (void)file, (void)line;
  static int def;
  *library = &def;
  return strcmp(ns, "lina") != 0;
}

int32_t aoti_torch_library_init_impl(const char *ns, const char *key, const char *file,
                                     uint32_t line, void **library) {
  (void)file, (void)line;
  static int cpu, cuda;
  *library = strcmp(key, "CPU") == 0 ? &cpu : &cuda;
  *(int *)*library = strcmp(key, "CPU") == 0;
  return strcmp(ns, "lina") != 0;
}

int32_t aoti_torch_library_def(void *library, const char *schema) {
  (void)library;
  ops[op_count].schema = schema;
  snprintf(names[op_count++], sizeof names[0], "%.*s", (int)strcspn(schema, "("), schema);
  return 0;
}

int32_t aoti_torch_library_impl(void *library, const char *name, fake_boxed *function) {
  for (int i = 0; i < op_count; i++)
    if (strcmp(names[i], name) == 0) {
      *(*(int *)library ? &ops[i].cpu : &ops[i].cuda) = function;
      return 0;
    }
  return 1; /* no such operator defined */
}

static jmp_buf caller;
static char thrown[1024];

const char *fake_call(fake_boxed *function, uint64_t *stack, uint64_t nargs, uint64_t nouts) {
  if (setjmp(caller)) return thrown;
  function(stack, nargs, nouts);
  return NULL;
}

/* C cannot throw. A jump drops the frames in between, like an exception that
 * C frames do not catch. */
void aoti_torch_check(bool condition, const char *function, const char *file, uint32_t line,
                      const char *text) {
  (void)function, (void)file, (void)line;
  if (condition) return;
  snprintf(thrown, sizeof thrown, "%s", text);
  longjmp(caller, 1);
}

/* ---- the functions over tensors ---- */

#define NUMBER(name, value) \
  int32_t aoti_torch_##name(void) { return value; }
NUMBER(dtype_float32, FAKE_F32)
NUMBER(dtype_bfloat16, FAKE_BF16)
NUMBER(dtype_float16, FAKE_F16)
NUMBER(dtype_float64, FAKE_F64)
NUMBER(dtype_int32, FAKE_I32)
NUMBER(dtype_int64, FAKE_I64)
NUMBER(device_type_cpu, FAKE_CPU)
NUMBER(device_type_cuda, FAKE_CUDA)

#define GETTER(name, type, expression)                          \
  int32_t aoti_torch_get_##name(fake_tensor *t, type *result) { \
    MAY_FAIL();                                                 \
    *result = expression;                                       \
    return 0;                                                   \
  }
GETTER(data_ptr, void *, t->data)
GETTER(dim, int64_t, t->dim)
GETTER(numel, int64_t, t->numel)
GETTER(sizes, int64_t *, t->size)
GETTER(strides, int64_t *, t->stride)
GETTER(dtype, int32_t, t->dtype)
GETTER(device_type, int32_t, t->device)
GETTER(device_index, int32_t, t->index)

int32_t aoti_torch_empty_strided(int64_t dim, const int64_t *size, const int64_t *stride,
                                 int32_t dtype, int32_t device, int32_t index, fake_tensor **out) {
  MAY_FAIL();
  (void)index;
  fake_tensor *t = fake_new(dtype, device, dim, size, stride);
  if (!t) return 1;
  /* Uninitialised means any value: NaN finds who counts on zeros. */
  if (t->storage) {
    int64_t last = 0;
    for (int64_t i = 0; i < dim; i++) last += (size[i] - 1) * stride[i];
    memset(t->storage, 0xff, (last + 1) * fake_element_bytes(dtype));
  }
  *out = t;
  return 0;
}

int32_t aoti_torch_create_tensor_from_blob(void *data, int64_t dim, const int64_t *size,
                                           const int64_t *stride, int64_t offset, int32_t dtype,
                                           int32_t device, int32_t index, fake_tensor **out) {
  MAY_FAIL();
  (void)index;
  fake_tensor *t = describe(dtype, device, dim, size, stride);
  t->data = data ? (char *)data + offset * fake_element_bytes(dtype) : NULL;
  *out = t;
  return 0;
}

int32_t aoti_torch__reinterpret_tensor(fake_tensor *base, int64_t dim, const int64_t *size,
                                       const int64_t *stride, int64_t offset, fake_tensor **out) {
  MAY_FAIL();
  fake_tensor *t = describe(base->dtype, base->device, dim, size, stride);
  t->storage = base->storage, t->owners = base->owners;
  if (t->owners) ++*t->owners;
  /* torch counts the offset from the start of the storage, and so does this. */
  t->data = base->storage && base->device == FAKE_CPU
              ? (char *)base->storage + offset * fake_element_bytes(base->dtype)
              : base->data;
  *out = t;
  return 0;
}

int32_t aoti_torch_new_tensor_handle(fake_tensor *base, fake_tensor **out) {
  MAY_FAIL();
  fake_tensor *t = describe(base->dtype, base->device, base->dim, base->size, base->stride);
  t->storage = base->storage, t->owners = base->owners, t->data = base->data;
  if (t->owners) ++*t->owners;
  *out = t;
  return 0;
}

int32_t aoti_torch_delete_tensor_object(fake_tensor *t) {
  fake_delete(t);
  return 0;
}

/* The byte offset of element i, counted as a contiguous tensor's. */
static int64_t place(const fake_tensor *t, int64_t i) {
  int64_t at = 0;
  for (int64_t d = t->dim - 1; d >= 0; d--) {
    at += i % t->size[d] * t->stride[d];
    i /= t->size[d];
  }
  return at * fake_element_bytes(t->dtype);
}

int32_t aoti_torch_copy_(fake_tensor *to, fake_tensor *from, int32_t non_blocking) {
  (void)non_blocking;
  MAY_FAIL();
  if (to->dtype != from->dtype || to->numel != from->numel) return 1;
  if (to->device != FAKE_CPU || from->device != FAKE_CPU) return 0;
  for (int64_t i = 0; i < to->numel; i++)
    memcpy(to->data + place(to, i), from->data + place(from, i), fake_element_bytes(to->dtype));
  return 0;
}

int32_t aoti_torch_zero_(fake_tensor *t) {
  MAY_FAIL();
  if (t->device != FAKE_CPU) return 0;
  for (int64_t i = 0; i < t->numel; i++)
    memset(t->data + place(t, i), 0, fake_element_bytes(t->dtype));
  return 0;
}

static double element(const fake_tensor *t, int64_t i) {
  const char *at = t->data + place(t, i);
  if (t->dtype == FAKE_F32) return *(const float *)at;
  if (t->dtype == FAKE_F64) return *(const double *)at;
  return *(const uint16_t *)at; /* its bits: the read is what matters */
}

static int32_t multiply(fake_tensor *out, const fake_tensor *a, const fake_tensor *b) {
  int64_t rows = out->size[0], cols = out->size[1], inner = a->size[1];
  if (out->dim != 2 || a->dim != 2 || b->dim != 2 || b->size[0] != inner || a->size[0] != rows ||
      b->size[1] != cols || a->dtype != b->dtype || out->dtype != a->dtype)
    return 1;
  for (int64_t i = 0; i < rows * cols; i++) {
    double sum = 0;
    for (int64_t k = 0; k < inner; k++)
      sum += element(a, i / cols * inner + k) * element(b, k * cols + i % cols);
    char *at = out->data + place(out, i);
    float f = out->dtype == FAKE_F32 ? (float)sum : 0;
    if (out->dtype == FAKE_F64)
      memcpy(at, &sum, 8);
    else
      memcpy(at, &f, fake_element_bytes(out->dtype));
  }
  return 0;
}

int32_t aoti_torch_cpu_mm_out(fake_tensor *out, fake_tensor *a, fake_tensor *b) {
  MAY_FAIL();
  return multiply(out, a, b);
}

#ifndef FAKE_OLD
int32_t aoti_torch_cpu__linear_pointwise(fake_tensor *x, fake_tensor *weight, fake_tensor **bias,
                                         const char *function, const double **scalars,
                                         int64_t scalar_count, const char **algorithm,
                                         fake_tensor **out) {
  MAY_FAIL();
  if (x->dim != 2 || weight->dim != 2 || bias || strcmp(function, "none") != 0 || scalars ||
      scalar_count != 0 || algorithm)
    return 1;
  int64_t size[2] = {x->size[0], weight->size[0]}, stride[2] = {weight->size[0], 1};
  fake_tensor turned = *weight;
  turned.size[0] = weight->size[1], turned.stride[0] = weight->stride[1];
  turned.size[1] = weight->size[0], turned.stride[1] = weight->stride[0];
  *out = fake_new(x->dtype, x->device, 2, size, stride);
  if (!*out) return 1;
  if (multiply(*out, x, &turned) == 0) return 0;
  fake_delete(*out);
  *out = NULL;
  return 1;
}
#endif

/* In pieces of random length, the last one first: nobody may count on an order. */
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                           void (*body)(int64_t, int64_t, void *), void *context) {
  MAY_FAIL();
  while (begin < end) {
    int64_t least = grain < 1 ? 1 : grain, length = end - begin;
    if (length > least) length = least + (int64_t)(draw() % (uint64_t)(length - least + 1));
    body(end - length, end, context);
    end -= length;
  }
  return 0;
}

/* Only operators on a GPU are called by name. */
int32_t torch_call_dispatcher(const char *name, const char *overload, uint64_t *stack,
                              uint64_t build_version) {
  (void)name, (void)overload, (void)stack, (void)build_version;
  return 1;
}

#ifdef FAKE_OLD
void *_Znwm(size_t bytes) { /* C++'s operator new */
  live++;
  return malloc(bytes);
}
void _ZdlPv(void *cell) { /* C++'s operator delete */
  free(cell);
  live--;
}
#else
int32_t torch_new_stable_ivalue(uint64_t **cell) {
  *cell = calloc(1, sizeof **cell);
  live++;
  return 0;
}
int32_t torch_delete_stable_ivalue(uint64_t *cell) {
  free(cell);
  live--;
  return 0;
}
const char *torch_exception_get_what_without_backtrace(void) { return "failed on purpose"; }
#endif
