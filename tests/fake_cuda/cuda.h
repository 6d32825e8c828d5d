/* cuda.h - what csrc/comm uses of the driver's interface, for fake_cuda.c. */
#ifndef FAKE_CUDA_CUDA_H
#define FAKE_CUDA_CUDA_H

#include <stdint.h>

typedef enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 } CUresult;
typedef struct fake_stream *CUstream;
typedef unsigned long long CUdeviceptr;
typedef uint32_t cuuint32_t;

enum { CU_STREAM_WAIT_VALUE_GEQ = 0, CU_STREAM_WAIT_VALUE_EQ = 1 };
enum { CU_STREAM_WRITE_VALUE_DEFAULT = 0 };

#endif
