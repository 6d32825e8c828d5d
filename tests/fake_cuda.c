/* fake_cuda.c - the CUDA driver and runtime of fake_cuda.h. */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#define ON_DEVICE (1ull << 62) /* no address a processor takes */

/* ---- the driver ---- */

static _Atomic uint32_t *on_host(CUdeviceptr word) {
  if (!(word & ON_DEVICE)) fake_broken("a stream was given a host's pointer");
  return (_Atomic uint32_t *)(uintptr_t)(word - ON_DEVICE);
}

void *fake_host_pointer(void *on_device) { return on_host((CUdeviceptr)(uintptr_t)on_device); }

static CUresult write_value(CUstream s, CUdeviceptr word, cuuint32_t value, unsigned flags) {
  if (flags != CU_STREAM_WRITE_VALUE_DEFAULT ||
      fake_breaks(fake_stream_device(s), FAKE_WRITE_VALUE))
    return CUDA_ERROR_INVALID_VALUE;
  /* As where the stream's queue is full. Long: only what the caller does about it ends it. */
  if (fake_breaks(fake_stream_device(s), FAKE_FULL) && !fake_stream_drain(s, 30))
    fake_broken("device %d: a call of the driver blocks for ever", fake_stream_device(s));
  fake_push_write(s, on_host(word), value);
  return CUDA_SUCCESS;
}

static CUresult wait_value(CUstream s, CUdeviceptr word, cuuint32_t value, unsigned flags) {
  if (flags != CU_STREAM_WAIT_VALUE_EQ) return CUDA_ERROR_INVALID_VALUE;
  fake_push_wait(s, on_host(word), value);
  return CUDA_SUCCESS;
}

/* ---- the runtime ---- */

static _Thread_local int current;

const char *cudaGetErrorString(cudaError_t code) { return code ? "fake CUDA error" : "no error"; }

cudaError_t cudaGetDevice(int *device) { return *device = current, cudaSuccess; }

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= FAKE_DEVICES) return cudaErrorInvalidValue;
  return current = device, cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void **on_device, void *host, unsigned flags) {
  *on_device = (void *)(uintptr_t)((uintptr_t)host + ON_DEVICE);
  return flags ? cudaErrorInvalidValue : cudaSuccess;
}

typedef struct {
  void *to;
  const void *from;
  size_t to_pitch, from_pitch, width, height;
} copy;

static void run_copy(fake_stream *s, void *argument) {
  copy *c = argument;
  (void)s;
  for (size_t y = 0; y < c->height; y++)
    memcpy((char *)c->to + y * c->to_pitch, (const char *)c->from + y * c->from_pitch, c->width);
  free(c);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t s) {
  if (kind != cudaMemcpyDeviceToDevice || width > to_pitch || width > from_pitch ||
      to_pitch > INT32_MAX || from_pitch > INT32_MAX ||
      fake_breaks(fake_stream_device(s), FAKE_COPY))
    return cudaErrorInvalidValue;
  copy *c = malloc(sizeof *c);
  *c = (copy){to, from, to_pitch, from_pitch, width, height};
  fake_push(s, run_copy, c);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t s) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, s);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  bool on = fake_stream_captures(s);
  *status = on ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
  *function = NULL;
  fake_cuda_begin();
  if (strcmp(name, "cuStreamWriteValue32") == 0) *function = (void *)write_value;
  if (strcmp(name, "cuStreamWaitValue32") == 0) *function = (void *)wait_value;
  *found = cudaDriverEntryPointSuccess;
  return *function && version >= 11000 && flags == cudaEnableDefault ? cudaSuccess
                                                                     : cudaErrorInvalidValue;
}
