/* peers_dispatch.cu - rows out to the ranks of their experts. Contract: peers.h.
 *
 * Slots: a thread to a token turns its K ids into a mask of ranks, ballots count
 * the tokens before it. Up to 512 tokens every block of the one kernel does this
 * for itself; else a kernel before it does, whose blocks tell each other their
 * counts (each adds up those of all earlier blocks: stable, no atomics).
 * Sending: a warp to a piece of a row, 4 loads of 16 bytes a lane in flight, each
 * piece read once and stored to every rank that wants it. Then all blocks wait for
 * the flags, copy ids and weights out and, for a backward pass, rows.
 * Bound by NVLink from about 4 MB on, below that by the round trip of the flags.
 */
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

template <class V>
static __device__ __forceinline__ void load_piece(const Args &a, unsigned u, unsigned width,
                                                  int64_t vectors, int lane, peers_piece<V> *p) {
  const unsigned t = u / width;
  p->load((const char *)a.x + t * a.row_bytes, (int64_t)(u - t * width) * 32 * PEERS_DEPTH + lane,
          vectors);
}

/* One piece of a token's row to all its ranks, and with the first piece its ids and weights. */
template <class V>
static __device__ __forceinline__ void send_piece(const Args &a, const peers_piece<V> &p, int64_t t,
                                                  int piece, int64_t vectors, int my_slot,
                                                  int lane) {
  const int64_t first = (int64_t)piece * 32 * PEERS_DEPTH + lane;
  const int ep = a.links.ep, rank = a.links.rank;
  const int64_t rows = (int64_t)ep * a.C;
  for (int i = 0; i < ep; i++) { /* from the next rank on, so that not all write to one */
    int d = rank + 1 + i;
    if (d >= ep) d -= ep;
    const int slot = __shfl_sync(LINA_FULL, my_slot, d);
    if (slot < 0) continue;
    const int64_t row = (int64_t)rank * a.C + slot;
    char *out = a.links.buffer[d] + a.links.out_at;
    p.store((d == rank && a.x_out ? (char *)a.x_out : out) + row * a.row_bytes, first, vectors);
    if (piece == 0 && a.expert_out) {
      char *weights = out + lina_peers_weights_at(rows, a.row_bytes),
           *ids = weights + rows * a.K * 4;
      for (int k = lane; k < a.K; k += 32) {
        ((float *)weights)[row * a.K + k] = __ldg(a.weight + t * a.K + k);
        ((int32_t *)ids)[row * a.K + k] = __ldg(a.expert + t * a.K + k);
      }
    }
  }
}

/* What `source` sent: ids made local, weights, and rows if they are to outlive the round. */
template <class V>
static __device__ __forceinline__ void receive(const Args &a, int source, int64_t n,
                                               int64_t vectors, int pieces) {
  const int ep = a.links.ep, rank = a.links.rank;
  const int64_t rows = (int64_t)ep * a.C, part = (int64_t)source * a.C;
  const char *out = a.links.buffer[rank] + a.links.out_at;
  const char *weights = out + lina_peers_weights_at(rows, a.row_bytes);
  const float *weight = (const float *)weights + part * a.K;
  const int32_t *ids = (const int32_t *)(weights + rows * a.K * 4) + part * a.K;
  const unsigned local = (unsigned)(a.E / ep), first_id = local * (unsigned)rank;
  const int64_t threads = (int64_t)gridDim.x * PEERS_THREADS;
  const int64_t thread = (int64_t)blockIdx.x * PEERS_THREADS + threadIdx.x;
  for (int64_t i = thread; i < a.C * a.K; i += threads) {
    int id = -1;
    if (i < n * a.K) {
      const unsigned mine = (unsigned)ids[i] - first_id;
      if (mine < local) id = (int)mine;
      a.weight_out[part * a.K + i] = weight[i];
    }
    a.expert_out[part * a.K + i] = id;
  }
  if (!a.x_out || source == rank) return;
  const int lane = threadIdx.x % 32;
  const unsigned width = (unsigned)pieces, all = (unsigned)n * width;
  for (unsigned u = (unsigned)(thread / 32); u < all; u += (unsigned)(threads / 32)) {
    const int64_t row = part + u / width, first = (int64_t)(u % width) * 32 * PEERS_DEPTH + lane;
    peers_piece<V> p;
    p.load(out + row * a.row_bytes, first, vectors);
    p.store((char *)a.x_out + row * a.row_bytes, first, vectors);
  }
}

/* Rows that did not come: NaN in every dtype, so that no gradient looks like one. */
static __device__ __forceinline__ void spoil(const Args &a, int source) {
  const int64_t n = a.count[a.links.ep + source] * a.row_bytes / 2;
  uint16_t *rows = (uint16_t *)(a.links.buffer[a.links.rank] + a.links.out_at +
                                (int64_t)source * a.C * a.row_bytes);
  for (int64_t i = (int64_t)blockIdx.x * PEERS_THREADS + threadIdx.x; i < n;
       i += (int64_t)gridDim.x * PEERS_THREADS)
    rows[i] = 0xffff;
}

