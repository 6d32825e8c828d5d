/* dispatch.cu - tables and header of a spread layer's dispatch. Contract: ../ops/dispatch.h.
 *
 * A block takes a tile of tokens, one to a thread, that lies in one chunk; blockIdx.y is the
 * direction. Two launches over the same tiles:
 *   1. count: for each warp and rank a word whose bit l says whether lane l's token has an
 *      expert there; its bits are the tile's rows. Rows and pairs by rank go to `partial`.
 *   2. place: every block adds up all tiles' counts (out of L2): what lies in earlier chunks,
 *      and by rank in its own chunk and in that one's earlier tiles. Words again, and the
 *      count of set bits before each warp: then a token's row is its rank's first row, that
 *      count, and the bits below its own. A chunk's first block writes its columns.
 * Stable by construction; atomics add integers only.
 *
 * Bound by latency (two dependent launches) at usual sizes, then by writing `row`, which
 * warps do in order of memory whatever ep is.
 */
#include "../ops/dispatch.h"
#include "common.cuh"

#define THREADS     256
#define MAX_THREADS 1024 /* from MANY tokens on: fewer tiles for every block to add up */
#define MANY        65536
#define WORDS       4096 /* of shared memory: one for each warp and rank */
#define MAX_EP      LINA_DISPATCH_MAX_EP
#define CHUNKS      LINA_DISPATCH_CHUNKS
#define COLUMNS     LINA_DISPATCH_COLUMNS

typedef lina_dispatch_args Args;

struct Direction {
  int chunks, ranges, per_chunk; /* per_chunk: tiles */
  int first;                     /* its first tile in `partial` */
};
struct Grid {
  Direction dir[2];
  int words; /* of a tile in `partial`: rows by rank, pairs by rank, own pairs by range */
};

static __host__ __device__ __forceinline__ int64_t first_of(int64_t i, int64_t n, int64_t T) {
  return (i * T + n - 1) / n;
}

/* The block's tokens, [begin, end); none for blocks beyond a direction's tiles. */
struct Tile {
  int chunk, sub;
  int64_t begin, end;
};
static __device__ __forceinline__ Tile tile_of(const Args &a, const Direction &d) {
  Tile tile;
  tile.chunk = blockIdx.x / d.per_chunk, tile.sub = blockIdx.x % d.per_chunk;
  const int64_t end = first_of(tile.chunk + 1, d.chunks, a.T);
  tile.begin = first_of(tile.chunk, d.chunks, a.T) + (int64_t)tile.sub * blockDim.x;
  tile.end = min(tile.begin + (int64_t)blockDim.x, end);
  return tile;
}

/* hit[warp][rank], zero before: bit l for lane l's token. With `pairs` those of other ranks
 * are counted there, and own ones by range behind them. A warp reads its pairs in order. */
static __device__ __forceinline__ void find_hits(const Args &a, const Direction &d,
                                                 const Tile &tile, unsigned *hit, int *pairs) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned E = (unsigned)a.E, local = E / a.ep, K = (unsigned)a.K;
  const int64_t from = tile.begin + warp * 32;
  const int64_t tokens = min((int64_t)32, tile.end - from);
  const int32_t *expert = a.expert + from * a.K;
  if (tokens <= 0) return;
#pragma unroll 4
  for (unsigned i = lane; i < (unsigned)tokens * K; i += 32) {
    const unsigned e = (unsigned)__ldg(expert + i), token = i / K;
    if (e >= E) continue;
    const int rank = (int)(e / local);
    atomicOr(hit + warp * a.ep + rank, 1u << token);
    if (!pairs) continue;
    const bool late = d.ranges == 2 && 2 * (from + token) >= a.T;
    atomicAdd(pairs + (rank == a.me ? a.ep + late : rank), 1);
  }
}

static __global__ void __launch_bounds__(MAX_THREADS)
    dispatch_count(const __grid_constant__ Args a, const __grid_constant__ Grid grid) {
  __shared__ unsigned hit[WORDS];
  __shared__ int pairs[MAX_EP + 2];
  const Direction d = grid.dir[blockIdx.y];
  if (blockIdx.x >= d.chunks * d.per_chunk) return;
  const int ep = a.ep, warps = blockDim.x / 32;
  for (int i = threadIdx.x; i < warps * ep; i += blockDim.x) hit[i] = 0;
  for (int i = threadIdx.x; i < ep + 2; i += blockDim.x) pairs[i] = 0;
  __syncthreads();
  find_hits(a, d, tile_of(a, d), hit, pairs);
  __syncthreads();
  int32_t *partial = a.partial + (int64_t)(d.first + blockIdx.x) * grid.words;
  for (int r = threadIdx.x; r < ep; r += blockDim.x) {
    int rows = 0;
    for (int w = 0; w < warps; w++) rows += __popc(hit[w * ep + r]);
    partial[r] = r == a.me ? 0 : rows;
  }
  for (int i = threadIdx.x; i < ep + 2; i += blockDim.x) partial[ep + i] = pairs[i];
}

