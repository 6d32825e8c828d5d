/* fuzz_comm_round.c - one round of fuzz_comm.c: operations drawn, issued and checked. */
#define _GNU_SOURCE
#include "fuzz_comm.h"

#include <stdlib.h>
#include <string.h>

#include "comm/priority.h"
#include "dtype.h"
#include "error.h"
#include "splitmix.h"

/* ---- one operation: drawn alike on all ranks ---- */

typedef enum { A2A, ALL_REDUCE, REDUCE_SCATTER } op_kind;

typedef struct {
  op_kind kind;
  int how, dtype, element;
  uint64_t salt;
  int64_t count;
  bool mean, gently;
  lina_policy policy;
  /* This rank's. */
  char *in, *out, *scratch;
  int64_t send[MAX_RANKS], receive[MAX_RANKS], bytes;
} op;

/* Bytes from one rank to another: often none, seldom from anybody. */
static int64_t a2a_bytes(const op *o, int source, int target) {
  uint64_t state = o->salt + (uint64_t)source * 64 + (uint64_t)target;
  if (splitmix(&state) % 4 == 0) return 0;
  return (int64_t)(splitmix(&state) % (o->count + 1));
}

static char a2a_byte(const op *o, int source, int target, int64_t i) {
  return (char)(o->salt + (uint64_t)(source * 31 + target * 17) + (uint64_t)i * 7);
}

static int term(const op *o, int rank, int64_t i) {
  return 12 * (int)(1 + ((uint64_t)i * 7 + (uint64_t)rank * 13 + o->salt) % 5);
}

static void put(char *to, int dtype, int64_t i, int value) {
  float narrow = (float)value;
  uint32_t bits;
  memcpy(&bits, &narrow, sizeof bits);
  if (dtype == LINA_F64) ((double *)to)[i] = value;
  if (dtype == LINA_F32) ((float *)to)[i] = narrow;
  if (dtype == LINA_BF16) ((uint16_t *)to)[i] = (uint16_t)(bits >> 16);
}

static void draw(op *o, uint64_t *random, bool *raised) {
  static const int dtypes[] = {LINA_F32, LINA_F64, LINA_BF16};
  memset(o, 0, sizeof *o);
  o->kind = (op_kind)(splitmix(random) % 3);
  o->salt = splitmix(random);
  o->dtype = dtypes[splitmix(random) % 3];
  o->element = o->dtype == LINA_F64 ? 8 : o->dtype == LINA_F32 ? 4 : 2;
  o->count = (int64_t)(splitmix(random) % (splitmix(random) % 8 == 0 ? 2 : 1500));
  o->mean = splitmix(random) % 2;
  o->gently = splitmix(random) % 4 > 0;
  if (o->kind == A2A) {
    /* A raise may come with an earlier operation than its lower. */
    o->how = splitmix(random) % 3 ? LINA_A2A_RAISE : 0;
    if (*raised || o->how) o->how |= splitmix(random) % 2 ? LINA_A2A_LOWER : 0;
    *raised = (*raised || o->how & LINA_A2A_RAISE) && !(o->how & LINA_A2A_LOWER);
  }
  /* At 1 byte/ns: 200 to 4,000 bytes a micro-op; a unit of 3 bytes is no element's. */
  lina_link link = {0, 1e-9};
  double seconds = 1e-9 * (double)(200 + splitmix(random) % 3800);
  fine(lina_policy_init(&o->policy, link, seconds, splitmix(random) % 8 ? 16 : 3), "a policy");
}

static void fill(op *o, const rank_state *s) {
  int64_t in = 0, out = 0, parts = o->kind == REDUCE_SCATTER ? s->size : 1;
  if (o->kind == A2A) {
    for (int r = 0; r < s->size; r++) {
      in += o->send[r] = a2a_bytes(o, s->rank, r);
      out += o->receive[r] = a2a_bytes(o, r, s->rank);
    }
  } else {
    in = o->count * o->element * parts, out = o->count * o->element;
  }
  o->bytes = out;
  o->in = malloc((size_t)in + 1), o->out = malloc((size_t)out + 1);
  o->scratch = malloc((size_t)in + 1);
  memset(o->out, 0x5a, (size_t)out + 1);
  if (o->kind == A2A) {
    int64_t at = 0;
    for (int r = 0; r < s->size; r++)
      for (int64_t i = 0; i < o->send[r]; i++) o->in[at++] = a2a_byte(o, s->rank, r, i);
  } else {
    char *to = o->kind == ALL_REDUCE ? o->out : o->in;
    for (int64_t i = 0; i < o->count * parts; i++) put(to, o->dtype, i, term(o, s->rank, i));
  }
}

