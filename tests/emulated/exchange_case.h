/* exchange_case.h - layers and rounds as exchange.cpp draws them, and what plain loops make of
 * them: the contract of peers.h, token by token. */
#ifndef LINA_TESTS_EXCHANGE_CASE_H
#define LINA_TESTS_EXCHANGE_CASE_H

#include <math.h>

#include <algorithm>

#include "races.h"

struct Layer {
  int ep, dtype, size;
  int64_t C, K, E, D, T[RANKS];

  explicit Layer(int ranks) : ep(ranks) {
    static const int widths[] = {1, 3, 4, 8, 8, 20, 24, 33, 70, 264};
    dtype = draw(3) == 0 ? LINA_BF16 : LINA_F32, size = dtype == LINA_F32 ? 4 : 2;
    const bool many = draw(10) == 0; /* than one block counts */
    D = widths[draw(many ? 5 : 10)], K = 1 + draw(many ? 2 : draw(4) ? 4 : 10);
    C = many ? 65 + draw(BLOCKS * THREADS - 64) : 1 + draw(D > 100 ? 4 : 14);
    E = ep * (1 + draw(4));
    for (int r = 0; r < ep; r++) T[r] = draw(5) == 0 ? 0 : draw(3) ? draw(C + 1) : C;
  }
  int64_t row() const { return D * size; }
  size_t bytes() const { return lina_peers_weights_at(ep * C, row()) + ep * C * K * 4; }
  float get(const char *p, int64_t i) const {
    uint32_t bits = 0;
    memcpy((char *)&bits + 4 - size, p + i * size, size);
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  float rounded(float f) const { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (size == 2) bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    memcpy(&f, &bits, 4);
    return f;
  }
};

/* What one rank has in a round. */
struct Part {
  char *x = nullptr, *x_out = nullptr, *y = nullptr, *out = nullptr;
  int32_t *expert, *slot, *count, *expert_out = nullptr, *pair_row = nullptr;
  float *weight, *weight_out = nullptr, *dweight = nullptr, *dweight_out = nullptr;
  std::vector<int> want_slot, sent; /* by token and rank; by rank */
  bool launched = false;
};

struct Round {
  int layer, forward = -1; /* the round whose slots this one takes, going backward */
  bool keeps, pairs, grads, raises;
  Part of[RANKS];

  Round(const std::vector<Layer> &layers, const std::vector<Round> &before) {
    layer = (int)draw((uint32_t)layers.size());
    if (!before.empty() && draw(3) == 0) {
      forward = (int)draw((uint32_t)before.size());
      if (before[forward].forward >= 0) forward = before[forward].forward;
      layer = before[forward].layer;
    }
    keeps = forward < 0 && draw(2), pairs = forward < 0 && draw(2), grads = !pairs && draw(2);
    raises = draw(2);
  }

  template <class T> static T *words_of(int64_t n) { return (T *)allocate(n * sizeof(T)); }
  static float any() {
    return (float)((int)draw(1 << 24) - (1 << 23)) / (float)(1 << (8 + draw(16)));
  }
  static char *rows(const Layer &l, int64_t n, bool filled) {
    char *p = allocate(n * l.row(), draw(4) ? 0 : l.size);
    for (int64_t i = 0; filled && i < n * l.D; i++) {
      const float f = l.rounded(any());
      memcpy(p + i * l.size, (const char *)&f + 4 - l.size, l.size);
    }
    if (filled) by_host(p, n * l.row(), HOST);
    return p;
  }
  static float *numbers(int64_t n) {
    float *p = words_of<float>(n);
    for (int64_t i = 0; i < n; i++) p[i] = any();
    by_host(p, n * 4, HOST);
    return p;
  }

