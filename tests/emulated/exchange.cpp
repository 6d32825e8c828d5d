/* exchange.cpp - the text of peers_dispatch.cu and peers_collect.cu, for 2 and 3 ranks.
 *
 *   exchange FIRST COUNT FAULT    numbers to draw by; FAULT: none, stop (a rank says that it
 *       does), death (it says nothing: time-outs), abort (death, and the hosts give up), mismatch
 *
 * Each run draws layers (tokens, K, experts, width, dtype, routes) and rounds of them one after
 * the other over the same buffers: forward, with or without rows that outlive it and sums over
 * experts, and backward by the slots of an earlier one; then which rank, block and thread goes on.
 * Looked for: words as races.h says; what arrived (rows, ids, weights, counts, slots)
 * and what came back (sums bit for bit, gradients of weights) against plain loops; epochs and
 * counters that do not end where they should, a priority word lowered too early; ranks that wait for
 * ever. After a fault a rank that has failed may have NaN and ids of -1, and no others.
 */
#include "exchange_case.h"

#include <deque>

#include "error.h"

enum Fault { NONE, STOP, DEATH, MISMATCH, ABORT };

struct Rank {
  std::deque<std::shared_ptr<Launch>> stream;
  lina_peers_word host;
  uint32_t word; /* of priority */
  uint64_t look[BLOCKS * LINA_PEERS_MAX];
  int sms, free_sms;
  bool dead;
};
static Rank ranks[RANKS];
static Rank *launching;
static int launching_round;
static Half launching_half;

extern "C" {
int64_t emulated_split;
int lina_error(int code, const char *, ...) { return code; }
void emulated_launch(unsigned blocks, unsigned width, void (*body)(const void *), const void *it,
                     size_t bytes) {
  std::vector<uint64_t> copy(bytes / 8 + 1);
  memcpy(copy.data(), it, bytes);
  auto l = std::make_shared<Launch>();
  l->rank = (int)(launching - ranks), l->round = launching_round, l->half = launching_half;
  l->threads = width;
  l->body = [copy, body] {
    thread_begins();
    body(copy.data());
    thread_ends();
  };
  if (blocks > BLOCKS || width > THREADS) found("a grid that is too large");
  for (unsigned b = 0; b < blocks; b++)
    l->blocks.emplace_back(new Block{l.get(), b, std::unique_ptr<Shared>(new Shared), {}});
  launching->stream.push_back(l);
}
}

static uint32_t flag_epoch(int of, int direction, int source) {
  const char *at = buffers[of] + (direction * LINA_PEERS_CHUNKS * LINA_PEERS_MAX + source) * 128;
  return (uint32_t)(*(const uint64_t *)at >> 32);
}
/* All rows have left and all have arrived, says a rank that lowers its word. */
static void volatile_write(const void *p) {
  if (!current) return;
  const Launch *l = launch_of(current);
  if (p != &ranks[l->rank].word || l->half != BACK || states[l->rank].failed) return;
  const uint32_t epoch = (uint32_t)l->round + 1; /* who stops announces a later one */
  for (int r = 0; r < RANKS && buffers[r]; r++)
    if (r != l->rank && (flag_epoch(l->rank, 1, r) < epoch || flag_epoch(r, 1, l->rank) < epoch))
      found("gradients go on before all rows have left and arrived");
}

struct Run {
  Fault fault;
  int ep, odd, odd_round;
  Half odd_half;
  uint64_t when; /* the fault comes */
  size_t room_out = 0, room_back = 0;
  std::vector<Layer> layers;
  std::vector<Round> rounds;

  explicit Run(Fault f) : fault(f) {
    ep = 2 + (int)draw(2);
    for (int n = 1 + (int)draw(3); n > 0; n--) layers.emplace_back(ep);
    for (int n = 2 + (int)draw(5), i = 0; i < n; i++) rounds.emplace_back(layers, rounds);
    odd = (int)draw(ep), odd_round = (int)draw((uint32_t)rounds.size()), when = draw(60000);
    odd_half = draw(2) ? OUT : BACK;
    emulated_split = draw(3) ? draw(2000) : INT64_MAX;
    ticks = moved = 0;
    forget_all();
    for (const Layer &l : layers) {
      room_out = std::max(room_out, l.bytes() + ep * l.C * l.K * 4);
      room_back = std::max(room_back, l.bytes());
    }
    room_out = (room_out + 255) & ~(size_t)255;
    for (int r = 0; r < RANKS; r++) {
      ranks[r] = Rank(), buffers[r] = buffers_end[r] = nullptr;
      ranks[r].sms = 1 + (int)draw(BLOCKS), ranks[r].free_sms = 1 + (int)draw(BLOCKS);
      for (int b = 0; b < BLOCKS; b++) shared_at[r][b] = allocate(SHARED);
      if (r >= ep) continue;
      const size_t bytes = LINA_PEERS_FLAGS + room_out + room_back;
      buffers[r] = allocate(bytes), buffers_end[r] = buffers[r] + bytes;
      memset(buffers[r], 0, LINA_PEERS_FLAGS);
    }
    for (Round &r : rounds) {
      for (int me = 0; me < ep; me++) r.draw_rank(me, layers[r.layer], rounds);
      for (int me = 0; me < ep; me++) r.draw_results(me, layers[r.layer]);
    }
    for (int me = 0; me < ep; me++)
      for (int n = 0; n < (int)rounds.size(); n++) submit(me, n);
  }

