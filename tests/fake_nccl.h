/* fake_nccl.h - NCCL over the streams of fake_cuda.h: all ranks in one process.
 *
 * A communicator's plain fields are the caller's to serialise, as NCCL's are; those
 * behind `group->lock` are the streams'. */
#ifndef FAKE_NCCL_H
#define FAKE_NCCL_H

#include <pthread.h>

#include "fake_cuda.h"
#include "nccl_abi.h"

#define MAX_RANKS FAKE_DEVICES

typedef enum { ALL_REDUCE, REDUCE_SCATTER, EXCHANGE } op_kind;

typedef struct {
  int source, target, remaining;  /* 0: delivered */
  const void *from;
  void *to;
  size_t bytes;
  int64_t number;                 /* of its kind between the two */
} parcel;

typedef struct operation {
  lina_nccl_comm comm;
  op_kind kind;
  const void *from;
  void *to;
  size_t count;
  int dtype, op;
  int64_t issue, number;          /* of all operations; of the collectives */
  parcel parcels[2 * MAX_RANKS];  /* of an exchange */
  int parcel_count;
  bool done;
  struct operation *next;         /* posted, not done */
} operation;

typedef struct group {
  lina_nccl_id id;
  int size, joined, members;      /* members: not freed yet */
  pthread_mutex_t lock;
  pthread_cond_t changed;
  operation *posted;
  struct group *next;
} group;

struct lina_nccl_handle {
  group *group;
  int rank, size, device;
  /* The caller's. */
  int64_t asked, collectives, sent[MAX_RANKS], received[MAX_RANKS];
  operation *open;                /* of ncclGroupStart */
  lina_nccl_stream open_stream;
  /* Behind group->lock. */
  bool aborted, grouping;         /* grouping: between its first part and ncclGroupEnd */
  int inside;                     /* calls */
  int64_t issued, run, ended;
};

/* Takes an operation, on the thread of its stream. */
void fake_nccl_run(fake_stream *s, void *operation);
/* Of a dtype that is reduced here. */
size_t fake_element_bytes(int dtype);

#endif
