/* Mapped buffers of peers: lifetime, errors. Contract: peers.h. */
#include "peers.h"

#include <stddef.h>

#if LINA_CUDA
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "peers_private.h"

#define MAX_BYTES ((int64_t)1 << 46) /* more than any memory: sums do not overflow */

_Static_assert(sizeof(cudaIpcMemHandle_t) == LINA_PEERS_HANDLE, "an export is one CUDA IPC handle");

int lina_peers_cuda(cudaError_t rc, const char *what) {
  if (rc == cudaSuccess) return LINA_OK;
  (void)cudaGetLastError();              /* or a later launch would report it */
  return lina_error(rc == cudaErrorMemoryAllocation ? LINA_ENOMEM : LINA_ECUDA, "p2p: %s: %s", what,
                    cudaGetErrorString(rc));
}

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static int share_word(lina_peers *p, const lina_peers *with) {
  int rc = LINA_OK;
  p->shared = with ? with->shared : calloc(1, sizeof *p->shared);
  if (!p->shared) return lina_error(LINA_ENOMEM, "p2p: no memory");
  lina_peers_shared *s = p->shared;
  if (atomic_fetch_add(&s->users, 1) == 0) {
    LINA_TRY(lina_peers_cuda(cudaHostAlloc((void **)&s->host, sizeof *s->host, cudaHostAllocMapped),
                             "host word"));
    memset((void *)s->host, 0, sizeof *s->host);
    LINA_TRY(
        lina_peers_cuda(cudaHostGetDevicePointer((void **)&s->device, s->host, 0), "host word"));
  }
  p->links.word = s->device;
done:
  return rc;
}

static void leave_word(lina_peers_shared *s) {
  if (!s || atomic_fetch_sub(&s->users, 1) != 1) return;
  if (s->host) (void)cudaFreeHost((void *)s->host);
  free(s);
}

int lina_peers_make(lina_peers **out, int rank, int ep, int64_t out_bytes, int64_t back_bytes,
                    int64_t tokens, double timeout_s, int sms, bool beside,
                    const lina_peers *with) {
  lina_peers *p = NULL;
  int rc;
  *out = NULL;
  if (ep < 2 || ep > LINA_PEERS_MAX || rank < 0 || rank >= ep)
    LINA_FAIL(LINA_EINVAL, "p2p: rank %d of %d ranks, limit 2..%d", rank, ep, LINA_PEERS_MAX);
  if (tokens < 1 || tokens >= LINA_PEERS_MAX_C)
    LINA_FAIL(LINA_EINVAL, "p2p: tokens=%lld a rank, limit 1..%d", (long long)tokens,
              LINA_PEERS_MAX_C - 1);
  if (out_bytes < 0 || out_bytes > MAX_BYTES || back_bytes < 0 || back_bytes > MAX_BYTES)
    LINA_FAIL(LINA_EINVAL, "p2p: buffers of out_bytes=%lld and back_bytes=%lld, limit 0..2^46",
              (long long)out_bytes, (long long)back_bytes);
  if (!(timeout_s > 0 && timeout_s < 1e8))
    LINA_FAIL(LINA_EINVAL, "p2p: timeout_s=%g, must be above 0 and below 1e8", timeout_s);
  p = calloc(1, sizeof *p);
  if (!p) LINA_FAIL(LINA_ENOMEM, "p2p: no memory");
  pthread_mutex_init(&p->lock, NULL);
  LINA_TRY(lina_peers_cuda(cudaGetDevice(&p->device), "device"));
  int all = 0;
  LINA_TRY(lina_peers_cuda(cudaDeviceGetAttribute(&all, cudaDevAttrMultiProcessorCount, p->device),
                           "SMs"));
  if (sms < 0 || sms > all) LINA_FAIL(LINA_EINVAL, "p2p: sms=%d, the GPU has %d", sms, all);
  if (sms == 0) sms = all < 4 ? 1 : all / 4 * 3;
  p->out_bytes = round_up(out_bytes, 256);
  p->back_bytes = round_up(back_bytes, 256);
  p->tokens = tokens;
  p->timeout_s = timeout_s;
  /* whole pages of the driver's: an export then starts where the buffer does */
  const int64_t bytes = round_up(LINA_PEERS_FLAGS + p->out_bytes + p->back_bytes, 2 << 20);
  const int64_t tiles = (tokens + LINA_PEERS_TILE - 1) / LINA_PEERS_TILE;
  const size_t look = (size_t)tiles * LINA_PEERS_MAX * sizeof(uint64_t);
  LINA_TRY(lina_peers_cuda(cudaMalloc(&p->own, (size_t)bytes), "buffer"));
  LINA_TRY(lina_peers_cuda(cudaMemset(p->own, 0, LINA_PEERS_FLAGS), "buffer"));
  LINA_TRY(lina_peers_cuda(cudaMalloc((void **)&p->links.state, sizeof *p->links.state + look),
                           "counters"));
  LINA_TRY(
      lina_peers_cuda(cudaMemset(p->links.state, 0, sizeof *p->links.state + look), "counters"));
  LINA_TRY(share_word(p, with));
  LINA_TRY(lina_peers_cuda(cudaEventCreateWithFlags(&p->order, cudaEventDisableTiming), "event"));
  LINA_TRY(lina_peers_cuda(cudaIpcGetMemHandle(&p->handle, p->own), "export of the buffer"));
  /* zeros must be there before any peer can write its flag */
  LINA_TRY(lina_peers_cuda(cudaDeviceSynchronize(), "buffer"));
  p->links.sms = sms;
  p->links.free_sms = beside ? sms : all;
  p->links.ep = ep;
  p->links.rank = rank;
  p->links.timeout_ns = (uint64_t)(timeout_s * 1e9);
  p->links.out_at = LINA_PEERS_FLAGS;
  p->links.back_at = LINA_PEERS_FLAGS + p->out_bytes;
  p->links.look = (uint64_t *)(p->links.state + 1);
  p->links.buffer[rank] = p->own;
  *out = p;
  p = NULL;
  rc = LINA_OK;
done:
  lina_peers_free(p);
  return rc;
}

