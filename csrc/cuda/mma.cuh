/* mma.cuh - the tensor cores of sm_80 and newer: blocks of 16-bit elements out of
 * shared memory and their products, in the layout of PTX's mma.m16n8k16.
 */
#ifndef LINA_CUDA_MMA_CUH
#define LINA_CUDA_MMA_CUH

#include "common.cuh"

/* Four 8 x 8 blocks; lane l gives the 16-byte row l % 8 of block l / 8. TRANS: each transposed. */
template <bool TRANS>
static __device__ __forceinline__ void ldmatrix(const void *row, unsigned (&r)[4]) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(row);
  if (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

/* c[16 x 8] += a[16 x 16] b[16 x 8]; the last argument names the type only. */
static __device__ __forceinline__ void mma(float *c, const unsigned (&a)[4], const unsigned *b,
                                           lina_bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void mma(float *c, const unsigned (&a)[4], const unsigned *b,
                                           lina_f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
