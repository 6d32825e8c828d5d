/* peers_slots.cuh - which row of each rank's part a token goes to: slots count a rank's
 * tokens in order. How: peers_dispatch.cu. */
#ifndef LINA_CUDA_PEERS_SLOTS_CUH
#define LINA_CUDA_PEERS_SLOTS_CUH

#include "peers.cuh"

typedef lina_peers_dispatch_args Args;

/* Ranks that hold an expert of token t: bit r for rank r. */
static __device__ __forceinline__ unsigned ranks_of(const Args &a, int64_t t) {
  const unsigned local = (unsigned)(a.E / a.links.ep), E = (unsigned)a.E;
  const int K = (int)a.K;
  unsigned mask = 0;
#pragma unroll 8
  for (int k = 0; k < K; k++) {
    const unsigned e = (unsigned)__ldg(a.expert + t * K + k);
    if (e < E) mask |= 1u << (e / local);
  }
  return mask;
}

struct SlotCounts {
  int before[PEERS_WARPS][LINA_PEERS_MAX]; /* tokens of earlier warps, by rank */
  int total[LINA_PEERS_MAX];
};

/* The whole block, one tile of tokens. Afterwards lane's slots are in `slot`
 * (-1: none), counted from the tile's first token. */
static __device__ __forceinline__ void tile_slots(const Args &a, int64_t first, SlotCounts *counts,
                                                  int (&slot)[LINA_PEERS_MAX]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t t = first + threadIdx.x;
  const unsigned mask = t < a.T ? ranks_of(a, t) : 0;
#pragma unroll
  for (int d = 0; d < LINA_PEERS_MAX; d++) {
    const unsigned same = __ballot_sync(LINA_FULL, mask >> d & 1);
    slot[d] = mask >> d & 1 ? __popc(same & ((1u << lane) - 1)) : -1;
    if (lane == d) counts->before[warp][d] = __popc(same);
  }
  __syncthreads();
  if (threadIdx.x < LINA_PEERS_MAX) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < PEERS_WARPS; w++) {
      const int n = counts->before[w][threadIdx.x];
      counts->before[w][threadIdx.x] = sum;
      sum += n;
    }
    counts->total[threadIdx.x] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int d = 0; d < LINA_PEERS_MAX; d++)
    if (slot[d] >= 0) slot[d] += counts->before[warp][d];
}

/* T > 512. Blocks wait for earlier ones only, which the GPU starts first. */
static __global__ void __launch_bounds__(PEERS_THREADS)
    peers_slots(const __grid_constant__ Args a) {
  __shared__ SlotCounts counts;
  __shared__ int start[LINA_PEERS_MAX];
  int slot[LINA_PEERS_MAX];
  const uint32_t epoch = a.links.state->epoch[LINA_PEERS_OUT] + 1;
  const int64_t first = (int64_t)blockIdx.x * LINA_PEERS_TILE;
  const int ep = a.links.ep;
  if (threadIdx.x < LINA_PEERS_MAX) start[threadIdx.x] = 0;
  tile_slots(a, first, &counts, slot);
  volatile uint64_t *look = a.links.look;
  if (threadIdx.x < LINA_PEERS_MAX)
    look[blockIdx.x * LINA_PEERS_MAX + threadIdx.x] =
        (uint64_t)epoch << 32 | (uint32_t)counts.total[threadIdx.x];
  for (unsigned i = threadIdx.x; i < blockIdx.x * LINA_PEERS_MAX; i += PEERS_THREADS) {
    uint64_t word;
    do word = look[i];
    while ((uint32_t)(word >> 32) != epoch);
    atomicAdd(&start[i % LINA_PEERS_MAX], (int)(uint32_t)word);
  }
  __syncthreads();
  const int64_t t = first + threadIdx.x;
  if (t < a.T)
#pragma unroll
    for (int d = 0; d < LINA_PEERS_MAX; d++)
      if (d < ep) a.slot[t * ep + d] = slot[d] < 0 ? -1 : slot[d] + start[d];
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < ep)
    a.count[threadIdx.x] = start[threadIdx.x] + counts.total[threadIdx.x];
}

/* Block-wide: slots of up to 512 tokens, kept here and written out by block 0. */
static __device__ __forceinline__ void count_slots(const Args &a, SlotCounts *counts,
                                                   int (*slots)[LINA_PEERS_MAX]) {
  const int ep = a.links.ep;
  int slot[LINA_PEERS_MAX];
  tile_slots(a, 0, counts, slot);
#pragma unroll
  for (int d = 0; d < LINA_PEERS_MAX; d++) slots[threadIdx.x][d] = slot[d];
  if (blockIdx.x == 0) {
    if (threadIdx.x < a.T)
#pragma unroll
      for (int d = 0; d < LINA_PEERS_MAX; d++)
        if (d < ep) a.slot[threadIdx.x * ep + d] = slot[d];
    if (threadIdx.x < ep) a.count[threadIdx.x] = counts->total[threadIdx.x];
  }
  __syncthreads();
}

#endif
