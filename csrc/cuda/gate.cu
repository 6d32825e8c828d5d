/* gate.cu - the gate's forward pass. Contract: ../ops/gate.h.
 *
 * LANES lanes of a warp (8, 16 or 32) hold one token's E logits, V to a lane,
 * in registers. A lane sorts its values as codes: ordered integers whose low
 * bits name the expert, so that equals never meet. Top-k takes K rounds: the
 * lanes' first codes meet in one maximum, and the lane that holds it writes it
 * to shared memory and shifts its list; no ids, votes or branches. Where codes
 * may mislead (gate_choose.cuh: near ties of float32 and special values, seen
 * among the K + 1 best) the warp's tokens are chosen again by whole keys.
 * Lane k then reads the k-th chosen logit back from L1 and forms the weight.
 *
 * Bound by instruction issue (at E 128, K 8 about 200 a token), then by the
 * logits' bytes. Four tokens share a warp up to E 64, since rounds and outputs
 * cost a warp the same for one token as for four; at E 128 fewer instructions
 * a token (two tokens of 16 lanes) lost to shorter chains of them.
 *
 * Statistics run on a fixed number of blocks that stride over the tokens: each
 * warp adds probabilities in registers, the block's warps add up in order, and
 * a second kernel adds the blocks in order. Loads are integers.
 */
#include "../ops/gate.h"
#include "common.cuh"
#include "gate.cuh"
#include "gate_choose.cuh"
#include "gate_stats.cuh"

#define STAT_BLOCKS 264 /* two to each of an H200's 132 multiprocessors; one of 1024 threads */
#define THREADS     256
#define MAX_SHARED  49152
#define CHOSEN      33 /* words for a token's K + 1 best; odd, so that tokens lie in other banks */

typedef struct {
  unsigned T;
  int E, K, score, renorm, groups, top_groups, group_top;
  int keyed, aligned, full; /* a bias or groups; whole vectors; and as many of them as slots */
  float scale;
  const void *logits;
  const float *bias;
  float *weight;
  int32_t *expert, *partial; /* partial: a row of 3E+1 words for each block */
} params;

template <int V> constexpr int stat_threads = V <= 8 ? 1024 : V <= 16 ? 512 : 256;
template <int V, bool STATS> constexpr int threads_of = STATS ? stat_threads<V> : THREADS;
template <int V> constexpr int blocks_for = V <= 4 ? 8 : V <= 8 ? 5 : 64 / V;

