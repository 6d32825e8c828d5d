/* peers.cuh - what the peers' kernels share: flags, waiting, copies of rows. */
#ifndef LINA_CUDA_PEERS_CUH
#define LINA_CUDA_PEERS_CUH

#include "common.cuh"
#include "peers.h"

#define PEERS_THREADS 512
#define PEERS_WARPS   (PEERS_THREADS / 32)
#define PEERS_DEPTH   4 /* vectors of one lane in flight: a warp's piece of a row */
#define PEERS_POISON  255u
#define PEERS_LOST    0xffffffffu
/* Bytes sent from which a half is three kernels: below, their launches cost more than they gain. */
#define PEERS_SPLIT_LEAST (32 << 20)

static __device__ __forceinline__ uint64_t peers_time_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
static __device__ __forceinline__ uint64_t peers_acquire(const uint64_t *p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
static __device__ __forceinline__ void peers_relaxed(uint64_t *p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
/* Release and acquire for all ranks; cheaper than __threadfence_system. */
static __device__ __forceinline__ void peers_fence() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}
static __device__ __forceinline__ uint64_t *peers_flag(char *buffer, int direction, int source) {
  const int flag = direction * LINA_PEERS_CHUNKS * LINA_PEERS_MAX + source; /* of chunk 0 */
  return (uint64_t *)(buffer + flag * LINA_PEERS_FLAG);
}
static __device__ __forceinline__ uint64_t peers_signal(uint32_t epoch, uint32_t tag,
                                                        uint32_t count) {
  return (uint64_t)epoch << 32 | tag << 24 | count;
}

static __device__ __forceinline__ uint32_t peers_read_failed(const lina_peers_state *state) {
  return *(const volatile uint32_t *)&state->failed;
}
/* For a whole warp, whose lanes have read `failed`: rows of a rank that failed do not leave, for
 * they might meet experts that still read those of the round before. */
static __device__ __forceinline__ bool peers_stays(uint32_t failed) {
  return __any_sync(LINA_FULL, failed != 0);
}

/* The first failure of this rank: told to the host once, then to all later waits. */
static __device__ inline void peers_fail(const lina_peers_links &links, uint32_t why, int direction,
                                         int source, uint32_t epoch) {
  if (atomicCAS(&links.state->failed, 0u, why) != 0 || links.word->failure) return;
  links.word->direction = (uint32_t)direction;
  links.word->source = (uint32_t)source;
  links.word->epoch = epoch;
  __threadfence_system();
  links.word->failure = why;
  __threadfence_system();
}

/* Whether the host, or another that shares its word, has given up. A GPU reads host memory once a
 * microsecond, all blocks taken together: they look in turns, and tell each other by `failed`. */
static __device__ __forceinline__ bool peers_stopped(const lina_peers_links &links, unsigned look) {
  return look % gridDim.x == blockIdx.x && (links.word->abort || links.word->failure);
}

/* Rows that `source` announces in this epoch, or PEERS_LOST. */
static __device__ inline uint32_t peers_wait(const lina_peers_links &links, int direction,
                                             int source, uint32_t epoch) {
  const uint64_t *flag = peers_flag(links.buffer[links.rank], direction, source);
  if (peers_read_failed(links.state)) return PEERS_LOST;
  uint64_t start = 0;
  uint32_t why;
  for (unsigned polls = 1;; polls++) {
    const uint64_t f = peers_acquire(flag);
    const uint32_t at = (uint32_t)(f >> 32);
    if ((int32_t)(at - epoch) >= 0) { /* ahead only if poisoned: a rank that stops says so twice */
      const uint32_t tag = (uint32_t)f >> 24, count = (uint32_t)f & 0xffffffu;
      if (tag == links.tag && at == epoch) return count;
      why = tag == PEERS_POISON ? count : (uint32_t)LINA_PEERS_MISMATCH;
      break;
    }
    if (polls % 256) continue;
    if (peers_read_failed(links.state)) return PEERS_LOST;
    const uint64_t now = peers_time_ns();
    if (start == 0) start = now;
    if (now - start > links.timeout_ns) {
      why = LINA_PEERS_TIMEOUT;
      break;
    }
    if (peers_stopped(links, polls / 256)) {
      why = LINA_PEERS_ABORTED;
      break;
    }
    __nanosleep(64);
  }
  peers_fail(links, why, direction, source, epoch);
  return PEERS_LOST;
}

/* Every block calls it behind its last store to a peer. True in the block that is
 * last to do so, on thread 0: all rows of the grid are then visible everywhere. */
static __device__ __forceinline__ bool peers_all_sent(lina_peers_state *state) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  peers_fence();
  if (atomicAdd(&state->sent, 1u) != gridDim.x - 1) return false;
  state->sent = 0;
  peers_fence();
  return true;
}

