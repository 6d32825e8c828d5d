/* gate_tokens.h - gate.h's forward and backward over a run of tokens, CPU.
 *
 * Included after gate_rows.h, with the same macros. Rows live in
 * buffers padded to whole vectors: logits and keys by -inf, so that padding is
 * never chosen and its exp is 0; everything else by 0.
 */
#define PADDED (ROW_MAX + LANES)

LINA_INLINE void NAME(store_row)(void *to, int dtype, int64_t t, int64_t E, const A *row) {
  if (dtype == LINA_BF16)
    for (int64_t i = 0; i < E; i++) ((uint16_t *)to)[t * E + i] = lina_to_bf16((float)row[i]);
  else if (dtype == LINA_F16)
    for (int64_t i = 0; i < E; i++) ((uint16_t *)to)[t * E + i] = lina_to_f16((float)row[i]);
  else
    for (int64_t i = 0; i < E; i++) ((A *)to)[t * E + i] = row[i];
}

/* s[k] of the chosen logits for the scores that need those alone. */
LINA_INLINE void NAME(chosen_scores)(const A *l, const int32_t *id, int64_t K, int score, A *s) {
  A x[LINA_GATE_MAX_K], scratch[LINA_GATE_MAX_K];
  int64_t padded = (K + LANES - 1) / LANES * LANES;
  for (int64_t k = 0; k < padded; k++) x[k] = k < K ? l[id[k]] : -(A)INFINITY;
  if (score == LINA_SIGMOID) {
    NAME(sigmoid)(x, s, scratch, padded);
  } else {
    A sum = NAME(exp_sum)(x, NAME(row_max)(x, padded), s, padded);
    for (int64_t k = 0; k < K; k++) s[k] /= sum;
  }
}

/* Tokens [begin, end); adds to sums (stat [E+1]) and load [2E] unless NULL. */
static void NAME(fwd)(const lina_gate_args *a, int64_t begin, int64_t end, void *sums,
                      int32_t *load) {
  A *stat = (A *)sums;
  A buffer[PADDED], e[PADDED], s[PADDED], key[PADDED], w[LINA_GATE_MAX_K];
  const int64_t E = a->E, K = a->K, padded = (E + LANES - 1) / LANES * LANES;
  const int with_keys = a->bias != NULL || a->groups > 1;
  const A *bias = (const A *)a->bias;
  for (int64_t i = E; i < padded; i++) key[i] = -(A)INFINITY;
  for (int64_t t = begin; t < end; t++) {
    const A *l = NAME(load_row)(a->logits, a->dtype, a->T, t, E, buffer);
    int32_t *id = a->expert + t * K;
    A largest = 0, sum = 0, inverse = 0;
    if (stat || a->score == LINA_SOFTMAX) {
      largest = NAME(row_max)(l, padded);
      sum = NAME(exp_sum)(l, largest, e, padded);
      inverse = 1 / sum;
    }
    if (a->score == LINA_SIGMOID && (stat || with_keys)) NAME(sigmoid)(l, s, key, padded);
    if (with_keys) {
      const A *from = a->score == LINA_SOFTMAX ? e : a->score == LINA_SIGMOID ? s : l;
      A factor = a->score == LINA_SOFTMAX ? inverse : 1;
      for (int64_t i = 0; i < E; i++) key[i] = from[i] * factor;
      for (int64_t i = 0; bias && i < E; i++) key[i] += bias[i];
      for (int64_t i = E; i < padded; i++) key[i] = -(A)INFINITY;
      if (a->groups > 1) NAME(mask_groups)(key, E, a->groups, a->top_groups, a->group_top);
    }
    NAME(select)(with_keys ? key : l, E, K, id);

    A total = a->score == LINA_SIGMOID ? (A)1e-20 : 0;
    if (a->score == LINA_SOFTMAX)
      for (int64_t k = 0; k < K; k++) w[k] = e[id[k]] * inverse;
    else
      NAME(chosen_scores)(l, id, K, a->score, w);
    for (int64_t k = 0; k < K; k++) total += w[k];
    for (int64_t k = 0; k < K; k++)
      ((A *)a->weight)[t * K + k] = (a->renorm ? w[k] / total : w[k]) * (A)a->scale;

    if (!stat) continue;
    A lse = NAME(logsumexp)(l, largest, sum, E);
    A part = a->score == LINA_SIGMOID ? 1 / NAME(row_dot)(s, NULL, padded) : inverse;
    const A *p = a->score == LINA_SIGMOID ? s : e;
    for (int64_t i = 0; i < E; i++) stat[i] += p[i] * part;
    stat[E] += lse * lse;
    for (int64_t k = 0; k < K; k++) load[id[k]]++;
    load[E + id[0]]++;
  }
}

