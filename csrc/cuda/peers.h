/* peers.h - tokens to the ranks of their experts and back by stores into the
 * peers' memory, inside one NVLink domain. Contract of the kernels.
 *
 * ep ranks, one process and one GPU each. Every rank has one buffer that all
 * peers have mapped; C tokens is the most that any rank may have. A buffer is
 *   flags   [2 directions][LINA_PEERS_CHUNKS][LINA_PEERS_MAX sources], 128 bytes apart
 *   out     rows [ep,C,D], weights [ep,C,K] f32, ids [ep,C,K] i32: by source rank
 *   back    rows [ep,C,D], weight gradients [ep,C,K] f32: by expert rank
 * Out and back lie at fixed places; inside them the layout follows C, D and K.
 *
 * One round is a dispatch on every rank, then a collect on every rank:
 *   dispatch  token t goes once to each rank that holds one of its experts, to
 *             the row slot[t,rank] of this rank's part there; slots count tokens in
 *             order. Then a flag: epoch, tag and number of rows. Waits for
 *             the flags of all ranks.
 *   collect   row r of part s of y goes to row r of this rank's part in rank s's
 *             `back`; flag; waits for all; out[t] = sum over ranks, in order, of the
 *             rows at slot[t,rank], in float32, rounded once. With pair_row a row of y
 *             is first summed over its experts, as ops/combine.h defines it.
 * Backward is the same round: dout rows out by the saved slots, dx rows back,
 * with the gradients of the K weights, each taken from its expert's rank.
 *
 * Why buffers can be used again without further handshakes: dispatch n + 1 of
 * rank s writes to d's `out` after s saw d's flag of collect n, which d sent
 * after all its readers of `out` n. Collect n + 1 of d writes to s's `back`
 * after d saw s's flag of dispatch n + 1, which s sent after its sum n. Both hold
 * on one stream a rank whatever the round is for: forward without
 * gradients, backward, several layers, other shapes. They need that ranks agree
 * on the order of rounds; the tag tells when they do not.
 *
 * Epochs live in device memory and are advanced by the last block of a kernel to
 * have read them, so a captured graph replays. Flags are stored after a system-wide fence by the
 * last block to have sent its rows, and read with acquire. A round uses one for each direction
 * and source, chunk 0's; the other chunks are room for flags of ranges of a source's rows, by
 * which experts could begin before all have arrived.
 *
 * Blocks first send, then wait: the grid takes at most `sms` SMs, one block to
 * each (3/4 of the GPU's by default), so that spinning never keeps another kernel from
 * the GPU. From 32 MB of rows of its own tokens on, a rank runs either half of a round as three
 * kernels: all SMs of the GPU send, one block waits, all SMs take in. The flags are the same, so
 * each rank chooses for itself.
 * A wait ends after timeout_ns by the global timer, when the host aborts, when another that
 * shares `word` has failed, or when the flag says that its sender failed; then `word` tells the
 * host what was waited for, ids become -1, results NaN, and every later wait fails at once.
 *
 * With `priority` dispatch raises that word as it starts, and collect lowers it when all
 * rows have left and arrived, before the sums: gradients give way in between, the
 * experts included, since rows back follow at once.
 *
 * The experts take a round's rows after all of them have arrived. A layer in several passes
 * has a buffer for each, and its rounds follow each other in one order on all ranks
 * (lina/parallel/tokens/round.py).
 *
 * Limits: 2 <= ep <= 8, 1 <= C < 2^24, ep*C*K < 2^31, 1 <= K <= 1024,
 * T <= C, E a multiple of ep.
 * Stream: asynchronous on `stream`, no host read.
 * Errors: LINA_ECUDA (launch), LINA_ENOTSUP (dtype).
 */
#ifndef LINA_CUDA_PEERS_H
#define LINA_CUDA_PEERS_H

#include <stdint.h>

#include "../dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LINA_PEERS_MAX    8
#define LINA_PEERS_CHUNKS 16
#define LINA_PEERS_FLAG   128 /* bytes from flag to flag */
#define LINA_PEERS_TILE   512 /* tokens whose slots one block counts */
#define LINA_PEERS_MAX_C  (1 << 24)
#define LINA_PEERS_FLAGS  (2 * LINA_PEERS_CHUNKS * LINA_PEERS_MAX * LINA_PEERS_FLAG)

