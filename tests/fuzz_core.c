/* fuzz_core.c - random calls of every operator, over the fake libtorch, built
 * with AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer.
 *
 *   fuzz [calls [seed [first]]]
 *
 * Call i is drawn from seed and i alone, so `fuzz 1 SEED i` repeats call i. Its
 * arguments are those of fuzz_draw.h. Some calls run out of memory or see torch
 * fail half-way. After each one every tensor must be gone, and a refusal must
 * come with a text.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_torch.h"
#include "fuzz_draw.h"
#include "register.h"
#include "splitmix.h"

/* A full machine is an error to handle, and every death a signal to report. */
const char *__asan_default_options(void) { return "abort_on_error=1:allocator_may_return_null=1"; }
const char *__ubsan_default_options(void) { return "abort_on_error=1:print_stacktrace=1"; }

static const char *op_name;
static int64_t call;
static uint64_t seed;

static void on_abort(int number) {
  (void)number;
  fprintf(stderr, "fuzz: died in %s; repeat by: fuzz 1 %llu %lld\n", op_name,
          (unsigned long long)seed, (long long)call);
}

static void broken(const char *what) {
  fprintf(stderr, "fuzz: %s in %s; repeat by: fuzz 1 %llu %lld\n", what, op_name,
          (unsigned long long)seed, (long long)call);
  exit(1);
}

static int outputs(const char *schema) {
  const char *arrow = strstr(schema, "->");
  int count = 1;
  for (const char *c = arrow; *c; c++) count += *c == ',';
  return count;
}

/* 1 if the operator took the arguments, 0 if it refused them. */
static int call_once(const fake_op *op) {
  uint64_t stack[FUZZ_MAX_ARGS] = {0}; /* results are fewer */
  int nargs = fuzz_draw(op_name, stack);
  fake_fail(fuzz_random(), fuzz_random() % 4 == 0 ? 30 : 0);
  int nouts = outputs(op->schema);
  const char *text = fake_call(fuzz_random() % 8 == 0 ? op->cuda : op->cpu, stack, nargs, nouts);
  if (text) {
    if (strncmp(text, "lina: ", 6) != 0 || strlen(text) < 12) broken("refusal without a text");
  } else {
    for (int i = 0; i < nouts; i++) {
      if (!stack[i]) broken("missing result");
      fake_delete((fake_tensor *)(uintptr_t)stack[i]);
    }
  }
  if (fake_live() != 0) broken(text ? "leak after a refusal" : "leak after a success");
  return text == NULL;
}

int main(int argc, char **argv) {
  int64_t calls = argc > 1 ? strtoll(argv[1], NULL, 10) : 100000;
  seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  int64_t first = argc > 3 ? strtoll(argv[3], NULL, 10) : 0;
  signal(SIGABRT, on_abort);
  if (lina_register() != LINA_OK) {
    fprintf(stderr, "fuzz: %s\n", lina_error_text());
    return 1;
  }
  int count;
  const fake_op *ops = fake_ops(&count);
  int64_t taken[64] = {0}, total[64] = {0};
  for (call = first; call < first + calls; call++) {
    fuzz_seed(splitmix_call(seed, call));
    int i = (int)(fuzz_random() % (uint64_t)count);
    static char name[64];
    snprintf(name, sizeof name, "%.*s", (int)strcspn(ops[i].schema, "("), ops[i].schema);
    op_name = name;
    total[i]++;
    taken[i] += call_once(&ops[i]);
  }
  printf("fuzz: %lld calls, seed %llu\n", (long long)calls, (unsigned long long)seed);
  for (int i = 0; i < count; i++) {
    printf("  %-15.*s %7lld calls, %7lld taken, %7lld refused\n", (int)strcspn(ops[i].schema, "("),
           ops[i].schema, (long long)total[i], (long long)taken[i],
           (long long)(total[i] - taken[i]));
    /* A third of the calls are valid: too few taken means that lina refuses them. */
    if (calls >= 1000 && taken[i] * 5 < total[i]) {
      fprintf(stderr, "fuzz: %.*s refuses valid calls\n", (int)strcspn(ops[i].schema, "("),
              ops[i].schema);
      return 1;
    }
  }
  return 0;
}
