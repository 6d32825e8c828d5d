/* fuzz_tensor.h - random numbers and tensors for fuzz_draw.c. */
#ifndef LINA_FUZZ_TENSOR_H
#define LINA_FUZZ_TENSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "fake_torch.h"

int64_t between(int64_t low, int64_t high);
bool once_in(int n);
#define ONE_OF(list) list[between(0, (int64_t)(sizeof list / sizeof list[0]) - 1)]
int64_t any_int(void);
double any_double(void);
int32_t any_dtype(void);

/* A tensor of this shape in a random layout: dense, padded, permuted or expanded. */
fake_tensor *shaped(int32_t dtype, int dim, const int64_t *size);
fake_tensor *contiguous_i32(int dim, int64_t rows, int64_t cols, const int32_t *values);
/* Any geometry at all; NULL where even torch could not make it. */
fake_tensor *any_tensor(void);

#endif
