/* fuzz_plan.h - what the random calls of csrc/plan share. */
#ifndef LINA_FUZZ_PLAN_H
#define LINA_FUZZ_PLAN_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "error.h"
#include "plan/link.h"

/* Ends the run, naming what does not hold and the call that repeats it. */
#define MUST(condition)                                                                 \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      fprintf(stderr, "plan: %s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, \
              #condition, lina_error_text());                                           \
      abort();                                                                          \
    }                                                                                   \
  } while (0)

extern bool wild; /* whether this call's arguments may be anything */

uint64_t draw(void);
int64_t between(int64_t low, int64_t high);
bool once_in(int n);
#define ONE_OF(list) list[between(0, (int64_t)(sizeof list / sizeof list[0]) - 1)]

/* 10^low .. 10^high, evenly over the decades; sometimes 0. */
double amount(double low, double high);
/* low .. high, evenly. */
int64_t whole(int64_t low, int64_t high);
lina_link any_link(void);

/* Whether the call with this result took its arguments; a refusal must come with
 * its text, and only wild arguments may be refused. */
bool taken(int rc);
bool close_to(double a, double b);

/* One random call each; whether it took its arguments. */
bool try_link(void);
bool try_policy(void);
bool try_fill(void);
bool try_pipeline(void);
bool try_packing(void);

#endif
