/* sort.c - torch.ops.lina.sort: checks, allocation, dispatch, and the CPU's sort.
 *
 * CPU: pairs are cut into at most 64 chunks; each counts its experts, a running
 * sum over (expert, chunk) gives each chunk its first row of each expert, and
 * each chunk then places its pairs in order. Counts are written once and read
 * once, so what bounds it is the scattered write of row_pair.
 */
#include "sort.h"

#include <stdlib.h>
#include <string.h>

#include "../tensor.h"

#define MAX_CHUNKS 64
#define MIN_CHUNK  8192           /* pairs; fewer are not worth another thread */

typedef struct {
  const lina_sort_args *a;
  int64_t pairs, chunk;
  int32_t *count;                /* [chunks, E]: counts, then first rows */
} sort_work;

static inline int present(int32_t expert, int64_t E) { return (uint32_t)expert < (uint32_t)E; }

static int64_t chunk_end(const sort_work *work, int64_t c) {
  int64_t end = (c + 1) * work->chunk;
  return end < work->pairs ? end : work->pairs;
}

static void count_chunks(int64_t begin, int64_t end, void *context) {
  const sort_work *work = (const sort_work *)context;
  const int64_t E = work->a->E;
  for (int64_t c = begin; c < end; c++) {
    int32_t *count = work->count + c * E;
    for (int64_t p = c * work->chunk; p < chunk_end(work, c); p++) {
      int32_t e = work->a->expert[p];
      if (present(e, E)) count[e]++;
    }
  }
}

static void place_chunks(int64_t begin, int64_t end, void *context) {
  const sort_work *work = (const sort_work *)context;
  const lina_sort_args *a = work->a;
  for (int64_t c = begin; c < end; c++) {
    int32_t *next = work->count + c * a->E;
    for (int64_t p = c * work->chunk; p < chunk_end(work, c); p++) {
      int32_t e = a->expert[p];
      if (present(e, a->E)) {
        int32_t row = next[e]++;
        a->pair_row[p] = row;
        a->row_pair[row] = (int32_t)p;
      } else {
        a->pair_row[p] = -1;
      }
    }
  }
}

int lina_sort_cpu(const lina_sort_args *a) {
  sort_work work = {.a = a, .pairs = a->T * a->K};
  int64_t chunks = (work.pairs + MIN_CHUNK - 1) / MIN_CHUNK;
  int32_t row = 0;
  int rc = LINA_OK;
  if (chunks > MAX_CHUNKS) chunks = MAX_CHUNKS;
  if (chunks < 1) chunks = 1;
  work.chunk = (work.pairs + chunks - 1) / chunks;
  work.count = calloc((size_t)(chunks * a->E), sizeof(int32_t));
  if (!work.count)
    LINA_FAIL(LINA_ENOMEM, "sort: no memory for %lld counts", (long long)(chunks * a->E));
  LINA_TRY(lina_parallel_for(chunks, 1, count_chunks, &work));
  for (int64_t e = 0; e < a->E; e++) {
    a->offset[e] = row;
    for (int64_t c = 0; c < chunks; c++) {
      int32_t *slot = work.count + c * a->E + e, count = *slot;
      *slot = row;
      row += count;
    }
  }
  a->offset[a->E] = row;
  if (row < work.pairs)
    memset(a->row_pair + row, 0xff, (size_t)(work.pairs - row) * sizeof(int32_t));
  LINA_TRY(lina_parallel_for(chunks, 1, place_chunks, &work));
done:
  free(work.count);
  return rc;
}

/* ---- operator ---- */

static int check(const lina_tensor *expert, int64_t E) {
  int rc = lina_check("sort", "expert", expert, 2, 1u << LINA_I32);
  if (rc != LINA_OK) return rc;
  const int64_t T = expert->size[0], K = expert->size[1];
  if (E < 1 || E > LINA_SORT_MAX_E)
    return lina_error(LINA_EINVAL, "sort: experts=%lld, limit 1..%d", (long long)E,
                      LINA_SORT_MAX_E);
  if (K < 1 || K > LINA_SORT_MAX_E)
    return lina_error(LINA_EINVAL, "sort: expert has K=%lld columns, limit 1..%d", (long long)K,
                      LINA_SORT_MAX_E);
  if (T > INT32_MAX / K)
    return lina_error(LINA_EINVAL, "sort: expert has T*K=%lld*%lld pairs, limit 2^31-1",
                      (long long)T, (long long)K);
  return LINA_OK;
}

static int run(lina_sort_args *a, const lina_tensor *expert, void *stream) {
  if (expert->device == LINA_ON_CPU) return lina_sort_cpu(a);
#if LINA_CUDA
  lina_tensor partial = {0};
  int64_t count = lina_sort_partial_count(a->T, a->K, a->E);
  int rc = LINA_OK;
  if (count > 0) {
    LINA_TRY(lina_empty(&partial, LINA_I32, expert, 1, &count));
    a->partial = partial.data;
  }
  LINA_TRY(lina_sort_cuda(a, stream));
done:
  lina_drop(&partial); /* the allocator reuses it on this stream only */
  return rc;
#else
  (void)stream;
  return lina_error(LINA_ENOTSUP, "sort: expert is not on the CPU, and this build has no CUDA");
#endif
}

void lina_sort_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts) {
  (void)nargs, (void)nouts;
  lina_tensor expert = {0}, offset = {0}, row_pair = {0}, pair_row = {0};
  lina_scope scope = {0};
  const int64_t E = lina_take_int(stack[1]);
  int rc;

  LINA_TRY(lina_take(stack[0], &expert));
  LINA_TRY(check(&expert, E));
  const int64_t T = expert.size[0], K = expert.size[1];
  LINA_TRY(lina_enter(&expert, &scope));
  LINA_TRY(lina_make_contiguous(&expert));
  LINA_TRY(lina_empty(&offset, LINA_I32, &expert, 1, (int64_t[]){E + 1}));
  LINA_TRY(lina_empty(&row_pair, LINA_I32, &expert, 1, (int64_t[]){T * K}));
  LINA_TRY(lina_empty(&pair_row, LINA_I32, &expert, 2, (int64_t[]){T, K}));
  lina_sort_args args = {
      .T = T,
      .K = K,
      .E = E,
      .expert = expert.data,
      .offset = offset.data,
      .row_pair = row_pair.data,
      .pair_row = pair_row.data,
  };
  LINA_TRY(run(&args, &expert, scope.stream));
  stack[0] = lina_give(&offset);
  stack[1] = lina_give(&row_pair);
  stack[2] = lina_give(&pair_row);
done:
  lina_drop(&pair_row);
  lina_drop(&row_pair);
  lina_drop(&offset);
  lina_drop(&expert);
  lina_leave(&scope);
  if (rc != LINA_OK) lina_throw(rc);
}
