/* peers_collect_bulk.cuh - collect by the SMs' copy engines, sums while rows arrive.
 * Contract: peers.h.
 *
 * Rows for every rank fall into `chunks` ranges; all of the first range leave before any of
 * the second, and each range has a flag. Of a block's 16 warps the first send (carriers, or with
 * WEIGH warps that sum a row's experts into shared memory), the last waits for the flags of all
 * sources and tells the block, the others sum tokens, in order, as their rows are here. A
 * token's rows lie in ranges known beforehand: slots count tokens, counts are both ranks'.
 * Nobody's sending depends on a sum or a flag, so nothing can wait in a circle. */
#ifndef LINA_CUDA_PEERS_COLLECT_BULK_CUH
#define LINA_CUDA_PEERS_COLLECT_BULK_CUH

#include "peers_bulk.cuh"
#include "peers_sums.cuh"

#define BULK_WEIGHING 10 /* warps that send with WEIGH */
static_assert(BULK_WEIGHING * 2 * PEERS_DEPTH * 512 <= BULK_ROOM, "two stages to a warp");
static_assert(BULK_LAG == 2, "send_rows and send_sums have two pieces on the way");

/* Rows of one range of n rows. */
static __device__ __forceinline__ unsigned chunk_rows(unsigned n, unsigned chunks) {
  return n < chunks ? 1 : (n + chunks - 1) / chunks;
}

/* Piece u of the s-th of chunks * (ep - 1) segments: range c of the rows for rank d. */
struct BulkCursor {
  int s, c, d;
  unsigned u, all, first; /* pieces of the segment; its first row */
  __device__ __forceinline__ bool settle(const Args &a, unsigned pieces, int chunks) {
    const int ep = a.links.ep;
    for (;; u -= all, s++) {
      if (s == chunks * (ep - 1)) return false;
      c = s / (ep - 1);
      d = a.links.rank + 1 + s % (ep - 1); /* one order for all blocks: u counts through it */
      if (d >= ep) d -= ep;
      const unsigned n = (unsigned)__ldg(a.count + ep + d), rows = chunk_rows(n, chunks);
      first = min(c * rows, n);
      all = min(rows, n - first) * pieces;
      if (u < all) return true;
    }
  }
};

/* One lane of each sending warp says, range by range, that its stores have arrived. */
struct Teller {
  uint32_t epoch;
  unsigned warps;
  int chunks, told;
  bool last; /* the flags of the last range were sent from here */
  __device__ __forceinline__ void until(const Args &a, int chunk) {
    for (; told < chunk; told++) {
      BULK_ASM("fence.proxy.async;" :: : "memory");
      peers_fence();
      if (atomicAdd(&a.links.state->chunk[told], 1u) != warps - 1) continue;
      a.links.state->chunk[told] = 0;
      peers_fence();
      peers_announce(a.links, LINA_PEERS_BACK, epoch, NULL, false, told);
      last = told == chunks - 1;
    }
  }
};

/* Lane 0 of a carrier: its share of y's rows as they are. */
static __device__ void send_rows(const Args &a, int64_t row_bytes, char *rooms, uint64_t *barriers,
                                 Teller *tell) {
  const int carrier = threadIdx.x / 32, chunks = tell->chunks;
  const bulk_cut cut = bulk_cuts(row_bytes);
  const unsigned step = gridDim.x * BULK_CARRIERS;
  BulkCursor from = {0, 0, 0, blockIdx.x * BULK_CARRIERS + carrier, 0, 0}, to = from;
  unsigned loaded = 0;
  int before = 0; /* range of the piece before this one */
  bulk_pipe pipe;
  pipe.begin(rooms, barriers, carrier);
  bool more = from.settle(a, cut.pieces, chunks);
  auto load = [&]() {
    const int64_t row = from.d * a.C + from.first + from.u / cut.pieces;
    const unsigned piece = from.u % cut.pieces;
    pipe.load(loaded++, (const char *)a.y + row * row_bytes + (int64_t)piece * cut.bytes,
              bulk_size(cut, piece, row_bytes));
    from.u += step;
    more = from.settle(a, cut.pieces, chunks);
  };
  while (more && loaded < BULK_STAGES) load();
  for (unsigned n = 0; to.settle(a, cut.pieces, chunks); n++, to.u += step) {
    const int64_t row = a.links.rank * a.C + to.first + to.u / cut.pieces;
    const unsigned piece = to.u % cut.pieces;
    pipe.await(n);
    bulk_store(
        a.links.buffer[to.d] + a.links.back_at + row * row_bytes + (int64_t)piece * cut.bytes,
        pipe.stage(n), bulk_size(cut, piece, row_bytes));
    bulk_commit();
    bulk_wait<2>(); /* all pieces before n - 1 have arrived, so all ranges before that piece's */
    tell->until(a, before);
    before = to.c;
    if (n >= 2 && more) load(); /* into the stage of piece n - 2 */
  }
  bulk_finish();
  tell->until(a, chunks);
}

