/* peers.h - buffers that the ranks of one NVLink domain map into each other, and
 * the rounds of dispatch and collect over them. What a round is, and why it may
 * use the same memory again: ../cuda/peers.h.
 *
 * Making one takes three steps, the second and third collective by whatever
 * carries bytes between the ranks: make (allocates and exports), open
 * (maps everybody's export), and nothing may be sent before all ranks have opened.
 * Closing likewise: close on all ranks before free on any.
 *
 * Calls with different streams are put in order by an event, except while a
 * stream is being captured: then the capture's own dependencies order them.
 * Every call first looks whether an earlier wait has failed, and says so.
 * Any host thread may call: calls take turns, all but export, rows, room, check and abort,
 * which wait for nothing. None may follow free, or be going on.
 * Errors: LINA_EINVAL, LINA_ENOTSUP (no CUDA, no peer access), LINA_ECUDA,
 *   LINA_ENOMEM, LINA_EPEER (another rank stopped; the text says which and when).
 */
#ifndef LINA_COMM_PEERS_H
#define LINA_COMM_PEERS_H

#include <stdbool.h>
#include <stdint.h>

#include "../cuda/peers.h"
#include "../error.h"

#define LINA_PEERS_HANDLE 64  /* bytes of an export */
#define LINA_PEERS_TAGS 255 /* tags are below: a flag has 8 bits for them, and one tells failure */

typedef struct lina_peers lina_peers;

/* Buffers of this process's current device for tokens of up to out_bytes on their
 * way and back_bytes returning; at most `tokens` (C) a rank. Kernels that wait take `sms` SMs,
 * or 3/4 of the GPU's if that is 0; those that do not take all, or where experts compute `beside`
 * them `sms` too. What fails in these or in `with` (or NULL) ends the waits
 * of both, with one text: layers whose rounds follow each other have buffers of their own. */
int lina_peers_make(lina_peers **out, int rank, int ep, int64_t out_bytes, int64_t back_bytes,
                    int64_t tokens, double timeout_s, int sms, bool beside, const lina_peers *with);
void lina_peers_export(const lina_peers *p, unsigned char *handle); /* LINA_PEERS_HANDLE bytes */
/* ep, as it was made with. */
int lina_peers_ranks(const lina_peers *p);
/* handles: [ep] in order of rank; this rank's own is not looked at. */
int lina_peers_open(lina_peers *p, const unsigned char *handles);
/* Where rows arrive: `out` of this rank's own buffer. */
void *lina_peers_rows(const lina_peers *p);

/* Fill in links except for tag; check the rest; launch. `priority`: the round raises the
 * device's priority word (priority.h); the same for its dispatch and its collect. */
int lina_peers_dispatch(lina_peers *p, lina_peers_dispatch_args *a, bool priority, void *stream);
int lina_peers_collect(lina_peers *p, lina_peers_collect_args *a, bool priority, void *stream);

/* What all kernels over these buffers begin with: waits for its turn, checks, fills in links
 * except for tag, sets the device, puts `stream` in order; after success leave() must follow,
 * which sets the caller's device back. */
int lina_peers_begin(lina_peers *p, lina_peers_links *links, bool priority, void *stream,
                     int *before);
void lina_peers_leave(lina_peers *p, int before);
/* Bytes of `out`. */
int64_t lina_peers_room(const lina_peers *p);

/* LINA_OK, or LINA_EPEER with what was waited for. Does not wait for the device. */
int lina_peers_check(const lina_peers *p);
/* Whether a wait has ended in time-out, or was given up: a peer may be gone. */
bool lina_peers_lost(const lina_peers *p);
/* Tells all peers that this rank stops (LINA_PEERS_FAILED or _OVERFLOW). */
int lina_peers_stop(lina_peers *p, int failure, void *stream);
/* Ends every wait on the device, now and later. */
void lina_peers_abort(lina_peers *p);
/* Waits for the device and unmaps the peers' buffers. */
void lina_peers_close(lina_peers *p);
/* Frees everything after lina_peers_close. Without it peers may still have the buffer mapped,
 * and what was launched may still run: all stays until the process ends, and goes on
 * undisturbed; who wants it to end calls abort first. NULL is fine. */
void lina_peers_free(lina_peers *p);

#endif
