/* gate_cpu.c - gate.h on the CPU.
 *
 * A thread takes whole chunks of tokens; a token's row stays in the first
 * level cache from its logits to its weights. exp dominates for few experts,
 * the choice of K for many (gate_rows.h). Chunks depend on T alone and their
 * statistics are added in chunk order, so results do not depend on timing or
 * on the number of threads. The loops are compiled for each vector width below
 * and the widest that the processor has is chosen at run time.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../tensor.h"
#include "../vector.h"
#include "gate.h"

#define RANK_MAX 64              /* candidates ranked by counting */
#define ROW_MAX  LINA_GATE_MAX_E

/* ln 2 in two parts, the first with 9 significant bits. */
#define LN2_HIGH 0.693359375
#define LN2_LOW  -2.12194440054690582767e-4

static const double INV_FACT[] = {
    1.,
    1.,
    1. / 2,
    1. / 6,
    1. / 24,
    1. / 120,
    1. / 720,
    1. / 5040,
    1. / 40320,
    1. / 362880,
    1. / 3628800,
    1. / 39916800,
    1. / 479001600,
    1. / 6227020800,
};

/* log(x) of a positive normal x: x = m * 2^n, sqrt(1/2) <= m < sqrt(2), and
 * log(m) = 2 atanh(f), f = (m - 1)/(m + 1); f^25 is under 1e-19. */
static inline double lina_log(double x) {
  uint64_t u;
  memcpy(&u, &x, sizeof u);
  uint64_t n = (u + (0x3ff0000000000000 - 0x3fe6a09e667f3bcd)) >> 52;
  u -= (n - 1023) << 52;
  memcpy(&x, &u, sizeof x);
  double f = (x - 1) / (x + 1), f2 = f * f, sum = 0;
  for (int k = 23; k > 1; k -= 2) sum = (sum + 1. / k) * f2;
  double power = (double)((int64_t)n - 1023);
  return power * LN2_HIGH + (power * LN2_LOW + 2 * (f + f * sum));
}

#if defined(__x86_64__) && !defined(LINA_NO_CLONES)
#define WIDER 1
#else
#define WIDER 0
#endif

/* ---- one copy for each type and vector width ---- */

/* float64 is for checking gradients: one copy will do. */
#define A       double
#define INT     int64_t
#define LANES   2
#define NAME(x) x##_f64
#define TERMS   13
#define MANT    52
#define BIAS    1023
#define LOWEST  -760
#include "gate_rows.h"
#include "gate_tokens.h"

#define A       float
#define INT     int32_t
#define LANES   4
#define NAME(x) x##_f32
#define TERMS   7
#define MANT    23
#define BIAS    127
#define LOWEST  -110
#include "gate_rows.h"
#include "gate_tokens.h"

#if WIDER
#pragma GCC push_options
#pragma GCC target("avx2")
#define A       float
#define INT     int32_t
#define LANES   8
#define NAME(x) x##_f32_avx2
#define TERMS   7
#define MANT    23
#define BIAS    127
#define LOWEST  -110
#include "gate_rows.h"
#include "gate_tokens.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl")
#define A       float
#define INT     int32_t
#define LANES   16
#define NAME(x) x##_f32_avx512
#define TERMS   7
#define MANT    23
#define BIAS    127
#define LOWEST  -110
#include "gate_rows.h"
#include "gate_tokens.h"
#pragma GCC pop_options
#endif

typedef void fwd_fn(const lina_gate_args *a, int64_t begin, int64_t end, void *sums, int32_t *load);
typedef void bwd_fn(const lina_gate_bwd_args *a, int64_t begin, int64_t end);

/* The widest vectors that the processor has and that E fills. Up to 16 experts,
 * two vectors of 8 are a fifth faster than one of 16. */
