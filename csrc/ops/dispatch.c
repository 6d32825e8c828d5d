/* dispatch.c - torch.ops.lina.dispatch_layout: checks, allocation, dispatch, and the CPU's
 * kernel.
 *
 * CPU: a chunk's tokens are cut into tiles; each tile counts its rows and pairs by rank, a
 * running sum over (chunk, rank, tile) gives each tile its first row of each rank, and each
 * tile then places its rows in order. Bound by writing `row`.
 */
#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

#include "../tensor.h"

#define MAX_TILES 64
#define MIN_TILE  2048            /* tokens; fewer are not worth another thread */

/* One direction. */
typedef struct {
  const lina_dispatch_args *a;
  int dir, chunks, ranges, tiles; /* tiles of each chunk */
  int64_t S;
  int32_t *count; /* [chunks, tiles, words]: rows by rank, then first rows; pairs */
} work;

static int words(const lina_dispatch_args *a) {
  return 2 * a->ep + 2; /* the last two: own pairs */
}

static int32_t *counts_of(const work *w, int chunk, int tile) {
  return w->count + ((int64_t)chunk * w->tiles + tile) * words(w->a);
}

static int64_t first_of(int64_t i, int64_t n, int64_t T) { return (i * T + n - 1) / n; }

/* First token of a tile, numbered through all chunks. */
static int64_t tile_first(const work *w, int64_t tile) {
  const int64_t chunk = tile / w->tiles, begin = first_of(chunk, w->chunks, w->a->T),
                end = first_of(chunk + 1, w->chunks, w->a->T);
  return begin + first_of(tile % w->tiles, w->tiles, end - begin);
}

static inline int rank_of(const lina_dispatch_args *a, int64_t pair, int32_t local) {
  const int32_t e = a->expert[pair];
  return (uint32_t)e < (uint32_t)a->E ? e / local : -1;
}

static void count_tiles(int64_t begin, int64_t end, void *context) {
  const work *w = (const work *)context;
  const lina_dispatch_args *a = w->a;
  const int32_t local = (int32_t)(a->E / a->ep);
  for (int64_t i = begin; i < end; i++) {
    int32_t *rows = w->count + i * words(a), *pairs = rows + a->ep, *own = pairs + a->ep;
    int32_t seen[LINA_DISPATCH_MAX_EP]; /* the last token with a row there */
    memset(seen, 0xff, sizeof(int32_t) * (size_t)a->ep);
    for (int64_t t = tile_first(w, i); t < tile_first(w, i + 1); t++)
      for (int64_t k = 0; k < a->K; k++) {
        const int r = rank_of(a, t * a->K + k, local);
        if (r < 0) continue;
        if (r == a->me) {
          own[w->ranges == 2 && 2 * t >= a->T]++;
          continue;
        }
        pairs[r]++;
        rows[r] += seen[r] != (int32_t)t;
        seen[r] = (int32_t)t;
      }
  }
}

static void place_tiles(int64_t begin, int64_t end, void *context) {
  const work *w = (const work *)context;
  const lina_dispatch_args *a = w->a;
  const int32_t local = (int32_t)(a->E / a->ep);
  for (int64_t i = begin; i < end; i++) {
    int32_t *next = w->count + i * words(a);
    for (int64_t t = tile_first(w, i); t < tile_first(w, i + 1); t++) {
      int32_t *row = a->row[w->dir] + t * a->ep;
      memset(row, 0xff, sizeof(int32_t) * (size_t)a->ep);
      for (int64_t k = 0; k < a->K; k++) {
        const int r = rank_of(a, t * a->K + k, local);
        if (r < 0 || row[r] >= 0) continue;
        row[r] = r == a->me ? (int32_t)(w->S + t) : next[r]++;
        if (r != a->me) a->token[w->dir][row[r]] = (int32_t)t;
      }
    }
  }
}

