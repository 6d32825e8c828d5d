/* gate_bwd.cu - the gate's backward pass. Contract: ../ops/gate.h.
 *
 * One token to LANES lanes as in gate.cu, its logits in registers; the scores
 * are computed again. Lane k turns the gradient of weight k into that of its
 * expert's score, which reaches the lane that holds the expert's logit through
 * a row of shared memory; the rest is arithmetic on slots and sums over lanes.
 * Each logit is read once and each gradient written once: bound by memory.
 */
#include "../ops/gate.h"
#include "common.cuh"
#include "gate.cuh"

/* 32 slots to a lane want about 170 registers. */
template <int V> constexpr int threads_for = V <= 16 ? 256 : 128;

typedef struct {
  unsigned T;
  int E, K, score, renorm, aligned;
  float scale;
  const void *logits;
  const int32_t *expert;
  const float *dweight, *dstat;
  void *dlogits;
} params;

template <class T, int LANES, int V>
static __global__ void __launch_bounds__(threads_for<V>, V <= 4 ? 5 : 3)
    gate_bwd(const __grid_constant__ params p) {
  extern __shared__ float shared[];
  constexpr int OUTS = LANES * V < 32 ? V : 32 / LANES;
  const int mine = threadIdx.x / LANES, lane = threadIdx.x % LANES, E = p.E, K = p.K;
  const unsigned token = blockIdx.x * (threads_for<V> / LANES) + mine;
  const bool live = token < p.T; /* the others follow along on the last token */
  const size_t t = live ? token : p.T - 1;
  const T *row = (const T *)p.logits + t * E;
  float *chosen = shared + mine * LANES * V; /* d loss / d score of each expert */

  float l[V], q[V], dl[V];
  load_slots<T, LANES, V>(row, E, lane, p.aligned, -INFINITY, l);
#pragma unroll
  for (int i = 0; i < V; i++) chosen[i * LANES + lane] = 0;
  __syncwarp();

  /* Softmax of the whole row: its own score, and the statistics of every score. */
  float top = 0, sum = 1;
  if (p.dstat || p.score == LINA_SOFTMAX) {
    top = -INFINITY;
#pragma unroll
    for (int i = 0; i < V; i++) top = fmaxf(top, l[i]);
    top = key_value(lanes_max<LANES>(rank_key(top)));
    sum = 0;
#pragma unroll
    for (int i = 0; i < V; i++) q[i] = expf(l[i] - top), sum += q[i];
    sum = lanes_sum<LANES>(sum);
#pragma unroll
    for (int i = 0; i < V; i++) q[i] /= sum;
  }

  if (p.dweight) {
    int id[OUTS];
    float s[OUTS], g[OUTS];
    bool in[OUTS];
#pragma unroll
    for (int j = 0; j < OUTS; j++) {
      int k = lane + j * LANES;
      id[j] = k < K ? __ldg(p.expert + t * K + k) : -1;
      in[j] = id[j] >= 0 && id[j] < E;
      s[j] = in[j] ? to_float(row[id[j]]) : -INFINITY;
      g[j] = in[j] ? __ldg(p.dweight + t * K + k) * p.scale : 0;
    }
    if (p.score == LINA_TOPK_SOFTMAX) {
      softmax_of_chosen<LANES>(s);
    } else {
#pragma unroll
      for (int j = 0; j < OUTS; j++)
        s[j] = !in[j] ? 0 : p.score == LINA_SOFTMAX ? expf(s[j] - top) / sum : sigmoid(s[j]);
    }
    if (p.renorm) { /* w = s / S: ds = (g - <g, w>) / S */
      float total = 0, dot = 0;
#pragma unroll
      for (int j = 0; j < OUTS; j++) total += s[j];
      total = lanes_sum<LANES>(total) + (p.score == LINA_SIGMOID ? 1e-20f : 0.0f);
#pragma unroll
      for (int j = 0; j < OUTS; j++) dot += g[j] * (s[j] / total);
      dot = lanes_sum<LANES>(dot);
#pragma unroll
      for (int j = 0; j < OUTS; j++) g[j] = (g[j] - dot) / total;
    }
    if (p.score == LINA_TOPK_SOFTMAX) { /* through the softmax over the chosen at once */
      float dot = 0;
#pragma unroll
      for (int j = 0; j < OUTS; j++)
        if (in[j]) dot += g[j] * s[j];
      dot = lanes_sum<LANES>(dot);
#pragma unroll
      for (int j = 0; j < OUTS; j++) g[j] = s[j] * (g[j] - dot);
    }
#pragma unroll
    for (int j = 0; j < OUTS; j++)
      if (in[j]) chosen[id[j]] = g[j];
    __syncwarp();
  }

#pragma unroll
  for (int i = 0; i < V; i++) {
    int e = slot_id<T, LANES, V>(lane, i);
    dl[i] = e < E ? chosen[e] : 0; /* of s; of l for LINA_TOPK_SOFTMAX */
  }
  if (p.score == LINA_SIGMOID) {
    float each = 0, dot = 0;
    if (p.dstat) { /* p[e] = s[e] / S */
      float S = 0;
#pragma unroll
      for (int i = 0; i < V; i++) S += sigmoid(l[i]);
      S = lanes_sum<LANES>(S);
      each = 1.0f / S;
#pragma unroll
      for (int i = 0; i < V; i++) {
        int e = slot_id<T, LANES, V>(lane, i);
        if (e < E) dot += sigmoid(l[i]) * each * __ldg(p.dstat + e);
      }
      dot = lanes_sum<LANES>(dot);
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
      int e = slot_id<T, LANES, V>(lane, i);
      float s = sigmoid(l[i]), d = dl[i];
      if (p.dstat && e < E) d += (__ldg(p.dstat + e) - dot) * each;
      dl[i] = d * s * (1 - s);
    }
  }
  if (p.score == LINA_SOFTMAX || (p.dstat && p.score != LINA_SIGMOID)) {
    /* Both gradients that pass through the softmax of the row: dl = p (d - <p, d>) */
    float d[V], dot = 0;
#pragma unroll
    for (int i = 0; i < V; i++) {
      int e = slot_id<T, LANES, V>(lane, i);
      d[i] = p.score == LINA_SOFTMAX ? dl[i] : 0;
      if (p.dstat && e < E) d[i] += __ldg(p.dstat + e);
      if (e < E) dot += q[i] * d[i];
    }
    dot = lanes_sum<LANES>(dot);
#pragma unroll
    for (int i = 0; i < V; i++) dl[i] = (p.score == LINA_SOFTMAX ? 0 : dl[i]) + q[i] * (d[i] - dot);
  }
  if (p.dstat) { /* of logsumexp squared */
    float dz = 2 * __ldg(p.dstat + E) * (top + logf(sum));
#pragma unroll
    for (int i = 0; i < V; i++) dl[i] += dz * q[i];
  }
  if (live) store_slots<T, LANES, V>((T *)p.dlogits + t * E, E, lane, p.aligned, dl);
}

