/* peers_collect.cu - rows back to their tokens' ranks, and their sums. Contract: peers.h.
 *
 * Every block first stores its share of y's rows to the peers; then it, or one block of
 * a second kernel, waits for theirs; then it, or a block of a third, sums its share of the
 * tokens: a warp to a piece of a token, the loads of all ranks' rows in flight before the
 * first is added. This rank's own rows do not travel; they are read where they are. Rows
 * by expert are summed over a row's experts on the way, so that this hides behind the stores.
 * Bound by NVLink from about 4 MB on, below that by the round trip of the flags.
 */
#include "peers_sums.cuh"

template <class T, int N, bool WEIGH>
static __device__ __forceinline__ void send_back(const Args &a) {
  const int ep = a.links.ep, rank = a.links.rank, lane = threadIdx.x % 32;
  const int64_t row_bytes = a.D * (int64_t)sizeof(T), vectors = a.D / N;
  const unsigned pieces = (unsigned)((vectors + 32 * PEERS_DEPTH - 1) / (32 * PEERS_DEPTH));
  const unsigned warps = gridDim.x * PEERS_WARPS;
  const unsigned warp = blockIdx.x * PEERS_WARPS + threadIdx.x / 32;
  const uint32_t failed_before = peers_read_failed(a.links.state); /* on its way with the counts */
  for (int i = 0; i < ep - 1; i++) { /* blocks begin with different ranks */
    int d = rank + 1 + (i + (int)blockIdx.x) % (ep - 1);
    if (d >= ep) d -= ep;
    const int64_t rows = __ldg(a.count + ep + d), n = peers_stays(failed_before) ? 0 : rows;
    char *back = a.links.buffer[d] + a.links.back_at;
    char *to = back + (int64_t)rank * a.C * row_bytes;
    for (unsigned u = warp; u < (unsigned)n * pieces; u += warps) {
      const int64_t row = u / pieces, first = (int64_t)(u % pieces) * 32 * PEERS_DEPTH + lane;
      peers_piece<lina_raw<T, N>> p;
      if (WEIGH)
        weigh<T, N, PEERS_DEPTH>(a, d * a.C + row, first, p.v);
      else
        p.load((const char *)a.y + (d * a.C + row) * row_bytes, first, vectors);
      p.store(to + row * row_bytes, first, vectors);
    }
    if (a.dweight) send_dweight(a, d, n, row_bytes);
  }
}

template <class T, int N, bool WEIGH, int RANKS, int DEPTH>
static __device__ __forceinline__ void sum_tokens(const Args &a, bool lost) {
  const int lane = threadIdx.x % 32;
  const unsigned pieces = (unsigned)((a.D / N + 32 * DEPTH - 1) / (32 * DEPTH));
  for (unsigned u = blockIdx.x * PEERS_WARPS + threadIdx.x / 32; u < (unsigned)a.T * pieces;
       u += gridDim.x * PEERS_WARPS) {
    const int64_t t = u / pieces;
    const int my_slot = lane < a.links.ep ? __ldg(a.slot + t * a.links.ep + lane) : -1;
    sum_piece<T, N, WEIGH, RANKS, DEPTH>(a, t, (int64_t)(u % pieces) * 32 * DEPTH + lane, my_slot,
                                         lost);
  }
}

template <class T, int N, bool WEIGH, int RANKS, int DEPTH>
static __global__ void __launch_bounds__(PEERS_THREADS, 1)
    peers_collect(const __grid_constant__ Args a, peers_part part) {
  const int ep = a.links.ep;
  const uint32_t read = peers_read(a.links.state, LINA_PEERS_BACK);
  const int64_t row_bytes = a.D * (int64_t)sizeof(T);
  if (part & PEERS_SEND) send_back<T, N, WEIGH>(a);
  const peers_turn turn = peers_begin(a.links.state, read);
  const uint32_t epoch = turn.epoch;
  bool lowers = blockIdx.x == 0 && threadIdx.x == 0; /* any thread, if all rows left before */
  if (part & PEERS_SEND) {
    lowers = peers_all_sent(a.links.state);
    if (lowers) peers_announce(a.links, LINA_PEERS_BACK, epoch, NULL, false);
  }
  if (part & PEERS_WAIT) { /* a wait that fails says so in `failed` */
    if (threadIdx.x < ep && threadIdx.x != a.links.rank)
      (void)peers_wait(a.links, LINA_PEERS_BACK, threadIdx.x, epoch);
    __syncthreads();
    if (lowers) peers_lower(a.links); /* all rows have left, and now all have arrived */
  }
  if (!(part & PEERS_TAKE)) {
    peers_again(a.links.state, turn);
    return;
  }
  const bool lost = peers_read_failed(a.links.state) != 0;
  sum_tokens<T, N, WEIGH, RANKS, DEPTH>(a, lost);
  if (a.dweight_out) pick_dweight(a, row_bytes, lost);
  peers_end(a.links.state, LINA_PEERS_BACK, turn);
}

template <class T, int N, bool WEIGH> static int launch(const Args *a, cudaStream_t stream) {
  const int64_t pieces = peers_pieces(a->D / N);
  int rc = peers_check_pieces("p2p collect", a->links.ep, a->C, PEERS_DEPTH * pieces);
  if (rc != LINA_OK) return rc;
  const auto kernel = a->links.ep == 2 ? peers_collect<T, N, WEIGH, 2, PEERS_DEPTH>
                                       : peers_collect<T, N, WEIGH, LINA_PEERS_MAX, 1>;
  /* T, not the rows that leave, which only the device knows */
  return peers_launch("p2p collect", &a->links, a->C * pieces, a->T * a->D * (int64_t)sizeof(T),
                      [&](unsigned blocks, peers_part part) {
                        kernel<<<blocks, PEERS_THREADS, 0, stream>>>(*a, part);
                      });
}

template <class T> static int collect(const Args *a, cudaStream_t stream) {
  constexpr int N = in_16_bytes<T>;
  const bool wide = a->D % N == 0 && lina_aligned(a->y, 16) && lina_aligned(a->out, 16);
  if (a->pair_row) return wide ? launch<T, N, true>(a, stream) : launch<T, 1, true>(a, stream);
  return wide ? launch<T, N, false>(a, stream) : launch<T, 1, false>(a, stream);
}

extern "C" int lina_peers_collect_cuda(const Args *a, void *stream) {
  switch (a->dtype) {
    case LINA_F32: return collect<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return collect<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return collect<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("p2p collect", a->dtype);
}
