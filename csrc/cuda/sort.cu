/* sort.cu - the stable counting sort of pairs by expert. Contract: ../ops/sort.h.
 *
 * Two launches over the same chunks of consecutive pairs, one chunk to a block:
 *   1. count: the chunk's pairs of each expert, to partial[block][E].
 *   2. place: every block adds up all blocks' counts (B*E words out of L2), so
 *      that it knows each expert's total, hence the offsets, and what earlier
 *      blocks hold; then its warps, each on its own part of the chunk, count
 *      once more, turn the counts into cursors in order of the warps, and hand
 *      out rows 32 pairs at a time: lanes with the same expert find each other
 *      by one ballot for each bit of the id.
 * Stable by construction and free of races on order: integers only.
 *
 * Bound by latency (two dependent launches, a few L2 round trips) up to about a
 * million pairs, then by reading the ids three times and the scattered stores.
 */
#include "../ops/sort.h"
#include "common.cuh"

#define MAX_BLOCKS  128
#define MIN_CHUNK   1024
#define COUNTERS    8192 /* words of shared memory for a row of counts for each warp */
#define MAX_THREADS 1024

static int64_t block_count(int64_t N) {
  int64_t blocks = lina_ceil_div(N, MIN_CHUNK);
  return blocks < MAX_BLOCKS ? blocks : MAX_BLOCKS;
}

/* Adds one for each present pair of [begin, end) to count[expert]. */
static __device__ __forceinline__ void count_pairs(const int32_t *expert, unsigned begin,
                                                   unsigned end, int E, unsigned first,
                                                   unsigned step, int *count) {
#pragma unroll 4
  for (unsigned p = begin + first; p < end; p += step) {
    unsigned e = (unsigned)__ldg(expert + p);
    if (e < (unsigned)E) atomicAdd(count + e, 1);
  }
}

static __global__ void __launch_bounds__(MAX_THREADS)
    sort_count(const int32_t *expert, unsigned N, int E, unsigned chunk, int32_t *partial) {
  __shared__ int count[LINA_SORT_MAX_E];
  for (int e = threadIdx.x; e < E; e += blockDim.x) count[e] = 0;
  __syncthreads();
  const unsigned begin = blockIdx.x * chunk, end = min(begin + chunk, N);
  count_pairs(expert, begin, end, E, threadIdx.x, blockDim.x, count);
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += blockDim.x) partial[(size_t)blockIdx.x * E + e] = count[e];
}

