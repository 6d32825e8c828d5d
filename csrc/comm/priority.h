/* priority.h - the word in memory that holds gradients back while tokens travel.
 *
 * One word a device: not 0 while an all-to-all is queued, running or imminent.
 * The reduce stream waits for 0 before each micro-op (cuStreamWaitValue32). What writes the
 * word runs on the stream of the all-to-alls: cuStreamWriteValue32 around NCCL's, or the
 * kernels of peers.h themselves. So raises and lowers are ordered by that stream, need no
 * counting, and replay in a CUDA graph. No host thread stands between the two, and no
 * multiprocessor is held. Both kinds at once on one device would lower each other's raise.
 * Source: Lina, Li et al. 2023, arXiv:2210.17223, section 4.1, where a host thread
 * decides.
 *
 * Priority is a hint about speed and never one about order: the word lies in
 * pinned host memory, and lina's watch thread (watch.h) writes 0 itself, without CUDA,
 * where it stayed raised for LINA_PRIORITY_HOLD_S. So a host that blocks in the
 * driver while the reduce stream waits (the first launch of a kernel that is not
 * loaded yet does) goes on after that time instead of never.
 *
 * With CUDA_DEVICE_MAX_CONNECTIONS=1 every stream queues behind one that waits:
 * there raising is refused (lina_priority_off names the reason) and nothing waits.
 *
 * Errors: LINA_ECUDA. Asynchronous on the stream given.
 */
#ifndef LINA_COMM_PRIORITY_H
#define LINA_COMM_PRIORITY_H

#include <stdbool.h>
#include <stdint.h>

#define LINA_PRIORITY_HOLD_S      0.25
#define LINA_PRIORITY_MAX_DEVICES 64

int lina_priority_raise(int device, void *a2a_stream);
int lina_priority_lower(int device, void *a2a_stream);
int lina_priority_wait(int device, void *reduce_stream);

/* The word's address on the device, for kernels that raise (not 0, and another value each
 * time) and lower it themselves; NULL where nothing is held back. */
uint32_t *lina_priority_word(int device);

/* Why nothing is held back on this machine, or NULL. */
const char *lina_priority_off(void);

/* The word as the host sees it now, and how often the watch thread released it. */
int lina_priority_read(int device, uint32_t *word, int64_t *releases);

/* For the watch thread: releases what has been raised for too long, and everything
 * if `all`. Calls no CUDA function; any thread may call it. */
void lina_priority_watch(double now_s, bool all);

#endif
