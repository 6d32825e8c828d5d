/* tensor_product.c - torch's matrix products and CPU threads. Contract: tensor.h. */
#include <string.h>

#include "tensor_torch.h"

static int wrap(const lina_matrix *m, int dtype, void **handle) {
  int64_t size[2] = {m->rows, m->cols}, stride[2] = {m->row_stride, m->col_stride};
  TORCH(aoti_torch_create_tensor_from_blob(m->data, 2, size, stride, 0, lina_torch_dtype(dtype),
                                           lina_torch_device(LINA_ON_CPU), -1, handle));
  return LINA_OK;
}

static int by_mm(lina_matrix out, lina_matrix a, lina_matrix b, int dtype) {
  void *handle[3] = {NULL, NULL, NULL};
  int rc;
  a.rows = out.rows;
  LINA_TRY(wrap(&out, dtype, &handle[0]));
  LINA_TRY(wrap(&a, dtype, &handle[1]));
  LINA_TRY(wrap(&b, dtype, &handle[2]));
  if (lina_torch.aoti_torch_cpu_mm_out(handle[0], handle[1], handle[2]) != 0)
    rc = lina_torch_failed("aoti_torch_cpu_mm_out");
done:
  for (int i = 0; i < 3; i++)
    if (handle[i]) lina_torch.aoti_torch_delete_tensor_object(handle[i]);
  return rc;
}

/* ---- float32 by oneDNN ---- */

/* The smallest side and number of multiplications that make up for oneDNN's
 * larger cost of a call and for its result being copied. */
#if defined(__SANITIZE_ADDRESS__)
enum { LEAST_SIDE = 1, LEAST_WORK = 1 }; /* the fuzz driver's matrices are tiny */
#else
enum { LEAST_SIDE = 32, LEAST_WORK = 1 << 20 };
#endif

/* On x86 torch's mm is MKL's, which leaves processors other than Intel's half of
 * their speed; oneDNN, in the same torch and at the same precision, does not. */
static bool onednn_is_faster(int dtype) {
  bool intel = false;
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
  intel = __builtin_cpu_is("intel");
#elif !defined(__x86_64__)
  intel = true;                        /* not measured: torch's own choice */
#endif
  return dtype == LINA_F32 && lina_torch.aoti_torch_cpu__linear_pointwise && !intel;
}

int64_t lina_mm_rows(int64_t n, int dtype) {
  int64_t step = 16;
  if (n < LEAST_SIDE || !onednn_is_faster(dtype)) return n;
  while (step * 32 <= n) step *= 2;    /* 16 sizes from each power of two to the next */
  return (n + step - 1) / step * step;
}

typedef struct {
  const float *from;
  float *to;
  int64_t rows, cols, from_stride, to_stride;
} copy_work;

static void copy_rows(int64_t begin, int64_t end, void *context) {
  const copy_work *c = context;
  for (int64_t i = begin; i < end; i++)
    memcpy(c->to + i * c->to_stride, c->from + i * c->from_stride, (size_t)c->cols * sizeof(float));
}

enum { TILE = 16 };                      /* floats: a cache line */

/* to[j,i] = from[i,j] for tiles of rows begin .. end of `to`. */
static void transpose_tiles(int64_t begin, int64_t end, void *context) {
  const copy_work *c = context;
  for (int64_t j0 = begin * TILE; j0 < c->cols && j0 < end * TILE; j0 += TILE)
    for (int64_t i0 = 0; i0 < c->rows; i0 += TILE) {
      int64_t n = c->cols - j0 < TILE ? c->cols - j0 : TILE;
      int64_t m = c->rows - i0 < TILE ? c->rows - i0 : TILE;
      for (int64_t j = j0; j < j0 + n; j++)
        for (int64_t i = i0; i < i0 + m; i++)
          c->to[j * c->to_stride + i] = c->from[i * c->from_stride + j];
    }
}

static int read_data(void *handle, float **data) {
  void *p;
  TORCH(aoti_torch_get_data_ptr(handle, &p));
  *data = p;
  return LINA_OK;
}

/* `a`, whose columns are contiguous, in rows of its own: oneDNN's linear would
 * copy it as well, on one thread. */
static int in_rows(lina_matrix a, void **handle) {
  int64_t size[2] = {a.rows, a.cols}, stride[2] = {a.cols, 1};
  copy_work work = {a.data, NULL, a.cols, a.rows, a.col_stride, a.cols};
  TORCH(aoti_torch_empty_strided(2, size, stride, lina_torch_dtype(LINA_F32),
                                 lina_torch_device(LINA_ON_CPU), -1, handle));
  int rc;
  LINA_TRY(read_data(*handle, &work.to));
  LINA_TRY(
      lina_parallel_for((a.rows + TILE - 1) / TILE, 1 + 1024 / a.cols, transpose_tiles, &work));
done:
  return rc;
}