  void route(int me, const Layer &l) {
    Part &p = of[me];
    const uint32_t way = draw(4), one = draw((uint32_t)l.E);
    p.expert = words_of<int32_t>(l.T[me] * l.K);
    for (int64_t i = 0; i < l.T[me] * l.K; i++) {
      static const int32_t absent[] = {-1, INT32_MIN, 1 << 20};
      p.expert[i] = (int32_t)(way == 0 ? one : draw((uint32_t)l.E));
      if (way > 1 && draw(way == 2 ? 8 : 2) == 0)
        p.expert[i] = draw(4) ? absent[draw(3)] : (int32_t)l.E;
    }
    by_host(p.expert, l.T[me] * l.K * 4, HOST);
    p.sent.assign(l.ep, 0), p.want_slot.assign(l.T[me] * l.ep, -1);
    for (int64_t t = 0; t < l.T[me]; t++)
      for (int d = 0; d < l.ep; d++)
        for (int64_t k = 0; k < l.K; k++)
          if (p.want_slot[t * l.ep + d] < 0 && holds(l, d, p.expert[t * l.K + k]))
            p.want_slot[t * l.ep + d] = p.sent[d]++;
  }
  static bool holds(const Layer &l, int rank, int32_t id) {
    const int64_t local = l.E / l.ep;
    return id >= rank * local && id < (rank + 1) * local;
  }

  void draw_rank(int me, const Layer &l, const std::vector<Round> &all) {
    Part &p = of[me];
    const int64_t ranks = l.ep;
    if (forward >= 0) {
      const Part &was = all[forward].of[me];
      p.expert = was.expert, p.slot = was.slot, p.count = was.count;
      p.want_slot = was.want_slot, p.sent = was.sent;
    } else {
      route(me, l);
      p.weight = numbers(l.T[me] * l.K);
      p.slot = words_of<int32_t>(l.T[me] * ranks), p.count = words_of<int32_t>(2 * ranks);
      p.weight_out = words_of<float>(ranks * l.C * l.K);
      p.expert_out = words_of<int32_t>(ranks * l.C * l.K);
    }
    p.x = rows(l, l.T[me], true), p.out = rows(l, l.T[me], false);
    if (keeps) p.x_out = rows(l, ranks * l.C, false);
    if (grads)
      p.dweight = numbers(ranks * l.C * l.K), p.dweight_out = words_of<float>(l.T[me] * l.K);
  }
  /* Behind draw_rank of all: rows by expert, in any order, of what arrives. */
  void draw_results(int me, const Layer &l) {
    Part &p = of[me];
    if (!pairs) {
      p.y = rows(l, l.ep * l.C, true);
      return;
    }
    std::vector<int32_t> places;
    p.pair_row = words_of<int32_t>(l.ep * l.C * l.K);
    for (int64_t i = 0; i < l.ep * l.C * l.K; i++) p.pair_row[i] = -1;
    for (int s = 0; s < l.ep; s++)
      for (int64_t t = 0; t < l.T[s]; t++)
        for (int64_t k = 0; k < l.K; k++)
          if (holds(l, me, of[s].expert[t * l.K + k]))
            places.push_back((int32_t)((s * l.C + of[s].want_slot[t * l.ep + me]) * l.K + k));
    std::shuffle(places.begin(), places.end(), chance);
    for (size_t i = 0; i < places.size(); i++) p.pair_row[places[i]] = (int32_t)i;
    by_host(p.pair_row, l.ep * l.C * l.K * 4, HOST);
    p.y = rows(l, (int64_t)places.size(), true);
  }

  lina_peers_dispatch_args dispatch(int me, const Layer &l, const lina_peers_links &links) const {
    const Part &p = of[me];
    return {links,
            l.T[me],
            l.C,
            l.K,
            l.E,
            l.row(),
            p.x,
            forward < 0 ? p.expert : nullptr,
            forward < 0 ? p.weight : nullptr,
            p.slot,
            p.count,
            p.x_out,
            p.weight_out,
            p.expert_out};
  }
  lina_peers_collect_args collect(int me, const Layer &l, const lina_peers_links &links) const {
    const Part &p = of[me];
    return {links,        l.T[me], l.C,     l.K,        l.E,
            l.D,          l.dtype, p.y,     p.pair_row, pairs ? p.weight_out : nullptr,
            p.dweight,    p.slot,  p.count, p.expert,   p.out,
            p.dweight_out};
  }

