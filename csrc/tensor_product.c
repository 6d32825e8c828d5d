/* tensor_product.c - torch's matrix products and CPU threads. Contract: tensor.h. */
#include <string.h>

#include "tensor_torch.h"

static int wrap(const lina_matrix *m, int dtype, void **handle) {
  int64_t size[2] = {m->rows, m->cols}, stride[2] = {m->row_stride, m->col_stride};
  TORCH(aoti_torch_create_tensor_from_blob(m->data, 2, size, stride, 0, lina_torch_dtype(dtype),
                                           lina_torch_device(LINA_ON_CPU), -1, handle));
  return LINA_OK;
}

int lina_mm(lina_matrix out, lina_matrix a, lina_matrix b, int dtype) {
  void *handle[3] = {NULL, NULL, NULL};
  int rc;
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
