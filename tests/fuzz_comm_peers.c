/* fuzz_comm_peers.c - the host's side of buffers that peers have mapped: limits, threads,
 * lifetime. The kernels are fakes here, which only look at how they are launched. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdatomic.h>
#include <string.h>

#include "comm/peers.h"
#include "comm/peers_reduce.h"
#include "dtype.h"
#include "error.h"
#include "fuzz_comm.h"

#define TOKENS 8
#define ROW    64

/* ---- kernels ---- */

static _Atomic bool launching[MAX_RANKS], closed[MAX_RANKS];
static int launches[MAX_RANKS];          /* plain: two threads at once are a race */
static lina_peers_word *words[MAX_RANKS]; /* of the last launch */

static int launch(const lina_peers_links *l) {
  if (atomic_exchange(&launching[l->rank], true)) fake_broken("two threads launch at once");
  if (atomic_load(&closed[l->rank])) fake_broken("a launch over buffers that were closed");
  launches[l->rank]++;
  words[l->rank] = fake_host_pointer(l->word);
  fake_nap();
  atomic_store(&launching[l->rank], false);
  return LINA_OK;
}

int lina_peers_dispatch_cuda(const lina_peers_dispatch_args *a, void *stream) {
  return (void)stream, launch(&a->links);
}
int lina_peers_collect_cuda(const lina_peers_collect_args *a, void *stream) {
  return (void)stream, launch(&a->links);
}
int lina_peers_reduce_cuda(const lina_peers_reduce_args *a, void *stream) {
  return (void)stream, launch(&a->links);
}
int lina_peers_poison_cuda(const lina_peers_links *links, int failure, void *stream) {
  return (void)failure, (void)stream, launch(links);
}

/* ---- calls ---- */

static lina_peers *open_peers(rank_state *s, const lina_peers *with) {
  static unsigned char handles[MAX_RANKS * LINA_PEERS_HANDLE];
  lina_peers *p;
  (void)cudaSetDevice(s->rank);
  fine(lina_peers_make(&p, s->rank, s->size, 4096, 4096, TOKENS, s->timeout_s, 0, with != NULL,
                       with),
       "buffers");
  if (lina_peers_ranks(p) != s->size) fake_broken("buffers of %d ranks", lina_peers_ranks(p));
  lina_peers_export(p, handles + s->rank * LINA_PEERS_HANDLE);
  meet(s);
  fine(lina_peers_open(p, handles), "opening");
  meet(s);
  return p;
}

/* On all ranks: nobody frees what another still has mapped. */
static void close_peers(rank_state *s, lina_peers *p) {
  lina_peers_close(p);
  meet(s);
  lina_peers_free(p);
}

static lina_peers_dispatch_args out(void) {
  return (lina_peers_dispatch_args){
      .links.tag = LINA_PEERS_TAGS - 1, .T = TOKENS, .C = TOKENS, .K = 2, .E = 8, .row_bytes = ROW};
}

static lina_peers_collect_args back(void) {
  return (lina_peers_collect_args){
      .T = TOKENS, .C = TOKENS, .K = 2, .E = 8, .D = ROW / 4, .dtype = LINA_F32};
}

static int dispatch(rank_state *s, lina_peers *p, lina_peers_dispatch_args a) {
  return lina_peers_dispatch(p, &a, true, s->a2a);
}

static int collect(rank_state *s, lina_peers *p, lina_peers_collect_args a) {
  return lina_peers_collect(p, &a, true, s->reduce);
}

/* ---- scenarios ---- */