void lina_peers_export(const lina_peers *p, unsigned char *handle) {
  memcpy(handle, &p->handle, LINA_PEERS_HANDLE);
}

int64_t lina_peers_room(const lina_peers *p) { return p->out_bytes; }
void *lina_peers_rows(const lina_peers *p) { return (char *)p->own + p->links.out_at; }

int lina_peers_ranks(const lina_peers *p) { return p->links.ep; }

int lina_peers_enter(lina_peers *p, int *before) {
  int rc = lina_peers_cuda(cudaGetDevice(before), "device");
  if (rc != LINA_OK) return rc;
  pthread_mutex_lock(&p->lock);
  if (*before != p->device) rc = lina_peers_cuda(cudaSetDevice(p->device), "device");
  if (rc != LINA_OK) pthread_mutex_unlock(&p->lock);
  return rc;
}
void lina_peers_leave(lina_peers *p, int before) {
  if (before != p->device) (void)cudaSetDevice(before);
  pthread_mutex_unlock(&p->lock);
}

int lina_peers_open(lina_peers *p, const unsigned char *handles) {
  int before, rc = lina_peers_enter(p, &before);
  if (rc != LINA_OK) return rc;
  if (p->closed) rc = lina_peers_check(p);
  for (int d = 0; d < p->links.ep && rc == LINA_OK; d++) {
    if (d == p->links.rank || p->mapped[d]) continue;
    cudaIpcMemHandle_t handle;
    char what[64];
    memcpy(&handle, handles + (size_t)d * LINA_PEERS_HANDLE, sizeof handle);
    snprintf(what, sizeof what, "rank %d cannot map the memory of rank %d", p->links.rank, d);
    rc = lina_peers_cuda(
        cudaIpcOpenMemHandle(&p->mapped[d], handle, cudaIpcMemLazyEnablePeerAccess), what);
    p->links.buffer[d] = p->mapped[d];
  }
  lina_peers_leave(p, before);
  return rc;
}

