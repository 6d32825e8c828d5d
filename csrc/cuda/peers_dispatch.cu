/* peers_dispatch.cu - rows out to the ranks of their experts. Contract: peers.h.
 *
 * Slots: a thread to a token turns its K ids into a mask of ranks, ballots count
 * the tokens before it. Up to 512 tokens every block of the one kernel does this
 * for itself; else a kernel before it does, whose blocks tell each other their
 * counts (each adds up those of all earlier blocks: stable, no atomics).
 * Sending: a warp to a piece of a row, 4 loads of 16 bytes a lane in flight, each
 * piece read once and stored to every rank that wants it. Then all blocks, or one of a
 * second kernel, wait for the flags; all, or those of a third, copy ids and weights out
 * and, for a backward pass, rows.
 * Bound by NVLink from about 4 MB on, below that by the round trip of the flags.
 */
#include "peers.cuh"
#include "peers_slots.cuh"

template <class V>
static __device__ __forceinline__ void load_piece(const Args &a, unsigned u, unsigned width,
                                                  int64_t vectors, int lane, peers_piece<V> *p) {
  const unsigned t = u / width;
  p->load((const char *)a.x + t * a.row_bytes, (int64_t)(u - t * width) * 32 * PEERS_DEPTH + lane,
          vectors);
}

