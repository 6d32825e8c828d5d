/* peers_reduce.cu - an all-reduce over peers' memory that gives way. Contract: peers_reduce.h.
 *
 * A block has two warps beside those that move data. Warp 0 sets and awaits flags: its
 * fence, which lasts as long as the last stores are on their way, hides behind the next tile's
 * loads. Warp 1 reads the priority word a step ahead: the value a step looks at has been on
 * its way for all of the step before.
 * The others copy and add vectors of 16 bytes, several to a thread in flight, past the L1 cache.
 * Bound by NVLink, over which every rank sends count * 2 (ep - 1) / ep elements.
 */
#include "peers_reduce.cuh"

#define WORKERS 512
#define THREADS (64 + WORKERS)
#define COPIES  8 /* vectors of a thread in flight */
#define SUMS    4 /* the same where two operands are read */

/* ---- the others: i counts from this thread's first vector ---- */

/* A tile to the peers: all of it to the only one, or to each its part. */
template <class T, bool SCATTER>
static __device__ __forceinline__ void send(const Args &a, const Plan &p, const Span<T> &tile,
                                            unsigned number, int thread) {
  const int me = a.links.rank;
  uint4 *const only = SCATTER ? NULL : ring(a, p, 1 - me, 0, me, number);
  const auto to = [&](int i) {
    return SCATTER ? ring(a, p, i >> p.part, 0, me, number) + (i & ((1 << p.part) - 1)) : only + i;
  };
  const auto mine = [&](int i) { return SCATTER && i >> p.part == me; };
  const int last = tile.whole - 1; /* loads past it are of it: a predicate would cost registers */
  for (int first = thread; first < tile.whole; first += COPIES * WORKERS) {
    uint4 v[COPIES];
#pragma unroll
    for (int c = 0; c < COPIES; c++) v[c] = __ldcg(tile.at(min(first + c * WORKERS, last)));
#pragma unroll
    for (int c = 0; c < COPIES; c++) {
      const int i = first + c * WORKERS;
      if (i < tile.whole && !mine(i)) *to(i) = v[c];
    }
  }
#pragma unroll 1
  for (int i = tile.whole + thread; i < tile.len; i += WORKERS)
    if (!mine(i)) *to(i) = tile.gather(a.count, i);
}

/* The peers' parts of a tile's sums into the data. */
template <class T>
static __device__ __forceinline__ void take_in(const Args &a, const Plan &p, const Span<T> &tile,
                                               unsigned number, int thread) {
  const int me = a.links.rank;
  const auto from = [&](int i) {
    return ring(a, p, me, 1, i >> p.part, number) + (i & ((1 << p.part) - 1));
  };
  const int last = tile.whole - 1; /* loads past it are of it: a predicate would cost registers */
  for (int first = thread; first < tile.whole; first += COPIES * WORKERS) {
    uint4 v[COPIES];
#pragma unroll
    for (int c = 0; c < COPIES; c++) {
      const int i = min(first + c * WORKERS, last);
      v[c] = __ldcg(i >> p.part != me ? from(i) : tile.at(i));
    }
#pragma unroll
    for (int c = 0; c < COPIES; c++) {
      const int i = first + c * WORKERS;
      if (i < tile.whole && i >> p.part != me) *tile.at(i) = v[c];
    }
  }
#pragma unroll 1
  for (int i = tile.whole + thread; i < tile.len; i += WORKERS)
    if (i >> p.part != me) tile.scatter(a.count, i, __ldcg(from(i)));
}

template <class T>
static __device__ __forceinline__ void add(uint4 v, float (&sum)[in_16_bytes<T>]) {
  float f[in_16_bytes<T>];
  lina_vector<T, in_16_bytes<T>>::widen(v, f);
#pragma unroll
  for (int k = 0; k < in_16_bytes<T>; k++) sum[k] += f[k];
}
template <class T>
static __device__ __forceinline__ uint4 scaled(float (&sum)[in_16_bytes<T>], float scale) {
#pragma unroll
  for (int k = 0; k < in_16_bytes<T>; k++) sum[k] *= scale;
  return lina_vector<T, in_16_bytes<T>>::narrow(sum);
}

