/* peers_bulk.cuh - rows moved by an SM's copy engine (sm_90): global memory to shared
 * memory to the memory of any GPU, no register and no load or store unit between.
 *
 * A carrier is one warp with STAGES pieces of shared memory, each with an mbarrier that
 * its load completes on. Its stores are bulk groups, one to a piece; a stage is loaded
 * again when the store that reads it is LAG pieces old and has read it. So a carrier has
 * LAG stores leaving and STAGES - LAG loads coming. */
#ifndef LINA_CUDA_PEERS_BULK_CUH
#define LINA_CUDA_PEERS_BULK_CUH

#include <stdlib.h>
#include <string.h>

#include "peers.cuh"

#define BULK_CARRIERS 4    /* warps of a block */
#define BULK_STAGES   4
#define BULK_LAG      2
#define BULK_PIECE    4096 /* bytes, at most */
#define BULK_ROOM     (BULK_CARRIERS * BULK_STAGES * BULK_PIECE)
#define BULK_LEAST    (2 << 20) /* bytes sent; less is bound by latency, where plain stores win */

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BULK_ASM(...) asm volatile(__VA_ARGS__)
#else
#define BULK_ASM(...) /* never launched there */ \
  do {                                           \
    __trap();                                    \
    if (false) asm volatile(__VA_ARGS__);        \
  } while (0)
#endif

static __device__ __forceinline__ uint32_t bulk_shared(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
/* From shared memory; part of the thread's open group. */
static __device__ __forceinline__ void bulk_store(void *to, uint32_t from, uint32_t bytes) {
  BULK_ASM("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
           "r"(bytes) : "memory");
}
static __device__ __forceinline__ void bulk_commit() {
  BULK_ASM("cp.async.bulk.commit_group;" :: : "memory");
}
/* All but the thread's last N groups have read their shared memory. */
template <int N> static __device__ __forceinline__ void bulk_wait_read() {
  BULK_ASM("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
/* They have arrived, too. */
template <int N> static __device__ __forceinline__ void bulk_wait() {
  BULK_ASM("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
/* What ordinary stores wrote to shared memory may be read by bulk stores. */
static __device__ __forceinline__ void bulk_publish() {
  BULK_ASM("fence.proxy.async.shared::cta;" :: : "memory");
}
/* Behind it the thread's bulk stores are as its own ordinary ones: complete, and under the
 * fence that comes before a flag. */
static __device__ __forceinline__ void bulk_finish() {
  BULK_ASM("cp.async.bulk.wait_group 0;" :: : "memory");
  BULK_ASM("fence.proxy.async;" :: : "memory");
  peers_fence();
}

/* Lane 0 of a carrier. Pieces are numbered from 0 as the carrier meets them. */
struct bulk_pipe {
  uint32_t room, barrier;
  __device__ __forceinline__ void begin(char *rooms, uint64_t *barriers, int carrier) {
    room = bulk_shared(rooms) + (uint32_t)(carrier * BULK_STAGES * BULK_PIECE);
    barrier = bulk_shared(barriers) + (uint32_t)(carrier * BULK_STAGES * 8);
    for (int s = 0; s < BULK_STAGES; s++)
      BULK_ASM("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + s * 8) : "memory");
    BULK_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");
    bulk_publish();
  }
  __device__ __forceinline__ uint32_t stage(unsigned n) const {
    return room + n % BULK_STAGES * BULK_PIECE;
  }
  __device__ __forceinline__ void load(unsigned n, const void *from, uint32_t bytes) const {
    const uint32_t bar = barrier + n % BULK_STAGES * 8;
    BULK_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
             "r"(bytes) : "memory");
    BULK_ASM(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(stage(n)),
        "l"(from), "r"(bytes), "r"(bar) : "memory");
  }
  __device__ __forceinline__ void await(unsigned n) const {
    const uint32_t bar = barrier + n % BULK_STAGES * 8, parity = n / BULK_STAGES & 1;
    uint32_t done = 0;
    while (!done)
      BULK_ASM(
          "{.reg .pred q; mbarrier.try_wait.parity.shared::cta.b64 q, [%1], %2; selp.u32 %0, "
          "1, 0, q;}" : "=r"(done) : "r"(bar),
          "r"(parity) : "memory");
  }
};

/* A row's pieces: equal but for the last, multiples of 16 bytes. */
struct bulk_cut {
  unsigned pieces;
  uint32_t bytes;
};
static __host__ __device__ __forceinline__ bulk_cut bulk_cuts(int64_t row_bytes) {
  const unsigned pieces = (unsigned)((row_bytes + BULK_PIECE - 1) / BULK_PIECE);
  return {pieces, (uint32_t)((row_bytes / 16 + pieces - 1) / pieces * 16)};
}
static __device__ __forceinline__ uint32_t bulk_size(bulk_cut cut, unsigned piece,
                                                     int64_t row_bytes) {
  return piece + 1 < cut.pieces ? cut.bytes : (uint32_t)(row_bytes - (int64_t)piece * cut.bytes);
}

/* ---- host ---- */

/* How rows are sent, by $LINA_P2P_WAY at each launch, to be measured against each other. */
enum bulk_way {
  WAY_STORES, /* by every warp's loads and stores; without the variable */
  WAY_BULK,   /* by the copy engines of the SMs, from BULK_LEAST bytes on */
  WAY_SPLIT   /* dispatch in two kernels: all SMs send, then `sms` of them wait */
};
static inline int bulk_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess) (void)cudaDeviceGetAttribute(&value, which, device);
  return value;
}
static inline enum bulk_way bulk_way_of(int64_t bytes) {
  const char *name = getenv("LINA_P2P_WAY");
  if (!name) return WAY_STORES;
  if (strcmp(name, "split") == 0) return WAY_SPLIT;
  return strcmp(name, "bulk") == 0 && bytes >= BULK_LEAST &&
                 bulk_attribute(cudaDevAttrComputeCapabilityMajor) >= 9
           ? WAY_BULK
           : WAY_STORES;
}
/* $LINA_P2P_CHUNKS, 1 to 16: flags of a collect by copy engines; the same on all ranks. */
static inline int bulk_chunks(void) {
  const char *name = getenv("LINA_P2P_CHUNKS");
  const int chunks = name ? atoi(name) : 8;
  return chunks < 1 ? 1 : chunks > LINA_PEERS_CHUNKS ? LINA_PEERS_CHUNKS : chunks;
}
static inline int bulk_allow(const char *op, const void *kernel) {
  cudaError_t rc =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BULK_ROOM);
  if (rc == cudaSuccess) return LINA_OK;
  return lina_error(LINA_ECUDA, "%s: shared memory: %s", op, cudaGetErrorString(rc));
}

#endif