#define refused(call, field, value, words, function)         \
  do {                                                       \
    function##_type changed = function();                    \
    changed.field = (value);                                 \
    expect(call(s, p, changed), LINA_EINVAL, words, #field); \
  } while (0)
typedef lina_peers_dispatch_args out_type;
typedef lina_peers_collect_args back_type;

static void refused_buffers(rank_state *s, int64_t out_bytes, int64_t back_bytes, double timeout_s,
                            const char *text) {
  lina_peers *none = NULL;
  expect(lina_peers_make(&none, s->rank, s->size, out_bytes, back_bytes, TOKENS, timeout_s, 0,
                         false, NULL),
         LINA_EINVAL, text, "buffers");
  if (none) fake_broken("buffers were made of nothing");
}

void peers_limits(rank_state *s) {
  lina_peers *p = open_peers(s, NULL), *r;
  fine(dispatch(s, p, out()), "a dispatch at the limits");
  fine(collect(s, p, back()), "a collect");
  refused(dispatch, links.tag, LINA_PEERS_TAGS, "tag=255, limit 254", out);
  refused(collect, links.tag, (uint32_t)-1, "tag=-1", back);
  refused(dispatch, T, TOKENS + 1, "T=9 tokens of C=8", out);
  refused(dispatch, K, INT64_MAX, "1 <= K <= 1024", out);
  refused(dispatch, E, (int64_t)s->size << 32, "experts", out);
  refused(dispatch, row_bytes, INT64_MAX, "limit 1..2147483647", out);
  refused(dispatch, row_bytes, 512, "do not fit the buffer", out);
  refused(collect, D, (int64_t)1 << 62, "limit 1..536870911", back);
  refused(collect, D, 0, "D=0", back);
  refused_buffers(s, INT64_MAX, 0, 1, "limit 0..2^46");
  refused_buffers(s, 0, -1, 1, "back_bytes=-1");
  refused_buffers(s, 0, 0, 1e9, "below 1e8");
  fine(lina_peers_reduce_make(&r, s->rank, s->size, 1, LINA_REDUCE_MIN_TILE, false, s->timeout_s),
       "rings");
  lina_peers_reduce_args a = {.blocks = 1, .tile_bytes = LINA_REDUCE_MIN_TILE, .count = 1};
  fine(lina_peers_reduce(r, &a, true, s->reduce), "a reduction");
  a.count = INT64_MAX;
  expect(lina_peers_reduce(r, &a, false, s->reduce), LINA_EINVAL, "0 to 2^46", "a count");
  a.count = 1, a.blocks = 2;
  expect(lina_peers_reduce(r, &a, false, s->reduce), LINA_EINVAL, "is for fewer", "blocks");
  close_peers(s, r);
  close_peers(s, p);
}

typedef struct {
  rank_state *s;
  lina_peers *p;
  bool sends;
} caller;

static void *call_until_closed(void *argument) {
  const caller *c = argument;
  int rc = LINA_OK;
  while (rc == LINA_OK) {
    rc = c->sends ? dispatch(c->s, c->p, out()) : collect(c->s, c->p, back());
    (void)lina_peers_check(c->p);
  }
  expect(rc, LINA_EPEER, "were closed", "a call while it is closed");
  return NULL;
}

/* Without Python's lock calls come from several threads at once. */
void peers_turns(rank_state *s) {
  pthread_t threads[2];
  lina_peers *p = open_peers(s, NULL);
  caller callers[2] = {{s, p, true}, {s, p, false}};
  for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, call_until_closed, &callers[i]);
  fake_sleep(0.1);
  lina_peers_close(p);
  atomic_store(&closed[s->rank], true);
  fine(lina_peers_stop(p, LINA_PEERS_FAILED, s->a2a), "stopping what is closed");
  for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
  if (launches[s->rank] == 0) fake_broken("nothing was launched");
  meet(s);
  lina_peers_free(p);
  atomic_store(&closed[s->rank], false);
}

void peers_dropped(rank_state *s) {
  static lina_peers *left[MAX_RANKS];    /* on purpose: no leak */
  lina_peers *p = left[s->rank] = open_peers(s, NULL);
  fine(dispatch(s, p, out()), "a dispatch");
  lina_peers_free(p);
  const lina_peers_word *word = words[s->rank];
  if (word->abort || word->failure) fake_broken("dropping aborted what is in flight");
  memset(lina_peers_rows(p), 1, 4096);   /* as a peer may */
  meet(s);

  int before = fake_cuda_held();
  meet(s);
  p = open_peers(s, NULL);
  lina_peers_abort(p);
  expect(dispatch(s, p, out()), LINA_EPEER, "gave the exchange up", "a dispatch after an abort");
  close_peers(s, p);
  meet(s);
  if (fake_cuda_held() != before) fake_broken("closing left memory");
  meet(s);

  p = open_peers(s, NULL);
  lina_peers *q = open_peers(s, p);
  if (lina_peers_lost(q)) fake_broken("lost before anything was");
  lina_peers_abort(p);
  expect(dispatch(s, q, out()), LINA_EPEER, "gave the exchange up", "a dispatch of another pass");
  if (!lina_peers_lost(q)) fake_broken("a pass does not hear of another's failure");
  close_peers(s, p);
  expect(dispatch(s, q, out()), LINA_EPEER, "gave the exchange up", "the word of a closed pass");
  close_peers(s, q);
  meet(s);
  if (fake_cuda_held() != before) fake_broken("closing two that share a word left memory");
  meet(s);
}
