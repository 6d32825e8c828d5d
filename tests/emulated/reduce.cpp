/* reduce.cpp - the text of peers_reduce.cu and of its host's loop of turns, for 2 to 8 ranks.
 *
 *   reduce FIRST COUNT FAULT    numbers to draw by; FAULT: none, death, mismatch, abort
 *
 * Each run draws calls of some sizes, gentle or not, among all-to-alls that raise and lower
 * every rank's word, or words raised at random; then which rank, stream, block and thread goes
 * on. Looked for: wrong sums, elements past the end, flags that are lowered, barriers that some
 * threads do not reach, notices left behind, and ranks that wait for ever. After a fault
 * what is not the sum is NaN, or as it was where nothing was launched.
 */
#include "plain.h"

#include <deque>

#include "cuda/peers_reduce.h"
#include "error.h"

template <class T> constexpr int in_16_bytes = 16 / (int)sizeof(T);
template <class T, int N> struct lina_vector {
  static void widen(uint4 v, float *f) {
    T t[N];
    memcpy(t, &v, 16);
    for (int i = 0; i < N; i++) f[i] = t[i];
  }
  static uint4 narrow(const float *f) {
    T t[N];
    uint4 v;
    for (int i = 0; i < N; i++) t[i] = (T)f[i];
    memcpy(&v, t, 16);
    return v;
  }
};
static bool lina_aligned(const void *p, size_t bytes) { return ((uintptr_t)p & (bytes - 1)) == 0; }
static int64_t lina_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
extern "C" int lina_error(int code, const char *, ...) { return code; }
static int lina_launched(const char *) { return LINA_OK; }
static int cudaGetDevice(int *) { return cudaSuccess; }
static double hold_s;
static int64_t turn_count;
#define LINA_PRIORITY_HOLD_S hold_s
#define TURN_COUNT           turn_count

/* ---- a rank's streams ---- */

enum Kind { WAIT_FOR_0, KERNEL, CALL_ENDS };
struct Op {
  Kind kind;
  std::shared_ptr<Kernel> kernel;
  int call;
};
enum Does { SUBMIT, EXCHANGE, WAIT };
struct Item { /* of the compute stream; n: a call, an all-to-all, calls that are to have ended */
  Does does;
  int n;
};
struct Rank {
  std::deque<Op> stream; /* of reductions */
  size_t at = 0; /* in the program */
  bool exchanging = false, dead = false;
  uint32_t word = 0;
  int ended = 0; /* calls */
  lina_peers_state state = {};
  lina_peers_word host = {};
  std::vector<uint64_t> memory;
  char *buffer;
};
static std::vector<Rank> ranks;
static Rank *launching;

static uint32_t *lina_priority_word(int) { return &launching->word; }
static int lina_priority_wait(int, void *) {
  launching->stream.push_back({WAIT_FOR_0, nullptr, 0});
  return LINA_OK;
}
template <class K, class A, class P>
static void launched(K kernel, unsigned blocks, const A &a, const P &p);
template <class T> static int reduce_on_device(lina_peers_reduce_args *a);

#include "kernel.h" /* the kernel's text, Shared, and reduce() */

template <class K, class A, class P>
static void launched(K kernel, unsigned blocks, const A &a, const P &p) {
  auto k = std::make_shared<Kernel>();
  k->body = [kernel, a, p] { kernel(a, p); };
  for (unsigned b = 0; b < blocks; b++) {
    k->blocks.emplace_back(new Block{k.get(), b, std::unique_ptr<Shared>(new Shared), {}});
    memset((void *)k->blocks.back()->shared.get(), 0xa5, sizeof(Shared));
  }
  launching->stream.push_back({KERNEL, k, 0});
}
template <class T> static int reduce_on_device(lina_peers_reduce_args *a) {
  return a->count == 0 ? LINA_OK : launch<T>(a, nullptr);
}

/* What on the stream of reductions need not wait. */
static void advance(Rank &r) {
  for (; !r.stream.empty(); r.stream.pop_front(), moved = ticks) {
    const Op &op = r.stream.front();
    if (op.kind == WAIT_FOR_0 && r.word) return;
    if (op.kind == KERNEL && op.kernel->ended < op.kernel->blocks.size()) return;
    if (op.kind == CALL_ENDS) r.ended = op.call + 1;
  }
}