template <class V>
static __global__ void __launch_bounds__(PEERS_THREADS, 1)
    peers_dispatch(const __grid_constant__ Args a, int pieces, bool count_here) {
  __shared__ SlotCounts counts;
  __shared__ int slots[LINA_PEERS_TILE][LINA_PEERS_MAX];
  __shared__ uint32_t received[LINA_PEERS_MAX];
  const int lane = threadIdx.x % 32, ep = a.links.ep;
  const uint32_t read = peers_read(a.links.state, LINA_PEERS_OUT);
  const int64_t vectors = a.row_bytes / (int64_t)sizeof(V);

  /* the next piece is on its way while this one leaves, the first while slots are counted */
  const unsigned width = (unsigned)pieces, all = (unsigned)a.T * width;
  const unsigned step = gridDim.x * PEERS_WARPS;
  unsigned u = blockIdx.x * PEERS_WARPS + threadIdx.x / 32;
  peers_piece<V> next;
  if (u < all) load_piece(a, u, width, vectors, lane, &next);
  if (count_here) {
    int slot[LINA_PEERS_MAX];
    tile_slots(a, 0, &counts, slot);
#pragma unroll
    for (int d = 0; d < LINA_PEERS_MAX; d++) slots[threadIdx.x][d] = slot[d];
    if (blockIdx.x == 0) {
      if (threadIdx.x < a.T)
#pragma unroll
        for (int d = 0; d < LINA_PEERS_MAX; d++)
          if (d < ep) a.slot[threadIdx.x * ep + d] = slot[d];
      if (threadIdx.x < ep) a.count[threadIdx.x] = counts.total[threadIdx.x];
    }
    __syncthreads();
  }
  const peers_turn turn = peers_begin(a.links.state, read);
  const uint32_t epoch = turn.epoch;
  for (; u < all; u += step) {
    const unsigned t = u / width;
    int my_slot = -1;
    if (lane < ep) my_slot = count_here ? slots[t][lane] : __ldg(a.slot + (int64_t)t * ep + lane);
    const peers_piece<V> piece = next;
    if (u + step < all) load_piece(a, u + step, width, vectors, lane, &next);
    send_piece<V>(a, piece, t, (int)(u - t * width), vectors, my_slot, lane);
  }
  if (peers_all_sent(a.links.state))
    peers_announce(a.links, LINA_PEERS_OUT, epoch, count_here ? counts.total : a.count, true);

  if (threadIdx.x < ep) {
    const uint32_t n = peers_wait(a.links, LINA_PEERS_OUT, threadIdx.x, epoch);
    received[threadIdx.x] = n;
    if (a.expert_out && blockIdx.x == 0)
      a.count[ep + threadIdx.x] = n == PEERS_LOST ? 0 : (int32_t)n;
  }
  __syncthreads();
  for (int i = 0; i < ep; i++) {
    const int source = a.links.rank + i < ep ? a.links.rank + i : a.links.rank + i - ep;
    const uint32_t n = received[source];
    if (a.expert_out)
      receive<V>(a, source, n == PEERS_LOST ? 0 : n, vectors, pieces);
    else if (n == PEERS_LOST)
      spoil(a, source);
  }
  peers_end(a.links.state, LINA_PEERS_OUT, turn);
}

static __global__ void peers_poison(const __grid_constant__ lina_peers_links links, int why) {
  lina_peers_state *state = links.state;
  atomicCAS(&state->failed, 0u, (uint32_t)why);
  for (int direction = 0; direction < 2; direction++)
    for (int d = 0; d < links.ep; d++)
      if (d != links.rank)
        peers_relaxed(peers_flag(links.buffer[d], direction, links.rank),
                      peers_signal(state->epoch[direction] + 1, PEERS_POISON, (uint32_t)why));
}

template <class V> static int launch(const Args *a, cudaStream_t stream) {
  const int64_t vectors = a->row_bytes / (int64_t)sizeof(V);
  const int64_t pieces = peers_pieces(vectors);
  int rc = peers_check_pieces("p2p dispatch", a->links.ep, a->C, pieces);
  if (rc != LINA_OK) return rc;
  const bool count_here = a->expert_out && a->T <= LINA_PEERS_TILE;
  if (a->expert_out && !count_here) {
    const unsigned tiles = (unsigned)lina_ceil_div(a->T, LINA_PEERS_TILE);
    peers_slots<<<tiles, PEERS_THREADS, 0, stream>>>(*a);
    rc = lina_launched("p2p dispatch");
    if (rc != LINA_OK) return rc;
  }
  /* rows that come may be more than those that go */
  const unsigned blocks = peers_blocks(&a->links, a->C * pieces);
  peers_dispatch<V><<<blocks, PEERS_THREADS, 0, stream>>>(*a, (int)pieces, count_here);
  return lina_launched("p2p dispatch");
}

extern "C" int lina_peers_dispatch_cuda(const Args *a, void *stream) {
  const bool wide = a->row_bytes % 16 == 0 && lina_aligned(a->x, 16) && lina_aligned(a->x_out, 16);
  return wide ? launch<uint4>(a, (cudaStream_t)stream) : launch<uint16_t>(a, (cudaStream_t)stream);
}

extern "C" int lina_peers_poison_cuda(const lina_peers_links *links, int failure, void *stream) {
  peers_poison<<<1, 1, 0, (cudaStream_t)stream>>>(*links, failure);
  return lina_launched("p2p");
}
