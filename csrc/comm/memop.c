#include "memop.h"

#if LINA_CUDA
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <string.h>

#include "../error.h"

static CUresult (*write_value)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
static CUresult (*wait_value)(CUstream, CUdeviceptr, cuuint32_t, unsigned);

static int find(void) {
  enum cudaDriverEntryPointQueryResult found;
  if (write_value && wait_value) return LINA_OK;
  cudaError_t e = cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", (void **)&write_value,
                                                   12000, cudaEnableDefault, &found);
  if (e == cudaSuccess)
    e = cudaGetDriverEntryPointByVersion("cuStreamWaitValue32", (void **)&wait_value, 12000,
                                         cudaEnableDefault, &found);
  if (e != cudaSuccess || !write_value || !wait_value)
    return lina_error(LINA_ECUDA, "comm: the driver has no cuStreamWaitValue32");
  return LINA_OK;
}

int lina_memop_load(void) {
  static pthread_mutex_t finding = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&finding);
  int rc = find();
  pthread_mutex_unlock(&finding);
  return rc;
}

int lina_memop_write(void *stream, uint32_t *device_word, uint32_t value) {
  CUresult e = write_value((CUstream)stream, (CUdeviceptr)(uintptr_t)device_word, value,
                           CU_STREAM_WRITE_VALUE_DEFAULT);
  return e == CUDA_SUCCESS ? LINA_OK
                           : lina_error(LINA_ECUDA, "comm: cuStreamWriteValue32 gives %d", e);
}

int lina_memop_wait_zero(void *stream, uint32_t *device_word) {
  CUresult e =
      wait_value((CUstream)stream, (CUdeviceptr)(uintptr_t)device_word, 0, CU_STREAM_WAIT_VALUE_EQ);
  return e == CUDA_SUCCESS ? LINA_OK
                           : lina_error(LINA_ECUDA, "comm: cuStreamWaitValue32 gives %d", e);
}

int lina_memop_word(int device, _Atomic uint32_t **host, uint32_t **on_device) {
  int current = 0;
  void *word = NULL;
  if (cudaGetDevice(&current) != cudaSuccess || cudaSetDevice(device) != cudaSuccess)
    return lina_error(LINA_ECUDA, "comm: no device %d", device);
  cudaError_t e = cudaHostAlloc(&word, 128, cudaHostAllocMapped | cudaHostAllocPortable);
  if (e == cudaSuccess) {
    memset(word, 0, 128);
    e = cudaHostGetDevicePointer((void **)on_device, word, 0);
  }
  (void)cudaSetDevice(current);
  if (e != cudaSuccess) {
    if (word) (void)cudaFreeHost(word);
    return lina_error(LINA_ECUDA, "comm: pinned memory: %s", cudaGetErrorString(e));
  }
  *host = word;
  return LINA_OK;
}
#else
typedef int lina_memop_is_empty; /* ISO C wants a declaration in every file */
#endif