/* ---- a run ---- */

enum Fault { NONE, DEATH, MISMATCH, ABORT };
enum { OUT_AT = 256, PAST = 16 }; /* elements behind a call's that must stay */

template <class T> struct Call {
  int64_t count;
  int askew;
  bool mean;
  std::vector<bool> gently; /* by rank */
  std::vector<std::vector<T>> before, data;
  std::vector<double> want;
  T *at(int rank) { return data[rank].data() + askew; }
};

template <class T> struct Run {
  Fault fault;
  bool matched, watched; /* words by all-to-alls; lowered at random besides */
  int ep, blocks, odd, odd_call;
  int64_t tile_bytes;
  bool scatter;
  uint64_t when; /* the fault comes */
  std::vector<Call<T>> calls;
  std::vector<Item> program;
  std::vector<int> raised; /* ranks that have, by all-to-all */

  explicit Run(Fault f) : fault(f) {
    ep = draw(3) ? 2 + (int)draw(3) : 2 + (int)draw(7);
    scatter = ep > 2 || draw(2);
    blocks = 1 + (int)draw(ep > 4 ? 3 : 5), tile_bytes = (int64_t)4096 << draw(2);
    matched = draw(2), watched = !matched || fault || draw(3) == 0;
    hold_s = watched && draw(3) == 0 ? (2000 + draw(20000)) * 1e-9 : 1e9;
    turn_count = 500 + draw(8000);
    ticks = moved = 0, when = draw(400000);
    ranks.clear(), ranks.resize(ep);
    const int64_t bytes = OUT_AT + lina_peers_reduce_bytes(ep, blocks, tile_bytes, scatter);
    for (Rank &r : ranks) {
      r.memory.assign(bytes / 8 + 2, 0x5555555555555555u);
      r.buffer = (char *)(((uintptr_t)r.memory.data() + 15) & ~(uintptr_t)15);
      memset(r.buffer + OUT_AT, 0, LINA_REDUCE_RINGS_AT);
    }
    calls.resize(5 + draw(8));
    for (Call<T> &c : calls) make(c);
    odd = (int)draw(ep), odd_call = (int)draw((uint32_t)calls.size());
    int submitted = 0, awaited = 0;
    while (awaited < (int)calls.size()) {
      const uint32_t kind = draw(6);
      if (kind < 2 && submitted < (int)calls.size())
        program.push_back({SUBMIT, submitted++});
      else if (kind < 5 && matched && raised.size() < 60)
        program.push_back({EXCHANGE, (int)raised.size()}), raised.push_back(0);
      else if (awaited < submitted && draw(3) == 0)
        program.push_back({WAIT, awaited += 1 + (int)draw(submitted - awaited)});
    }
  }

  void make(Call<T> &c) {
    static const uint32_t most[] = {1, 10, 3000, 3000, 20000, 20000, 20000, 60000};
    c.count = draw(most[draw(8)]), c.askew = draw(3) == 0;
    c.mean = sizeof(T) == 4 && (ep & (ep - 1)) == 0 && draw(2); /* exact */
    c.want.assign(c.count, 0);
    const uint32_t way = draw(4);
    for (int r = 0; r < ep; r++) {
      c.gently.push_back(way == 0 ? false : way == 1 ? draw(2) : true); /* ranks may differ */
      c.data.emplace_back(c.askew + c.count + PAST);
      for (T &x : c.data.back()) x = (T)(int)draw(1000);
      for (int64_t i = 0; i < c.count; i++) c.want[i] += c.at(r)[i] / (c.mean ? (double)ep : 1.0);
    }
    c.before = c.data;
  }

  void submit(int me, int n) {
    Rank &r = ranks[me];
    Call<T> &c = calls[n];
    lina_peers_reduce_args a = {};
    a.links.ep = ep, a.links.rank = me, a.links.out_at = OUT_AT;
    for (int q = 0; q < ep; q++) a.links.buffer[q] = ranks[q].buffer;
    a.links.state = &r.state, a.links.word = &r.host;
    a.links.timeout_ns = fault ? 400000 : ~(uint64_t)0;
    a.blocks = blocks, a.tile_bytes = tile_bytes, a.scatter = scatter;
    a.data = c.at(me), a.count = c.count, a.dtype = 0, a.mean = c.mean;
    if (fault == MISMATCH && me == odd && n == odd_call && a.count > 40) a.count -= 1 + draw(30);
    launching = &r;
    if (!r.host.failure && !r.host.abort && reduce<T>(&a, c.gently[me]) != LINA_OK)
      found("a call fails");
    r.stream.push_back({CALL_ENDS, nullptr, n});
  }

  /* The compute stream and the all-to-alls'. */
  void step(int me) {
    Rank &r = ranks[me];
    if (r.at == program.size() || draw(3)) return;
    const Item it = program[r.at];
    bool done = it.does == SUBMIT || (it.does == WAIT && r.ended >= it.n);
    if (it.does == SUBMIT) submit(me, it.n);
    if (it.does == EXCHANGE && !r.exchanging) {
      r.word = 2 * (uint32_t)it.n + 1, raised[it.n]++, r.exchanging = true, moved = ticks;
    } else if (it.does == EXCHANGE) {
      int awaited = ep;
      for (const Rank &q : ranks) awaited -= q.dead;
      done = raised[it.n] >= awaited && draw(6) == 0;
      if (done) r.word = 0, r.exchanging = false;
    }
    if (done) r.at++, moved = ticks;
  }

  bool ended() const {
    for (const Rank &r : ranks)
      if (!r.dead && (r.at < program.size() || !r.stream.empty())) return false;
    return true;
  }

  void go() {
    int me = 0, burst = 0;
    unsigned block = 0;
    while (!ended()) {
      ticks++;
      if (fault == DEATH && ticks > when) ranks[odd].dead = true;
      if (fault == ABORT && ticks > when) ranks[odd].host.abort = 1;
      if (!matched && draw(60) == 0) {
        Rank &r = ranks[draw(ep)];
        r.word = r.word || draw(3) == 0 ? 0 : 1 + draw(1000);
      }
      if (watched && draw(20000) == 0) ranks[draw(ep)].word = 0;
      if (burst-- <= 0) me = (int)draw(ep), burst = draw(8) ? 1 + (int)draw(12) : 300;
      Rank &r = ranks[me];
      if (r.dead) continue;
      step(me);
      advance(r);
      if (!r.stream.empty() && r.stream.front().kind == KERNEL) {
        Kernel &k = *r.stream.front().kernel;
        if (draw(3) == 0) block = draw(64);
        Block *b = k.blocks[block % k.blocks.size()].get();
        if (!b->started || b->alive) goes_on(b, THREADS, 1 + (int)draw(3));
        advance(r);
      }
      if (ticks - moved > 30000000) found("ranks wait for ever");
    }
  }

  void check() {
    for (int me = 0; me < ep; me++) {
      const Rank &r = ranks[me];
      const bool failed = r.state.failed || r.host.failure || r.host.abort;
      if (r.dead) continue;
      if (!fault && failed) found("a failure where nothing failed");
      const uint32_t *told = (const uint32_t *)(r.buffer + OUT_AT + LINA_REDUCE_TOLD_AT);
      if (told[0] || told[1]) found("blocks are told of a raise after all calls");
      for (Call<T> &c : calls) {
        const T *was = c.before[me].data() + c.askew, *is = c.at(me);
        const bool cut = fault == MISMATCH && me == odd && &c == &calls[odd_call];
        for (int64_t i = 0; i < c.count; i++)
          if (is[i] != c.want[i] && !(fault && is[i] != is[i]) &&
              !(fault && failed && is[i] == was[i]) && !(cut && i >= c.count - 30))
            found("a wrong sum");
        for (int64_t i = c.count; i < c.count + PAST - 1; i++)
          if (is[i] != was[i]) found("an element past the end");
      }
    }
  }
};

template <class T> static void run_of(Fault fault) {
  Run<T> run(fault);
  run.go();
  run.check();
}
static void run_one(int fault) {
  if (!fault && draw(2)) /* integers know no NaN */
    run_of<int16_t>((Fault)fault);
  else
    run_of<float>((Fault)fault);
}

int main(int argc, char **argv) {
  return runs(argc, argv, {"none", "death", "mismatch", "abort"}, run_one);
}
