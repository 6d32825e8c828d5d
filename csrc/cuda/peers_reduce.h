/* peers_reduce.h - gradients summed over the ranks of one NVLink domain by stores into
 * the peers' memory, giving way between small tiles. Contract of the kernel.
 *
 *   data[i] = sum over ranks, in their order, of data[i], in float32; times 1/ep with
 *             `mean`; rounded once. In place, and of the same bits on all ranks.
 *
 * The data is cut into tiles; block b of every rank has tiles b, b + blocks, ..., and
 * numbers them on through all calls (`first` in device memory, so that a captured graph
 * replays). With D = LINA_REDUCE_DEPTH, a call of fewer than D tiles takes D numbers all
 * the same, lest a longer call of a peer be taken for a later one. In step s a block
 *   sends    tile s to a slot of each peer's ring (2 ranks: the whole tile, which both
 *            then sum; more, or `scatter`: part q of it to rank q alone);
 *   waits    for all peers' tile s - D, and sums it into its own data;
 *            with `scatter` it sends its part of the sums to a second ring of all peers,
 *            and takes in their parts of tile s - 2D;
 *   flags    what it sent, with the tile's number: release, for all ranks.
 *
 * No deadlock: step s waits only for what peers flag at the end of their step s - D. By
 * induction on s every step ends, whatever pauses between, as long as those end.
 *
 * Rings of 2D + 2 slots need no credits. Whoever sends tile s has ended step s - 1, so has
 * seen the peer's flag of tile s - 1 - D, set at the end of the peer's step of that number;
 * there the peer had summed tile s - 1 - 2D, and the slot's last tile was s - 2D - 2.
 * In the second ring, whoever sends sums of tile j has seen the peer's flag of tile j,
 * and at the end of that step the peer had taken in tile j - 2D. Between calls: a call ends with
 * all peers' flags seen, so the next begins with all tiles but the last D known to be
 * summed, and sends D + 1 tiles, 2D + 1 slots in all, before it has seen a new flag.
 *
 * Giving way: `priority` is the word of comm/priority.h. Blocks read it in turns, by their steps, and
 * tell the others. A reduction is several launches, `turn` 0, 1, ..., each of which goes on where the
 * one before left; between them the stream waits for the word to be 0. Where a block hears that it is
 * raised, be it while it waits for a peer, it ends (`leaves`): the experts beside an all-to-all need
 * all SMs. The next turn does its step again, of which nothing was flagged or summed; most have
 * nothing left to do. In the last turn a block stays, and sends no further tile while the
 * word is not 0; where that lasts for hold_ns, it goes on and heeds the word no more.
 *
 * A wait ends timeout_ns after the turn has begun it, when the host aborts, when the peer reduces something
 * else (count, dtype, mean), or when the peer failed; then `word` tells the host what was
 * waited for, data becomes NaN on this rank, and on the peers in turn.
 *
 *   data  in, out  [count]  f32, bf16 or f16
 *
 * Limits: 2 <= ep <= 8, 1 <= blocks <= 64, tile_bytes a power of two, 4 KB to 1 MB; all
 * equal on all ranks, and `blocks` few enough for all to run at once beside what else
 * waits for peers. count = 0 launches nothing.
 * Stream: asynchronous on `stream`, no host read.
 * Errors: LINA_ECUDA (launch), LINA_ENOTSUP (dtype).
 */
#ifndef LINA_CUDA_PEERS_REDUCE_H
#define LINA_CUDA_PEERS_REDUCE_H

#include <stdbool.h>

#include "peers.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LINA_REDUCE_DEPTH    3
#define LINA_REDUCE_SLOTS    (2 * LINA_REDUCE_DEPTH + 2) /* a power of two */
#define LINA_REDUCE_BLOCKS   64
#define LINA_REDUCE_MIN_TILE (4 << 10)
#define LINA_REDUCE_MAX_TILE (1 << 20)

enum { LINA_PEERS_REDUCE = LINA_PEERS_BACK + 1 }; /* the direction in lina_peers_word */

/* In a buffer's `out`: flags [blocks, 2 phases, sources], the blocks' first tile
 * numbers u64 [blocks], the steps u32 [blocks] they left at, what blocks tell each other of the
 * priority word u32 [turn % 2], then rings [blocks, phases, ep - 1 sources, slots]. */
#define LINA_REDUCE_FLAGS    (LINA_REDUCE_BLOCKS * 2 * LINA_PEERS_MAX * LINA_PEERS_FLAG)
#define LINA_REDUCE_LEFT_AT  (LINA_REDUCE_FLAGS + LINA_REDUCE_BLOCKS * 8)
#define LINA_REDUCE_TOLD_AT  (LINA_REDUCE_LEFT_AT + LINA_REDUCE_BLOCKS * 4)
#define LINA_REDUCE_RINGS_AT (LINA_REDUCE_FLAGS + 4096)

typedef struct {
  lina_peers_links links;
  int blocks;
  int64_t tile_bytes;
  bool scatter;                          /* always, where ep > 2 */
  void *data;
  int64_t count;
  int dtype;
  bool mean;
  const uint32_t *priority;              /* NULL: never gives way */
  int turn;                              /* of this reduction; 0: from its start */
  bool leaves;                           /* where the word is raised: another turn follows */
  uint64_t hold_ns;
} lina_peers_reduce_args;

/* A slot holds 1 << this vectors of 16 bytes: a tile, or one rank's part of it. */
static inline int lina_peers_reduce_slot(int ep, int64_t tile_bytes, bool scatter) {
  int log = 0;
  const int64_t vectors = tile_bytes / 16 / (scatter ? ep : 1);
  while ((int64_t)2 << log <= vectors) log++;
  return log;
}
static inline int64_t lina_peers_reduce_bytes(int ep, int blocks, int64_t tile_bytes,
                                              bool scatter) {
  const int64_t slots = (int64_t)blocks * (scatter ? 2 : 1) * (ep - 1) * LINA_REDUCE_SLOTS;
  return LINA_REDUCE_RINGS_AT + (slots << lina_peers_reduce_slot(ep, tile_bytes, scatter)) * 16;
}

int lina_peers_reduce_cuda(const lina_peers_reduce_args *a, void *stream);

#ifdef __cplusplus
}
#endif
#endif
