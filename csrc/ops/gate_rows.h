/* gate_rows.h - one token's row on the CPU: exp, choice of K, group mask.
 *
 * Included by gate_cpu.c once for each arithmetic type and vector width, with
 *   A        float or double; INT the signed integer of its size
 *   LANES    elements of a vector, 2 to 16, a power of two
 *   NAME(x)  x with a suffix for the copy
 *   TERMS    degree of exp's Taylor polynomial on |r| <= ln(2)/2: the remainder
 *            r^(TERMS+1)/(TERMS+1)! is under a tenth of A's epsilon
 *   MANT     mantissa bits;  BIAS  exponent bias;  LOWEST  where exp is 0
 *
 * Vectors are GCC's vector extension. It is lowered before functions are
 * inlined, so each width needs its own functions, built for its target.
 */
typedef A NAME(vec) __attribute__((vector_size(LANES * sizeof(A)), aligned(sizeof(A)), may_alias));
typedef INT NAME(ivec)
    __attribute__((vector_size(LANES * sizeof(INT)), aligned(sizeof(INT)), may_alias));
#define vec                 NAME(vec)
#define ivec                NAME(ivec)
#define PICK(mask, yes, no) ((vec)(((mask) & (ivec)(yes)) | (~(mask) & (ivec)(no))))