  /* ---- what should have come ---- */

  static void same(const void *got, const void *want, size_t bytes, const char *what) {
    touched(got, bytes, false);
    if (memcmp(got, want, bytes)) found(what);
  }
  static void same(int got, int want, const char *what) {
    if (got != want) found(what);
  }

  void check_arrived(int me, const Layer &l, const char *buffer, bool failed) const {
    const Part &p = of[me];
    for (int64_t i = 0; p.expert_out && failed && i < l.ep * l.C * l.K; i++)
      if (p.expert_out[i] < -1 || p.expert_out[i] >= l.E / l.ep) found("an id that nobody has");
    if (failed) return;
    same(p.slot, p.want_slot.data(), l.T[me] * l.ep * 4, "a wrong slot");
    same(p.count, p.sent.data(), l.ep * 4, "a wrong number of rows sent");
    for (int s = 0; s < l.ep; s++) {
      const Part &from = of[s];
      const int n = from.sent[me];
      same(p.count + l.ep + s, &n, 4, "a wrong number of rows received");
      for (int64_t t = 0; t < l.T[s]; t++) {
        const int slot = from.want_slot[t * l.ep + me];
        if (slot < 0) continue;
        const int64_t row = s * l.C + slot;
        same((p.x_out ? p.x_out : buffer) + row * l.row(), from.x + t * l.row(), l.row(),
             "a wrong row");
        if (!p.expert_out) continue;
        same(p.weight_out + row * l.K, from.weight + t * l.K, l.K * 4, "a wrong weight");
        for (int64_t k = 0; k < l.K; k++) {
          const int32_t id = from.expert[t * l.K + k], first = (int32_t)(me * (l.E / l.ep));
          const int32_t want = holds(l, me, id) ? id - first : -1;
          same(p.expert_out + row * l.K + k, &want, 4, "a wrong id");
        }
      }
      const int32_t none = -1;
      for (int64_t i = (s * l.C + n) * l.K; p.expert_out && i < (s + 1) * l.C * l.K; i++)
        same(p.expert_out + i, &none, 4, "an id behind the last row");
    }
  }

  /* Element i of the row that rank e has for row `row` of its parts. */
  float result(int e, const Layer &l, int64_t row, const float *weight, int64_t i) const {
    const Part &p = of[e];
    if (!pairs) return l.get(p.y, row * l.D + i);
    float sum = 0;
    for (int64_t k = 0; k < l.K; k++)
      if (p.pair_row[row * l.K + k] >= 0)
        sum = fmaf(weight[k], l.get(p.y, p.pair_row[row * l.K + k] * l.D + i), sum);
    return l.rounded(sum);
  }
  void check_back(int me, const Layer &l, bool failed) const {
    const Part &p = of[me];
    for (int64_t t = 0; t < l.T[me]; t++) {
      for (int64_t i = 0; i < l.D; i++) {
        float want = 0;
        for (int e = 0; e < l.ep; e++) {
          const int slot = p.want_slot[t * l.ep + e];
          if (slot >= 0) want += result(e, l, me * l.C + slot, p.weight + t * l.K, i);
        }
        want = l.rounded(want);
        const float got = l.get(p.out, t * l.D + i);
        if (memcmp(&got, &want, 4) && !(failed && got != got)) found("a wrong sum");
      }
      for (int64_t k = 0; p.dweight_out && k < l.K; k++) {
        float want = 0;
        for (int e = 0; e < l.ep; e++)
          if (holds(l, e, p.expert[t * l.K + k]))
            want = of[e].dweight[(me * l.C + p.want_slot[t * l.ep + e]) * l.K + k];
        const float got = p.dweight_out[t * l.K + k];
        if (memcmp(&got, &want, 4) && !(failed && got != got))
          found("a wrong gradient of a weight");
      }
    }
  }
};

#endif
