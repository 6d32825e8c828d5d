/* link.h - what an operation costs: t = alpha_s + n * beta_s seconds.
 *
 * n counts bytes for a collective, rows for an expert pass, operations for a
 * product; alpha_s is what it costs before the first of them. Source: FSMoE,
 * arXiv:2501.10714. Differs: times are fitted by their relative
 * error, for sizes span five decades and absolute errors would fit the largest
 * alone; neither term may be negative.
 *
 *   alpha_s  seconds, finite, >= 0
 *   beta_s   seconds a unit, finite, >= 0
 */
#ifndef LINA_PLAN_LINK_H
#define LINA_PLAN_LINK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct { double alpha_s, beta_s; } lina_link;

/* The line that minimises sum (1 - fit(n[i]) / t[i])^2 over alpha_s, beta_s >= 0.
 * Where the free minimum has a negative term, that term is 0 and the other is
 * fitted again.
 *
 *   n      in   [count]  units, finite, >= 0, not all equal
 *   t      in   [count]  seconds, finite, > 0
 *   r2     out  1 - E/C: E is the sum above, C the same sum for the best
 *               constant time. 0 (no better than a constant) .. 1 (exact; also
 *               where all times are equal). May be NULL.
 *
 * Errors: LINA_EINVAL (count < 2, n or t outside the limits above, a result
 * that is not finite); outputs are then untouched.
 */
int lina_link_fit(const double *n, const double *t, int64_t count, lina_link *link, double *r2);

/* LINA_EINVAL, naming `who` and `name`, unless both terms are finite and >= 0. */
int lina_link_check(const char *who, const char *name, lina_link link);

/* Seconds of n units; n < 0 counts as 0. */
double lina_link_time(lina_link link, double n);

/* The same where nothing at all is started for n <= 0: then 0 seconds. */
double lina_link_cost(lina_link link, double n);

/* g^-1: the most units done within `seconds`. 0 where seconds < alpha_s or is
 * NaN; infinity where beta_s = 0. */
double lina_link_units(lina_link link, double seconds);

#ifdef __cplusplus
}
#endif
#endif