enum lina_peers_direction { LINA_PEERS_OUT, LINA_PEERS_BACK };

/* Why a wait ended; also what a poisoned flag carries in its count. */
enum lina_peers_failure {
  LINA_PEERS_FINE,
  LINA_PEERS_TIMEOUT,    /* the flag never came */
  LINA_PEERS_ABORTED,    /* the host gave up */
  LINA_PEERS_FAILED,     /* the sender could not go on */
  LINA_PEERS_OVERFLOW,   /* the sender has more than C tokens */
  LINA_PEERS_MISMATCH    /* the sender runs another layer */
};

/* Pinned host memory, written by the first wait that fails; several buffers may share one. */
typedef struct {
  volatile uint32_t failure, direction, source, epoch;
  volatile uint32_t abort;               /* written by the host */
} lina_peers_word;

/* Device memory of one rank. */
typedef struct {
  uint32_t epoch[2];                     /* rounds finished, by direction */
  uint32_t sent, begun;                  /* blocks past sending; past reading the epoch */
  uint32_t failed;                       /* lina_peers_failure */
  uint32_t spare[27];
} lina_peers_state;

typedef struct {
  int ep, rank;
  int sms, free_sms;                     /* SMs for blocks that wait; that do not */
  uint32_t tag;                          /* 0..254: which layer's shapes, agreed */
  uint64_t timeout_ns;
  char *buffer[LINA_PEERS_MAX];          /* as mapped here; [rank] is this rank's own */
  int64_t out_at, back_at;               /* bytes from the buffer's start */
  lina_peers_state *state;
  uint64_t *look;                        /* [tiles,8]: counts that blocks tell each other */
  lina_peers_word *word;
  uint32_t *priority;                    /* comm/priority.h's word, or NULL: not raised */
} lina_peers_links;

typedef struct {
  lina_peers_links links;
  int64_t T, C, K, E;
  int64_t row_bytes;                     /* of x: D elements, no gaps */
  const void *x;                         /* [T,D] */
  const int32_t *expert;                 /* [T,K] global ids */
  const float *weight;                   /* [T,K] */
  int32_t *slot;                         /* [T,ep], -1: not sent */
  int32_t *count;                        /* [2,ep]: rows sent to and received from each rank */
  void *x_out;                           /* [ep,C,D] or NULL: leave rows in the buffer */
  float *weight_out;                     /* [ep,C,K]; rows past a part's count unset */
  /* [ep,C,K] ids in [0,E/ep), -1 elsewhere. NULL: rows alone, by the slots and counts of
   * an earlier round. */
  int32_t *expert_out;
} lina_peers_dispatch_args;

typedef struct {
  lina_peers_links links;
  int64_t T, C, K, E, D;
  int dtype;
  const void *y;                         /* [ep,C,D]; with pair_row [N,D], rows by expert */
  const int32_t *pair_row;               /* [ep,C,K] of lina::sort, or NULL */
  const float *weight;                   /* [ep,C,K] with pair_row */
  const float *dweight;                  /* [ep,C,K] or NULL */
  const int32_t *slot, *count;
  const int32_t *expert;                 /* [T,K]; needed with dweight */
  void *out;                             /* [T,D] */
  float *dweight_out;                    /* [T,K] or NULL */
} lina_peers_collect_args;

/* Bytes from a part's first row to its weights; ids, if any, lie behind those. */
#ifdef __CUDACC__
#define LINA_BOTH __host__ __device__
#else
#define LINA_BOTH
#endif
LINA_BOTH static inline int64_t lina_peers_weights_at(int64_t rows, int64_t row_bytes) {
  return (rows * row_bytes + 15) / 16 * 16;
}

int lina_peers_dispatch_cuda(const lina_peers_dispatch_args *a, void *stream);
int lina_peers_collect_cuda(const lina_peers_collect_args *a, void *stream);
/* Tells all peers that this rank cannot go on, and makes its own later waits fail. */
int lina_peers_poison_cuda(const lina_peers_links *links, int failure, void *stream);

#ifdef __cplusplus
}
#endif
#endif