/* Turns counts of rows into first rows, and tells the header. */
static void add_up(work *w) {
  const lina_dispatch_args *a = w->a;
  const int64_t width = a->facts + 2 * LINA_DISPATCH_COLUMNS;
  int64_t *columns = a->header + a->facts + w->dir * LINA_DISPATCH_COLUMNS;
  for (int c = 0; c < w->chunks; c++)
    for (int r = 0; r < a->ep; r++) {
      int64_t *line = columns + r * width, first = w->S;
      for (int tile = 0; tile < w->tiles; tile++) {
        int32_t *count = counts_of(w, c, tile), rows = count[r];
        count[r] = (int32_t)w->S;
        w->S += rows;
        if (r != a->me)
          line[LINA_DISPATCH_CHUNKS + c] += count[a->ep + r];
        else
          for (int i = 0; i < 2; i++) line[LINA_DISPATCH_CHUNKS + i] += count[2 * a->ep + i];
      }
      line[c] = w->S - first;
    }
}

static int one_direction(const lina_dispatch_args *a, int dir) {
  work w = {.a = a, .dir = dir};
  int rc = LINA_OK;
  w.chunks = lina_dispatch_chunks(a->degree[dir]);
  w.ranges = lina_dispatch_ranges(a->degree[dir]);
  const int64_t tiles = (a->T / w.chunks + MIN_TILE - 1) / MIN_TILE, most = MAX_TILES / w.chunks;
  w.tiles = (int)(tiles < 1 ? 1 : tiles < most ? tiles : most);
  const int64_t all = (int64_t)w.chunks * w.tiles;
  w.count = calloc((size_t)(all * words(a)), sizeof(int32_t));
  if (!w.count)
    LINA_FAIL(LINA_ENOMEM, "dispatch_layout: no memory for %lld counts",
              (long long)(all * words(a)));
  LINA_TRY(lina_parallel_for(all, 1, count_tiles, &w));
  add_up(&w);
  if (w.S < a->R) memset(a->token[dir] + w.S, 0xff, (size_t)(a->R - w.S) * sizeof(int32_t));
  LINA_TRY(lina_parallel_for(all, 1, place_tiles, &w));
done:
  free(w.count);
  return rc;
}

int lina_dispatch_cpu(const lina_dispatch_args *a) {
  const int64_t width = a->facts + 2 * LINA_DISPATCH_COLUMNS;
  memset(a->header, 0, sizeof(int64_t) * (size_t)(a->ep * width));
  for (int r = 0; r < a->ep; r++)
    for (int f = 0; f < a->facts; f++) a->header[r * width + f] = a->said[f];
  int rc = one_direction(a, 0);
  return rc == LINA_OK && a->degree[1] ? one_direction(a, 1) : rc;
}

/* ---- operator ---- */

#define OP "dispatch_layout"

static int in_range(const char *name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return LINA_OK;
  return lina_error(LINA_EINVAL, OP ": %s=%lld, limit %lld..%lld", name, (long long)value,
                    (long long)least, (long long)most);
}

typedef struct { int64_t E, ep, me, degree[2]; } numbers;

static int check(const lina_tensor *expert, const lina_tensor *said, const numbers *n) {
  int rc;
  LINA_TRY(lina_check(OP, "expert", expert, 2, 1u << LINA_I32));
  LINA_TRY(lina_check(OP, "said", said, 1, 1u << LINA_I64));
  if (said->device != LINA_ON_CPU)
    LINA_FAIL(LINA_ENOTSUP, OP ": said is not on the CPU, where it must be");
  LINA_TRY(in_range("said.shape[0]", said->size[0], 0, LINA_DISPATCH_MAX_SAID));
  LINA_TRY(in_range("ep", n->ep, 1, LINA_DISPATCH_MAX_EP));
  LINA_TRY(in_range("experts", n->E, 1, INT32_MAX));
  if (n->E % n->ep)
    LINA_FAIL(LINA_EINVAL, OP ": experts=%lld, must be a multiple of ep=%lld", (long long)n->E,
              (long long)n->ep);
  LINA_TRY(in_range("me", n->me, -1, n->ep - 1));
  LINA_TRY(in_range("forward", n->degree[0], 1, LINA_DISPATCH_MAX_DEGREE));
  LINA_TRY(in_range("backward", n->degree[1], 0, LINA_DISPATCH_MAX_DEGREE));
  const int64_t T = expert->size[0], K = expert->size[1], most = K > n->ep ? K : n->ep;
  LINA_TRY(in_range("expert.shape[1]", K, 1, LINA_DISPATCH_MAX_K));
  if (T > INT32_MAX / most)
    LINA_FAIL(LINA_EINVAL,
              OP ": expert has T=%lld rows, T * max(K, ep) = T * %lld is at most 2^31-1",
              (long long)T, (long long)most);
done:
  return rc;
}

