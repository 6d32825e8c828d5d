/* gate.cu - the gate's forward pass. Contract: ../ops/gate.h.
 *
 * LANES lanes of a warp (8, 16 or 32) hold one token's E logits, V to a lane,
 * in registers. Top-k takes K rounds: the lanes' best remaining keys meet in
 * one warp maximum (redux.sync for whole warps), a ballot finds the lowest id
 * among equals, and the winner writes the id to shared memory and steps to its
 * next key. Up to 4 keys a lane are sorted beforehand, so that stepping is a
 * shift; more are searched again by the winner's warp. Lane k then reads the
 * k-th chosen logit back from L1 and forms the weight.
 *
 * Bound by instruction issue (about 300 a warp and token at E 128, K 8), then
 * by the logits' bytes: registers are capped so that all warps fit on a chip.
 *
 * Statistics run on a fixed number of blocks that stride over the tokens: each
 * warp adds probabilities in registers, the block's warps add up in order, and
 * a second kernel adds the blocks in order. Loads are integers.
 */
#include "../ops/gate.h"
#include "common.cuh"
#include "gate.cuh"

#define STAT_BLOCKS 264 /* two to each of an H200's 132 multiprocessors */
#define THREADS     256
#define MAX_SHARED  49152

typedef struct {
  unsigned T;
  int E, K, score, renorm, groups, top_groups, group_top, aligned;
  float scale;
  const void *logits;
  const float *bias;
  float *weight;
  int32_t *expert, *partial; /* partial: a row of 3E+1 words for each block */
} params;

template <int V> constexpr int stat_threads = V <= 16 ? 512 : 256; /* 2V + 30 registers each */
template <int V, bool STATS>
constexpr int blocks_for = STATS ? (V <= 8 ? 2 : 1) : (V <= 4 ? 8 : 32 / V + 1);