static const char *reason(uint32_t failure) {
  switch (failure) {
    case LINA_PEERS_TIMEOUT: return "has stopped, or hangs";
    case LINA_PEERS_ABORTED: return "was given up by this rank";
    case LINA_PEERS_FAILED: return "failed";
    case LINA_PEERS_OVERFLOW:
      return "has more tokens than agreed; give the most of any rank, lina.mesh(..., tokens=N)";
    case LINA_PEERS_MISMATCH: return "runs another layer, shape or dtype than this rank";
  }
  return "failed in an unknown way";
}

int lina_peers_check(const lina_peers *p) {
  static const char *const awaited[] = {"tokens", "results", "gradients"};
  const lina_peers_word *w = p->shared->host;
  if (p->closed) return lina_error(LINA_EPEER, "p2p: the buffers were closed");
  if (w->failure != LINA_PEERS_FINE)
    return lina_error(
        LINA_EPEER,
        "p2p: rank %d of %d waited for the %s of rank %u (round %u, limit %g s), which %s",
        p->links.rank, p->links.ep, awaited[w->direction % 3], (unsigned)w->source,
        (unsigned)w->epoch, p->timeout_s, reason(w->failure));
  if (p->stopped == LINA_PEERS_OVERFLOW)
    return lina_error(LINA_EPEER, "p2p: this rank had more tokens than agreed and stopped");
  if (p->stopped) return lina_error(LINA_EPEER, "p2p: this rank failed and stopped");
  if (w->abort) return lina_error(LINA_EPEER, "p2p: this rank gave the exchange up");
  return LINA_OK;
}

bool lina_peers_lost(const lina_peers *p) {
  const lina_peers_word *w = p->shared->host;
  return w->failure == LINA_PEERS_TIMEOUT || w->failure == LINA_PEERS_ABORTED || w->abort;
}

void lina_peers_abort(lina_peers *p) { p->shared->host->abort = 1; }

void lina_peers_close(lina_peers *p) {
  int before;
  if (lina_peers_enter(p, &before) != LINA_OK) return;
  (void)cudaDeviceSynchronize();
  for (int d = 0; d < LINA_PEERS_MAX; d++) {
    if (p->mapped[d]) (void)cudaIpcCloseMemHandle(p->mapped[d]);
    p->mapped[d] = NULL;
  }
  (void)cudaGetLastError();
  p->closed = true;
  lina_peers_leave(p, before);
}

void lina_peers_free(lina_peers *p) {
  if (!p || (p->links.buffer[p->links.rank] && !p->closed)) return;
  int before;
  if (lina_peers_enter(p, &before) == LINA_OK) {
    if (p->order) (void)cudaEventDestroy(p->order);
    leave_word(p->shared);
    if (p->links.state) (void)cudaFree(p->links.state);
    if (p->own) (void)cudaFree(p->own);
    (void)cudaGetLastError();
    lina_peers_leave(p, before);
  }
  pthread_mutex_destroy(&p->lock);
  free(p);
}

#else

struct lina_peers { int unused; };

/* Only lina_peers_make is ever called: there is nothing to call the others with. */
#define ABSENT lina_error(LINA_ENOTSUP, "p2p: lina was built without CUDA")

int lina_peers_make(lina_peers **out, int rank, int ep, int64_t out_bytes, int64_t back_bytes,
                    int64_t tokens, double timeout_s, int sms, bool beside,
                    const lina_peers *with) {
  (void)rank, (void)ep, (void)out_bytes, (void)back_bytes, (void)tokens, (void)timeout_s;
  (void)sms, (void)beside, (void)with;
  *out = NULL;
  return ABSENT;
}
int lina_peers_open(lina_peers *p, const unsigned char *handles) {
  return (void)p, (void)handles, ABSENT;
}
int lina_peers_check(const lina_peers *p) { return (void)p, ABSENT; }
bool lina_peers_lost(const lina_peers *p) { return (void)p, false; }
int lina_peers_ranks(const lina_peers *p) { return (void)p, 0; }
void *lina_peers_rows(const lina_peers *p) { return (void)p, NULL; }
void lina_peers_export(const lina_peers *p, unsigned char *handle) { (void)p, (void)handle; }
void lina_peers_abort(lina_peers *p) { (void)p; }
void lina_peers_close(lina_peers *p) { (void)p; }
void lina_peers_free(lina_peers *p) { (void)p; }

#endif
