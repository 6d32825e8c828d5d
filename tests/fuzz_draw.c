/* fuzz_draw.c - see fuzz_draw.h. */
#include "fuzz_draw.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz_tensor.h"
#include "ops/experts.h"

/* ---- arguments, first valid ones ---- */

typedef struct {
  char kind;                     /* t tensor, o Tensor?, i int, b bool, f float */
  fake_tensor *tensor;
  int64_t integer;
  double real;
} argument;

static argument args[FUZZ_MAX_ARGS];
static int arg_count;

static void tensor(fake_tensor *t) { args[arg_count++] = (argument){'t', t, 0, 0}; }
static void optional(fake_tensor *t) { args[arg_count++] = (argument){'o', t, 0, 0}; }
static void integer(int64_t i) { args[arg_count++] = (argument){'i', NULL, i, 0}; }
static void boolean(int64_t i) { args[arg_count++] = (argument){'b', NULL, i, 0}; }
static void real(double f) { args[arg_count++] = (argument){'f', NULL, 0, f}; }
#define SHAPED(dtype, ...) \
  shaped(dtype, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__})
#define MAYBE(t) (once_in(2) ? (t) : NULL)

/* The layer's dimensions, its dtypes, and a routing that sort would give. */
static int64_t T, K, D, F, U, E, N;
static int32_t x_dtype, sum_dtype; /* A of the contracts */
static int32_t expert_of[4096], row_pair[4096], pair_row[4096], offset[1026];

static void draw_layer(void) {
  static const int32_t floats[] = {FAKE_F32, FAKE_F32, FAKE_BF16, FAKE_F16, FAKE_F64};
  T = between(0, once_in(4) ? 40 : 9);
  E = once_in(10) ? between(65, 1024) : between(1, 17);
  K = between(1, E < 8 ? E : once_in(10) && E > 32 ? 32 : 8);
  D = between(once_in(8) ? 0 : 1, 20), F = between(once_in(8) ? 0 : 1, 20);
  N = T * K;
  x_dtype = ONE_OF(floats);
  sum_dtype = x_dtype == FAKE_F64 ? FAKE_F64 : FAKE_F32;
  bool absent = once_in(4), crowded = once_in(6);
  memset(offset, 0, sizeof offset);
  for (int64_t p = 0; p < N; p++) {
    expert_of[p] = absent && once_in(3) ? -1 : crowded ? 0 : (int32_t)between(0, E - 1);
    if (expert_of[p] >= 0) offset[expert_of[p] + 1]++;
    row_pair[p] = pair_row[p] = -1;
  }
  int32_t next[1025];
  for (int64_t e = 0; e < E; e++) next[e] = offset[e + 1] += offset[e], next[e] = offset[e];
  for (int64_t p = 0; p < N; p++)
    if (expert_of[p] >= 0) {
      pair_row[p] = next[expert_of[p]]++;
      row_pair[pair_row[p]] = (int32_t)p;
    }
}

static void draw_gate(bool backward) {
  int64_t groups = 1, tops = 1;
  E = once_in(4) ? between(1, 1024) : between(1, 40);
  if (once_in(3)) {
    groups = between(1, 8), tops = between(1, groups);
    E = groups * between(1, 32);
  }
  int64_t room = tops * (E / groups);
  K = between(1, room < 32 ? room : 32);
  tensor(SHAPED(x_dtype, T, E));
  if (backward) {
    int32_t ids[40 * 32];
    for (int64_t p = 0; p < T * K; p++) ids[p] = (int32_t)((p % K + p / K) % E);
    tensor(contiguous_i32(2, T, K, ids));
    optional(MAYBE(SHAPED(sum_dtype, T, K)));
    optional(MAYBE(SHAPED(sum_dtype, E + 1)));
  } else {
    optional(MAYBE(SHAPED(sum_dtype, E)));
    integer(K);
  }
  integer(between(0, 2));
  boolean(between(0, 1));
  real(any_double());
  if (backward) return;
  integer(groups), integer(tops), integer(between(1, 2));
  boolean(between(0, 1));
}

static void draw_experts(bool backward) {
  int activation = (int)between(0, LINA_SILU);
  bool by_token = once_in(2);
  /* Indices may be cut down to the pairs that are present. */
  int64_t rows = once_in(2) ? N : between(offset[E], N);
  U = lina_activation_is_gated(activation) ? 2 * F : F;
  if (backward) {
    tensor(SHAPED(x_dtype, by_token ? T : rows, D));
    optional(by_token ? SHAPED(sum_dtype, T, K) : NULL);
  }
  tensor(SHAPED(x_dtype, T, D));
  if (backward) tensor(SHAPED(x_dtype, rows, U));
  tensor(contiguous_i32(1, E + 1, 1, offset));
  tensor(contiguous_i32(1, rows, 1, row_pair));
  if (backward) tensor(contiguous_i32(2, T, K, pair_row));
  tensor(SHAPED(x_dtype, E, U, D));
  if (!backward) optional(MAYBE(SHAPED(x_dtype, E, U)));
  tensor(SHAPED(x_dtype, E, D, F));
  optional(MAYBE(SHAPED(x_dtype, E, D)));
  const bool kept = backward && once_in(3);
  if (backward) {
    optional(kept ? SHAPED(x_dtype, rows, U) : NULL);
    optional(kept ? SHAPED(x_dtype, rows, F) : NULL);
  }
  if (!backward) integer(K);
  integer(activation);
  boolean(between(0, 1));
  real(any_double()), real(any_double());
  if (backward)
    integer(between(0, 127) & (kept ? ~66 : 127));
  else
    boolean(between(0, 1));
}