/* Of two ranks: both sum all; x + y has the bits of y + x. */
template <class T>
static __device__ __forceinline__ void sum_pair(const Args &a, const Plan &p, const Span<T> &tile,
                                                unsigned number, int thread) {
  const uint4 *const other = ring(a, p, a.links.rank, 0, 1 - a.links.rank, number);
  const auto both = [&](uint4 x, uint4 y) {
    float sum[in_16_bytes<T>];
    lina_vector<T, in_16_bytes<T>>::widen(x, sum);
    add<T>(y, sum);
    return scaled<T>(sum, p.scale);
  };
  const int last = tile.whole - 1; /* loads past it are of it: a predicate would cost registers */
  for (int first = thread; first < tile.whole; first += SUMS * WORKERS) {
    uint4 x[SUMS], y[SUMS];
#pragma unroll
    for (int c = 0; c < SUMS; c++) {
      const int i = min(first + c * WORKERS, last);
      x[c] = __ldcg(tile.at(i)), y[c] = __ldcg(other + i);
    }
#pragma unroll
    for (int c = 0; c < SUMS; c++)
      if (first + c * WORKERS < tile.whole) *tile.at(first + c * WORKERS) = both(x[c], y[c]);
  }
#pragma unroll 1
  for (int i = tile.whole + thread; i < tile.len; i += WORKERS)
    tile.scatter(a.count, i, both(tile.gather(a.count, i), __ldcg(other + i)));
}

/* This rank's part of a tile: its sum into the data, and to all peers. */
template <class T>
static __device__ __forceinline__ void sum_part(const Args &a, const Plan &p, const Span<T> &part,
                                                unsigned number, int thread) {
  const int ep = a.links.ep, me = a.links.rank;
  for (int i = thread; i < part.len; i += WORKERS) {
    uint4 v[LINA_PEERS_MAX];
#pragma unroll
    for (int q = 0; q < LINA_PEERS_MAX; q++)
      if (q < ep && q != me) v[q] = __ldcg(ring(a, p, me, 0, q, number) + i);
    const uint4 own = i < part.whole ? __ldcg(part.at(i)) : part.gather(a.count, i);
    float sum[in_16_bytes<T>];
    lina_vector<T, in_16_bytes<T>>::widen(me == 0 ? own : v[0], sum);
#pragma unroll
    for (int q = 1; q < LINA_PEERS_MAX; q++)
      if (q < ep) add<T>(q == me ? own : v[q], sum);
    const uint4 result = scaled<T>(sum, p.scale);
    if (i < part.whole)
      *part.at(i) = result;
    else
      part.scatter(a.count, i, result);
    for (int away = 1; away < ep; away++) { /* from the next rank on: not all to one at once */
      const int q = me + away < ep ? me + away : me + away - ep;
      ring(a, p, q, 1, me, number)[i] = result;
    }
  }
}

