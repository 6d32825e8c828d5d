/* races.h - what a thread of dispatch or collect may rely on when it reads or writes a word.
 *
 * Values are sequentially consistent here, orders are not: every thread has a clock of what it
 * knows of all others (a vector clock), passed on by barriers of its block, kernels that follow
 * on a stream, and flags and counters as PTX has it: a store without release passes on what
 * was known at the last fence, a load without acquire is known from the next fence on. Each word
 * of memory has its last writer and readers. So found is, in whatever order threads ran: a word
 * read that nobody wrote, that may not have arrived, or is of another round; one written over
 * another write or a read that may still be going on, or outside what was allocated.
 *
 * Words that atomics or volatile accesses touch alone (the state, flags, the host's) are not
 * looked at: only their values count. Of a rank that has failed what it reads does not matter.
 */
#ifndef LINA_TESTS_RACES_H
#define LINA_TESTS_RACES_H

#include <map>

#include "cuda/peers.h"
#include "fibers.h"

enum { THREADS = 64, BLOCKS = 3, RANKS = 3, PER_RANK = THREADS * BLOCKS, ALL = RANKS * PER_RANK };
enum { GRANULE = 2, ARENA = 2 << 20, SHARED = 4096 };

struct Clock {
  uint32_t at[ALL] = {};
  void join(const Clock &o) {
    for (int i = 0; i < ALL; i++) at[i] = at[i] > o.at[i] ? at[i] : o.at[i];
  }
};
struct Reader { uint32_t thread, when; };
enum { OUTSIDE = -3, NOBODY = -2, HOST = -1 }; /* or a thread */
struct Word {
  int writer = OUTSIDE, round = 0;
  uint32_t when = 0;
  std::vector<Reader> readers; /* since it was written */
};
struct Thread {
  Clock knows, fenced, seen;
}; /* fenced: at the last fence; seen: from the next on */
struct Warp {
  uint64_t lanes[2][32];
  unsigned arrived = 0, turn = 0;
};
struct Shared { /* of a block */
  std::map<int, size_t> at;
  size_t used = 0;
  Warp warps[THREADS / 32];
  Clock met[2]; /* what a block's threads know together, at every other barrier */
  unsigned barriers[THREADS] = {};
};
enum Half { OUT, EXPERTS, BACK };
struct Launch : Kernel {
  int rank, round;
  Half half;
  unsigned threads;
  bool begun = false;
  Clock begins;
};

alignas(256) static char arena[ARENA];
static std::vector<Word> words(ARENA / GRANULE);
static size_t arena_used;
static Thread threads[ALL];
static Clock streams[RANKS]; /* what is known on each rank's stream */
static std::map<const void *, Clock> passed; /* by flags and counters */
static lina_peers_state states[RANKS];
static char *buffers[RANKS], *buffers_end[RANKS];
static char *shared_at[RANKS][BLOCKS];
static void volatile_write(const void *p);

static Launch *launch_of(Fiber *f) { return static_cast<Launch *>(f->block->kernel); }
static int number_of(Fiber *f) {
  return launch_of(f)->rank * PER_RANK + (int)f->block->index * THREADS + (int)f->thread;
}

static Word *word_of(const void *p) { return &words[((const char *)p - arena) / GRANULE]; }
static void by_host(const void *p, size_t bytes, int writer) {
  for (size_t i = 0; i < (bytes + GRANULE - 1) / GRANULE; i++) {
    Word *w = word_of(p) + i;
    w->writer = writer, w->readers.clear();
  }
}
/* Between two of these lies what nobody may write; askew: bytes off a multiple of 16. */
static char *allocate(size_t bytes, size_t askew = 0) {
  const size_t at = ((arena_used + 15) & ~(size_t)15) + askew;
  if (at + bytes + 16 > ARENA) abort();
  arena_used = at + bytes + 16;
  memset(arena + at, 0xa5, bytes);
  by_host(arena + at, bytes, NOBODY);
  return arena + at;
}
static void forget_all() {
  by_host(arena, arena_used, OUTSIDE);
  arena_used = 0, passed.clear();
  for (Clock &c : streams) c = Clock();
  memset(states, 0, sizeof states);
}

