/* peers_reduce.cuh - the parts of peers_reduce.cu that move no data: where things lie, flags,
 * waiting, giving way. */
#ifndef LINA_CUDA_PEERS_REDUCE_CUH
#define LINA_CUDA_PEERS_REDUCE_CUH

#include "peers.cuh"
#include "peers_reduce.h"

#define DEPTH  LINA_REDUCE_DEPTH
#define SLOTS  LINA_REDUCE_SLOTS
#define POISON (~(uint64_t)0)
#define DONE   (~0u) /* as the step a block left at: it has nothing left to do */

typedef lina_peers_reduce_args Args;

/* In vectors of 16 bytes; the last may be cut short. */
typedef struct {
  int64_t vectors;
  int64_t whole; /* those that one load may take; 0: data is not aligned */
  unsigned tiles;
  int part, slot; /* log2 of a part's and a ring slot's vectors */
  uint32_t tag; /* what is reduced, below 65535 */
  float scale;
} Plan;

/* Some vectors of the data that lie together; the first `whole` in whole vectors. */
template <class T> struct Span {
  T *data;
  int64_t first;
  int len, whole;
  __device__ __forceinline__ Span(const Args &a, const Plan &p, int64_t from, int most)
      : data((T *)a.data), first(from) {
    len = (int)(from >= p.vectors ? 0 : p.vectors - from < most ? p.vectors - from : most);
    whole = (int)(from >= p.whole ? 0 : p.whole - from < len ? p.whole - from : len);
  }
  __device__ __forceinline__ uint4 *at(int i) const { return (uint4 *)data + first + i; }
  /* One by one: the last vector's elements, or all that lie askew. */
  __device__ __forceinline__ uint4 gather(int64_t count, int i) const {
    uint4 v = make_uint4(0, 0, 0, 0);
    const int64_t e = (first + i) * in_16_bytes<T>;
#pragma unroll
    for (int k = 0; k < in_16_bytes<T>; k++)
      if (e + k < count) ((T *)&v)[k] = data[e + k];
    return v;
  }
  __device__ __forceinline__ void scatter(int64_t count, int i, uint4 v) const {
    const int64_t e = (first + i) * in_16_bytes<T>;
#pragma unroll
    for (int k = 0; k < in_16_bytes<T>; k++)
      if (e + k < count) data[e + k] = ((const T *)&v)[k];
  }
};

static __device__ __forceinline__ uint4 *ring(const Args &a, const Plan &p, int receiver, int phase,
                                              int source, unsigned tile) {
  const int from = source - (source > receiver ? 1 : 0);
  const unsigned phases = a.scatter ? 2 : 1;
  const unsigned row = (blockIdx.x * phases + phase) * (unsigned)(a.links.ep - 1) + from;
  return (uint4 *)(a.links.buffer[receiver] + a.links.out_at + LINA_REDUCE_RINGS_AT) +
         ((uint64_t)(row * SLOTS + tile % SLOTS) << p.slot);
}
static __device__ __forceinline__ uint64_t *flag(const Args &a, int receiver, int phase,
                                                 int source) {
  return (uint64_t *)(a.links.buffer[receiver] + a.links.out_at +
                      ((blockIdx.x * 2 + phase) * LINA_PEERS_MAX + source) * LINA_PEERS_FLAG);
}
static __device__ __forceinline__ uint64_t *first_tile(const Args &a) {
  return (uint64_t *)(a.links.buffer[a.links.rank] + a.links.out_at + LINA_REDUCE_FLAGS) +
         blockIdx.x;
}

/* The step at which this block left the turn before. */
static __device__ __forceinline__ uint32_t *left_at(const Args &a) {
  return (uint32_t *)(a.links.buffer[a.links.rank] + a.links.out_at + LINA_REDUCE_LEFT_AT) +
         blockIdx.x;
}
static __device__ __forceinline__ uint32_t *told(const Args &a, int turn) {
  return (uint32_t *)(a.links.buffer[a.links.rank] + a.links.out_at + LINA_REDUCE_TOLD_AT) +
         turn % 2;
}

/* ---- giving way ---- */

/* The word itself, or what others have told: a GPU reads host memory once a microsecond at most,
 * all blocks taken together, and launches kernels by such reads. */
static __device__ __forceinline__ uint32_t read_word(const Args &a, bool itself) {
  uint32_t v;
  if (itself)
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(a.priority) : "memory");
  else
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(told(a, a.turn)) : "memory");
  return v;
}
static __device__ __forceinline__ void tell(const Args &a, int turn, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(told(a, turn)), "r"(v) : "memory");
}
/* Until the word is 0; false when that took too long. Whoever has told of a raise tells of its end. */
static __device__ bool give_way(const Args &a, bool itself) {
  const uint64_t start = peers_time_ns();
  bool held = true;
  if (itself) tell(a, a.turn, 1);
  do {
    held = peers_time_ns() - start < a.hold_ns;
    __nanosleep(500);
  } while (held && read_word(a, itself));
  if (itself) tell(a, a.turn, 0);
  return held;
}

/* ---- warp 0: lane 8 * phase + rank has that rank's flag ---- */

/* After the block's barrier behind the stores. */
static __device__ __forceinline__ void announce(const Args &a, int lane, bool wanted,
                                                uint64_t signal) {
  const int phase = lane / LINA_PEERS_MAX, rank = lane % LINA_PEERS_MAX;
  if (!wanted || rank >= a.links.ep || rank == a.links.rank) return;
  peers_fence();
  peers_relaxed(flag(a, rank, phase, a.links.rank), signal);
}

/* The source's tile `number` is here, or this block leaves, or has failed. `end` is the last of this
 * call. */
enum Arrival { ARRIVED, LEAVES, LOST };
static __device__ Arrival arrives(const Args &a, const Plan &p, int phase, int source,
                                  uint64_t number, uint64_t end) {
  const uint64_t *at = flag(a, a.links.rank, phase, source);
  uint64_t start = 0;
  uint32_t why;
  for (unsigned polls = 1;; polls++) {
    const uint64_t f = peers_acquire(at), seen = f >> 16;
    if (seen >= number) { /* past the end the source is in a later call: this one was as long */
      if (f != POISON && (seen > end || (uint32_t)(f & 0xffff) == p.tag)) return ARRIVED;
      why = f == POISON ? (uint32_t)LINA_PEERS_FAILED : (uint32_t)LINA_PEERS_MISMATCH;
      break;
    }
    if (a.leaves && polls % 16 == 0 && read_word(a, polls % 256 == 0)) return LEAVES;
    if (polls % 256) continue;
    if (peers_read_failed(a.links.state)) return LOST;
    const uint64_t now = peers_time_ns();
    if (start == 0) start = now;
    if (now - start > a.links.timeout_ns) {
      why = LINA_PEERS_TIMEOUT;
      break;
    }
    if (peers_stopped(a.links, polls / 256)) {
      why = LINA_PEERS_ABORTED;
      break;
    }
    __nanosleep(64);
  }
  peers_fail(a.links, why, LINA_PEERS_REDUCE, source, (uint32_t)number);
  return LOST;
}

#endif
