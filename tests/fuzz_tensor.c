/* fuzz_tensor.c - see fuzz_tensor.h. */
#include "fuzz_tensor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz_draw.h"
#include "splitmix.h"

/* ---- randomness ---- */

static uint64_t state;
void fuzz_seed(uint64_t seed) { state = seed; }
uint64_t fuzz_random(void) { return splitmix(&state); }
int64_t between(int64_t low, int64_t high) {
  return low + (int64_t)(fuzz_random() % (uint64_t)(high - low + 1));
}
bool once_in(int n) { return fuzz_random() % n == 0; }

int64_t any_int(void) {
  static const int64_t odd[] = {0,         -1,        1,         2,         31,        32,
                                33,        1024,      1025,      INT32_MAX, INT32_MIN, 1ll << 31,
                                1ll << 32, 1ll << 40, INT64_MAX, INT64_MIN};
  return once_in(2) ? ONE_OF(odd) : between(-3, 40);
}

double any_double(void) {
  static const double odd[] = {0, -0.0, 1, -1, 1e-300, 1e300, INFINITY, -INFINITY, NAN};
  return once_in(2) ? ONE_OF(odd) : (double)between(-1000, 1000) / 256;
}

int32_t any_dtype(void) {
  static const int32_t all[] = {FAKE_F32, FAKE_F32, FAKE_F64,  FAKE_F16, FAKE_BF16,
                                FAKE_I32, FAKE_I64, FAKE_BOOL, FAKE_F8};
  return ONE_OF(all);
}

/* ---- tensors ---- */

/* Bits of any kind: NaN, infinities and subnormal numbers among them. */
static void fill_floats(fake_tensor *t, int64_t bytes) {
  if (t->device != FAKE_CPU || !t->storage) return;
  int width = fake_element_bytes(t->dtype);
  bool wild = once_in(4);
  for (int64_t i = 0; i < bytes / width; i++) {
    float f = (float)between(-512, 512) / 128;
    double d = f;
    uint64_t bits = fuzz_random();
    if (t->dtype == FAKE_F32) memcpy(&bits, &f, 4);
    if (t->dtype == FAKE_F64) memcpy(&bits, &d, 8);
    if (wild && once_in(8)) bits = fuzz_random();
    memcpy((char *)t->storage + i * width, &bits, width);
  }
}

fake_tensor *shaped(int32_t dtype, int dim, const int64_t *size) {
  int64_t stride[FAKE_MAX_DIM], step = 1;
  int order[FAKE_MAX_DIM];
  for (int i = 0; i < dim; i++) order[i] = dim - 1 - i;
  if (once_in(4))
    for (int i = dim - 1; i > 0; i--) {
      int j = (int)between(0, i), swap = order[i];
      order[i] = order[j], order[j] = swap;
    }
  bool pads = once_in(5), expands = once_in(12);
  for (int i = 0; i < dim; i++) {
    stride[order[i]] = expands && once_in(2) ? 0 : step;
    int64_t length = (size[order[i]] > 0 ? size[order[i]] : 1) + (pads ? between(0, 3) : 0);
    if (__builtin_mul_overflow(step, length, &step)) return NULL;
  }
  fake_tensor *t = fake_new(dtype, FAKE_CPU, dim, size, stride);
  if (!t) return NULL;
  int64_t last = 0;
  for (int i = 0; i < dim; i++) last += (size[i] - 1) * stride[i];
  if (dtype != FAKE_I32) fill_floats(t, (last + 1) * fake_element_bytes(dtype));
  return t;
}

fake_tensor *contiguous_i32(int dim, int64_t rows, int64_t cols, const int32_t *values) {
  int64_t size[2] = {rows, cols}, stride[2] = {dim == 2 ? cols : 1, 1};
  fake_tensor *t = fake_new(FAKE_I32, FAKE_CPU, dim, size, stride);
  if (t->storage) memcpy(t->storage, values, t->numel * sizeof *values);
  return t;
}

fake_tensor *any_tensor(void) {
  static const int64_t huge[] = {1ll << 31, (1ll << 31) - 1, 1ll << 33, 1ll << 40, 1025, 70000};
  int64_t size[FAKE_MAX_DIM], stride[FAKE_MAX_DIM], step = 1;
  int dim = (int)between(0, once_in(8) ? 7 : 3);
  bool big = once_in(4);
  for (int i = dim - 1; i >= 0; i--) {
    size[i] = big && once_in(2) ? ONE_OF(huge) : between(0, once_in(3) ? 1 : 12);
    stride[i] = big || once_in(6) ? between(0, 2) * (once_in(2) ? 0 : step) : step;
    step *= size[i] > 0 && size[i] < 64 ? size[i] : 1;
  }
  int32_t device = once_in(12) ? FAKE_CUDA : once_in(24) ? FAKE_META : FAKE_CPU;
  fake_tensor *t = fake_new(any_dtype(), device, dim, size, stride);
  if (t && t->dtype == FAKE_I32 && t->storage && t->device == FAKE_CPU) {
    int64_t last = 0;
    for (int i = 0; i < dim; i++) last += (size[i] - 1) * stride[i];
    memset(t->storage, once_in(2) ? 0 : 0xff, (last + 1) * 4);
  }
  return t;
}
