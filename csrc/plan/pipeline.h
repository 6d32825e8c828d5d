/* pipeline.h - how long a layer spread over ranks takes, cut into `degree` expert passes.
 *
 * Rows of the rank's own tokens stay; the others arrive by dispatch and leave by
 * return. One stream computes, one carries a2a's. Passes run in order:
 *
 *   degree 1      everything, after the whole dispatch
 *   degree 2      own rows, while the dispatch travels; then all remote rows
 *   degree r > 2  first half of the own rows; r-2 equal chunks of the remote
 *                 rows, each after its part of the dispatch; second half of the
 *                 own rows, while the last chunks return
 *
 * A2a's run one after the other: every dispatch chunk, then every return, each
 * after its pass. With chunk = 0 .. C-1, C = max(1, degree - 2):
 *
 *   arrived[c] = arrived[c-1] + t_a2a(dispatch_bytes / C)
 *   ended[p]   = max(ended[p-1], arrived[chunk of p]) + t_pass(rows of p)
 *   ready[p]   = ended[p] - t_late(rows of p)
 *   back[c]    = max(back[c-1], ready[pass of c]) + t_a2a(return_bytes / C)
 *   seconds    = max(ended[last], back[C-1]),  back[-1] = arrived[C-1]
 *
 * A pass without rows and an a2a without bytes take no time: on one rank nothing
 * travels. Forward and backward are two models with two best degrees; backward,
 * weights' gradients are late: computed while what a pass gives back travels.
 *
 * Source: the pipelines of Lina, arXiv:2210.17223, and FSMoE, arXiv:2501.10714;
 * weights' gradients beside a2a's, Lancet, arXiv:2404.19429.
 * Differs: FSMoE solves closed forms, one a region of the parameters, by
 * sequential quadratic programming; here the recurrence is exact and the degrees
 * are few, so they are tried one by one. Own rows, which those systems send
 * through the a2a with the rest, fill the start and the end. Bytes of dispatch
 * and return differ.
 */
#ifndef LINA_PLAN_PIPELINE_H
#define LINA_PLAN_PIPELINE_H

#include "link.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LINA_PIPELINE_MAX 64      /* degrees */

typedef struct {
  lina_link a2a;                 /* seconds of an a2a over the bytes a rank sends */
  double dispatch_bytes, return_bytes; /* of all remote rows */
  lina_link pass;                /* seconds of an expert pass over its rows */
  lina_link late;                /* those of them after its results; at most the pass's */
  double own_rows, remote_rows;
} lina_pipeline_model;

/* Rows of a pass; chunk of dispatch and return it belongs to, -1: own rows only. */
typedef struct {
  double rows;
  int chunk;
} lina_pass;

typedef struct { double start_s, end_s; } lina_span;

/* Times in seconds from the start of the dispatch. */
typedef struct {
  int degree;
  double seconds;                /* until the results of all rows are there */
  double compute_s, a2a_s;       /* busy time of either stream */
  double exposed_s;              /* seconds - compute_s: computing waits for the network */
  double idle_s;                 /* sum of the gaps: the slack for gradients */
  int gaps;
  lina_span gap[LINA_PIPELINE_MAX];  /* when the a2a stream idles, in order, none empty */
} lina_pipeline;

/* Chunks of dispatch and of return; passes are `degree`. */
int lina_pipeline_chunks(int degree);

/* Writes `degree` passes, in order. 1 <= degree <= LINA_PIPELINE_MAX. */
void lina_pipeline_passes(const lina_pipeline_model *model, int degree, lina_pass *pass);

/* Seconds at the end of a pass in which its results are there already; a pass of own
 * rows alone gives nothing back, and has none. */
double lina_pipeline_late(const lina_pipeline_model *model, lina_pass pass);

/* The plan at one degree.
 * Errors: LINA_EINVAL (a link, bytes, rows or the time negative or not finite, degree
 * outside 1 .. LINA_PIPELINE_MAX); *plan is then untouched. */
int lina_pipeline_time(const lina_pipeline_model *model, int degree, lina_pipeline *plan);

/* The fastest plan among degrees 1 .. max_degree; of those that differ by rounding
 * alone the lowest degree.
 * Errors: as lina_pipeline_time. */
int lina_pipeline_best(const lina_pipeline_model *model, int max_degree, lina_pipeline *plan);

#ifdef __cplusplus
}
#endif
#endif