static void choose(int dtype, int64_t E, fwd_fn **fwd, bwd_fn **bwd) {
  *fwd = dtype == LINA_F64 ? fwd_f64 : fwd_f32;
  *bwd = dtype == LINA_F64 ? bwd_f64 : bwd_f32;
#if WIDER
  if (dtype == LINA_F64 || E <= 4) return;
  __builtin_cpu_init();
  if (E > 16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    *fwd = fwd_f32_avx512, *bwd = bwd_f32_avx512;
  else if (__builtin_cpu_supports("avx2"))
    *fwd = fwd_f32_avx2, *bwd = bwd_f32_avx2;
#else
  (void)E;
#endif
}

/* ---- chunks ---- */

/* Tokens a chunk: at most 256 chunks, whose statistics need one row each. */
static int64_t chunk_size(int64_t T) { return T <= 256 * 64 ? 64 : (T + 255) / 256; }

/* Chunks a thread must have before another is worth waking: 2^14 logits. */
static int64_t chunk_grain(int64_t chunk, int64_t E) { return 1 + (1 << 14) / (chunk * E); }

typedef struct {
  const lina_gate_args *a;
  fwd_fn *run;
  int64_t chunk;
  char *stat;                    /* [chunks, E+1] of A, or NULL */
  int32_t *load;                 /* [chunks, 2E] */
} fwd_work;

static void fwd_chunks(int64_t begin, int64_t end, void *context) {
  const fwd_work *work = (const fwd_work *)context;
  const lina_gate_args *a = work->a;
  size_t width = (size_t)(a->E + 1) * (a->dtype == LINA_F64 ? sizeof(double) : sizeof(float));
  for (int64_t c = begin; c < end; c++) {
    int64_t first = c * work->chunk, last = first + work->chunk < a->T ? first + work->chunk : a->T;
    work->run(a, first, last, work->stat ? work->stat + (size_t)c * width : NULL,
              work->stat ? work->load + c * 2 * a->E : NULL);
  }
}

static void add_chunks(const fwd_work *work, int64_t chunks) {
  const lina_gate_args *a = work->a;
  for (int64_t c = 0; c < chunks; c++) {
    for (int64_t i = 0; i < 2 * a->E; i++) a->load[i] += work->load[c * 2 * a->E + i];
    for (int64_t i = 0; i <= a->E; i++)
      if (a->dtype == LINA_F64)
        ((double *)a->stat)[i] += ((double *)work->stat)[c * (a->E + 1) + i];
      else
        ((float *)a->stat)[i] += ((float *)work->stat)[c * (a->E + 1) + i];
  }
}

int lina_gate_fwd_cpu(const lina_gate_args *a) {
  const size_t item = a->dtype == LINA_F64 ? sizeof(double) : sizeof(float);
  fwd_work work = {.a = a, .chunk = chunk_size(a->T)};
  bwd_fn *unused;
  int64_t chunks = (a->T + work.chunk - 1) / work.chunk;
  int rc = LINA_OK;
  if (a->load) {
    memset(a->load, 0, (size_t)(2 * a->E) * sizeof(int32_t));
    memset(a->stat, 0, (size_t)(a->E + 1) * item);
  }
  if (a->T == 0) return LINA_OK;
  if (a->load) {
    work.stat = calloc((size_t)(chunks * (a->E + 1)), item);
    work.load = calloc((size_t)(chunks * 2 * a->E), sizeof(int32_t));
    if (!work.stat || !work.load)
      LINA_FAIL(LINA_ENOMEM, "gate: no memory for the statistics of %lld chunks of E=%lld",
                (long long)chunks, (long long)a->E);
  }
  choose(a->dtype, a->E, &work.run, &unused);
  LINA_TRY(lina_parallel_for(chunks, chunk_grain(work.chunk, a->E), fwd_chunks, &work));
  if (a->load) add_chunks(&work, chunks);
done:
  free(work.load);
  free(work.stat);
  return rc;
}

typedef struct {
  const lina_gate_bwd_args *a;
  bwd_fn *run;
} bwd_work;

static void bwd_tokens(int64_t begin, int64_t end, void *context) {
  const bwd_work *work = (const bwd_work *)context;
  work->run(work->a, begin, end);
}

int lina_gate_bwd_cpu(const lina_gate_bwd_args *a) {
  bwd_work work = {.a = a};
  fwd_fn *unused;
  if (a->T == 0) return LINA_OK;
  choose(a->dtype, a->E, &unused, &work.run);
  return lina_parallel_for(a->T, 1 + (1 << 14) / a->E, bwd_tokens, &work);
}
