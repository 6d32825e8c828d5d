/* Calls over mapped buffers that launch: limits, order of streams. Contract: peers.h. */
#include "peers.h"

#if LINA_CUDA
#include "peers_private.h"
#include "priority.h"

/* Behind the last call, if that was on another stream. */
static int in_order(lina_peers *p, cudaStream_t stream) {
  enum cudaStreamCaptureStatus capture, other = cudaStreamCaptureStatusNone;
  int rc = lina_peers_cuda(cudaStreamIsCapturing(stream, &capture), "stream");
  if (rc != LINA_OK || capture != cudaStreamCaptureStatusNone) return rc;
  if (p->used && p->last != (void *)stream) {
    LINA_TRY(lina_peers_cuda(cudaStreamIsCapturing((cudaStream_t)p->last, &other), "stream"));
    if (other == cudaStreamCaptureStatusNone) {
      LINA_TRY(lina_peers_cuda(cudaEventRecord(p->order, (cudaStream_t)p->last), "event"));
      LINA_TRY(lina_peers_cuda(cudaStreamWaitEvent(stream, p->order, 0), "event"));
    }
  }
  p->last = stream, p->used = true;
done:
  return rc;
}

/* Each limit keeps the products behind it inside 64 bits. */
static int check_sizes(const lina_peers *p, uint32_t tag, int64_t T, int64_t C, int64_t K,
                       int64_t E, int64_t row_bytes) {
  const int64_t ep = p->links.ep;
  if (tag >= LINA_PEERS_TAGS)
    return lina_error(LINA_EINVAL, "p2p: tag=%d, limit %d", (int)tag, LINA_PEERS_TAGS - 1);
  if (C < 1 || C > p->tokens || T < 0 || T > C)
    return lina_error(LINA_EINVAL, "p2p: T=%lld tokens of C=%lld, limit %lld", (long long)T,
                      (long long)C, (long long)p->tokens);
  if (K < 1 || K > 1024 || ep * C > INT32_MAX / K)
    return lina_error(LINA_EINVAL, "p2p: K=%lld, C=%lld; 1 <= K <= 1024, ep*C*K < 2^31 needed",
                      (long long)K, (long long)C);
  if (E < 1 || E > INT32_MAX || E % ep)
    return lina_error(LINA_EINVAL, "p2p: %lld experts on %d ranks", (long long)E, (int)ep);
  if (row_bytes < 1 || row_bytes > INT32_MAX)
    return lina_error(LINA_EINVAL, "p2p: rows of %lld bytes, limit 1..%d", (long long)row_bytes,
                      INT32_MAX);
  const int64_t back = lina_peers_weights_at(ep * C, row_bytes) + ep * C * K * 4;
  if (back + ep * C * K * 4 > p->out_bytes || back > p->back_bytes)
    return lina_error(LINA_EINVAL, "p2p: rows of %lld bytes, C=%lld, K=%lld do not fit the buffer",
                      (long long)row_bytes, (long long)C, (long long)K);
  return LINA_OK;
}

int lina_peers_begin(lina_peers *p, lina_peers_links *links, bool priority, void *stream,
                     int *before) {
  const uint32_t tag = links->tag;
  int rc = lina_peers_enter(p, before);
  if (rc != LINA_OK) return rc;
  LINA_TRY(lina_peers_check(p));
  if (priority && !p->links.priority) p->links.priority = lina_priority_word(p->device);
  *links = p->links;
  links->tag = tag;
  if (!priority) links->priority = NULL;
  LINA_TRY(in_order(p, stream));
done:
  if (rc != LINA_OK) lina_peers_leave(p, *before);
  return rc;
}

int lina_peers_dispatch(lina_peers *p, lina_peers_dispatch_args *a, bool priority, void *stream) {
  int before, rc = check_sizes(p, a->links.tag, a->T, a->C, a->K, a->E, a->row_bytes);
  if (rc == LINA_OK) rc = lina_peers_begin(p, &a->links, priority, stream, &before);
  if (rc == LINA_OK) rc = lina_peers_dispatch_cuda(a, stream), lina_peers_leave(p, before);
  return rc;
}

int lina_peers_collect(lina_peers *p, lina_peers_collect_args *a, bool priority, void *stream) {
  const int64_t size = a->dtype == LINA_F32 ? 4 : 2;
  if (a->D < 1 || a->D > INT32_MAX / size)
    return lina_error(LINA_EINVAL, "p2p: rows of D=%lld, limit 1..%lld", (long long)a->D,
                      (long long)(INT32_MAX / size));
  int before, rc = check_sizes(p, a->links.tag, a->T, a->C, a->K, a->E, a->D * size);
  if (rc == LINA_OK) rc = lina_peers_begin(p, &a->links, priority, stream, &before);
  if (rc == LINA_OK) rc = lina_peers_collect_cuda(a, stream), lina_peers_leave(p, before);
  return rc;
}

int lina_peers_stop(lina_peers *p, int failure, void *stream) {
  int before, rc = lina_peers_enter(p, &before);
  if (rc != LINA_OK) return rc;
  if (p->stopped || p->closed) goto done; /* not so after a wait that failed here: peers may wait */
  LINA_TRY(in_order(p, stream));
  LINA_TRY(lina_peers_poison_cuda(&p->links, failure, stream));
  p->stopped = failure;
done:
  lina_peers_leave(p, before);
  return rc;
}
#else
#define ABSENT lina_error(LINA_ENOTSUP, "p2p: lina was built without CUDA")

int lina_peers_dispatch(lina_peers *p, lina_peers_dispatch_args *a, bool priority, void *stream) {
  return (void)p, (void)a, (void)priority, (void)stream, ABSENT;
}
int lina_peers_collect(lina_peers *p, lina_peers_collect_args *a, bool priority, void *stream) {
  return (void)p, (void)a, (void)priority, (void)stream, ABSENT;
}
int lina_peers_stop(lina_peers *p, int failure, void *stream) {
  return (void)p, (void)failure, (void)stream, ABSENT;
}
#endif