static void draw_dispatch(void) {
  const int64_t ep = once_in(8) ? E : between(1, E < 9 ? E : 9);
  for (int64_t p = 0; p < N && once_in(3); p++) expert_of[p] = (int32_t)fuzz_random();
  tensor(contiguous_i32(2, T, K, expert_of));
  tensor(SHAPED(FAKE_I64, between(0, 16)));
  integer(ep * (E / ep)), integer(ep), integer(between(-1, ep - 1));
  integer(between(1, 8)), integer(between(0, 8));
}

static void draw_valid(const char *op_name) {
  arg_count = 0;
  draw_layer();
  if (strcmp(op_name, "gate_fwd") == 0) {
    draw_gate(false);
  } else if (strcmp(op_name, "gate_bwd") == 0) {
    draw_gate(true);
  } else if (strcmp(op_name, "sort") == 0) {
    for (int64_t p = 0; p < N && once_in(3); p++)
      expert_of[p] = (int32_t)fuzz_random(); /* any id is lawful */
    tensor(contiguous_i32(2, T, K, expert_of));
    integer(E);
  } else if (strcmp(op_name, "dispatch_layout") == 0) {
    draw_dispatch();
  } else if (strcmp(op_name, "experts_fwd") == 0) {
    draw_experts(false);
  } else if (strcmp(op_name, "experts_bwd") == 0) {
    draw_experts(true);
  } else if (strcmp(op_name, "combine_fwd") == 0) {
    tensor(SHAPED(x_dtype, N, D));
    optional(MAYBE(SHAPED(sum_dtype, T, K)));
    tensor(contiguous_i32(2, T, K, pair_row));
  } else if (strcmp(op_name, "combine_bwd") == 0) {
    tensor(SHAPED(x_dtype, T, D));
    tensor(SHAPED(x_dtype, N, D));
    optional(MAYBE(SHAPED(sum_dtype, T, K)));
    tensor(contiguous_i32(2, T, K, pair_row));
    tensor(contiguous_i32(1, N, 1, row_pair));
  } else {
    fprintf(stderr, "fuzz: no valid arguments are known for operator %s\n", op_name);
    exit(2);
  }
}

/* ---- then spoiled ones ---- */

static void spoil(argument *a) {
  if (a->kind == 'i' || a->kind == 'b') a->integer = any_int();
  if (a->kind == 'f') a->real = any_double();
  if (a->kind != 't' && a->kind != 'o') return;
  fake_tensor *old = a->tensor;
  a->tensor = NULL;
  if (old && once_in(2)) { /* the same but for one thing */
    int64_t size[FAKE_MAX_DIM];
    memcpy(size, old->size, sizeof size);
    int64_t dim = old->dim;
    int32_t dtype = once_in(3) ? any_dtype() : old->dtype;
    if (once_in(3) && dim < 4)
      size[dim++] = between(0, 2);
    else if (dim > 0)
      size[between(0, dim - 1)] += between(-1, 1);
    for (int64_t i = 0; i < dim; i++)
      if (size[i] < 0) size[i] = 0;
    a->tensor = shaped(dtype, (int)dim, size); /* an index tensor's zeros stay in range */
  } else if (!once_in(6)) {
    a->tensor = any_tensor();
  }
  if (old) fake_delete(old);
}

int fuzz_draw(const char *op_name, uint64_t *stack) {
  draw_valid(op_name);
  if (!once_in(3))
    for (int64_t n = between(1, 3); n > 0; n--) spoil(&args[between(0, arg_count - 1)]);
  for (int i = 0; i < arg_count; i++) {
    const argument *a = &args[i];
    switch (a->kind) {
      case 't': stack[i] = (uint64_t)(uintptr_t)a->tensor; break;
      case 'o': stack[i] = fake_optional(a->tensor); break;
      case 'f': memcpy(&stack[i], &a->real, 8); break;
      /* A bool fills one byte of its cell; the others may hold anything. */
      case 'b': stack[i] = (fuzz_random() & ~0xffull) | (a->integer & 1); break;
      default: stack[i] = (uint64_t)a->integer;
    }
  }
  return arg_count;
}