static int run(lina_dispatch_args *a, const lina_tensor *expert, void *stream) {
  if (expert->device == LINA_ON_CPU) return lina_dispatch_cpu(a);
#if LINA_CUDA
  lina_tensor partial = {0};
  int64_t count = lina_dispatch_partial_count(a);
  int rc = LINA_OK;
  LINA_TRY(lina_empty(&partial, LINA_I32, expert, 1, &count));
  a->partial = partial.data;
  LINA_TRY(lina_dispatch_cuda(a, stream));
done:
  lina_drop(&partial); /* the allocator reuses it on this stream only */
  return rc;
#else
  (void)stream;
  return lina_error(LINA_ENOTSUP, OP ": expert is not on the CPU, and this build has no CUDA");
#endif
}

void lina_dispatch_layout_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts) {
  (void)nargs, (void)nouts;
  lina_tensor expert = {0}, said = {0}, token[2] = {{0}}, row[2] = {{0}}, header = {0};
  lina_scope scope = {0};
  const numbers n = {lina_take_int(stack[2]),
                     lina_take_int(stack[3]),
                     lina_take_int(stack[4]),
                     {lina_take_int(stack[5]), lina_take_int(stack[6])}};
  int rc = lina_take(stack[0], &expert), later = lina_take(stack[1], &said);

  LINA_TRY(rc);
  LINA_TRY(later);
  LINA_TRY(check(&expert, &said, &n));
  const int64_t T = expert.size[0], K = expert.size[1], others = n.ep - (n.me >= 0);
  const bool two = n.degree[1] && n.degree[1] != n.degree[0];
  lina_dispatch_args args = {
      .T = T,
      .K = K,
      .E = n.E,
      .R = T * (K < others ? K : others),
      .ep = (int)n.ep,
      .me = (int)n.me,
      .facts = (int)said.size[0],
      .degree = {(int)n.degree[0], two ? (int)n.degree[1] : 0},
  };
  LINA_TRY(lina_enter(&expert, &scope));
  LINA_TRY(lina_make_contiguous(&expert));
  LINA_TRY(lina_make_contiguous(&said));
  if (args.facts) memcpy(args.said, said.data, sizeof(int64_t) * (size_t)args.facts);
  for (int dir = 0; dir < 2; dir++) {
    const bool wanted = !dir || two;
    LINA_TRY(lina_empty(&token[dir], LINA_I32, &expert, 1, (int64_t[]){wanted ? args.R : 0}));
    LINA_TRY(lina_empty(&row[dir], LINA_I32, &expert, 2, (int64_t[]){wanted ? T : 0, n.ep}));
    args.token[dir] = token[dir].data, args.row[dir] = row[dir].data;
  }
  LINA_TRY(lina_empty(&header, LINA_I64, &expert, 2,
                      (int64_t[]){n.ep, args.facts + 2 * LINA_DISPATCH_COLUMNS}));
  args.expert = expert.data, args.header = header.data;
  LINA_TRY(run(&args, &expert, scope.stream));
  stack[0] = lina_give(&token[0]);
  stack[1] = lina_give(&row[0]);
  stack[2] = lina_give(&token[1]);
  stack[3] = lina_give(&row[1]);
  stack[4] = lina_give(&header);
done:
  lina_drop(&header);
  for (int dir = 0; dir < 2; dir++) lina_drop(&row[dir]), lina_drop(&token[dir]);
  lina_drop(&said);
  lina_drop(&expert);
  lina_leave(&scope);
  if (rc != LINA_OK) lina_throw(rc);
}
