/* Sums over mapped buffers: sizes, priority. Contract: peers_reduce.h. */
#include "peers_reduce.h"

#include <stddef.h>

#include "../error.h"

#if LINA_CUDA
#include <cuda_runtime_api.h>

#include "priority.h"

#define MAX_COUNT ((int64_t)1 << 46) /* more than any memory holds: sums do not overflow */
/* Elements of a turn: 0.2 to 0.4 ms, less than attention takes between two layers' all-to-alls. */
#define TURN_COUNT ((int64_t)32 << 20)
#define MAX_TURNS  8

static int check_shape(int ep, int blocks, int64_t tile_bytes, bool scatter) {
  if (blocks < 1 || blocks > LINA_REDUCE_BLOCKS)
    return lina_error(LINA_EINVAL, "p2p reduce: blocks=%d, limit 1..%d", blocks,
                      LINA_REDUCE_BLOCKS);
  if (tile_bytes < LINA_REDUCE_MIN_TILE || tile_bytes > LINA_REDUCE_MAX_TILE ||
      (tile_bytes & (tile_bytes - 1)))
    return lina_error(LINA_EINVAL, "p2p reduce: tile_bytes=%lld, must be a power of two, %d..%d",
                      (long long)tile_bytes, LINA_REDUCE_MIN_TILE, LINA_REDUCE_MAX_TILE);
  if (ep < 2 || ep > LINA_PEERS_MAX || (ep > 2 && !scatter))
    return lina_error(LINA_EINVAL, "p2p reduce: %d ranks, limit 2..%d; more than 2 must scatter",
                      ep, LINA_PEERS_MAX);
  return LINA_OK;
}

/* Flags and numbers are zero before any peer can write. */
static int zero(lina_peers *p) {
  cudaError_t e = cudaMemset(lina_peers_rows(p), 0, LINA_REDUCE_RINGS_AT);
  if (e == cudaSuccess) e = cudaDeviceSynchronize();
  if (e == cudaSuccess) return LINA_OK;
  (void)cudaGetLastError();
  return lina_error(LINA_ECUDA, "p2p reduce: flags: %s", cudaGetErrorString(e));
}

int lina_peers_reduce_make(lina_peers **out, int rank, int ep, int blocks, int64_t tile_bytes,
                           bool scatter, double timeout_s) {
  lina_peers *p = NULL;
  int device, rc;
  *out = NULL;
  LINA_TRY(check_shape(ep, blocks, tile_bytes, scatter));
  LINA_TRY(lina_peers_make(&p, rank, ep, lina_peers_reduce_bytes(ep, blocks, tile_bytes, scatter),
                           0, 1, timeout_s, blocks, false, NULL));
  LINA_TRY(zero(p));
  if (cudaGetDevice(&device) != cudaSuccess) LINA_FAIL(LINA_ECUDA, "p2p reduce: no device");
  (void)lina_priority_word(device);      /* makes it, which a capture could not */
  *out = p;
  p = NULL;
done:
  if (p) lina_peers_close(p);            /* nobody was told of it */
  lina_peers_free(p);
  return rc;
}

/* One more than all-to-alls are likely to come in between. */
static int turns_of(int64_t count) {
  const int64_t more = count / TURN_COUNT;
  return 2 + (int)(more < MAX_TURNS - 2 ? more : MAX_TURNS - 2);
}

int lina_peers_reduce(lina_peers *p, lina_peers_reduce_args *a, bool gently, void *stream) {
  const int ep = lina_peers_ranks(p);
  int before, device, rc = check_shape(ep, a->blocks, a->tile_bytes, a->scatter);
  if (rc != LINA_OK) return rc;
  if (lina_peers_reduce_bytes(ep, a->blocks, a->tile_bytes, a->scatter) > lina_peers_room(p))
    return lina_error(LINA_EINVAL, "p2p reduce: blocks=%d of %lld bytes, the buffer is for fewer",
                      a->blocks, (long long)a->tile_bytes);
  if (a->count < 0 || a->count > MAX_COUNT)
    return lina_error(LINA_EINVAL, "p2p reduce: count=%lld, must be 0 to 2^46",
                      (long long)a->count);
  rc = lina_peers_begin(p, &a->links, false, stream, &before);
  if (rc != LINA_OK) return rc;
  gently = gently && a->count > 0;
  if (gently && cudaGetDevice(&device) != cudaSuccess)
    LINA_FAIL(LINA_ECUDA, "p2p reduce: no device");
  a->priority = gently ? lina_priority_word(device) : NULL;
  a->hold_ns = (uint64_t)(LINA_PRIORITY_HOLD_S * 1e9);
  a->turn = 0;
  for (const int turns = a->priority ? turns_of(a->count) : 1; a->turn < turns; a->turn++) {
    if (gently) LINA_TRY(lina_priority_wait(device, stream));
    a->leaves = a->turn + 1 < turns;
    LINA_TRY(lina_peers_reduce_cuda(a, stream));
  }
done:
  lina_peers_leave(p, before);
  /* half of it done: no later call may go on from there */
  if (rc != LINA_OK && a->turn > 0) (void)lina_peers_stop(p, LINA_PEERS_FAILED, stream);
  return rc;
}
#else
static int none(void) {
  return lina_error(LINA_ENOTSUP, "p2p reduce: lina was built without CUDA");
}
int lina_peers_reduce_make(lina_peers **out, int rank, int ep, int blocks, int64_t tile_bytes,
                           bool scatter, double timeout_s) {
  (void)rank, (void)ep, (void)blocks, (void)tile_bytes, (void)scatter, (void)timeout_s;
  *out = NULL;
  return none();
}
int lina_peers_reduce(lina_peers *p, lina_peers_reduce_args *a, bool gently, void *stream) {
  return (void)p, (void)a, (void)gently, (void)stream, none();
}
#endif