static int start(op *o, rank_state *s) {
  const lina_policy *policy = o->gently ? &o->policy : NULL;
  if (o->kind == A2A) {
    lina_all_to_all a = {o->in, o->out, o->send, o->receive};
    return lina_comm_all_to_all(s->tokens, &a, o->how, s->a2a);
  }
  if (o->kind == ALL_REDUCE) {
    lina_all_reduce a = {o->out, o->count, o->dtype, o->mean, policy};
    return lina_comm_all_reduce(s->gradients, &a, s->reduce);
  }
  lina_reduce_scatter a = {.parts = o->in,
                           .out = o->out,
                           .scratch = o->scratch,
                           .count = o->count,
                           .scratch_bytes = o->bytes * s->size,
                           .dtype = o->dtype,
                           .mean = o->mean,
                           .policy = policy};
  return lina_comm_reduce_scatter(s->gradients, &a, s->reduce);
}

static void check(const op *o, const rank_state *s) {
  char *wanted = malloc((size_t)o->bytes + 1);
  int64_t at = 0, parts = o->kind == REDUCE_SCATTER ? s->rank : 0;
  if (o->kind == A2A) {
    for (int r = 0; r < s->size; r++)
      for (int64_t i = 0; i < o->receive[r]; i++) wanted[at++] = a2a_byte(o, r, s->rank, i);
  } else {
    for (int64_t i = 0; i < o->count; i++) {
      int total = 0;
      for (int r = 0; r < s->size; r++) total += term(o, r, parts * o->count + i);
      put(wanted, o->dtype, i, o->mean ? total / s->size : total);
    }
  }
  wanted[o->bytes] = 0x5a;
  for (int64_t i = 0; i <= o->bytes; i++)
    if (wanted[i] != o->out[i])
      fake_broken("rank %d of %d: kind %d, dtype %d: byte %lld of %lld is wrong", s->rank, s->size,
                  (int)o->kind, o->dtype, (long long)i, (long long)o->bytes);
  free(wanted);
}

/* Micro-ops of a reduction: as many as the policy's size says, by its own text. */
static int64_t micro_ops(const op *o) {
  int64_t left = o->count * o->element, size = o->policy.size, n = 0;
  if (o->policy.unit % o->element && size % o->element) return left > 0;
  for (; left > 0; n++) left = 2 * (left - size) < size ? 0 : left - size;
  return n;
}

static void compare(const char *what, int64_t got, int64_t wanted) {
  if (got != wanted) fake_broken("%lld %s, not %lld", (long long)got, what, (long long)wanted);
}

/* What the streams should have done after `o`. */
static void expect_counts(const op *o, const rank_state *s, bool *raised, fake_counts *a2a,
                          fake_counts *reduce) {
  if (o->kind != A2A) {
    int64_t n = o->gently ? micro_ops(o) : o->count > 0;
    *(o->gently ? &reduce->waited : &reduce->at_once) += n;
    reduce->writes += n;
    return;
  }
  int64_t moved = o->bytes;
  for (int r = 0; r < s->size; r++) moved += o->send[r];
  if (o->how & LINA_A2A_RAISE) *raised = true, a2a->writes++;
  a2a->raised += *raised && moved > 0; /* NCCL is given nothing to do for no bytes */
  a2a->writes++;
  if (o->how & LINA_A2A_LOWER) *raised = false, a2a->writes++;
}

void run_round(rank_state *s, uint64_t seed) {
  op ops[MAX_OPS];
  int count = (int)(1 + splitmix(&seed) % MAX_OPS);
  bool drawn = false, raised = false;
  fake_counts a2a = fake_stream_counts(s->a2a), reduce = fake_stream_counts(s->reduce);
  for (int i = 0; i < count; i++) {
    draw(&ops[i], &seed, &drawn);
    fill(&ops[i], s);
    expect_counts(&ops[i], s, &raised, &a2a, &reduce);
    fake_nap();
    fine(start(&ops[i], s), "an operation");
  }
  if (raised) fine(lina_priority_lower(s->rank, s->a2a), "lowering"), a2a.writes++;
  drain(s, "after a round");
  for (int i = 0; i < count; i++) {
    check(&ops[i], s);
    free(ops[i].in), free(ops[i].out), free(ops[i].scratch);
    lina_policy_free(&ops[i].policy);
  }
  fake_counts a2a_now = fake_stream_counts(s->a2a), reduce_now = fake_stream_counts(s->reduce);
  compare("micro-ops waited", reduce_now.waited, reduce.waited);
  compare("reductions did not wait", reduce_now.at_once, reduce.at_once);
  compare("reductions were counted", reduce_now.writes, reduce.writes);
  compare("exchanges began under a raised gate", a2a_now.raised, a2a.raised);
  compare("raises, lowers and counts", a2a_now.writes, a2a.writes);
  fine(lina_comm_check(s->tokens), "tokens");
  fine(lina_comm_check(s->gradients), "gradients");
}