/* linear(x, weight) = x @ weight^T in a tensor of its own, with any strides of weight. */
static int by_onednn(lina_matrix out, lina_matrix a, lina_matrix b) {
  void *x = NULL, *weight = NULL, *result = NULL;
  int rc;
  if (out.col_stride != 1) {             /* out^T = b^T a^T */
    lina_matrix left = lina_transposed(b);
    a.rows = out.rows, b = lina_transposed(a), a = left, out = lina_transposed(out);
  }
  if (a.row_stride == 1 && a.col_stride != 1)
    LINA_TRY(in_rows(a, &x));
  else
    LINA_TRY(wrap(&a, LINA_F32, &x));
  b = lina_transposed(b);
  LINA_TRY(wrap(&b, LINA_F32, &weight));
  if (lina_torch.aoti_torch_cpu__linear_pointwise(x, weight, NULL, "none", NULL, 0, NULL,
                                                  &result) != 0) {
    rc = lina_torch_failed("aoti_torch_cpu__linear_pointwise");
    goto done;
  }
  float *from = NULL;
  LINA_TRY(read_data(result, &from));
  copy_work work = {from, out.data, out.rows, out.cols, out.cols, out.row_stride};
  LINA_TRY(lina_parallel_for(out.rows, 1 + (1 << 14) / out.cols, copy_rows, &work));
done:
  if (result) lina_torch.aoti_torch_delete_tensor_object(result);
  if (weight) lina_torch.aoti_torch_delete_tensor_object(weight);
  if (x) lina_torch.aoti_torch_delete_tensor_object(x);
  return rc;
}

int lina_mm(lina_matrix out, lina_matrix a, lina_matrix b, int dtype) {
  bool large = out.rows >= LEAST_SIDE && out.cols >= LEAST_SIDE && b.rows >= LEAST_SIDE &&
               out.rows * out.cols >= LEAST_WORK / b.rows;
  return large && onednn_is_faster(dtype) ? by_onednn(out, a, b) : by_mm(out, a, b, dtype);
}

/* The cell of an optional argument: C++ new, or torch's own from 2.13 on. */
static int new_cell(uint64_t **cell) {
  if (lina_torch.torch_new_stable_ivalue) {
    TORCH(torch_new_stable_ivalue(cell));
    return LINA_OK;
  }
  *cell = lina_torch.operator_new(sizeof **cell);
  return LINA_OK;
}

/* Through the dispatcher, whose stack takes over what lies on it; torch 2.11's
 * CUDA library has no C function of its own for this product. */
int lina_grouped_mm(const lina_tensor *a, const lina_tensor *b, const lina_tensor *offset,
                    lina_tensor *out) {
  enum { SELF, MAT2, OFFS, BIAS, OUT_DTYPE, ARGUMENTS };
  uint64_t stack[ARGUMENTS] = {0}, *cell = NULL; /* 0: None */
  void *handle[3] = {NULL, NULL, NULL};
  const lina_tensor *in[3] = {a, b, offset};
  int rc = LINA_OK;
  memset(out, 0, sizeof *out);
  for (int i = 0; i < 3; i++)
    if (lina_torch.aoti_torch_new_tensor_handle(in[i]->handle, &handle[i]) != 0) {
      rc = lina_torch_failed("aoti_torch_new_tensor_handle");
      goto failed;
    }
  if ((rc = new_cell(&cell)) != LINA_OK) goto failed;
  *cell = (uint64_t)(uintptr_t)handle[OFFS];
  stack[SELF] = (uint64_t)(uintptr_t)handle[SELF];
  stack[MAT2] = (uint64_t)(uintptr_t)handle[MAT2];
  stack[OFFS] = (uint64_t)(uintptr_t)cell;
  TORCH(torch_call_dispatcher("aten::_grouped_mm", "", stack, LINA_TORCH_BUILD_VERSION));
  out->handle = (void *)(uintptr_t)stack[0];
  return lina_read_geometry(out);
failed:
  for (int i = 0; i < 3; i++)
    if (handle[i]) lina_torch.aoti_torch_delete_tensor_object(handle[i]);
  return rc;
}

int lina_parallel_for(int64_t n, int64_t grain, lina_body *body, void *context) {
  TORCH(torch_parallel_for(0, n, grain, body, context));
  return LINA_OK;
}
