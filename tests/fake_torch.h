/* fake_torch.h - what the fuzz driver asks of the fake libtorch.
 *
 * fake_torch.c has the C functions of csrc/torch_abi.h, over plain memory, in a
 * library named libtorch_cpu.so, so that lina's own lookup finds it. Tensors
 * are allocated to the byte: AddressSanitizer sees any step outside.
 */
#ifndef LINA_FAKE_TORCH_H
#define LINA_FAKE_TORCH_H

#include <stdbool.h>
#include <stdint.h>

/* torch's own numbers (c10/core/ScalarType.h, DeviceType.h). */
enum {
  FAKE_I32 = 3,
  FAKE_I64 = 4,
  FAKE_F16 = 5,
  FAKE_F32 = 6,
  FAKE_F64 = 7,
  FAKE_BOOL = 11,
  FAKE_BF16 = 15,
  FAKE_F8 = 23
};
enum { FAKE_CPU = 0, FAKE_CUDA = 1, FAKE_META = 14 };
#define FAKE_MAX_DIM   8
#define FAKE_MAX_BYTES (8 << 20) /* larger allocations fail, as on a full machine */

typedef struct {
  void *storage;                 /* NULL for borrowed or no memory */
  int64_t *owners;               /* of storage: views share it */
  char *data;
  int64_t dim, numel, size[FAKE_MAX_DIM], stride[FAKE_MAX_DIM];
  int32_t dtype, device, index;
} fake_tensor;

typedef void fake_boxed(uint64_t *stack, uint64_t nargs, uint64_t nouts);
typedef struct {
  const char *schema;
  fake_boxed *cpu, *cuda;
} fake_op;

/* A tensor with this geometry over fresh zeroed memory; NULL if it is too large. */
fake_tensor *fake_new(int32_t dtype, int32_t device, int64_t dim, const int64_t *size,
                      const int64_t *stride);
void fake_delete(fake_tensor *t);
int fake_element_bytes(int32_t dtype);
/* The cell of a `Tensor?` argument; NULL stays None. */
uint64_t fake_optional(fake_tensor *t);
/* Tensors and cells alive. */
int64_t fake_live(void);

/* The operators registered so far; *count gets their number. */
const fake_op *fake_ops(int *count);
/* Calls a boxed function; NULL, or the text that it threw. */
const char *fake_call(fake_boxed *function, uint64_t *stack, uint64_t nargs, uint64_t nouts);
/* From now on each fallible function fails once in `one_in` calls; 0: never. */
void fake_fail(uint64_t seed, uint64_t one_in);
/* Whether a failure was injected since fake_fail. */
bool fake_has_failed(void);

#endif