  lina_peers_links links(int me, int n) {
    lina_peers_links l = {};
    l.ep = ep, l.rank = me, l.sms = ranks[me].sms, l.free_sms = ranks[me].free_sms;
    l.tag = (uint32_t)rounds[n].layer;
    if (fault == MISMATCH && me == odd && n == odd_round) l.tag += 100;
    l.timeout_ns = fault == DEATH ? 60000 : ~(uint64_t)0;
    for (int r = 0; r < ep; r++) l.buffer[r] = buffers[r];
    l.out_at = LINA_PEERS_FLAGS, l.back_at = LINA_PEERS_FLAGS + room_out;
    l.state = &states[me], l.look = ranks[me].look, l.word = &ranks[me].host;
    l.priority = rounds[n].raises ? &ranks[me].word : nullptr;
    return l;
  }

  /* Instead of this half of a round, and of all behind it. */
  bool stops(int me, int n, Half half) {
    if (fault != STOP || me != odd || n < odd_round || (n == odd_round && half < odd_half))
      return false;
    lina_peers_links all = links(me, n);
    all.priority = &ranks[me].word; /* the buffer's, whatever the round */
    if (n == odd_round && half == odd_half)
      lina_peers_poison_cuda(&all, LINA_PEERS_FAILED, nullptr);
    return true;
  }

  void submit(int me, int n) {
    Round &r = rounds[n];
    const Layer &l = layers[r.layer];
    launching = &ranks[me], launching_round = n;
    launching_half = OUT;
    if (stops(me, n, OUT)) return;
    const lina_peers_dispatch_args out = r.dispatch(me, l, links(me, n));
    if (lina_peers_dispatch_cuda(&out, nullptr) != LINA_OK) found("a dispatch is refused");
    launching_half = EXPERTS;
    launched_here([this, me, n] { experts(me, n); });
    launching_half = BACK;
    if (stops(me, n, BACK)) return;
    r.of[me].launched = true;
    const lina_peers_collect_args back = r.collect(me, l, links(me, n));
    if (lina_peers_collect_cuda(&back, nullptr) != LINA_OK) found("a collect is refused");
  }
  template <class F> static void launched_here(const F &body) {
    emulated_launch(1, 1, [](const void *it) { (*(const F *)it)(); }, &body, sizeof body);
  }

  /* A kernel between the two, which takes what has arrived. */
  void experts(int me, int n) {
    const Round &r = rounds[n];
    if (!fault && (states[me].failed || states[me].epoch[0] != (uint32_t)n + 1 ||
                   states[me].epoch[1] != (uint32_t)n || states[me].begun || states[me].sent))
      found("the state after a dispatch");
    if (!fault && ranks[me].word != (r.raises ? 2 * (uint32_t)n + 1 : 0))
      found("the priority word after a dispatch");
    const char *rows = buffers[me] + LINA_PEERS_FLAGS;
    r.check_arrived(me, layers[r.layer], rows, states[me].failed != 0);
  }

  bool step(int me, unsigned *block) {
    Rank &r = ranks[me];
    if (r.dead || r.stream.empty()) return false;
    Launch *l = r.stream.front().get();
    launch_begins(l);
    if (draw(3) == 0) *block = draw(64);
    Block *b = l->blocks[*block % l->blocks.size()].get();
    if (!b->started || b->alive) goes_on(b, l->threads, 1 + (int)draw(3));
    if (l->ended == l->blocks.size()) r.stream.pop_front(), moved = ticks;
    return true;
  }

  void go() {
    int me = 0, burst = 0;
    unsigned block = 0;
    for (;;) {
      ticks++;
      if ((fault == DEATH || fault == ABORT) && ticks > when) ranks[odd].dead = true;
      for (int r = 0; r < ep && fault == ABORT && ticks > when; r++) ranks[r].host.abort = 1;
      if (burst-- <= 0) me = (int)draw(ep), burst = draw(8) ? 1 + (int)draw(12) : 300;
      if (!step(me, &block)) {
        burst = 0;
        bool ended = true;
        for (int r = 0; r < ep; r++) ended = ended && (ranks[r].dead || ranks[r].stream.empty());
        if (ended) return;
      }
      if (ticks - moved > 1000000) found("ranks wait for ever");
    }
  }

  void check() {
    const int last = (int)rounds.size();
    for (int me = 0; me < ep; me++) {
      const bool failed = states[me].failed != 0;
      if (!fault && (failed || ranks[me].host.failure)) found("a failure where nothing failed");
      if (ranks[me].dead) continue;
      if (ranks[me].word) found("the priority word stays");
      if (!fault && (states[me].epoch[0] != (uint32_t)last ||
                     states[me].epoch[1] != (uint32_t)last || states[me].begun || states[me].sent))
        found("the state after all rounds");
      for (const Round &r : rounds)
        if (r.of[me].launched) r.check_back(me, layers[r.layer], failed);
    }
  }
};

static void run_one(int fault) {
  Run run((Fault)fault);
  run.go();
  run.check();
}

int main(int argc, char **argv) {
  return runs(argc, argv, {"none", "stop", "death", "mismatch", "abort"}, run_one);
}