template <class T, int LANES, int V> static int launch_tile(const lina_gate_bwd_args *a,
                                                            cudaStream_t stream) {
  constexpr int run = slot_run<T, V>, threads = threads_for<V>, tokens = threads / LANES;
  const size_t unit = run * sizeof(T);
  params p = {(unsigned)a->T,
              (int)a->E,
              (int)a->K,
              a->score,
              a->renorm,
              a->E % run == 0 && lina_aligned(a->logits, unit) && lina_aligned(a->dlogits, unit),
              (float)a->scale,
              a->logits,
              a->expert,
              (const float *)a->dweight,
              (const float *)a->dstat,
              a->dlogits};
  gate_bwd<T, LANES, V>
      <<<(unsigned)lina_ceil_div(a->T, tokens), threads, tokens * LANES * V * 4, stream>>>(p);
  return lina_launched("gate backward");
}

template <class T> static int launch(const lina_gate_bwd_args *a, cudaStream_t stream) {
  return with_tile<16>(a->E, [&](auto t) {
    return launch_tile<T, decltype(t)::lanes, decltype(t)::slots>(a, stream);
  });
}

extern "C" int lina_gate_bwd_cuda(const lina_gate_bwd_args *a, void *stream) {
  int rc = gate_check("gate backward", a->T, a->E, a->K, a->score);
  if (rc != LINA_OK || a->T == 0) return rc;
  switch (a->dtype) {
    case LINA_F32: return launch<float>(a, (cudaStream_t)stream);
    case LINA_BF16: return launch<lina_bf16>(a, (cudaStream_t)stream);
    case LINA_F16: return launch<lina_f16>(a, (cudaStream_t)stream);
  }
  return lina_unsupported("gate backward", a->dtype);
}