/* The raw operator may be given any ids: those that name no expert must not be followed. */
LINA_INLINE int NAME(all_experts)(const int32_t *id, int64_t K, int64_t E) {
  int good = 1;
  for (int64_t k = 0; k < K; k++) good &= (uint32_t)id[k] < (uint32_t)E;
  return good;
}

/* Gradients of the chosen scores s[k] from those of the weights. */
LINA_INLINE void NAME(chosen_grads)(const lina_gate_bwd_args *a, const A *s, const A *dw, A *ds) {
  A total = a->score == LINA_SIGMOID ? (A)1e-20 : 0, dot = 0, factor = (A)a->scale;
  if (a->renorm) {
    for (int64_t k = 0; k < a->K; k++) total += s[k];
    for (int64_t k = 0; k < a->K; k++) dot += dw[k] * (s[k] / total);
    factor /= total;
  }
  for (int64_t k = 0; k < a->K; k++) ds[k] = (dw[k] - dot) * factor;
}

/* With G = dstat[:E], p the statistic's probabilities and q = softmax(l):
 *   softmax:  dl = q * (G + ds - <q, G + ds> + 2 lse dz)
 *   others:   dl = q * 2 lse dz + (statistic's part) + (chosen's part)
 * where the chosen's part lies on the K chosen experts only. */
static void NAME(bwd)(const lina_gate_bwd_args *a, int64_t begin, int64_t end) {
  A buffer[PADDED], e[PADDED], s[PADDED], scratch[PADDED], G[PADDED], d[PADDED];
  A w[LINA_GATE_MAX_K], ds[LINA_GATE_MAX_K];
  const int64_t E = a->E, K = a->K, padded = (E + LANES - 1) / LANES * LANES;
  const A *dstat = (const A *)a->dstat, dz = dstat ? dstat[E] : 0;
  const int softmax = a->score == LINA_SOFTMAX, sigmoid = a->score == LINA_SIGMOID;
  for (int64_t i = 0; i < padded; i++) G[i] = dstat && i < E ? dstat[i] : 0;
  for (int64_t t = begin; t < end; t++) {
    const A *l = NAME(load_row)(a->logits, a->dtype, a->T, t, E, buffer);
    const int32_t *id = a->expert + t * K;
    const int with_weights = a->dweight && NAME(all_experts)(id, K, E);
    A shift = 0, dot = 0;
    if (dstat || softmax) {
      A largest = NAME(row_max)(l, padded), sum = NAME(exp_sum)(l, largest, e, padded),
        inverse = 1 / sum;
      for (int64_t i = 0; i < padded; i++) e[i] *= inverse;
      if (dz != 0) shift = 2 * dz * NAME(logsumexp)(l, largest, sum, E);
    }
    if (with_weights) {
      if (softmax)
        for (int64_t k = 0; k < K; k++) w[k] = e[id[k]];
      else
        NAME(chosen_scores)(l, id, K, a->score, w);
      NAME(chosen_grads)(a, w, (const A *)a->dweight + t * K, ds);
      for (int64_t k = 0; k < K; k++) dot += ds[k] * w[k];
    }
    if (softmax) {
      if (dstat) dot += NAME(row_dot)(e, G, padded);
      for (int64_t i = 0; i < E; i++) d[i] = e[i] * (G[i] - dot + shift);
      for (int64_t k = 0; with_weights && k < K; k++)
        d[id[k]] = w[k] * (G[id[k]] + ds[k] - dot + shift);
    } else {
      if (!dstat) {
        for (int64_t i = 0; i < E; i++) d[i] = 0;
      } else if (sigmoid) {
        NAME(sigmoid)(l, s, scratch, padded);
        A part = 1 / NAME(row_dot)(s, NULL, padded), mean = NAME(row_dot)(s, G, padded) * part;
        for (int64_t i = 0; i < E; i++)
          d[i] = (G[i] - mean) * part * s[i] * (1 - s[i]) + e[i] * shift;
      } else {
        A mean = NAME(row_dot)(e, G, padded);
        for (int64_t i = 0; i < E; i++) d[i] = e[i] * (G[i] - mean + shift);
      }
      for (int64_t k = 0; with_weights && k < K; k++)
        d[id[k]] += w[k] * (sigmoid ? ds[k] * (1 - w[k]) : ds[k] - dot);
    }
    NAME(store_row)(a->dlogits, a->dtype, t, E, d);
  }
}
#undef PADDED
#undef A
#undef INT
#undef LANES
#undef NAME
#undef TERMS
#undef MANT
#undef BIAS
#undef LOWEST