/* Flags to all ranks but this one (its own too if `own`); poison after a failure. */
static __device__ inline void peers_announce(const lina_peers_links &links, int direction,
                                             uint32_t epoch, const int32_t *count, bool own) {
  const bool failed = peers_read_failed(links.state) != 0;
  for (int i = own ? 0 : 1; i < links.ep; i++) {
    const int d = links.rank + i < links.ep ? links.rank + i : links.rank + i - links.ep;
    const uint64_t f = failed ? peers_signal(epoch, PEERS_POISON, LINA_PEERS_FAILED)
                              : peers_signal(epoch, links.tag, count ? (uint32_t)count[d] : 0);
    peers_relaxed(peers_flag(links.buffer[d], direction, links.rank), f);
  }
}

/* The number of a round's half. Warp 0 of every block reads it (other warps have no use
 * for it), later says that it has; at the end the block that said so last advances it. */
static __device__ __forceinline__ uint32_t peers_read(const lina_peers_state *state,
                                                      int direction) {
  uint32_t epoch = 0;
  if (threadIdx.x < 32)
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                 : "=r"(epoch)
                 : "l"(&state->epoch[direction])
                 : "memory");
  return epoch;
}
struct peers_turn { uint32_t epoch, order; };
static __device__ __forceinline__ peers_turn peers_begin(lina_peers_state *state, uint32_t read) {
  peers_turn turn = {__shfl_sync(LINA_FULL, read, 0) + 1, 0}; /* the read is over here */
  if (threadIdx.x == 0) turn.order = atomicAdd(&state->begun, 1u);
  return turn;
}
static __device__ __forceinline__ void peers_end(lina_peers_state *state, int direction,
                                                 peers_turn turn) {
  if (threadIdx.x != 0 || turn.order != gridDim.x - 1) return;
  state->begun = 0;
  state->epoch[direction] = turn.epoch;
}

/* In place of peers_end where another kernel of the same half follows. */
static __device__ __forceinline__ void peers_again(lina_peers_state *state, peers_turn turn) {
  if (threadIdx.x == 0 && turn.order == gridDim.x - 1) state->begun = 0;
}

/* Gradients give way from here: another odd number in each round (comm/priority.h). */
static __device__ __forceinline__ void peers_raise(const lina_peers_links &links, uint32_t read) {
  if (links.priority && blockIdx.x == 0 && threadIdx.x == 0)
    *(volatile uint32_t *)links.priority = 2 * read + 1;
}
static __device__ __forceinline__ void peers_lower(const lina_peers_links &links) {
  if (links.priority) *(volatile uint32_t *)links.priority = 0;
}

/* A piece of a row: lane l holds vectors first + l + 32 i, below `vectors`. */
template <class V> struct peers_piece {
  V v[PEERS_DEPTH];
  __device__ __forceinline__ void load(const void *row, int64_t first, int64_t vectors) {
#pragma unroll
    for (int i = 0; i < PEERS_DEPTH; i++)
      if (first + 32 * i < vectors) v[i] = ((const V *)row)[first + 32 * i];
  }
  __device__ __forceinline__ void store(void *row, int64_t first, int64_t vectors) const {
#pragma unroll
    for (int i = 0; i < PEERS_DEPTH; i++)
      if (first + 32 * i < vectors) ((V *)row)[first + 32 * i] = v[i];
  }
};

/* What a kernel does of its half of a round: all, or one thing. Only PEERS_WAIT waits. */
enum peers_part { PEERS_SEND = 1, PEERS_WAIT = 2, PEERS_TAKE = 4, PEERS_WHOLE = 7 };

/* ---- host ---- */

static inline int64_t peers_pieces(int64_t vectors) {
  return lina_ceil_div(vectors, 32 * PEERS_DEPTH);
}
/* Kernels count pieces in 32 bits. */
static inline int peers_check_pieces(const char *op, int64_t ep, int64_t C, int64_t pieces) {
  if (ep * C * pieces < INT32_MAX) return LINA_OK;
  return lina_error(LINA_EINVAL, "%s: %lld tokens of %lld pieces on %lld ranks are too many", op,
                    (long long)C, (long long)pieces, (long long)ep);
}

/* Small work is spread thin over the SMs: each has its own way to the links. */
static inline unsigned peers_blocks(int sms, int64_t pieces) {
  const int64_t blocks = lina_ceil_div(pieces, 4);
  return (unsigned)(blocks < 1 ? 1 : blocks < sms ? blocks : sms);
}

/* Half of a round: `run(blocks, part)` launches its kernel. Which way is this rank's own choice:
 * the flags are the same. */
template <class Run>
static inline int peers_launch(const char *op, const lina_peers_links *links, int64_t pieces,
                               int64_t bytes, const Run &run) {
  const unsigned waiting = peers_blocks(links->sms, pieces);
  if (bytes < PEERS_SPLIT_LEAST) {
    run(waiting, PEERS_WHOLE);
    return lina_launched(op);
  }
  const unsigned all = peers_blocks(links->free_sms, pieces);
  run(all, PEERS_SEND);
  int rc = lina_launched(op);
  if (rc != LINA_OK) return rc;
  run(1, PEERS_WAIT);
  if ((rc = lina_launched(op)) != LINA_OK) return rc;
  run(all, PEERS_TAKE);
  return lina_launched(op);
}

#endif