template <class T, bool SCATTER>
static __global__ void __launch_bounds__(THREADS, 1)
    peers_reduce(const __grid_constant__ Args a, const __grid_constant__ Plan p) {
  __shared__ uint64_t first;
  __shared__ uint32_t begun;
  __shared__ int failed, leaving;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, thread = (int)threadIdx.x - 64;
  const int size = (SCATTER ? a.links.ep : 1) << p.part; /* of a tile */
  const unsigned mine = (p.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
  const unsigned steps = mine + (SCATTER ? 2 : 1) * DEPTH;
  if (threadIdx.x == 0) {
    first = *first_tile(a);
    begun = a.turn ? *left_at(a) : 0;
    failed = peers_read_failed(a.links.state) != 0;
    leaving = 0;
    if (a.turn) tell(a, a.turn - 1, 0); /* that raise is over */
  }
  __syncthreads();
  if (begun == DONE) return;
  bool lost = failed, left = false;
  __syncthreads(); /* from here on both change between a step's barriers alone */
  /* as many as a peer may send unheard, or a longer call of a peer would look like a later one */
  const uint64_t start = first, end = start + (mine > DEPTH ? mine : DEPTH);
  bool gives_way = a.priority != NULL;
  bool itself = false;
  uint32_t raised = 0;
  /* in each step another block reads the word itself */
  const auto look = [&](unsigned step) {
    itself = step % gridDim.x == blockIdx.x;
    raised = read_word(a, itself);
  };
  if (warp == 1 && lane == 0 && gives_way) look(begun);
  const auto span = [&](unsigned tile) {
    return Span<T>(a, p, (int64_t)(blockIdx.x + tile * gridDim.x) * size, size);
  };

  unsigned s = begun;
  for (; s < steps && !lost; s++) {
    /* below `mine`, or not in this step */
    const unsigned summed = s - DEPTH, taken = s - 2 * DEPTH;
    if (warp == 0) {
      if (s > 0) { /* what the step before has sent; once more, if the turn before left here */
        const unsigned sent = lane < LINA_PEERS_MAX ? s - 1 : s - 1 - DEPTH;
        const bool wanted = sent < mine && lane < (SCATTER ? 2 : 1) * LINA_PEERS_MAX;
        announce(a, lane, wanted, (start + sent + 1) << 16 | p.tag);
      }
      const int phase = lane / LINA_PEERS_MAX, source = lane % LINA_PEERS_MAX;
      const unsigned tile = phase == 0 ? summed : taken;
      if (phase < (SCATTER ? 2 : 1) && source < a.links.ep && source != a.links.rank &&
          tile < mine) {
        const Arrival how = arrives(a, p, phase, source, start + tile + 1, end);
        if (how == LOST) failed = 1;
        if (how == LEAVES) leaving = 1, tell(a, a.turn, 1);
      }
      __syncwarp();
    } else if (warp == 1) {
      if (lane == 0 && gives_way && (s < mine || (SCATTER && summed < mine))) {
        if (raised && a.leaves)
          leaving = 1, tell(a, a.turn, 1);
        else if (raised)
          gives_way = give_way(a, itself);
        look(s + 1);
      }
      __syncwarp();
    } else if (s < mine) {
      send<T, SCATTER>(a, p, span(s), (unsigned)start + s, thread);
    }
    __syncthreads();
    lost = failed, left = leaving;
    if (left && !lost) break;
    if (warp > 1 && !lost) {
      if (summed < mine) {
        if constexpr (SCATTER) {
          const Span<T> part(a, p, span(summed).first + ((int64_t)a.links.rank << p.part),
                             1 << p.part);
          sum_part<T>(a, p, part, (unsigned)start + summed, thread);
        } else {
          sum_pair<T>(a, p, span(summed), (unsigned)start + summed, thread);
        }
      }
      if (SCATTER && taken < mine) take_in<T>(a, p, span(taken), (unsigned)start + taken, thread);
    }
    __syncthreads();
  }

  if (lost) {
    if (warp == 0) announce(a, lane, lane < 2 * LINA_PEERS_MAX, POISON);
    for (unsigned tile = 0; tile < mine; tile++) {
      const Span<T> all = span(tile);
#pragma unroll 1
      for (int i = threadIdx.x; i < all.len; i += THREADS)
        all.scatter(a.count, i, make_uint4(~0u, ~0u, ~0u, ~0u)); /* NaN in every dtype */
    }
  } else if (threadIdx.x == 0) {
    *left_at(a) = left ? s : DONE;
    if (!left) *first_tile(a) = end;
  }
}

template <class T> static int launch(const Args *a, cudaStream_t stream) {
  const int64_t per = in_16_bytes<T>, parts = a->scatter ? a->links.ep : 1;
  Plan p;
  p.vectors = lina_ceil_div(a->count, per);
  p.whole = lina_aligned(a->data, 16) ? a->count / per : 0;
  p.slot = lina_peers_reduce_slot(a->links.ep, a->tile_bytes, a->scatter);
  p.part = 5; /* four tiles to a block, where each is as much as its threads load at once */
  while (p.part < p.slot &&
         (parts << p.part < WORKERS || (4 * (int64_t)a->blocks * parts << p.part) < p.vectors))
    p.part++;
  const int64_t tiles = lina_ceil_div(p.vectors, parts << p.part);
  if (tiles > INT32_MAX)
    return lina_error(LINA_EINVAL, "p2p reduce: %lld elements are too many", (long long)a->count);
  p.tiles = (unsigned)tiles;
  p.tag = (uint32_t)(((uint64_t)a->count * 8 + (uint64_t)a->dtype * 2 + a->mean) % 65521);
  p.scale = a->mean ? 1.0f / (float)a->links.ep : 1.0f;
  const unsigned blocks = p.tiles < (unsigned)a->blocks ? p.tiles : (unsigned)a->blocks;
  if (a->scatter)
    peers_reduce<T, true><<<blocks, THREADS, 0, stream>>>(*a, p);
  else
    peers_reduce<T, false><<<blocks, THREADS, 0, stream>>>(*a, p);
  return lina_launched("p2p reduce");
}

extern "C" int lina_peers_reduce_cuda(const Args *a, void *stream) {
  if (a->count == 0) return LINA_OK;
  switch (a->dtype) {
    case LINA_F32: return launch<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return launch<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return launch<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("p2p reduce", a->dtype);
}
