/* comm_run.c - a communicator's operations. Contract: comm.h. */
#include "comm.h"

#include "../error.h"

#if LINA_CUDA
#include <cuda_runtime_api.h>

#include "../dtype.h"
#include "comm_private.h"
#include "priority.h"

#define MAX_BYTES ((int64_t)1 << 48) /* more than any memory: sums do not overflow */

static int exchange(lina_comm *c, lina_nccl_comm nccl, const lina_all_to_all *a, void *stream) {
  const char *from = a->send;
  char *to = a->receive;
  int code = lina_nccl.ncclGroupStart();
  for (int r = 0; r < c->options.size && code == LINA_NCCL_SUCCESS; r++) {
    if (a->send_bytes[r] > 0)
      code = lina_nccl.ncclSend(from, (size_t)a->send_bytes[r], LINA_NCCL_UINT8, r, nccl, stream);
    if (a->receive_bytes[r] > 0 && code == LINA_NCCL_SUCCESS)
      code = lina_nccl.ncclRecv(to, (size_t)a->receive_bytes[r], LINA_NCCL_UINT8, r, nccl, stream);
    from += a->send_bytes[r], to += a->receive_bytes[r];
  }
  lina_comm_may_wait(c);
  int ended = lina_nccl.ncclGroupEnd();
  return code == LINA_NCCL_SUCCESS ? ended : code;
}

int lina_comm_all_to_all(lina_comm *c, const lina_all_to_all *a, int how, void *stream) {
  lina_nccl_comm nccl = NULL;
  int64_t sent = 0, received = 0;
  for (int r = 0; r < c->options.size; r++) {
    const int64_t out = a->send_bytes[r], in = a->receive_bytes[r];
    if (out < 0 || in < 0 || out > MAX_BYTES - sent || in > MAX_BYTES - received)
      return lina_error(LINA_EINVAL,
                        "%s: %lld bytes to and %lld from rank %d, must be at least 0, all ranks' "
                        "at most 2^48",
                        c->options.name, (long long)out, (long long)in, r);
    sent += out, received += in;
  }
  int rc = lina_comm_begin(c);
  if (rc != LINA_OK) return rc;
  if (how & LINA_A2A_RAISE) LINA_TRY(lina_priority_raise(c->options.device, stream));
  LINA_TRY(lina_comm_take(c, &nccl));
  LINA_TRY(lina_comm_took(c, exchange(c, nccl, a, stream), stream));
  if (how & LINA_A2A_LOWER) LINA_TRY(lina_priority_lower(c->options.device, stream));
done:
  /* The stream may raise it only now, long after the failure released it. */
  if (rc != LINA_OK && how) (void)lina_priority_lower(c->options.device, stream);
  lina_comm_end(c);
  return rc;
}

typedef struct { int nccl, bytes; } element;

static int find_element(const char *name, const char *what, int dtype, element *out) {
  switch (dtype) {
    case LINA_F32: return *out = (element){LINA_NCCL_F32, 4}, LINA_OK;
    case LINA_F64: return *out = (element){LINA_NCCL_F64, 8}, LINA_OK;
    case LINA_F16: return *out = (element){LINA_NCCL_F16, 2}, LINA_OK;
    case LINA_BF16: return *out = (element){LINA_NCCL_BF16, 2}, LINA_OK;
  }
  return lina_error(LINA_ENOTSUP, "%s: %s of dtype %d", name, what, dtype);
}

static int check_count(const lina_comm *c, const char *what, int64_t count, int64_t bytes_each) {
  if (count >= 0 && count <= MAX_BYTES / bytes_each) return LINA_OK;
  return lina_error(LINA_EINVAL, "%s: %s of %lld elements, must be 0 to 2^48 bytes",
                    c->options.name, what, (long long)count);
}

/* Bytes of the micro-op that `left` bytes of a part begin with. */
static int64_t cut(const lina_policy *policy, int64_t left, int element_bytes) {
  int64_t bytes = policy ? lina_policy_cut(policy, left) : left;
  return bytes % element_bytes ? left : bytes;       /* a policy in units of no element */
}

