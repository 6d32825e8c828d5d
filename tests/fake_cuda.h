/* fake_cuda.h - streams and NCCL without a GPU, so that csrc/comm runs, and its
 * races can be found, on any machine. Built as libnccl.so.2.
 *
 * A stream is a thread with a queue. Several ranks live in one process, each with
 * a device number of its own; communicators meet across them in memory. Every
 * operation takes a random time: mostly none, seldom up to 50 ms.
 *
 * Device pointers to words of host memory are not the host's own, so that the two
 * cannot be mixed up. What must be serialised by the caller is no atomic here, so
 * that ThreadSanitizer sees a caller who does not.
 *
 * Watched throughout; a violation ends the program:
 *   - once a stream has waited for a word, that word is its device's gate. While it
 *     is raised at most one reduction that waited for it runs or starts, the one that
 *     had passed before;
 *   - nobody but the stream lowers the gate within fake_hold_s of its raise;
 *   - operations of a communicator match on all ranks, and run in order of issue.
 */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stdbool.h>
#include <stdint.h>

#define FAKE_DEVICES 8

typedef struct fake_stream fake_stream;

fake_stream *fake_stream_new(int device);
/* Whether all queued work ended within `seconds`. */
bool fake_stream_drain(fake_stream *s, double seconds);
void fake_stream_free(fake_stream *s);              /* drained before */
void fake_stream_capture(fake_stream *s, bool on);  /* what is said; work runs all the same */
int fake_stream_device(const fake_stream *s);
/* `run` on the stream's thread, after all that is queued. */
void fake_push(fake_stream *s, void (*run)(fake_stream *s, void *argument), void *argument);

/* What a stream has done; it is drained before this is asked. */
typedef struct {
  int64_t waited, at_once;         /* reductions behind a wait of their own, and without */
  int64_t raised;                  /* exchanges begun while the streams had the gate raised */
  int64_t writes;                  /* of words */
} fake_counts;
fake_counts fake_stream_counts(const fake_stream *s);

/* For fake_nccl_run.c: what begins or ends on the stream whose thread calls. */
void fake_reduction(fake_stream *s, bool begins);
void fake_exchange(fake_stream *s);

/* For fake_cuda.c. */
bool fake_stream_captures(const fake_stream *s);
void fake_push_write(fake_stream *s, _Atomic uint32_t *word, uint32_t value);
void fake_push_wait(fake_stream *s, _Atomic uint32_t *word, uint32_t value);

/* How long only the stream may lower a raised gate; 0: others may at any time. */
void fake_hold(double seconds);

/* The next call of the kind on this device fails. */
typedef enum {
  FAKE_NO_FAULT,
  FAKE_HOST_ALLOC,        /* cudaHostAlloc */
  FAKE_WRITE_VALUE,       /* cuStreamWriteValue32 */
  FAKE_FULL,              /* no failure: cuStreamWriteValue32 blocks until the stream is idle */
  FAKE_COPY,              /* cudaMemcpy2DAsync */
  FAKE_COLLECTIVE,        /* ncclAllReduce, ncclReduceScatter and ncclGroupEnd */
  FAKE_SLOW_ABORT,        /* ncclCommAbort takes a tenth of a second */
  FAKE_ASYNC,             /* ncclCommGetAsyncError gives an error, from now on */
  FAKE_STUCK              /* those do not return before an abort, from now on */
} fake_fault;
void fake_break(int device, fake_fault fault);
bool fake_breaks(int device, fake_fault fault);     /* takes it, unless it is to last */

/* The driver is up: at exit it unmaps all pinned memory, before or after other handlers. */
void fake_cuda_begin(void);
/* Allocations that are not freed. */
int fake_cuda_held(void);
/* The host's address of pinned memory. */
void *fake_host_pointer(void *on_device);

/* Communicators that NCCL has not freed yet. */
int fake_nccl_live(void);

double fake_now(void);
void fake_sleep(double seconds);
void fake_nap(void);                                /* a random time as above */
/* Says what is wrong and ends the program. */
void fake_broken(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

#endif