/* A token's weights and ids, beside its row; the whole warp. */
static __device__ __forceinline__ void send_pairs(const Args &a, char *out, int64_t rows,
                                                  int64_t row, int64_t t, int lane) {
  char *weights = out + lina_peers_weights_at(rows, a.row_bytes), *ids = weights + rows * a.K * 4;
  for (int k = lane; k < a.K; k += 32) {
    ((float *)weights)[row * a.K + k] = __ldg(a.weight + t * a.K + k);
    ((int32_t *)ids)[row * a.K + k] = __ldg(a.expert + t * a.K + k);
  }
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
    if (piece == 0 && a.expert_out) send_pairs(a, out, rows, row, t, lane);
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

static __device__ __forceinline__ void await_rows(const Args &a, uint32_t epoch,
                                                  uint32_t *received) {
  const int ep = a.links.ep;
  if (threadIdx.x < ep) {
    const uint32_t n = peers_wait(a.links, LINA_PEERS_OUT, threadIdx.x, epoch);
    received[threadIdx.x] = n;
    if (a.expert_out && blockIdx.x == 0)
      a.count[ep + threadIdx.x] = n == PEERS_LOST ? 0 : (int32_t)n;
  }
}

/* What the experts need, out of the buffer. */
template <class V>
static __device__ __forceinline__ void take_rows(const Args &a, int pieces,
                                                 const uint32_t *received) {
  const int ep = a.links.ep;
  const int64_t vectors = a.row_bytes / (int64_t)sizeof(V);
  for (int i = 0; i < ep; i++) {
    const int source = a.links.rank + i < ep ? a.links.rank + i : a.links.rank + i - ep;
    const uint32_t n = received[source];
    if (a.expert_out)
      receive<V>(a, source, n == PEERS_LOST ? 0 : n, vectors, pieces);
    else if (n == PEERS_LOST)
      spoil(a, source);
  }
}

template <class V>
static __global__ void __launch_bounds__(PEERS_THREADS, 1)
    peers_dispatch(const __grid_constant__ Args a, int pieces, bool count_here, peers_part part) {
  __shared__ SlotCounts counts;
  __shared__ int slots[LINA_PEERS_TILE][LINA_PEERS_MAX];
  __shared__ uint32_t received[LINA_PEERS_MAX];
  const int lane = threadIdx.x % 32, ep = a.links.ep;
  const uint32_t read = peers_read(a.links.state, LINA_PEERS_OUT);
  if (part & PEERS_SEND) peers_raise(a.links, read);
  const uint32_t failed_before = peers_read_failed(a.links.state); /* on its way for now */
  const int64_t vectors = a.row_bytes / (int64_t)sizeof(V);

  /* the next piece is on its way while this one leaves, the first while slots are counted */
  const unsigned width = (unsigned)pieces;
  unsigned all = part & PEERS_SEND ? (unsigned)a.T * width : 0;
  const unsigned step = gridDim.x * PEERS_WARPS;
  unsigned u = blockIdx.x * PEERS_WARPS + threadIdx.x / 32;
  peers_piece<V> next;
  if (u < all) load_piece(a, u, width, vectors, lane, &next);
  if (count_here && part & PEERS_SEND) count_slots(a, &counts, slots);
  const peers_turn turn = peers_begin(a.links.state, read);
  if (peers_stays(failed_before)) all = 0;
  for (; u < all; u += step) {
    const unsigned t = u / width;
    int my_slot = -1;
    if (lane < ep) my_slot = count_here ? slots[t][lane] : __ldg(a.slot + (int64_t)t * ep + lane);
    const peers_piece<V> piece = next;
    if (u + step < all) load_piece(a, u + step, width, vectors, lane, &next);
    send_piece<V>(a, piece, t, (int)(u - t * width), vectors, my_slot, lane);
  }
  if (part & PEERS_SEND && peers_all_sent(a.links.state))
    peers_announce(a.links, LINA_PEERS_OUT, turn.epoch, count_here ? counts.total : a.count, true);
  if (part & PEERS_WAIT) await_rows(a, turn.epoch, received);
  if (!(part & PEERS_TAKE)) {
    peers_again(a.links.state, turn);
    return;
  }
  if (!(part & PEERS_WAIT) && threadIdx.x < ep) {
    const bool failed = peers_read_failed(a.links.state) != 0;
    received[threadIdx.x] = failed ? PEERS_LOST : (uint32_t)a.count[ep + threadIdx.x];
  }
  __syncthreads();
  take_rows<V>(a, pieces, received);
  peers_end(a.links.state, LINA_PEERS_OUT, turn);
}

static __global__ void peers_poison(const __grid_constant__ lina_peers_links links, int why) {
  lina_peers_state *state = links.state;
  atomicCAS(&state->failed, 0u, (uint32_t)why);
  peers_lower(links);
  for (int direction = 0; direction < 2; direction++)
    for (int d = 0; d < links.ep; d++)
      if (d != links.rank)
        peers_relaxed(peers_flag(links.buffer[d], direction, links.rank),
                      peers_signal(state->epoch[direction] + 1, PEERS_POISON, (uint32_t)why));
}

template <class V> static int launch(const Args *a, cudaStream_t stream) {
  const int64_t pieces = peers_pieces(a->row_bytes / (int64_t)sizeof(V));
  int rc = peers_check_pieces("p2p dispatch", a->links.ep, a->C, pieces);
  if (rc != LINA_OK) return rc;
  const bool count_here = a->expert_out && a->T <= LINA_PEERS_TILE;
  if (a->expert_out && !count_here) {
    const unsigned tiles = (unsigned)lina_ceil_div(a->T, LINA_PEERS_TILE);
    peers_slots<<<tiles, PEERS_THREADS, 0, stream>>>(*a);
    rc = lina_launched("p2p dispatch");
    if (rc != LINA_OK) return rc;
  }
  /* rows that come may be more than those that go: C, not T */
  return peers_launch("p2p dispatch", &a->links, a->C * pieces, a->T * a->row_bytes,
                      [&](unsigned blocks, peers_part part) {
                        peers_dispatch<V><<<blocks, PEERS_THREADS, 0, stream>>>(*a, (int)pieces,
                                                                                count_here, part);
                      });
}

extern "C" int lina_peers_dispatch_cuda(const Args *a, void *stream) {
  const bool wide = a->row_bytes % 16 == 0 && lina_aligned(a->x, 16) && lina_aligned(a->x_out, 16);
  return wide ? launch<uint4>(a, (cudaStream_t)stream) : launch<uint16_t>(a, (cudaStream_t)stream);
}

extern "C" int lina_peers_poison_cuda(const lina_peers_links *links, int failure, void *stream) {
  peers_poison<<<1, 1, 0, (cudaStream_t)stream>>>(*links, failure);
  return lina_launched("p2p");
}