int lina_comm_all_reduce(lina_comm *c, const lina_all_reduce *a, void *stream) {
  lina_nccl_comm nccl = NULL;
  element e = {0};
  char *at = a->data;
  int64_t left;
  int rc = find_element(c->options.name, "all-reduce", a->dtype, &e);
  if (rc == LINA_OK) rc = check_count(c, "all-reduce", a->count, e.bytes);
  if (rc == LINA_OK) rc = lina_comm_begin(c);
  if (rc != LINA_OK) return rc;
  left = a->count * e.bytes;
  while (left > 0) {
    int64_t bytes = cut(a->policy, left, e.bytes);
    if (a->policy) LINA_TRY(lina_priority_wait(c->options.device, stream));
    LINA_TRY(lina_comm_take(c, &nccl));
    lina_comm_may_wait(c);
    LINA_TRY(lina_comm_took(
        c,
        lina_nccl.ncclAllReduce(at, at, (size_t)(bytes / e.bytes), e.nccl,
                                a->mean ? LINA_NCCL_AVG : LINA_NCCL_SUM, nccl, stream),
        stream));
    at += bytes, left -= bytes;
  }
done:
  lina_comm_end(c);
  return rc;
}

/* Most bytes that a micro-op takes of a part of `total`. */
static int64_t widest(const lina_policy *policy, int64_t total, int element_bytes) {
  int64_t most = 0;
  for (int64_t left = total; left > 0;) {
    int64_t bytes = cut(policy, left, element_bytes);
    if (bytes > most) most = bytes;
    left -= bytes;
  }
  return most;
}

/* Columns at .. at + bytes of all parts, one after the other. */
static int pack(const lina_comm *c, const lina_reduce_scatter *a, int64_t at, int64_t bytes,
                int64_t total, void *stream) {
  char *to = a->scratch;
  const char *from = (const char *)a->parts + at;
  const cudaStream_t on = (cudaStream_t)stream;
  cudaError_t code = cudaSuccess;
  if (total <= INT32_MAX) { /* the largest pitch */
    code = cudaMemcpy2DAsync(to, (size_t)bytes, from, (size_t)total, (size_t)bytes,
                             (size_t)c->options.size, cudaMemcpyDeviceToDevice, on);
  } else {
    for (int r = 0; r < c->options.size && code == cudaSuccess; r++, to += bytes, from += total)
      code = cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToDevice, on);
  }
  if (code == cudaSuccess) return LINA_OK;
  return lina_error(LINA_ECUDA, "%s: reduce-scatter: packing: %s", c->options.name,
                    cudaGetErrorString(code));
}

int lina_comm_reduce_scatter(lina_comm *c, const lina_reduce_scatter *a, void *stream) {
  lina_nccl_comm nccl = NULL;
  element e = {0};
  int rc = find_element(c->options.name, "reduce-scatter", a->dtype, &e);
  if (rc == LINA_OK)
    rc = check_count(c, "reduce-scatter", a->count, (int64_t)e.bytes * c->options.size);
  if (rc != LINA_OK) return rc;
  int64_t total = a->count * e.bytes;
  int64_t needed = widest(a->policy, total, e.bytes);
  needed = needed < total ? needed * c->options.size : 0;
  if (needed > 0 && (!a->scratch || a->scratch_bytes < needed))
    return lina_error(LINA_EINVAL, "%s: reduce-scatter: scratch of %lld bytes, must have %lld",
                      c->options.name, (long long)a->scratch_bytes, (long long)needed);
  rc = lina_comm_begin(c);
  if (rc != LINA_OK) return rc;
  for (int64_t at = 0, bytes; at < total; at += bytes) {
    const void *from = needed > 0 ? a->scratch : a->parts;
    bytes = cut(a->policy, total - at, e.bytes);
    if (needed > 0) LINA_TRY(pack(c, a, at, bytes, total, stream));
    if (a->policy) LINA_TRY(lina_priority_wait(c->options.device, stream));
    LINA_TRY(lina_comm_take(c, &nccl));
    lina_comm_may_wait(c);
    LINA_TRY(lina_comm_took(
        c,
        lina_nccl.ncclReduceScatter(from, (char *)a->out + at, (size_t)(bytes / e.bytes), e.nccl,
                                    a->mean ? LINA_NCCL_AVG : LINA_NCCL_SUM, nccl, stream),
        stream));
  }
done:
  lina_comm_end(c);
  return rc;
}
#else
static int none(void) { return lina_error(LINA_ENOTSUP, "comm: lina is built without CUDA"); }
int lina_comm_all_to_all(lina_comm *c, const lina_all_to_all *a, int how, void *stream) {
  return (void)c, (void)a, (void)how, (void)stream, none();
}
int lina_comm_all_reduce(lina_comm *c, const lina_all_reduce *a, void *stream) {
  return (void)c, (void)a, (void)stream, none();
}
int lina_comm_reduce_scatter(lina_comm *c, const lina_reduce_scatter *a, void *stream) {
  return (void)c, (void)a, (void)stream, none();
}
#endif