template <class T, int LANES, int V, bool STATS>
static __global__ void __launch_bounds__(STATS ? stat_threads<V> : THREADS, blocks_for<V, STATS>)
    gate_fwd(const __grid_constant__ params p) {
  extern __shared__ int shared[];
  constexpr bool ID_ORDER = V <= slot_run<T, V>; /* a lower lane has lower ids */
  constexpr int OUTS = LANES * V < 32 ? V : 32 / LANES; /* chosen experts to a lane */
  const int tokens = blockDim.x / LANES, mine = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int E = p.E, K = p.K, in_warp = threadIdx.x % 32;
  const unsigned group = (LANES == 32 ? LINA_FULL : (1u << LANES) - 1) << (in_warp - lane);
  const unsigned below = group & ((1u << in_warp) - 1);
  const bool keyed = p.bias != NULL || p.groups > 1;
  const bool soft = STATS || p.score == LINA_SOFTMAX;
  auto id_of = [&](int i) { return slot_id<T, LANES, V>(lane, i); };

  int *chosen = shared + mine * 32;
  unsigned *keys = (unsigned *)shared + tokens * 32 + mine * (E + p.groups); /* with groups only */
  int *words = shared + tokens * 32 + (p.groups > 1 ? tokens * (E + p.groups) : 0);
  float *sums = (float *)words; /* E probabilities and z, then 2E loads */
  int *loads = words + E + 1;
  float prob[STATS ? V : 1], z = 0;
  if (STATS) {
#pragma unroll
    for (int i = 0; i < V; i++) prob[STATS ? i : 0] = 0;
    for (int i = threadIdx.x; i < 3 * E + 1; i += blockDim.x) words[i] = 0;
    __syncthreads();
  }

  const unsigned step = gridDim.x * tokens; /* unsigned: T + step may pass 2^31 */
  for (unsigned first = blockIdx.x * tokens + mine - in_warp / LANES; first < p.T; first += step) {
    const unsigned token = first + in_warp / LANES;
    const bool live = token < p.T; /* the others follow along on the last token */
    const T *row = (const T *)p.logits + (size_t)(live ? token : p.T - 1) * E;
    float l[V];
    load_slots<T, LANES, V>(row, E, lane, p.aligned, -INFINITY, l);

    float top = 0, sum = 1, whole = 1;
    auto softmax = [&](float largest) {
      /* A shift of 0 keeps logsumexp right for infinite logits (statistics only). */
      top = STATS && isinf(largest) ? 0.0f : largest;
      sum = 0;
#pragma unroll
      for (int i = 0; i < V; i++) sum += exp_in_sum(l[i] - top);
      sum = lanes_sum<LANES>(sum);
      whole =
          STATS ? sum + (sum - sum) : sum; /* and this makes all of p NaN for them, as without */
    };
    unsigned key[V];
    if (keyed) {
      if (soft) {
        float largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < V; i++) largest = fmaxf(largest, l[i]);
        softmax(key_value(lanes_max<LANES>(rank_key(largest))));
      }
#pragma unroll
      for (int i = 0; i < V; i++) {
        float s = p.score == LINA_SOFTMAX ? expf(l[i] - top) / whole
                : p.score == LINA_SIGMOID ? sigmoid(l[i])
                                          : l[i];
        key[i] = rank_key(p.bias && id_of(i) < E ? s + __ldg(p.bias + id_of(i)) : s);
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; i++) key[i] = rank_key(l[i]);
    }
    if (p.groups > 1) {
#pragma unroll
      for (int i = 0; i < V; i++)
        if (id_of(i) < E) keys[id_of(i)] = key[i];
      __syncwarp();
      drop_groups<LANES>(keys, E, p.groups, p.top_groups, p.group_top, lane);
#pragma unroll
      for (int i = 0; i < V; i++) key[i] = id_of(i) < E ? keys[id_of(i)] : 0;
    } else if (E < LANES * V) {
#pragma unroll
      for (int i = 0; i < V; i++) key[i] = id_of(i) < E ? key[i] : 0;
    }

    remaining<V, V <= 4> left;
    left.start(key, id_of);
    unsigned best = lanes_max<LANES>(left.top());
    if (soft && !keyed) softmax(key_value(best));
    for (int k = 0; k < K; k++) {
      bool hit = left.top() == best;
      unsigned tied = __ballot_sync(LINA_FULL, hit) & group;
      bool win = hit;
      if constexpr (ID_ORDER) {
        win = hit && (tied & below) == 0;
      } else if (tied & (tied - 1)) { /* whole warps only, so that the branch is uniform */
        int lowest = __reduce_min_sync(LINA_FULL, hit ? left.id() : E); /* by all lanes */
        win = hit && left.id() == lowest;
      }
      if (win) {
        chosen[k] = left.id();
        left.pop(id_of);
      }
      best = lanes_max<LANES>(left.top());
    }
    __syncwarp();

    int id[OUTS];
    float w[OUTS], total = 0;
#pragma unroll
    for (int j = 0; j < OUTS; j++) {
      bool in = lane + j * LANES < K;
      id[j] = in ? chosen[lane + j * LANES] : 0;
      w[j] = in ? to_float(row[id[j]]) : -INFINITY;
    }
    if (p.score == LINA_SOFTMAX) {
#pragma unroll
      for (int j = 0; j < OUTS; j++) w[j] = __fdividef(expf(w[j] - top), whole);
    } else if (p.score == LINA_SIGMOID) {
#pragma unroll
      for (int j = 0; j < OUTS; j++) w[j] = sigmoid(w[j]);
    } else {
      softmax_of_chosen<LANES>(w);
    }
    if (p.renorm) {
#pragma unroll
      for (int j = 0; j < OUTS; j++)
        if (lane + j * LANES < K) total += w[j];
      total = lanes_sum<LANES>(total) + (p.score == LINA_SIGMOID ? 1e-20f : 0.0f);
#pragma unroll
      for (int j = 0; j < OUTS; j++) w[j] /= total;
    }
#pragma unroll
    for (int j = 0; j < OUTS; j++) {
      int k = lane + j * LANES;
      if (!live || k >= K) continue;
      p.weight[(size_t)token * K + k] = w[j] * p.scale;
      p.expert[(size_t)token * K + k] = id[j];
      if (STATS) {
        atomicAdd(loads + id[j], 1); /* integers: the order does not matter */
        if (k == 0) atomicAdd(loads + E + id[j], 1);
      }
    }
    if (STATS) {
      float q[V], all = whole;
      if (p.score == LINA_SIGMOID) {
        all = 0;
#pragma unroll
        for (int i = 0; i < V; i++) q[i] = sigmoid(l[i]), all += q[i];
        all = lanes_sum<LANES>(all);
      } else {
#pragma unroll
        for (int i = 0; i < V; i++) q[i] = exp_in_sum(l[i] - top);
      }
      if (live) {
        float each = 1.0f / all, lse = top + logf(sum);
#pragma unroll
        for (int i = 0; i < V; i++) prob[STATS ? i : 0] += q[i] * each;
        z += lse * lse;
      }
    }
    __syncwarp(); /* the next token's ids and keys overwrite this one's */
  }

  if (STATS) {
#pragma unroll
    for (int o = LANES; o < 32; o *= 2) {
#pragma unroll
      for (int i = 0; i < V; i++)
        prob[STATS ? i : 0] += __shfl_xor_sync(LINA_FULL, prob[STATS ? i : 0], o);
      z += __shfl_xor_sync(LINA_FULL, z, o);
    }
    for (int warp = 0; warp < blockDim.x / 32; warp++) {
      if (threadIdx.x / 32 == warp && in_warp < LANES) {
#pragma unroll
        for (int i = 0; i < V; i++)
          if (id_of(i) < E) sums[id_of(i)] += prob[STATS ? i : 0];
        if (lane == 0) sums[E] += z;
      }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < 3 * E + 1; i += blockDim.x)
      p.partial[(size_t)blockIdx.x * (3 * E + 1) + i] = words[i];
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

template <class T, int LANES, int V> static int launch_tile(const lina_gate_args *a,
                                                            cudaStream_t stream) {
  constexpr int run = slot_run<T, V>;
  params p = {
      (unsigned)a->T,     (int)a->E,    (int)a->K,
      a->score,           a->renorm,    a->groups,
      a->top_groups,      a->group_top, a->E % run == 0 && lina_aligned(a->logits, run * sizeof(T)),
      (float)a->scale,    a->logits,    (const float *)a->bias,
      (float *)a->weight, a->expert,    (int32_t *)a->partial};
  const int words = (a->load ? 3 * p.E + 1 : 0),
            token_words = 32 + (p.groups > 1 ? p.E + p.groups : 0);
  int threads = a->load ? stat_threads<V> : THREADS;
  while ((threads / LANES * token_words + words) * 4 > MAX_SHARED) threads /= 2;
  const int64_t needed = lina_ceil_div(a->T, threads / LANES);
  const size_t shared = (threads / LANES * token_words + words) * 4;
  if (!a->load) {
    gate_fwd<T, LANES, V, false><<<(unsigned)needed, threads, shared, stream>>>(p);
    return lina_launched("gate");
  }
  const int blocks = needed < STAT_BLOCKS ? (int)needed : STAT_BLOCKS;
  gate_fwd<T, LANES, V, true><<<blocks, threads, shared, stream>>>(p);
  int rc = lina_launched("gate");
  if (rc != LINA_OK) return rc;
  add_blocks<<<(unsigned)lina_ceil_div(3 * p.E + 1, 32), dim3(32, 16), 0, stream>>>(
      blocks, p.E, p.partial, (float *)a->stat, a->load);
  return lina_launched("gate statistics");
}

template <class T> static int launch(const lina_gate_args *a, cudaStream_t stream) {
  return with_tile(a->E, [&](auto t) {
    return launch_tile<T, decltype(t)::lanes, decltype(t)::slots>(a, stream);
  });
}

extern "C" int64_t lina_gate_partial_bytes(int64_t T, int64_t E) {
  return (T < STAT_BLOCKS ? T : STAT_BLOCKS) * (3 * E + 1) * 4;
}

extern "C" int lina_gate_fwd_cuda(const lina_gate_args *a, void *stream) {
  int rc = gate_check("gate", a->T, a->E, a->K, a->score);
  if (rc != LINA_OK) return rc;
  if (a->groups < 1 || a->E % a->groups || a->top_groups < 1 || a->top_groups > a->groups ||
      a->top_groups * (a->E / a->groups) < a->K || (a->group_top != 1 && a->group_top != 2))
    return lina_error(LINA_EINVAL,
                      "gate: groups=%d, top_groups=%d, group_top=%d with E=%lld, K=%lld", a->groups,
                      a->top_groups, a->group_top, (long long)a->E, (long long)a->K);
  if (a->T == 0) {
    if (!a->load) return LINA_OK;
    if (cudaMemsetAsync(a->load, 0, 2 * a->E * 4, (cudaStream_t)stream) == cudaSuccess)
      (void)cudaMemsetAsync(a->stat, 0, (a->E + 1) * 4, (cudaStream_t)stream);
    return lina_launched("gate");
  }
  switch (a->dtype) {
    case LINA_F32: return launch<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return launch<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return launch<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("gate", a->dtype);
}
