/* Zeroes the weight gradients of experts without rows. Contract: experts.h.
 * One grid row an expert; blocks of an expert that has rows leave at once, so
 * that the usual cost is one launch.
 */
#include <cuda_runtime.h>

#include "../error.h"
#include "../ops/experts.h"

static const int THREADS = 256, MOST_BLOCKS = 64;

static __global__ void clear_empty(lina_clear_empty_args a) {
  int e = blockIdx.y;
  if (a.offset[e + 1] > a.offset[e]) return;
  int64_t n = a.bytes / 16, step = (int64_t)gridDim.x * blockDim.x;
  uint4 *out = (uint4 *)a.out + e * n;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
    out[i] = make_uint4(0, 0, 0, 0);
}

extern "C" int lina_clear_empty_cuda(const lina_clear_empty_args *a, void *stream) {
  if (a->bytes % 16 != 0)
    return lina_error(LINA_EINVAL, "experts: %lld bytes an expert, must be a multiple of 16",
                      (long long)a->bytes);
  if (a->E == 0 || a->bytes == 0) return LINA_OK;
  int64_t blocks = (a->bytes / 16 + THREADS - 1) / THREADS;
  dim3 grid((unsigned)(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS), (unsigned)a->E);
  clear_empty<<<grid, THREADS, 0, (cudaStream_t)stream>>>(*a);
  cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess)
    return lina_error(LINA_ECUDA, "experts: clear_empty: %s", cudaGetErrorString(status));
  return LINA_OK;
}
