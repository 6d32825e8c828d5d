/* fake_cuda_memory.c - memory, its exports, and events of fake_cuda.h. Work on it runs at once. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cuda_runtime_api.h>

#include "fake_cuda.h"

/* Everything that is allocated stays reachable here: what is left on purpose is no leak. */
typedef struct block {
  void *memory;
  size_t mapped;                     /* bytes; 0: not pinned */
  bool for_good;                     /* a stream may write it at any time */
  struct block *next;
} block;
static block *blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* The driver's end: pinned memory is gone, whoever still looks at it. */
static void end(void) {
  pthread_mutex_lock(&lock);
  for (block *b = blocks; b; b = b->next)
    if (b->mapped) (void)munmap(b->memory, b->mapped);
  pthread_mutex_unlock(&lock);
  fake_sleep(0.05);                  /* for a thread that does */
}

static void begin(void) {
  if (atexit(end) != 0) fake_broken("no atexit");
}

void fake_cuda_begin(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, begin);
}

static void *keep(void *memory, size_t mapped, bool for_good) {
  block *b = malloc(sizeof *b);
  fake_cuda_begin();
  pthread_mutex_lock(&lock);
  *b = (block){memory, mapped, for_good, blocks};
  blocks = b;
  pthread_mutex_unlock(&lock);
  return memory;
}

int fake_cuda_held(void) {
  int n = 0;
  pthread_mutex_lock(&lock);
  for (const block *b = blocks; b; b = b->next) n++;
  pthread_mutex_unlock(&lock);
  return n;
}

static cudaError_t drop(void *memory, bool pinned) {
  pthread_mutex_lock(&lock);
  block **at = &blocks, *b;
  while (*at && (*at)->memory != memory) at = &(*at)->next;
  b = *at;
  if (b) *at = b->next;
  pthread_mutex_unlock(&lock);
  if (!b || pinned != (b->mapped > 0)) fake_broken("%p was freed, which is not allocated", memory);
  if (b->for_good) fake_broken("pinned memory %p was freed", memory);
  if (pinned)
    (void)munmap(memory, b->mapped);
  else
    free(memory);
  free(b);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
  int device = 0;
  (void)cudaGetDevice(&device);
  if (!(flags & cudaHostAllocMapped)) return cudaErrorInvalidValue;
  if (fake_breaks(device, FAKE_HOST_ALLOC)) return cudaErrorMemoryAllocation;
  bytes = (bytes + 4095) / 4096 * 4096;
  void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return cudaErrorMemoryAllocation;
  *out = memset(memory, 0xa5, bytes);
  (void)keep(memory, bytes, flags & cudaHostAllocPortable);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void *host) { return drop(host, true); }

cudaError_t cudaMalloc(void **out, size_t bytes) {
  *out = keep(malloc(bytes), 0, false);
  return cudaSuccess;
}

cudaError_t cudaFree(void *memory) { return drop(memory, false); }

cudaError_t cudaMemset(void *memory, int value, size_t bytes) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  (void)which, (void)device;
  return *value = 16, cudaSuccess;
}

/* ---- exports: all ranks are in this process ---- */

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *memory) {
  memset(handle, 0, sizeof *handle);
  memcpy(handle->reserved, &memory, sizeof memory);
  return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void **out, cudaIpcMemHandle_t handle, unsigned flags) {
  memcpy(out, handle.reserved, sizeof *out);
  return *out && flags == cudaIpcMemLazyEnablePeerAccess ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaIpcCloseMemHandle(void *memory) {
  return memory ? cudaSuccess : cudaErrorInvalidValue;
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
  *out = calloc(1, 1);
  return flags == cudaEventDisableTiming ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) {
  return event && s ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags) {
  return event && s && !flags ? cudaSuccess : cudaErrorInvalidValue;
}
