/* packing.h - over how many ranks to spread a layer's experts.
 *
 * `world` ranks in nodes of `node`; at degree ep each group of ep consecutive
 * ranks holds every expert once, E/ep a rank, and world/ep ranks hold replicas of
 * each. Fewer ranks a group: fewer tokens travel, and not as far; more gradients
 * are reduced over replicas, more weights are read and kept. For every ep that
 * divides world and E the step of `layers` such layers is predicted under
 * balanced routing, and the fastest that fits in memory is chosen.
 *
 *   m      = E / ep
 *   p      = 1 - C(E-m, K) / C(E, K): a token needs a given other rank, to which
 *            it then goes once, however many of its K experts are there
 *   a2a    = max(t_near(T p near bytes), t_far(T p far bytes)) one way; near and
 *            far count a rank's peers in its node and outside (where ranks differ,
 *            those of the rank with the most outside): the two links work at once.
 *            In a pipeline the one that is slower over the whole sets the pace
 *   passes = T K pairs a rank, T K m / E of them of its own tokens, each pass
 *            reading m experts' weights; cut into the best degree (pipeline.h)
 *   reduce = t(2 (n-1)/n G), n = world/ep replicas and G the bytes of m experts'
 *            gradients, over the far link unless the world is one node
 *   exposed = what of it the gaps of the backward pass and `slack_s` do not hide
 *   step   = layers (forward + backward + exposed)
 *   move   = t(bytes of weights and optimizer state) of the experts that the rank
 *            which lacks most must fetch, once; compared as move / steps. Over
 *            the near link where each group of ep_now lies in one node, else far
 *
 * Source: expert packing in Lina, arXiv:2210.17223. Differs: the paper doubles the
 * experts of a rank while their computation is shorter than the a2a, at any cost;
 * here every degree's whole step is predicted, and the reduction over replicas,
 * which the paper does not count, is part of it, as are memory and the move.
 */
#ifndef LINA_PLAN_PACKING_H
#define LINA_PLAN_PACKING_H

#include "link.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LINA_PACKING_MAX_WORLD (1 << 20)
#define LINA_PACKING_MAX_E     1024
#define LINA_PACKING_MAX       32 /* no number up to 1024 has more divisors */

/* One direction. */
typedef struct {
  double out_bytes, back_bytes;  /* of one token's copy, to the experts and back */
  lina_link pass;                /* seconds of an expert pass over its pairs */
  double expert_s;               /* seconds more a pass for every expert of the rank */
} lina_packing_way;

typedef struct {
  int64_t world, node;           /* ranks; node divides world */
  int64_t layers, E, K;
  double tokens;                 /* a rank and layer */
  lina_link a2a_near, a2a_far;   /* over the bytes a rank sends in its node; outside it */
  lina_link reduce_near, reduce_far; /* allreduce over 2 (n-1)/n of the bytes */
  lina_packing_way forward, backward;
  double slack_s;                /* besides, a layer's backward leaves the link idle so long */
  double expert_params;          /* parameters of one expert */
  double gradient_bytes;         /* a parameter, in the reduction */
  double state_bytes;            /* a parameter, kept: weights, gradients, optimizer state */
  double move_bytes;             /* a parameter, moved: weights and optimizer state */
  double memory_bytes;           /* a rank has for experts; infinite: no limit */
  int64_t ep_now;                /* 0: nothing to move */
  double steps;                  /* that pay for the move; > 0, may be infinite */
  int max_degree;                /* 1 .. LINA_PIPELINE_MAX */
} lina_packing_model;

typedef struct {
  int64_t ep;
  double copies;                 /* of a token to other ranks, expected: (ep-1) p */
  int forward_degree, backward_degree;
  double forward_s, backward_s;  /* of one layer, pipelined */
  double a2a_s;                  /* busy time of the a2a's of one layer, both ways */
  double reduce_s, exposed_s;    /* of one layer */
  double step_s;                 /* of all layers */
  double move_s;                 /* of all layers, once */
  double memory_bytes;           /* of all layers */
  int fits;
} lina_packing_row;

/* Writes a row for every ep, ascending, their number, and the index of the best:
 * least step_s + move_s / steps of those that fit, the lowest ep of equals.
 * Errors: LINA_EINVAL (values outside their limits, none fits; a time that is not
 * finite); *count and *best are then untouched. */
int lina_packing(const lina_packing_model *model, lina_packing_row row[LINA_PACKING_MAX],
                 int *count, int *best);

#ifdef __cplusplus
}
#endif
#endif
