/* tensor_torch.h - what tensor.c and tensor_product.c share: torch's numbers and
 * errors. Private to them. */
#ifndef LINA_TENSOR_TORCH_H
#define LINA_TENSOR_TORCH_H

#include "tensor.h"
#include "torch_abi.h"

/* LINA_ETORCH with torch's own words, where torch offers them. */
int lina_torch_failed(const char *call);

/* Returns from the calling function if torch caught an exception. */
#define TORCH(call)                                            \
  do {                                                         \
    if (lina_torch.call != 0) return lina_torch_failed(#call); \
  } while (0)

/* torch's number of a lina_dtype, of a lina_device. */
int32_t lina_torch_dtype(int dtype);
int32_t lina_torch_device(int device);

/* Fills in everything but the handle. */
int lina_read_geometry(lina_tensor *t);

#endif
