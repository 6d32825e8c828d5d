/* link.c - fitting a line to measured times, and reading it both ways. */
#include "link.h"

#include <math.h>

#include "../error.h"

/* Sums over the points, with u = least / t and v = u * n / most: 0 < u <= 1 and
 * 0 <= v <= 1, so that no unit of n or t overflows. The scaled line's error at a
 * point is 1 - (a*u + b*v). */
typedef struct {
  const double *n, *t;
  int64_t count;
  double most, least;            /* the largest n, the smallest t */
} points;

static double u_of(const points *p, int64_t i) { return p->least / p->t[i]; }
static double v_of(const points *p, int64_t i) { return u_of(p, i) * (p->n[i] / p->most); }

static double error_of(const points *p, double a, double b) {
  double sum = 0;
  for (int64_t i = 0; i < p->count; i++) {
    double e = 1 - (a * u_of(p, i) + b * v_of(p, i));
    sum += e * e;
  }
  return sum;
}

static int check_points(points *p) {
  int differ = 0;
  if (p->count < 2)
    return lina_error(LINA_EINVAL, "fit: %lld points, at least 2 needed", (long long)p->count);
  p->most = p->n[0], p->least = p->t[0];
  for (int64_t i = 0; i < p->count; i++) {
    if (!(p->n[i] >= 0) || !isfinite(p->n[i]))
      return lina_error(LINA_EINVAL, "fit: n[%lld]=%g, finite and >= 0 needed", (long long)i,
                        p->n[i]);
    if (!(p->t[i] > 0) || !isfinite(p->t[i]))
      return lina_error(LINA_EINVAL, "fit: t[%lld]=%g seconds, finite and > 0 needed", (long long)i,
                        p->t[i]);
    differ |= p->n[i] != p->n[0];
    p->most = fmax(p->most, p->n[i]);
    p->least = fmin(p->least, p->t[i]);
  }
  if (!differ)
    return lina_error(LINA_EINVAL, "fit: all n are %g, two different ones needed", p->n[0]);
  return LINA_OK;
}

/* The free minimum, by sums about the weighted means: they lose no digits where
 * the two columns are nearly parallel. 0 if it has a negative term. */
static int free_line(const points *p, double *a, double *b) {
  double weight = 0, n_mean = 0, t_mean = 0, nn = 0, nt = 0;
  for (int64_t i = 0; i < p->count; i++) {
    double w = u_of(p, i) * u_of(p, i);
    weight += w;
    n_mean += w * (p->n[i] / p->most);
    t_mean += u_of(p, i);        /* w * t / least */
  }
  n_mean /= weight, t_mean /= weight;
  for (int64_t i = 0; i < p->count; i++) {
    double w = u_of(p, i) * u_of(p, i), dn = p->n[i] / p->most - n_mean;
    nn += w * dn * dn;
    nt += w * dn * (1 / u_of(p, i) - t_mean);
  }
  *b = nt / nn;
  *a = t_mean - *b * n_mean;
  return *a >= 0 && *b >= 0;     /* also false for the NaN of weights that underflow */
}

int lina_link_fit(const double *n, const double *t, int64_t count, lina_link *link, double *r2) {
  points p = {.n = n, .t = t, .count = count};
  double u = 0, uu = 0, v = 0, vv = 0, a, b;
  int rc = check_points(&p);
  if (rc != LINA_OK) return rc;
  for (int64_t i = 0; i < count; i++) {
    u += u_of(&p, i), uu += u_of(&p, i) * u_of(&p, i);
    v += v_of(&p, i), vv += v_of(&p, i) * v_of(&p, i);
  }
  const double constant = error_of(&p, u / uu, 0);
  if (!free_line(&p, &a, &b)) {
    /* The minimum lies on one of the two axes. */
    a = u / uu, b = 0;
    if (vv > 0 && error_of(&p, 0, v / vv) < constant) a = 0, b = v / vv;
  }
  lina_link line = {.alpha_s = a * p.least, .beta_s = b * p.least / p.most};
  if (!isfinite(line.alpha_s) || !isfinite(line.beta_s))
    return lina_error(LINA_EINVAL, "fit: alpha=%g, beta=%g, n and t too far apart", line.alpha_s,
                      line.beta_s);
  *link = line;
  /* A constant that is off by rounding alone leaves nothing to explain. */
  if (r2) *r2 = constant > 1e-28 * (double)count ? fmax(0, 1 - error_of(&p, a, b) / constant) : 1;
  return LINA_OK;
}

int lina_link_check(const char *who, const char *name, lina_link link) {
  if (!(link.alpha_s >= 0) || !isfinite(link.alpha_s) || !(link.beta_s >= 0) ||
      !isfinite(link.beta_s))
    return lina_error(LINA_EINVAL, "%s: %s has alpha=%g, beta=%g, finite and >= 0 needed", who,
                      name, link.alpha_s, link.beta_s);
  return LINA_OK;
}

double lina_link_time(lina_link link, double n) {
  return n > 0 ? link.alpha_s + n * link.beta_s : link.alpha_s;
}

double lina_link_cost(lina_link link, double n) { return n > 0 ? lina_link_time(link, n) : 0; }

double lina_link_units(lina_link link, double seconds) {
  if (!(seconds >= link.alpha_s)) return 0;
  return link.beta_s > 0 ? (seconds - link.alpha_s) / link.beta_s : INFINITY;
}