typedef uint16_t NAME(halves) __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int32_t NAME(words) __attribute__((vector_size(LANES * 4)));
typedef float NAME(floats) __attribute__((vector_size(LANES * 4)));
static const INT NAME(lane)[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* LANES logits as A, the first n of them valid; the others become -inf. */
LINA_INLINE void NAME(load)(const void *from, int dtype, int64_t n, A *to) {
  vec v;
  if (dtype == LINA_BF16 || dtype == LINA_F16) {
    NAME(words) w = __builtin_convertvector(*(const NAME(halves) *)from, NAME(words));
    if (dtype == LINA_BF16) {
      w <<= 16;
    } else {                                    /* as lina_from_f16 */
      NAME(words) magnitude = (w & 0x7fff) << 13;
      NAME(words) scaled = (NAME(words))((NAME(floats))magnitude * 0x1p112f);
      NAME(words) special = magnitude >= 0x0f800000;
      w = (special & (magnitude | 0x7f800000)) | (~special & scaled) | (w & 0x8000) << 16;
    }
    v = __builtin_convertvector((NAME(floats))w, vec);
  } else {
    v = *(const vec *)from;
  }
  *(vec *)to = PICK(*(const ivec *)NAME(lane) < (INT)n, v, (vec){0} - (A)INFINITY);
}

/* Row t of T rows of logits, padded with -inf to a multiple of LANES: in place
 * where possible, else in `buffer`. The buffer is written in whole vectors, by
 * reading into the next row where there is one: narrower pieces would have to
 * leave the processor's store buffer before a vector of them could be read back,
 * which costs as much as all the rest of a short row. */
LINA_INLINE const A *NAME(load_row)(const void *logits, int dtype, int64_t T, int64_t t, int64_t E,
                                    A *buffer) {
  const char *from = lina_at(logits, dtype, t * E);
  int64_t whole = E / LANES * LANES, bytes = lina_dtype_bytes(dtype);
  if (bytes == sizeof(A) && whole == E) return (const A *)from;
  for (int64_t i = 0; i < whole; i += LANES) NAME(load)(from + i * bytes, dtype, LANES, buffer + i);
  if (whole < E && (T - t) * E >= whole + LANES) {
    NAME(load)(from + whole * bytes, dtype, E - whole, buffer + whole);
  } else if (whole < E) {
    A last[LANES] = {0};
    memcpy(last, from + whole * bytes, (size_t)((E - whole) * bytes));
    NAME(load)(last, dtype, E - whole, buffer + whole);
  }
  return buffer;
}

LINA_INLINE A NAME(lane_sum)(const vec *v) {
  A part[LANES];
  *(vec *)part = *v;
  for (int w = LANES / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++) part[i] += part[i + w];
  return part[0];
}

/* y[i] = exp(x[i] - shift) for x - shift <= 0, NaN for NaN; returns the sum. */
LINA_INLINE A NAME(exp_sum)(const A *x, A shift, A *y, int64_t n) {
  const A round = (A)1.5 * (A)((INT)1 << MANT); /* adding it rounds to whole */
  vec sum = {0};
  for (int64_t i = 0; i < n; i += LANES) {
    vec v = *(const vec *)(x + i) - shift;
    v = PICK(v < (A)LOWEST, (vec){0} + (A)LOWEST, v);
    vec k = v * (A)1.44269504088896340736 + round;
    ivec n2 = (ivec)k - (ivec)((vec){0} + round);
    k = k - round;
    vec r = v - k * (A)LN2_HIGH;                /* k * LN2_HIGH is exact */
    r = r - k * (A)LN2_LOW;
    vec p = (vec){0} + (A)INV_FACT[TERMS];
    for (int t = TERMS - 1; t >= 0; t--) p = p * r + (A)INV_FACT[t];
    ivec half = n2 >> 1;                        /* two factors: results may be subnormal */
    p = p * (vec)((half + BIAS) << MANT) * (vec)((n2 - half + BIAS) << MANT);
    *(vec *)(y + i) = p;
    sum += p;
  }
  return NAME(lane_sum)(&sum);
}

/* sum_i x[i] * y[i], y[i] = 1 if NULL. */
LINA_INLINE A NAME(row_dot)(const A *x, const A *y, int64_t n) {
  vec sum = {0};
  for (int64_t i = 0; i < n; i += LANES) {
    vec v = *(const vec *)(x + i);
    if (y) v = v * *(const vec *)(y + i);
    sum += v;
  }
  return NAME(lane_sum)(&sum);
}

/* The largest of x, ignoring NaN; -inf if there is none. */
LINA_INLINE A NAME(row_max)(const A *x, int64_t n) {
  vec best = (vec){0} - (A)INFINITY;
  for (int64_t i = 0; i < n; i += LANES) {
    vec v = *(const vec *)(x + i);
    best = PICK(v > best, v, best);
  }
  A part[LANES];
  *(vec *)part = best;
  for (int w = LANES / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++) part[i] = part[i + w] > part[i] ? part[i + w] : part[i];
  return part[0];
}

/* order[r] = index of the element of rank r, for the n <= RANK_MAX elements of
 * x, padded with -inf to a multiple of LANES; equal elements keep their order.
 * No NaN. Counts each element's betters: n * n comparisons and no branches. */
LINA_INLINE void NAME(rank_all)(const A *x, int64_t n, int32_t *order) {
  INT rank[RANK_MAX];
  const ivec lane = *(const ivec *)NAME(lane);
  for (int64_t b = 0; b < n; b += LANES) {
    vec v = *(const vec *)(x + b);
    ivec r = {0};
    for (int64_t j = 0; j < n; j++) {
      vec other = (vec){0} + x[j];
      r -= (other > v) | ((other == v) & (lane > (INT)(j - b)));
    }
    *(ivec *)(rank + b) = r;
  }
  for (int64_t i = 0; i < n; i++) order[rank[i]] = (int32_t)i;
}

/* A value that at least K of the n keys reach, from the maxima of 2K or
 * more interleaved sets; -inf where n is too small for it to exclude anything. */
LINA_INLINE A NAME(lower_bound)(const A *key, int64_t n, int64_t K) {
  A top[RANK_MAX];
  int32_t order[RANK_MAX];
  int64_t sets = K <= 8 ? 16 : K <= 16 ? 32 : 64;
  if (K > 32 || n < 2 * sets) return -(A)INFINITY;
  for (int64_t b = 0; b < sets; b += LANES) {
    vec best = (vec){0} - (A)INFINITY;
    for (int64_t i = b; i < n; i += sets) {
      vec v = *(const vec *)(key + i);
      best = PICK(v > best, v, best);
    }
    *(vec *)(top + b) = best;
  }
  NAME(rank_all)(top, sets, order);
  return top[order[K - 1]];
}

/* The K best of n keys, best first; equal keys: lower index first; NaN as -inf.
 * key is padded with -inf to a multiple of LANES. 1 <= K <= n <= ROW_MAX.
 * Short rows are ranked whole. In others, a bound that K keys reach leaves few candidates, collected without a branch;
 * these are ranked by counting, or, if ties make them many, kept in a sorted
 * list. Keys of -inf are filled in by index at the end. */
LINA_INLINE void NAME(select)(const A *key, int64_t n, int64_t K, int32_t *best) {
  int32_t from[ROW_MAX + 1], order[RANK_MAX];
  A value[ROW_MAX];
  int64_t found = 0, padded = (n + LANES - 1) / LANES * LANES;
  if (padded <= 16) {
    for (int64_t i = 0; i < padded; i += LANES) {
      vec v = *(const vec *)(key + i);
      *(vec *)(value + i) = PICK(v == v, v, (vec){0} - (A)INFINITY);
    }
    NAME(rank_all)(value, n, order);
    for (int64_t k = 0; k < K; k++) best[k] = order[k];
    return;
  }
  A bound = NAME(lower_bound)(key, padded, K);
  if (bound > -(A)INFINITY)
    for (int64_t i = 0; i < n; i++) from[found] = (int32_t)i, found += key[i] >= bound;
  else
    for (int64_t i = 0; i < n; i++) from[found] = (int32_t)i, found += key[i] > bound;
  int64_t taken = found < K ? found : K;
  if (found <= RANK_MAX) {
    for (int64_t i = 0; i < found; i++) value[i] = key[from[i]];
    for (int64_t i = found; i % LANES != 0; i++) value[i] = -(A)INFINITY;
    NAME(rank_all)(value, found, order);
    for (int64_t k = 0; k < taken; k++) best[k] = from[order[k]];
  } else {
    int64_t held = 0;
    for (int64_t i = 0; i < found; i++) {
      A v = key[from[i]];
      if (held == K && !(v > value[K - 1])) continue;
      int64_t j = held < K ? held++ : K - 1;
      for (; j > 0 && value[j - 1] < v; j--) value[j] = value[j - 1], best[j] = best[j - 1];
      value[j] = v, best[j] = from[i];
    }
  }
  for (int64_t i = 0; taken < K && i < n; i++)
    if (!(key[i] > -(A)INFINITY)) best[taken++] = (int32_t)i;
}

/* Sets the keys outside the best `top_groups` of `groups` runs to -inf. */
LINA_INLINE void NAME(mask_groups)(A *key, int64_t n, int64_t groups, int64_t top_groups, int top) {
  A score[ROW_MAX];
  int32_t best[ROW_MAX];
  unsigned char keep[ROW_MAX];
  int64_t size = n / groups;
  for (int64_t g = 0; g < groups; g++) {
    A first = -(A)INFINITY, second = -(A)INFINITY;
    for (int64_t i = g * size; i < (g + 1) * size; i++) {
      A v = key[i];
      if (v > first)
        second = first, first = v;
      else if (v > second)
        second = v;
    }
    score[g] = top == 2 && size > 1 ? first + second : first;
    keep[g] = 0;
  }
  for (int64_t g = groups; g % LANES != 0; g++) score[g] = -(A)INFINITY;
  NAME(select)(score, groups, top_groups, best);
  for (int64_t i = 0; i < top_groups; i++) keep[best[i]] = 1;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t i = g * size; !keep[g] && i < (g + 1) * size; i++) key[i] = -(A)INFINITY;
}

/* s[i] = sigmoid(x[i]), by exp of -|x| alone. x may not be scratch or s. */
LINA_INLINE void NAME(sigmoid)(const A *x, A *s, A *scratch, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    vec v = *(const vec *)(x + i);
    *(vec *)(scratch + i) = PICK(v > (vec){0}, -v, v);
  }
  NAME(exp_sum)(scratch, 0, s, n);
  for (int64_t i = 0; i < n; i += LANES) {
    vec z = *(const vec *)(s + i), v = *(const vec *)(x + i);
    *(vec *)(s + i) = PICK(v > (vec){0}, (vec){0} + (A)1, z) / ((A)1 + z);
  }
}

/* log(sum_i exp(x[i])) from the row's largest and the sum of exp(x - largest),
 * which is at least 1, or NaN after a NaN or infinite logit. */
LINA_INLINE A NAME(logsumexp)(const A *x, A largest, A sum, int64_t n) {
  if (sum >= 1) return largest + (A)lina_log((double)sum);
  for (int64_t i = 0; i < n; i++)
    if (x[i] != x[i]) return x[i];
  return largest;
}
#undef PICK
#undef ivec
#undef vec