/* ---- words ---- */

static int owner_of(const void *p) {
  for (int r = 0; r < RANKS; r++)
    if ((char *)p >= buffers[r] && (char *)p < buffers_end[r]) return r;
  return -1;
}
static bool known(const Clock &c, int writer, uint32_t when) {
  return writer == HOST || c.at[writer] >= when;
}
static void reads(const void *p, size_t bytes, const Clock &knows) {
  const Launch *l = launch_of(current);
  if (states[l->rank].failed) return;
  const int me = number_of(current), owner = owner_of(p);
  const uint32_t now = threads[me].knows.at[me];
  for (Word *w = word_of(p); bytes > 0; w++, bytes -= bytes < GRANULE ? bytes : GRANULE) {
    if (w->writer < HOST) found("a word is read that nobody wrote");
    if (!known(knows, w->writer, w->when)) found("a word is read that may not have arrived");
    if (owner >= 0 && w->round != l->round) found("a word is read that another round left");
    if (w->writer == HOST) continue; /* nobody writes those again */
    bool noted = false;
    for (Reader &r : w->readers)
      if (r.thread == (uint32_t)me) r.when = now, noted = true;
    if (!noted) w->readers.push_back({(uint32_t)me, now});
  }
}
static void writes(const void *p, size_t bytes) {
  const Launch *l = launch_of(current);
  const int me = number_of(current), owner = owner_of(p);
  const Clock &knows = threads[me].knows;
  const bool matters = !states[owner < 0 ? l->rank : owner].failed;
  for (Word *w = word_of(p); bytes > 0; w++, bytes -= bytes < GRANULE ? bytes : GRANULE) {
    if (w->writer == OUTSIDE) found("a word outside all tensors is written");
    if (matters && w->writer == HOST) found("a word of the caller's is overwritten");
    if (matters && w->writer >= 0 && !known(knows, w->writer, w->when))
      found("a word is written by two that do not know of each other");
    for (const Reader &r : w->readers)
      if (matters && !known(knows, (int)r.thread, r.when))
        found("a word is overwritten that another may still read");
    w->writer = me, w->when = knows.at[me], w->round = l->round, w->readers.clear();
  }
}
static bool tracked(const void *p) { return (char *)p >= arena && (char *)p < arena + ARENA; }
static void touched(const void *p, size_t bytes, bool write) {
  if (!current) return;
  if (tracked(p)) {
    perhaps();
    if (write)
      writes(p, bytes);
    else
      reads(p, bytes, threads[number_of(current)].knows);
  } else if ((char *)p >= (char *)states && (char *)p < (char *)(states + RANKS)) {
    others();
  }
}

/* ---- what the compiler puts before loads and stores ---- */

extern "C" {
#define TOUCHES(n)                                                 \
  void __tsan_read##n(void *p) { touched(p, n, false); }           \
  void __tsan_write##n(void *p) { touched(p, n, true); }           \
  void __tsan_unaligned_read##n(void *p) { touched(p, n, false); } \
  void __tsan_unaligned_write##n(void *p) { touched(p, n, true); } \
  void __tsan_volatile_read##n(void *) { /* as polls */            \
    if (current) others();                                         \
  }                                                                \
  void __tsan_volatile_write##n(void *p) {                         \
    if (current) others();                                         \
    volatile_write(p);                                             \
  }
