/* tensor.h - tensors as lina's C code sees them; the only user of torch_abi.h
 * besides register.c.
 *
 * A boxed kernel owns its arguments: it takes each one off the stack, gives
 * its results back and drops the rest. lina_tensor is an owned handle with its
 * geometry read once, so that kernels see plain pointers and int64_t sizes.
 *
 *   void lina_op_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts) {
 *     lina_tensor x = {0}, y = {0};
 *     lina_scope scope = {0};
 *     int rc;
 *     lina_take_all(stack, ..)            every argument, before any check
 *     ... check, LINA_TRY(lina_enter(&x, &scope)), LINA_TRY(lina_empty(&y, ..))
 *     stack[0] = lina_give(&y);
 *   done:
 *     lina_leave(&scope); lina_drop(&y); lina_drop(&x);
 *     if (rc != LINA_OK) lina_throw(rc);  last: it does not return
 *   }
 */
#ifndef LINA_TENSOR_H
#define LINA_TENSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "dtype.h"
#include "error.h"

#define LINA_MAX_DIM 4

typedef uint64_t lina_value; /* one cell of torch's boxed stack */

/* Not LINA_CUDA: that is the build switch, 0 or 1. */
enum lina_device { LINA_ON_CPU, LINA_ON_CUDA, LINA_ON_OTHER };

typedef struct {
  void *handle;                    /* owned; NULL: no tensor (None) */
  void *data;                      /* first element; may be NULL if empty */
  int64_t size[LINA_MAX_DIM];
  int64_t stride[LINA_MAX_DIM];    /* in elements */
  int64_t numel;
  int dim;                         /* as torch says; sizes kept up to LINA_MAX_DIM */
  int dtype, device, index;        /* lina_dtype, lina_device, device number */
} lina_tensor;

/* dtype of the router's weights, of their gradients and of sums. */
static inline int lina_sum_dtype(int dtype) { return dtype == LINA_F64 ? LINA_F64 : LINA_F32; }

/* ---- the stack ---- */

/* Takes ownership of a Tensor cell. Fails (LINA_ETORCH) only if torch does;
 * the handle is owned and must be dropped in any case. */
int lina_take(lina_value cell, lina_tensor *t);
/* The same for `Tensor?`: None gives handle == NULL. */
int lina_take_optional(lina_value cell, lina_tensor *t);
static inline int64_t lina_take_int(lina_value cell) { return (int64_t)cell; }
static inline bool lina_take_bool(lina_value cell) { return (cell & 0xff) != 0; }
double lina_take_double(lina_value cell);
/* Moves the tensor to the stack: t->handle becomes NULL. */
lina_value lina_give(lina_tensor *t);
/* Releases the tensor; harmless on {0} and after lina_give. */
void lina_drop(lina_tensor *t);
/* Raises the thread's error text as a Python RuntimeError. Never returns and
 * runs no C cleanup: release everything first. */
void lina_throw(int code);

/* ---- checks: each error names op, argument, value and limit ---- */

const char *lina_dtype_name(int dtype);
/* `t` has `dim` dimensions and one of the dtypes in `mask` (1 << LINA_F32 | ...) */
int lina_check(const char *op, const char *name, const lina_tensor *t, int dim, unsigned mask);
/* `t` lies on the device of `other`. */
int lina_check_device(const char *op, const char *name, const lina_tensor *t,
                      const lina_tensor *other);
/* size[axis] == want */
int lina_check_size(const char *op, const char *name, const lina_tensor *t, int axis, int64_t want);
bool lina_is_contiguous(const lina_tensor *t);

/* ---- allocation ---- */

/* Uninitialised, contiguous, on the device of `like`. */
int lina_empty(lina_tensor *t, int dtype, const lina_tensor *like, int dim, const int64_t *size);
/* The same with strides (in elements), e.g. a gradient laid out as its weight. */
int lina_empty_strided(lina_tensor *t, int dtype, const lina_tensor *like, int dim,
                       const int64_t *size, const int64_t *stride);
/* Replaces `t` by a contiguous copy unless it is contiguous already. */
int lina_make_contiguous(lina_tensor *t);
/* Strides (in elements) that a gradient of `w`, of three dimensions, gets: w's own where w is dense
 * and does not overlap itself, else contiguous ones. */
void lina_gradient_strides(const lina_tensor *w, int64_t stride[3]);
/* Gives the whole of `t` other sizes and strides over the same storage, e.g. a
 * transpose. */
int lina_restride(lina_tensor *t, int dim, const int64_t *size, const int64_t *stride);
/* Fills with zero bytes on the current stream. */
int lina_zero(lina_tensor *t);

/* ---- device scope ---- */

typedef struct {
  void *guard;
  void *stream;
} lina_scope;
/* On CUDA: makes t's device current and reads torch's current stream there.
 * On the CPU: both stay NULL. A build without CUDA refuses CUDA tensors. */
int lina_enter(const lina_tensor *t, lina_scope *scope);
void lina_leave(lina_scope *scope);

/* ---- torch's products and threads ---- */

/* A matrix over memory that somebody else owns. */
typedef struct {
  void *data;
  int64_t rows, cols, row_stride, col_stride;
} lina_matrix;
static inline lina_matrix lina_transposed(lina_matrix m) {
  lina_matrix t = {m.data, m.cols, m.rows, m.col_stride, m.row_stride};
  return t;
}
/* out = a @ b on the CPU by torch's own products, of its mm or its oneDNN (any CPU
 * float dtype). out's rows or columns are contiguous; it must not overlap. a may have
 * more rows than out: their products are not wanted. */
int lina_mm(lina_matrix out, lina_matrix a, lina_matrix b, int dtype);
/* n or slightly more: the rows that scratch of n rows should be filled up to, with
 * zeros. oneDNN compiles a kernel for each shape, so there should be few of them. */
int64_t lina_mm_rows(int64_t n, int dtype);
/* out = a @ b group by group by torch's _grouped_mm on CUDA; see torch's
 * documentation for the shapes: 2-D x 3-D (rows grouped) or 2-D x 2-D (inner
 * dimension grouped). `offset` holds the E group ends, int32. */
int lina_grouped_mm(const lina_tensor *a, const lina_tensor *b, const lina_tensor *offset,
                    lina_tensor *out);
/* A borrowed view: same memory as `base`, which must outlive it. `first` is
 * the offset of its first element from base's, in elements. */
int lina_view(lina_tensor *t, const lina_tensor *base, int64_t first, int dim, const int64_t *size,
              const int64_t *stride);

/* body(begin, end, context) over [0, n) in pieces of at least `grain`, on
 * torch's own CPU threads. */
typedef void lina_body(int64_t begin, int64_t end, void *context);
int lina_parallel_for(int64_t n, int64_t grain, lina_body *body, void *context);

#endif
