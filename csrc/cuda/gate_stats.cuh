/* gate_stats.cuh - the gate's statistics added up: a block's warps, then the
 * blocks, both in a fixed order. A block's row: E probabilities and z as floats, then 2E loads.
 */
#ifndef LINA_CUDA_GATE_STATS_CUH
#define LINA_CUDA_GATE_STATS_CUH

#include "common.cuh"

/* The block's row of `partial`, from the lanes' sums and 2E loads. `sums` has room for
 * E + 1 to a warp and takes the place of what the block's threads used before. */
template <class T, int LANES, int V>
static __device__ __forceinline__ void write_block(int E, float (&prob)[V], float z, float *sums,
                                                   const int *loads, int32_t *partial) {
#pragma unroll
  for (int o = LANES; o < 32; o *= 2) {
#pragma unroll
    for (int i = 0; i < V; i++) prob[i] += __shfl_xor_sync(LINA_FULL, prob[i], o);
    z += __shfl_xor_sync(LINA_FULL, z, o);
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  if (lane < LANES) {
    float *row = sums + threadIdx.x / 32 * (E + 1);
#pragma unroll
    for (int i = 0; i < V; i++) {
      int id = slot_id<T, LANES, V>(lane, i);
      if (id < E) row[id] = prob[i];
    }
    if (lane == 0) row[E] = z;
  }
  __syncthreads();
  partial += (size_t)blockIdx.x * (3 * E + 1);
  for (int i = threadIdx.x; i < 3 * E + 1; i += blockDim.x) {
    float sum = 0;
    if (i <= E)
      for (int warp = 0; warp < blockDim.x / 32; warp++) sum += sums[warp * (E + 1) + i];
    partial[i] = i <= E ? __float_as_int(sum) : loads[i - E - 1];
  }
}

/* Column c of the blocks' rows added up: 16 rows at a time, then the 16 in order. A word is
 * added as a float and as an integer; its column says which sum is meant. */
static __global__ void __launch_bounds__(512)
    add_blocks(int blocks, int E, const int32_t *partial, float *stat, int32_t *load) {
  __shared__ unsigned part[16][33];
  const int width = 3 * E + 1, column = blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  unsigned count = 0;
  auto add = [&](unsigned word) { sum += __uint_as_float(word), count += word; };
  if (column < width)
    for (int b = threadIdx.y; b < blocks; b += 16) add(__ldg(partial + (size_t)b * width + column));
  part[threadIdx.y][threadIdx.x] = column <= E ? __float_as_uint(sum) : count;
  __syncthreads();
  if (threadIdx.y || column >= width) return;
  sum = 0, count = 0;
  for (int i = 0; i < 16; i++) add(part[i][threadIdx.x]);
  if (column <= E)
    stat[column] = sum;
  else
    load[column - E - 1] = (int)count;
}

#endif