/* sum[i] += the n counts at `partial` of tiles [from, to), zero before; groups of threads
 * share the tiles. */
static __device__ __forceinline__ void add_tiles(const int32_t *partial, int words, int n, int from,
                                                 int to, int *sum) {
  const int groups = max((int)blockDim.x / n, 1), share = (to - from + groups - 1) / groups;
  for (int i = threadIdx.x; i < groups * n; i += blockDim.x) {
    const int group = i / n, c = i - group * n, first = from + group * share;
    const int last = min(first + share, to);
    int found = 0;
#pragma unroll 8
    for (int tile = first; tile < last; tile++) found += __ldg(partial + (int64_t)tile * words + c);
    if (found) atomicAdd(sum + c, found);
  }
}

/* The same of all tiles' rows at once: by rank those of the chunk [first, last) and of its
 * tiles before `own`; of all ranks those before the chunk, and all. */
static __device__ __forceinline__ void add_rows(const int32_t *partial, int words, int ep,
                                                int first, int own, int last, int tiles, int *chunk,
                                                int *before, int *earlier, int *all) {
  const int groups = max((int)blockDim.x / ep, 1), share = (tiles + groups - 1) / groups;
  int mine_earlier = 0, mine_all = 0;
  for (int i = threadIdx.x; i < groups * ep; i += blockDim.x) {
    const int group = i / ep, r = i - group * ep, end = min((group + 1) * share, tiles);
    int in_chunk = 0, in_before = 0;
#pragma unroll 8
    for (int tile = group * share; tile < end; tile++) {
      const int n = __ldg(partial + (int64_t)tile * words + r);
      mine_all += n;
      mine_earlier += tile < first ? n : 0;
      in_chunk += tile >= first && tile < last ? n : 0;
      in_before += tile >= first && tile < own ? n : 0;
    }
    if (in_chunk) atomicAdd(chunk + r, in_chunk);
    if (in_before) atomicAdd(before + r, in_before);
  }
  mine_earlier = __reduce_add_sync(LINA_FULL, mine_earlier);
  mine_all = __reduce_add_sync(LINA_FULL, mine_all);
  if (threadIdx.x % 32 == 0 && mine_earlier) atomicAdd(earlier, mine_earlier);
  if (threadIdx.x % 32 == 0 && mine_all) atomicAdd(all, mine_all);
}

/* A chunk's columns from its first tile's block; from the first chunk's also what belongs to
 * no chunk. The other direction's columns are 0 if it is not wanted. */
static __device__ __forceinline__ void write_header(const Args &a, const Direction &d, int chunk,
                                                    const int *rows, const int *pairs,
                                                    const int *own) {
  const int dir = blockIdx.y, width = a.facts + 2 * COLUMNS;
  for (int r = threadIdx.x; r < a.ep; r += blockDim.x) {
    int64_t *line = a.header + (int64_t)r * width, *columns = line + a.facts + dir * COLUMNS;
    columns[chunk] = rows[r];
    if (r != a.me) columns[CHUNKS + chunk] = pairs[r];
    if (chunk) continue;
    for (int c = d.chunks; c < CHUNKS; c++) {
      columns[c] = 0;
      if (r != a.me) columns[CHUNKS + c] = 0;
    }
    if (r == a.me)
      for (int c = 0; c < CHUNKS; c++) columns[CHUNKS + c] = c < 2 ? own[c] : 0;
    if (dir) continue;
    for (int f = 0; f < a.facts; f++) line[f] = a.said[f];
    if (!a.degree[1])
      for (int c = 0; c < COLUMNS; c++) columns[COLUMNS + c] = 0;
  }
}