TOUCHES(1)
TOUCHES(2)
TOUCHES(4)
TOUCHES(8)
TOUCHES(16)
void __tsan_read_range(void *p, size_t bytes) { touched(p, bytes, false); }
void __tsan_write_range(void *p, size_t bytes) { touched(p, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}

/* ---- device.h ---- */

void emulated_barrier() {
  Shared &s = *current->block->shared;
  Thread &me = threads[number_of(current)];
  const int self = number_of(current);
  Clock &met = s.met[s.barriers[current->thread]++ % 2];
  if (current->block->waiting == 0) met = Clock();
  met.join(me.knows);
  const uint32_t own = me.knows.at[self];
  __syncthreads();
  me.knows = met, me.knows.at[self] = own + 1;
}
const uint64_t *emulated_warp(uint64_t mine) {
  Fiber *self = current;
  Warp &w = self->block->shared->warps[self->thread / 32];
  const unsigned turn = w.turn;
  w.lanes[turn % 2][self->thread % 32] = mine;
  if (++w.arrived == 32) {
    w.arrived = 0, w.turn++;
    for (unsigned lane = 0; lane < 32; lane++) {
      Fiber &f = self->block->fibers[self->thread / 32 * 32 + lane];
      if (f.state == AT_WARP) f.state = READY;
    }
  } else {
    self->state = AT_WARP;
    others();
  }
  return w.lanes[turn % 2];
}
void *emulated_shared(int id, size_t bytes) {
  Shared &s = *current->block->shared;
  if (!s.at.count(id)) s.at[id] = s.used, s.used += (bytes + 15) & ~(size_t)15;
  if (s.used > SHARED) abort();
  return shared_at[launch_of(current)->rank][current->block->index] + s.at[id];
}
void emulated_constant(const void *p, size_t bytes) {
  if (tracked(p)) reads(p, bytes, launch_of(current)->begins);
}
uint32_t emulated_add(uint32_t *p, uint32_t v) {
  others();
  Thread &me = threads[number_of(current)];
  Clock &at = passed[p];
  if (tracked(p)) { /* of the block: sums, not signals, so one order of all that add is enough */
    me.knows.join(at);
    reads(p, 4, me.knows), writes(p, 4);
    at.join(me.knows);
    me.knows.at[number_of(current)]++;
  } else {
    me.seen.join(at);
    at.join(me.fenced);
  }
  return (*p += v) - v;
}
uint32_t emulated_swap(uint32_t *p, uint32_t old, uint32_t v) {
  others();
  const uint32_t before = *p;
  if (before == old) *p = v;
  return before;
}
uint64_t emulated_load(const void *p, size_t bytes, bool acquire) {
  others();
  Thread &me = threads[number_of(current)];
  const auto at = passed.find(p);
  if (at != passed.end()) (acquire ? me.knows : me.seen).join(at->second);
  return bytes == 8 ? *(const uint64_t *)p : *(const uint32_t *)p;
}
void emulated_store(uint64_t *p, uint64_t v) {
  others();
  if (v < *p) found("a flag is lowered");
  if (v == *p) found("a flag is sent twice");
  passed[p] = threads[number_of(current)].fenced;
  *p = v, moved = ticks;
}
void emulated_fence() {
  Thread &me = threads[number_of(current)];
  me.knows.join(me.seen);
  me.fenced = me.knows;
  me.knows.at[number_of(current)]++;
}
uint64_t emulated_time() { return ticks; }
void emulated_pause() { others(); }
}

/* ---- kernels ---- */

static void thread_begins() {
  const Launch *l = launch_of(current);
  const int self = number_of(current);
  Thread &me = threads[self];
  me.knows = l->begins, me.knows.at[self]++;
  me.fenced = me.seen = Clock();
}
static void thread_ends() {
  streams[launch_of(current)->rank].join(threads[number_of(current)].knows);
}
/* It has come to the front of its rank's stream. */
static void launch_begins(Launch *l) {
  if (l->begun) return;
  l->begun = true, l->begins = streams[l->rank];
  for (size_t b = 0; b < l->blocks.size(); b++) by_host(shared_at[l->rank][b], SHARED, NOBODY);
}

#endif