/* A whole warp: its share of rows, each summed over its experts. */
template <class T>
static __device__ __forceinline__ void send_sums(const Args &a, int64_t row_bytes, char *rooms,
                                                 Teller *tell) {
  constexpr int N = in_16_bytes<T>;
  constexpr unsigned PIECE = PEERS_DEPTH * 512;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunks = tell->chunks;
  const unsigned pieces = (unsigned)((row_bytes + PIECE - 1) / PIECE);
  const unsigned step = gridDim.x * BULK_WEIGHING;
  BulkCursor to = {0, 0, 0, blockIdx.x * BULK_WEIGHING + warp, 0, 0};
  int before = 0;
  for (unsigned n = 0; to.settle(a, pieces, chunks); n++, to.u += step) {
    const int64_t row = to.first + to.u / pieces, at = (int64_t)(to.u % pieces) * PIECE;
    lina_raw<T, N> v[PEERS_DEPTH];
    weigh<T, N, PEERS_DEPTH>(a, to.d * a.C + row, at / 16 + lane, v);
    uint4 *stage = (uint4 *)rooms + (warp * 2 + n % 2) * (PIECE / 16);
    if (lane == 0) {
      bulk_wait<1>(); /* all pieces before n - 1 have arrived; n - 2 was in this stage */
      tell->until(a, before);
    }
    before = to.c;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PEERS_DEPTH; i++) stage[i * 32 + lane] = v[i];
    bulk_publish();
    __syncwarp();
    if (lane == 0) {
      const int64_t left = row_bytes - at;
      bulk_store(
          a.links.buffer[to.d] + a.links.back_at + (a.links.rank * a.C + row) * row_bytes + at,
          bulk_shared(stage), left < PIECE ? (uint32_t)left : PIECE);
      bulk_commit();
    }
  }
  if (lane == 0) {
    bulk_finish();
    tell->until(a, chunks);
  }
}

template <class T, bool WEIGH, int RANKS, int DEPTH>
static __global__ void __launch_bounds__(PEERS_THREADS, 1)
    peers_collect_bulk(const __grid_constant__ Args a, int chunks) {
  constexpr int N = in_16_bytes<T>, SENDERS = WEIGH ? BULK_WEIGHING : BULK_CARRIERS;
  constexpr int WATCHER = PEERS_WARPS - 1, SUMMERS = WATCHER - SENDERS;
  extern __shared__ __align__(128) char rooms[];
  __shared__ uint64_t barriers[BULK_CARRIERS * BULK_STAGES];
  __shared__ volatile uint32_t seen[LINA_PEERS_MAX]; /* ranges that are here, by source */
  __shared__ uint32_t epoch;
  const int ep = a.links.ep, rank = a.links.rank, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row_bytes = a.D * (int64_t)sizeof(T);
  const uint32_t read = peers_read(a.links.state, LINA_PEERS_BACK);
  if (threadIdx.x < LINA_PEERS_MAX) seen[threadIdx.x] = 0;
  for (int d = 0; d < ep && a.dweight; d++)
    if (d != rank) send_dweight(a, d, __ldg(a.count + ep + d), row_bytes);
  const peers_turn turn = peers_begin(a.links.state, read);
  if (threadIdx.x == 0) epoch = turn.epoch;
  __syncthreads(); /* the block's dweight is under the fence of each of its first flags, too */

  const unsigned pieces = (unsigned)((a.D / N + 32 * DEPTH - 1) / (32 * DEPTH));
  const unsigned all = (unsigned)a.T * pieces, step = gridDim.x * SUMMERS;
  const unsigned mine = blockIdx.x * SUMMERS + warp - SENDERS;
  Teller tell = {epoch, gridDim.x * SENDERS, chunks, 0, false};
  if (warp < SENDERS) {
    if constexpr (WEIGH)
      send_sums<T>(a, row_bytes, rooms, &tell);
    else if (lane == 0)
      send_rows(a, row_bytes, rooms, barriers, &tell);
  } else if (warp == WATCHER) {
    if (lane < ep && lane != rank)
      for (int chunk = 0; chunk < chunks; chunk++) {
        if (peers_wait(a.links, LINA_PEERS_BACK, lane, epoch, chunk) == PEERS_LOST) {
          seen[lane] = PEERS_LOST; /* above every range: nobody waits any more */
          break;
        }
        __threadfence_block();
        seen[lane] = (uint32_t)chunk + 1;
      }
  } else {
    const unsigned rows =
        lane < ep ? chunk_rows((unsigned)__ldg(a.count + lane), (unsigned)chunks) : 1;
    for (unsigned u = mine; u < all; u += step) {
      const int64_t t = u / pieces;
      const int my_slot = lane < ep ? __ldg(a.slot + t * ep + lane) : -1;
      if (my_slot >= 0 && lane != rank)
        while (seen[lane] < (unsigned)my_slot / rows + 1) __nanosleep(64);
      __threadfence_block();
      __syncwarp();
      sum_piece<T, N, WEIGH, RANKS, DEPTH>(a, t, (int64_t)(u % pieces) * 32 * DEPTH + lane, my_slot,
                                           false);
    }
  }
  __syncwarp();
  __syncthreads();
  if (tell.last) peers_lower(a.links); /* all rows have left, and now all have arrived */
  bool lost = *(const volatile uint32_t *)&a.links.state->failed != 0;
  for (int e = 0; e < ep; e++) lost |= seen[e] == PEERS_LOST;
  if (lost && warp >= SENDERS && warp != WATCHER)
    for (unsigned u = mine; u < all; u += step)
      sum_piece<T, N, false, RANKS, DEPTH>(a, u / pieces, (int64_t)(u % pieces) * 32 * DEPTH + lane,
                                           -1, true);
  if (a.dweight_out) pick_dweight(a, row_bytes, lost);
  peers_end(a.links.state, LINA_PEERS_BACK, turn);
}

template <class T, bool WEIGH>
static int launch_bulk(const Args *a, unsigned blocks, cudaStream_t stream) {
  const auto kernel = a->links.ep == 2 ? peers_collect_bulk<T, WEIGH, 2, PEERS_DEPTH>
                                       : peers_collect_bulk<T, WEIGH, LINA_PEERS_MAX, 1>;
  int rc = bulk_allow("p2p collect", (const void *)kernel);
  if (rc != LINA_OK) return rc;
  kernel<<<blocks, PEERS_THREADS, BULK_ROOM, stream>>>(*a, bulk_chunks());
  return lina_launched("p2p collect");
}

#endif