static __global__ void __launch_bounds__(MAX_THREADS)
    dispatch_place(const __grid_constant__ Args a, const __grid_constant__ Grid grid) {
  __shared__ unsigned hit[WORDS];
  __shared__ int first[WORDS];   /* each warp's first row, by rank */
  __shared__ int chunk[MAX_EP], before[MAX_EP], pairs[MAX_EP], own[2], earlier, all;
  const Direction d = grid.dir[blockIdx.y];
  const int tiles = d.chunks * d.per_chunk;
  if (blockIdx.x >= tiles) return;
  const int ep = a.ep, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const Tile tile = tile_of(a, d);
  for (int i = threadIdx.x; i < warps * ep; i += blockDim.x) hit[i] = 0;
  for (int r = threadIdx.x; r < ep; r += blockDim.x) chunk[r] = before[r] = pairs[r] = 0;
  if (threadIdx.x == 0) own[0] = own[1] = earlier = all = 0;
  __syncthreads();

  const int32_t *partial = a.partial + (int64_t)d.first * grid.words;
  const int begin = tile.chunk * d.per_chunk, end = begin + d.per_chunk;
  add_rows(partial, grid.words, ep, begin, blockIdx.x, end, tiles, chunk, before, &earlier, &all);
  if (tile.sub == 0) add_tiles(partial + ep, grid.words, ep, begin, end, pairs);
  if (blockIdx.x == 0) add_tiles(partial + 2 * ep, grid.words, 2, 0, tiles, own);
  find_hits(a, d, tile, hit, NULL);
  __syncthreads();

  if (tile.sub == 0) write_header(a, d, tile.chunk, chunk, pairs, own);
  if (warp == 0) { /* the tile's first row of each rank */
    int start = earlier;
    for (int base = 0; base < ep; base += 32) {
      const int r = base + lane, n = r < ep ? chunk[r] : 0, up_to = warp_prefix(n, lane);
      if (r < ep) before[r] += start + up_to - n;
      start += __shfl_sync(LINA_FULL, up_to, 31);
    }
  }
  __syncthreads();
  for (int r = threadIdx.x; r < ep; r += blockDim.x) {
    int row = before[r];
    for (int w = 0; w < warps; w++) {
      first[w * ep + r] = row;
      row += __popc(hit[w * ep + r]);
    }
  }
  __syncthreads();

  const int S = all, dir = blockIdx.y;
  const int64_t from = tile.begin + warp * 32, tokens = min((int64_t)32, tile.end - from);
  int32_t *row_at = a.row[dir] + from * ep, *token_at = a.token[dir];
  for (int i = lane; i < (int)tokens * ep; i += 32) {
    const int t = i / ep, r = i - t * ep;
    const unsigned word = hit[warp * ep + r];
    int row = -1;
    if (word >> t & 1) {
      if (r == a.me) {
        row = S + (int)from + t;
      } else {
        row = first[warp * ep + r] + __popc(word & ((1u << t) - 1));
        token_at[row] = (int)from + t;
      }
    }
    row_at[i] = row;
  }
  for (int64_t i = S + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.R;
       i += (int64_t)tiles * blockDim.x)
    token_at[i] = -1;
}

/* ---- host ---- */

static int threads_of(const Args *a) {
  int threads = a->T < MANY ? THREADS : MAX_THREADS;
  while (threads / 32 * a->ep > WORDS) threads /= 2;
  return threads;
}

static Grid grid_of(const Args *a, int *most, int64_t *tiles) {
  Grid grid = {};
  grid.words = 2 * a->ep + 2;
  *most = 0, *tiles = 0;
  for (int dir = 0; dir < 2 && a->degree[dir]; dir++) {
    Direction *d = &grid.dir[dir];
    d->chunks = lina_dispatch_chunks(a->degree[dir]);
    d->ranges = lina_dispatch_ranges(a->degree[dir]);
    const int64_t n = lina_ceil_div(lina_ceil_div(a->T, d->chunks), threads_of(a));
    d->per_chunk = n < 1 ? 1 : (int)n;
    d->first = (int)*tiles;
    const int all = d->chunks * d->per_chunk;
    if (all > *most) *most = all;
    *tiles += all;
  }
  return grid;
}

extern "C" int64_t lina_dispatch_partial_count(const lina_dispatch_args *a) {
  int most;
  int64_t tiles;
  const Grid grid = grid_of(a, &most, &tiles);
  return tiles * grid.words;
}

extern "C" int lina_dispatch_cuda(const lina_dispatch_args *a, void *stream) {
  cudaStream_t on = (cudaStream_t)stream;
  const int64_t wider = a->K > a->ep ? a->K : a->ep;
  if (a->ep < 1 || a->ep > MAX_EP || a->K < 1 || a->K > LINA_DISPATCH_MAX_K || a->E < a->ep ||
      a->E > INT32_MAX || a->E % a->ep || a->T < 0 || a->T > INT32_MAX / wider)
    return lina_error(LINA_EINVAL,
                      "dispatch_layout: T=%lld, K=%lld, E=%lld, ep=%d; 1 <= ep <= %d, E a multiple "
                      "of it below 2^31, 1 <= K <= %d, T * max(K, ep) < 2^31 needed",
                      (long long)a->T, (long long)a->K, (long long)a->E, a->ep, MAX_EP,
                      LINA_DISPATCH_MAX_K);
  int most;
  int64_t tiles;
  const Grid grid = grid_of(a, &most, &tiles);
  const dim3 blocks((unsigned)most, a->degree[1] ? 2 : 1);
  const int threads = threads_of(a);
  dispatch_count<<<blocks, threads, 0, on>>>(*a, grid);
  int rc = lina_launched("dispatch_layout");
  if (rc != LINA_OK) return rc;
  dispatch_place<<<blocks, threads, 0, on>>>(*a, grid);
  return lina_launched("dispatch_layout");
}