/* blockDim.x * E / 32 <= COUNTERS: a row of counters for each warp fits. */
static __global__ void __launch_bounds__(MAX_THREADS)
    sort_place(const int32_t *expert, unsigned N, int E, unsigned chunk, int id_bits,
               const int32_t *partial, int32_t *offset, int32_t *row_pair, int32_t *pair_row) {
  __shared__ int count[COUNTERS];
  __shared__ int total[LINA_SORT_MAX_E], before[LINA_SORT_MAX_E], run[33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int blocks = gridDim.x;

  /* All blocks' counts: `parts` groups of threads take their share of the blocks, then add up in order. */
  const int parts = max((int)blockDim.x / E, 1), share = (blocks + parts - 1) / parts;
  for (int e = threadIdx.x; e < E; e += blockDim.x) total[e] = before[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < parts * E; i += blockDim.x) {
    const int part = i / E, e = i - part * E, last = min((part + 1) * share, blocks);
    int all = 0, earlier = 0;
#pragma unroll 8
    for (int b = part * share; b < last; b++) {
      int n = __ldg(partial + (size_t)b * E + e);
      all += n;
      earlier += b < blockIdx.x ? n : 0;
    }
    if (all) atomicAdd(total + e, all);
    if (earlier) atomicAdd(before + e, earlier);
  }
  for (int i = threadIdx.x; i < warps * E; i += blockDim.x) count[i] = 0;
  __syncthreads();

  /* Each warp's own counts, while the totals become offsets: a warp for 32 experts. */
  const unsigned begin = blockIdx.x * chunk, end = min(begin + chunk, N);
  const unsigned span = chunk / warps; /* chunk is a multiple of MAX_THREADS */
  const unsigned from = min(begin + warp * span, end), to = min(from + span, end);
  count_pairs(expert, from, to, E, lane, 32, count + warp * E);
  for (int base = warp * 32; base < E; base += warps * 32) {
    int e = base + lane, n = e < E ? total[e] : 0, up_to = warp_prefix(n, lane);
    if (e < E) total[e] = up_to - n;
    if (lane == 31) run[base / 32] = up_to;
  }
  __syncthreads();
  if (warp == 0) { /* E <= 1024: at most 32 runs */
    int n = lane < (E + 31) / 32 ? run[lane] : 0, up_to = warp_prefix(n, lane);
    run[lane] = up_to - n;
    if (lane == 31) run[32] = up_to;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    int start = total[e] + run[e / 32];
    if (blockIdx.x == 0) offset[e] = start;
    start += before[e];
    for (int w = 0; w < warps; w++) {
      int n = count[w * E + e];
      count[w * E + e] = start;
      start += n;
    }
  }
  const unsigned rows = run[32];
  if (blockIdx.x == 0 && threadIdx.x == 0) offset[E] = rows;
  __syncthreads();

  int *cursor = count + warp * E;
  for (unsigned base = from; base < to; base += 32) {
    const unsigned p = base + lane;
    const unsigned e = p < to ? (unsigned)__ldg(expert + p) : LINA_FULL;
    const bool present = e < (unsigned)E;
    unsigned same = __ballot_sync(LINA_FULL, present);
    for (int bit = 0; bit < id_bits; bit++) {
      unsigned set = __ballot_sync(LINA_FULL, (e >> bit) & 1);
      same &= (e >> bit) & 1 ? set : ~set;
    }
    const int rank = __popc(same & ((1u << lane) - 1));
    int row = -1;
    if (present) row = cursor[e] + rank;
    __syncwarp();
    if (present && rank == 0) cursor[e] += __popc(same);
    __syncwarp();
    if (present) row_pair[row] = (int)p;
    if (p < to) pair_row[p] = row;
  }
  for (unsigned r = rows + blockIdx.x * blockDim.x + threadIdx.x; r < N;
       r += gridDim.x * blockDim.x)
    row_pair[r] = -1;
}

extern "C" int64_t lina_sort_partial_count(int64_t T, int64_t K, int64_t E) {
  return block_count(T * K) * E;
}

extern "C" int lina_sort_cuda(const lina_sort_args *a, void *stream) {
  cudaStream_t on = (cudaStream_t)stream;
  if (a->E < 1 || a->E > LINA_SORT_MAX_E || a->K < 1 || a->K > 1024 || a->T < 0 ||
      a->T > INT32_MAX / a->K)
    return lina_error(
        LINA_EINVAL,
        "sort: T=%lld, K=%lld, E=%lld; 1 <= E <= %d, 1 <= K <= 1024, T*K < 2^31 needed",
        (long long)a->T, (long long)a->K, (long long)a->E, LINA_SORT_MAX_E);
  if (a->T == 0) {
    (void)cudaMemsetAsync(a->offset, 0, (a->E + 1) * sizeof(int32_t), on);
    return lina_launched("sort");
  }
  const int E = (int)a->E;
  const unsigned N = (unsigned)(a->T * a->K), blocks = (unsigned)block_count(N);
  const unsigned chunk =
      (unsigned)(lina_ceil_div(lina_ceil_div(N, blocks), MAX_THREADS) * MAX_THREADS);
  int threads = MAX_THREADS, id_bits = 0;
  while (threads / 32 * E > COUNTERS) threads /= 2;
  while ((1 << id_bits) < E) id_bits++;
  sort_count<<<blocks, MAX_THREADS, 0, on>>>(a->expert, N, E, chunk, a->partial);
  int rc = lina_launched("sort");
  if (rc != LINA_OK) return rc;
  sort_place<<<blocks, threads, 0, on>>>(a->expert, N, E, chunk, id_bits, a->partial, a->offset,
                                         a->row_pair, a->pair_row);
  return lina_launched("sort");
}
