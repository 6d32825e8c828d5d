/* torch_abi.h - the libtorch C functions lina calls, looked up at import.
 *
 * libtorch's shim headers have a C ABI but are not C source, so lina declares
 * what it calls here; tests/abi_check.cpp compares every line with torch's own
 * headers. Nothing is linked: one binary serves every torch from 2.10 on.
 *
 * X(return type, name, arguments). Handles of torch's own types are void *.
 * A lina_torch_error other than 0 means that torch caught an exception.
 */
#ifndef LINA_TORCH_ABI_H
#define LINA_TORCH_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LINA_TORCH_NEEDED        "2.10"
#define LINA_TORCH_BUILD_VERSION (2ULL << 56 | 10ULL << 48) /* the same as a number */

typedef int32_t lina_torch_error;
typedef void lina_torch_boxed(uint64_t *stack, uint64_t nargs, uint64_t nouts);
typedef void lina_torch_body(int64_t begin, int64_t end, void *context);

/* libtorch_cpu.so; all of them must be there. */
#define LINA_TORCH_FUNCTIONS(X)                                                             \
  X(lina_torch_error, aoti_torch_library_init_fragment,                                     \
    (const char *ns, const char *file, uint32_t line, void **library))                      \
  X(lina_torch_error, aoti_torch_library_init_impl,                                         \
    (const char *ns, const char *key, const char *file, uint32_t line, void **library))     \
  X(lina_torch_error, aoti_torch_library_def, (void *library, const char *schema))          \
  X(lina_torch_error, aoti_torch_library_impl,                                              \
    (void *library, const char *name, lina_torch_boxed *function))                          \
  X(int32_t, aoti_torch_dtype_float32, (void))                                              \
  X(int32_t, aoti_torch_dtype_bfloat16, (void))                                             \
  X(int32_t, aoti_torch_dtype_float16, (void))                                              \
  X(int32_t, aoti_torch_dtype_float64, (void))                                              \
  X(int32_t, aoti_torch_dtype_int32, (void))                                                \
  X(int32_t, aoti_torch_dtype_int64, (void))                                                \
  X(int32_t, aoti_torch_device_type_cpu, (void))                                            \
  X(int32_t, aoti_torch_device_type_cuda, (void))                                           \
  X(lina_torch_error, aoti_torch_get_data_ptr, (void *tensor, void **data))                 \
  X(lina_torch_error, aoti_torch_get_dim, (void *tensor, int64_t *dim))                     \
  X(lina_torch_error, aoti_torch_get_numel, (void *tensor, int64_t *numel))                 \
  X(lina_torch_error, aoti_torch_get_sizes, (void *tensor, int64_t **sizes))                \
  X(lina_torch_error, aoti_torch_get_strides, (void *tensor, int64_t **strides))            \
  X(lina_torch_error, aoti_torch_get_dtype, (void *tensor, int32_t *dtype))                 \
  X(lina_torch_error, aoti_torch_get_device_type, (void *tensor, int32_t *type))            \
  X(lina_torch_error, aoti_torch_get_device_index, (void *tensor, int32_t *index))          \
  X(lina_torch_error, aoti_torch_empty_strided,                                             \
    (int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype,              \
     int32_t device_type, int32_t device_index, void **tensor))                             \
  X(lina_torch_error, aoti_torch_create_tensor_from_blob,                                   \
    (void *data, int64_t dim, const int64_t *sizes, const int64_t *strides,                 \
     int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,      \
     void **tensor))                                                                        \
  X(lina_torch_error, aoti_torch__reinterpret_tensor,                                       \
    (void *tensor, int64_t dim, const int64_t *sizes, const int64_t *strides,               \
     int64_t storage_offset, void **result))                                                \
  X(lina_torch_error, aoti_torch_copy_, (void *tensor, void *source, int32_t non_blocking)) \
  X(lina_torch_error, aoti_torch_zero_, (void *tensor))                                     \
  X(lina_torch_error, aoti_torch_new_tensor_handle, (void *tensor, void **copy))            \
  X(lina_torch_error, aoti_torch_delete_tensor_object, (void *tensor))                      \
  X(lina_torch_error, aoti_torch_cpu_mm_out, (void *out, void *a, void *b))                 \
  X(lina_torch_error, torch_parallel_for,                                                   \
    (int64_t begin, int64_t end, int64_t grain, lina_torch_body *body, void *context))      \
  X(lina_torch_error, torch_call_dispatcher,                                                \
    (const char *name, const char *overload, uint64_t *stack, uint64_t build_version))      \
  X(void, aoti_torch_check,                                                                 \
    (bool condition, const char *function, const char *file, uint32_t line, const char *text))

/* libtorch_cuda.so; all or none: a CPU build of torch has none. */
#define LINA_TORCH_CUDA_FUNCTIONS(X)                                                             \
  X(lina_torch_error, aoti_torch_get_current_cuda_stream, (int32_t device_index, void **stream)) \
  X(lina_torch_error, aoti_torch_create_cuda_guard, (int32_t device_index, void **guard))        \
  X(lina_torch_error, aoti_torch_delete_cuda_guard, (void *guard))

/* oneDNN's products; NULL where torch was built without it. */
#define LINA_TORCH_ONEDNN_FUNCTIONS(X)                                                 \
  X(lina_torch_error, aoti_torch_cpu__linear_pointwise,                                \
    (void *x, void *weight, void **bias, const char *function, const double **scalars, \
     int64_t scalar_count, const char **algorithm, void **out))

/* Newer than LINA_TORCH_NEEDED: NULL where torch lacks them. */
#define LINA_TORCH_OPTIONAL_FUNCTIONS(X)                                        \
  X(lina_torch_error, torch_new_stable_ivalue, (uint64_t **value)) /* 2.13 */   \
  X(lina_torch_error, torch_delete_stable_ivalue, (uint64_t *value)) /* 2.13 */ \
  X(const char *, torch_exception_get_what_without_backtrace, (void)) /* 2.13 */

typedef struct {
#define X(type, name, arguments) type(*name) arguments;
  LINA_TORCH_FUNCTIONS(X)
  LINA_TORCH_CUDA_FUNCTIONS(X)
  LINA_TORCH_ONEDNN_FUNCTIONS(X)
  LINA_TORCH_OPTIONAL_FUNCTIONS(X)
#undef X
  void *(*operator_new)(size_t);   /* C++'s, for optional cells before 2.13 */
  void (*operator_delete)(void *);
  bool has_cuda;                   /* the CUDA functions are there */
} lina_torch_functions;

/* Valid after lina_torch_load() returned LINA_OK. */
extern lina_torch_functions lina_torch;

/* Finds every function in the libtorch that this process has loaded.
 * LINA_ETORCH: torch is not imported, or lacks a function (named in the text). */
int lina_torch_load(void);

#endif