template <class T, int LANES, int V, bool STATS>
static __global__ void __launch_bounds__(threads_of<V, STATS>, STATS ? 1 : blocks_for<V>)
    gate_fwd(const __grid_constant__ params p) {
  extern __shared__ int shared[];
  constexpr int OUTS = LANES * V < 32 ? V : 32 / LANES; /* chosen experts to a lane */
  constexpr int run = slot_run<T, V>;
  constexpr unsigned LOW = code_low<LANES, V>;
  const int tokens = blockDim.x / LANES, mine = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int E = p.E, K = p.K, in_warp = threadIdx.x % 32;
  auto id_of = [&](int i) { return slot_id<T, LANES, V>(lane, i); };

  int *loads = shared; /* statistics: 2E, then what follows */
  unsigned *scratch = (unsigned *)shared + (STATS ? 2 * E : 0);
  unsigned *chosen = scratch + mine * CHOSEN;
  unsigned *keys = scratch + tokens * CHOSEN + mine * (E + p.groups); /* with groups only */
  float prob[STATS ? V : 1], z = 0;
  if (STATS) {
#pragma unroll
    for (int i = 0; i < V; i++) prob[STATS ? i : 0] = 0;
    for (int i = threadIdx.x; i < 2 * E; i += blockDim.x) loads[i] = 0;
    __syncthreads();
  }

  const unsigned step = gridDim.x * tokens; /* unsigned: T + step may pass 2^31 */
  for (unsigned first = blockIdx.x * tokens + mine - in_warp / LANES; first < p.T; first += step) {
    const unsigned token = first + in_warp / LANES;
    const bool live = LANES == 32 || token < p.T; /* the others follow along on the last token */
    const unsigned at = (live ? token : p.T - 1) * E;
    const T *logits = (const T *)p.logits;
    float l[V], x[V], q[STATS ? V : 1];
    if (p.full) { /* no slot past E */
      const T *from = logits + (at + lane * run);
#pragma unroll
      for (int i = 0; i < V; i += run)
        lina_vector<T, run>::widen(load_const<T, run>(from + i * LANES), l + i);
    } else {
      load_slots<T, LANES, V>(logits + at, E, lane, p.aligned, -INFINITY, l);
    }

    float largest, shift, sum = 1; /* of the row's softmax */
    auto softmax = [&](const float (&v)[V], float top) {
      shift = top;
#pragma unroll
      for (int i = 0; i < V; i++) {
        float e = exp_in_sum(v[i] - top);
        sum = i ? sum + e : e;
        if (STATS) q[STATS ? i : 0] = e;
      }
      sum = lanes_sum<LANES>(sum);
    };
    /* A shift of 0 keeps logsumexp right for infinite logits (statistics only). */
    auto any_softmax = [&](const float (&v)[V], float top) {
      softmax(v, STATS && isinf(top) ? 0.0f : top);
    };
    /* And this makes all of p NaN for them, as without. */
    auto whole = [&] { return STATS ? sum + (sum - sum) : sum; };
    if (p.keyed) {
      if (STATS || p.score == LINA_SOFTMAX) {
        float top = -INFINITY;
#pragma unroll
        for (int i = 0; i < V; i++) top = fmaxf(top, l[i]);
        largest = key_value(lanes_max<LANES>(rank_key(top)));
        any_softmax(l, largest);
      }
#pragma unroll
      for (int i = 0; i < V; i++) {
        x[i] = p.score == LINA_SOFTMAX ? expf(l[i] - largest) / whole()
             : p.score == LINA_SIGMOID ? sigmoid(l[i])
                                       : l[i];
        if (STATS && p.score == LINA_SIGMOID) q[STATS ? i : 0] = x[i];
        if (p.bias && id_of(i) < E) x[i] += __ldg(p.bias + id_of(i));
        if (id_of(i) >= E) x[i] = -INFINITY;
      }
      if (p.groups > 1) {
#pragma unroll
        for (int i = 0; i < V; i++)
          if (id_of(i) < E) keys[id_of(i)] = rank_key(x[i]);
        __syncwarp();
        drop_groups<LANES>(keys, E, p.groups, p.top_groups, p.group_top, lane);
#pragma unroll
        for (int i = 0; i < V; i++)
          if (id_of(i) < E) x[i] = key_value(keys[id_of(i)]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; i++) x[i] = l[i];
    }

    int odd = 0;
    auto choose = [&](auto list) {
      return choose_by_code<T, LANES, V, decltype(list)::value>(
          x, K, lane, sizeof(T) == 4 || p.keyed, chosen, &odd);
    };
    const bool one_list = short_list<LANES, V> == long_list<V>;
    const unsigned best = one_list || K > SHORT_K ? choose(count<long_list<V>>())
                                                  : choose(count<short_list<LANES, V>>());
    if (!p.keyed) {
      largest = key_value(best & ~LOW); /* or a little less */
      if (STATS || p.score == LINA_SOFTMAX) softmax(x, largest);
    }
    if (__any_sync(LINA_FULL, odd)) {
      float top;
      choose_exactly<T, LANES, V>(x, E, K, lane, chosen, &top);
      if (!p.keyed) {
        largest = top;
        if (STATS || p.score == LINA_SOFTMAX) any_softmax(x, largest);
      }
      __syncwarp();
    }

    auto finish = [&](auto outs) {
      constexpr int N = decltype(outs)::value;
      int id[N];
      float w[N], total = 0;
#pragma unroll
      for (int j = 0; j < N; j++) {
        bool in = lane + j * LANES < K;
        id[j] = in ? ~chosen[lane + j * LANES] & LOW : 0;
        w[j] = in ? to_float(__ldg(logits + (at + id[j]))) : -INFINITY;
      }
      if (p.score == LINA_SIGMOID) {
#pragma unroll
        for (int j = 0; j < N; j++) w[j] = sigmoid(w[j]);
      } else if (p.score == LINA_SOFTMAX) {
#pragma unroll
        for (int j = 0; j < N; j++) w[j] = __fdividef(expf(w[j] - largest), whole());
      } else {
        softmax_of_chosen<LANES>(w);
      }
      if (p.renorm) {
#pragma unroll
        for (int j = 0; j < N; j++)
          if (lane + j * LANES < K) total += w[j];
        total = lanes_sum<LANES>(total) + (p.score == LINA_SIGMOID ? 1e-20f : 0.0f);
#pragma unroll
        for (int j = 0; j < N; j++) w[j] = __fdividef(w[j], total);
      }
#pragma unroll
      for (int j = 0; j < N; j++) {
        int k = lane + j * LANES;
        if (!live || k >= K) continue;
        p.weight[token * K + k] = w[j] * p.scale;
        p.expert[token * K + k] = id[j];
        if (STATS) {
          atomicAdd(loads + id[j], 1); /* integers: the order does not matter */
          if (k == 0) atomicAdd(loads + E + id[j], 1);
        }
      }
    };
    if (OUTS == 1 || K <= LANES)
      finish(count<1>());
    else
      finish(count<OUTS>());

    if (STATS) {
      float all = whole(), lse = shift + logf(sum);
      if (p.score == LINA_SIGMOID) {
        all = 0;
#pragma unroll
        for (int i = 0; i < V; i++) {
          if (!p.keyed) q[STATS ? i : 0] = sigmoid(x[i]);
          all += q[STATS ? i : 0];
        }
        all = lanes_sum<LANES>(all);
      }
      if (live) {
        float each = 1.0f / all;
#pragma unroll
        for (int i = 0; i < V; i++) prob[STATS ? i : 0] += q[STATS ? i : 0] * each;
        z += lse * lse;
      }
    }
    if (!STATS) break;
    __syncwarp(); /* the next token's ids and keys overwrite this one's */
  }

  if constexpr (STATS) write_block<T, LANES, V>(E, prob, z, (float *)scratch, loads, p.partial);
}

template <class T, int LANES, int V> static int launch_tile(const lina_gate_args *a,
                                                            cudaStream_t stream) {
  constexpr int run = slot_run<T, V>;
  const bool aligned = a->E % run == 0 && lina_aligned(a->logits, run * sizeof(T));
  params p = {(unsigned)a->T,
              (int)a->E,
              (int)a->K,
              a->score,
              a->renorm,
              a->groups,
              a->top_groups,
              a->group_top,
              a->bias || a->groups > 1,
              aligned,
              aligned && a->E == LANES * V,
              (float)a->scale,
              a->logits,
              (const float *)a->bias,
              (float *)a->weight,
              a->expert,
              (int32_t *)a->partial};
  const int token_words = CHOSEN + (p.groups > 1 ? p.E + p.groups : 0);
  auto shared_bytes = [&](int threads) {
    int words = threads / LANES * token_words, sums = threads / 32 * (p.E + 1);
    return 4 * (a->load ? 2 * p.E + (sums > words ? sums : words) : words);
  };
  int threads = a->load ? stat_threads<V> : THREADS;
  while (shared_bytes(threads) > MAX_SHARED) threads /= 2;
  const int64_t needed = lina_ceil_div(a->T, threads / LANES);
  const int shared = shared_bytes(threads);
  if (!a->load) {
    gate_fwd<T, LANES, V, false><<<(unsigned)needed, threads, shared, stream>>>(p);
    return lina_launched("gate");
  }
  const int most = stat_threads<V> == 1024 ? STAT_BLOCKS / 2 : STAT_BLOCKS,
            blocks = needed < most ? (int)needed : most;
  gate_fwd<T, LANES, V, true><<<blocks, threads, shared, stream>>>(p);
  int rc = lina_launched("gate");
  if (rc != LINA_OK) return rc;
  add_blocks<<<(unsigned)lina_ceil_div(3 * p.E + 1, 32), dim3(32, 16), 0, stream>>>(
      blocks, p.E, p.partial, (float *)a->stat, a->load);
  return lina_launched("gate statistics");
}

template <class T> static int launch(const lina_gate_args *a, cudaStream_t stream) {
  return with_tile<8>(a->E, [&](auto t) {
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
