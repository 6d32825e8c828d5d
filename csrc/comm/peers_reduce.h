/* peers_reduce.h - gradients summed over mapped buffers, giving way to all-to-alls. What the
 * kernel does, and its limits: ../cuda/peers_reduce.h; buffers, streams, failures: peers.h.
 *
 * A buffer serves this alone; export, open, check, abort, close and free are those of
 * peers.h. Every call must come with the blocks, tile_bytes and scatter it was made for,
 * and in one order on all ranks.
 * Errors: as peers.h.
 */
#ifndef LINA_COMM_PEERS_REDUCE_H
#define LINA_COMM_PEERS_REDUCE_H

#include "../cuda/peers_reduce.h"
#include "peers.h"

/* Rings of this process's current device. scatter: each rank sums a part of every
 * tile and sends it on; else, for 2 ranks alone, both sum all. */
int lina_peers_reduce_make(lina_peers **out, int rank, int ep, int blocks, int64_t tile_bytes,
                           bool scatter, double timeout_s);

/* Fills in links, turn, leaves, and with `gently` priority and hold_ns; checks the rest; launches
 * every turn. The stream waits for the device's priority word before each: pauses hold no SM. */
int lina_peers_reduce(lina_peers *p, lina_peers_reduce_args *a, bool gently, void *stream);

#endif
