/* comm.h - a communicator between GPUs over NCCL, one process a GPU.
 *
 * Operations are asynchronous on the stream given and must be issued in one order
 * on all ranks of the communicator. Two communicators never wait for each other:
 * each has its own stream, and NCCL's kernels of both fit on a GPU at once.
 *
 * After each operation the stream counts it in pinned host memory. Where the count
 * stands still for `timeout_s` while operations are outstanding, or NCCL reports
 * an error, the watch thread aborts the communicator and releases every stream
 * that waits for a priority word; from then on every call returns LINA_EPEER with
 * the reason. What was in flight then holds unspecified values. The end of the process waits some
 * seconds for what is in flight, and aborts the rest.
 *
 * Captured in a CUDA graph, operations replay, uncounted: nothing here waits for a replay, so
 * what holds the graph keeps the communicator too. Over a network bytes count as sent once NCCL's
 * own threads have them; a rank that comes for them long after this one went may not get them.
 * Errors: LINA_EINVAL, LINA_ENCCL (NCCL's own text), LINA_EPEER, LINA_ECUDA.
 */
#ifndef LINA_COMM_COMM_H
#define LINA_COMM_COMM_H

#include <stdbool.h>
#include <stdint.h>

#include "../plan/policy.h"

#define LINA_COMM_ID_BYTES 128
#define LINA_COMM_MAX_NAME 32

typedef struct lina_comm lina_comm;

typedef struct {
  char name[LINA_COMM_MAX_NAME];     /* in errors */
  int rank, size, device;
  double timeout_s;
  int max_ctas;                      /* thread blocks of a kernel; 0: NCCL's choice */
} lina_comm_options;

/* A fresh id; one rank makes it and tells the others. */
int lina_comm_id(char id[LINA_COMM_ID_BYTES]);

/* Collective over `size` ranks; waits for all of them up to timeout_s. Where they do not come, a
 * thread is left waiting inside NCCL until that gives up, or the process ends. */
int lina_comm_create(lina_comm **out, const lina_comm_options *options,
                     const char id[LINA_COMM_ID_BYTES]);

/* Aborts what is in flight. Calls that other threads are in, or make later, return
 * LINA_EPEER; waits for the one that runs. */
void lina_comm_close(lina_comm *comm);

/* Drops it: what is in flight ends first, for other ranks wait for it, and the watch thread looks on
 * as before; then it is closed. At once where it failed or was closed, or a call is going on: one at
 * most may be, and none may follow. NULL is fine. */
void lina_comm_free(lina_comm *comm);

/* LINA_OK, or LINA_EPEER with the reason. */
int lina_comm_check(lina_comm *comm);

/* Bytes to and from each rank, one after the other in `send` and `receive`.
 * `how`: raise the device's priority word before it, lower it after it (priority.h),
 * so that no host delay lies between. */
typedef struct {
  const void *send;
  void *receive;
  const int64_t *send_bytes, *receive_bytes;      /* [size] */
} lina_all_to_all;
enum { LINA_A2A_RAISE = 1, LINA_A2A_LOWER = 2 };
int lina_comm_all_to_all(lina_comm *comm, const lina_all_to_all *a, int how, void *stream);

/* In place: the mean over ranks, or the sum. With a policy in micro-ops, each of
 * which first waits for the device's priority word; all in one call. */
typedef struct {
  void *data;
  int64_t count;
  int dtype;                         /* dtype.h: f32, f64, bf16, f16 */
  bool mean;
  const lina_policy *policy;         /* NULL: whole, at once */
} lina_all_reduce;
int lina_comm_all_reduce(lina_comm *comm, const lina_all_reduce *a, void *stream);

/* out = the mean, or the sum, over ranks of their part for this rank. With a policy
 * in micro-ops, as above: one of n bytes takes n bytes of every rank's part, which
 * are first packed into `scratch` (the policy's sizes are those of one part, so its
 * link must count `size` parts to a byte). Nothing is packed where one micro-op, or
 * no policy, takes it all: then `scratch` may be NULL. */
typedef struct {
  const void *parts;                 /* [size, count]: row r is for rank r */
  void *out;                         /* [count] */
  void *scratch;
  int64_t count, scratch_bytes;
  int dtype;
  bool mean;
  const lina_policy *policy;         /* NULL: whole, at once */
} lina_reduce_scatter;
int lina_comm_reduce_scatter(lina_comm *comm, const lina_reduce_scatter *a, void *stream);

#endif
