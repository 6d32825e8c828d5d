/* words.h - CUDA's words that a kernel's text needs to be C++. */
#ifndef LINA_TESTS_WORDS_H
#define LINA_TESTS_WORDS_H

#include <stdint.h>

#define __device__
#define __forceinline__ inline
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct Index { unsigned x = 0; };
extern Index blockIdx, gridDim, threadIdx;
typedef void *cudaStream_t;
enum { cudaSuccess = 0 };

static inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) {
  return {a, b, c, d};
}

#endif
