/* simulate.h - one training step of a model on many ranks, by discrete events,
 * with the compiled policy (policy.h) and pipeline order (pipeline.h) deciding.
 *
 * A step is forward, backward and optimizer; forward runs a layer's dense part,
 * then its MoE part, backward the reverse. Ranks lie as ranks/ep groups of ep
 * neighbours (experts spread inside, a2a); rank r's experts have replicas at
 * r mod ep. Each rank has three streams:
 *
 *   compute  the program, in order; waits for an a2a where its rows are needed
 *   a2a      exchanges, in order
 *   reduce   micro-ops, one at a time, as the rank's own policy starts them
 *
 * A collective runs once every member has reached it on its stream and ends on
 * all at once. Each rank's gate is its own, as the word in device memory is: a
 * micro-op is taken while no a2a of that rank is queued, running or imminent,
 * then stands until the other members have taken it too. Collectives that run
 * on one rank over the same level of links share it: each goes at `share` of its
 * pace, and all times follow at every start and end.
 *
 *   a2a seconds        max over levels of alpha + bytes on that level * beta; none
 *                      without bytes
 *   allreduce seconds  alpha + 2 (n-1)/n * bytes * beta over n members; between
 *                      nodes beta is divided by the members a node has, for each
 *                      moves its part, and is at least the near beta
 *
 * Buckets as DistributedDataParallel fills them (Li et al., arXiv:2006.15704):
 * whole tensors, last layer first, closed once at least `bucket_bytes` (the first
 * one `first_bucket_bytes`) are in. An expert gradient is a bucket of its own.
 * Nothing is reduced over one rank.
 *
 * Not modelled: links of different ranks that meet in a switch, alpha growing
 * with the members, memory, compute slowed by collectives beside it.
 *
 * Deterministic: delays are drawn from (seed, rank, operation).
 */
#ifndef LINA_PLAN_SIMULATE_H
#define LINA_PLAN_SIMULATE_H

#include <stdint.h>

#include "pipeline.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LINA_SIM_MAX_RANKS  8192
#define LINA_SIM_MAX_LAYERS 1024

enum { LINA_SIM_FORWARD, LINA_SIM_BACKWARD };  /* index of pairs [2] */
enum { LINA_SIM_NEAR, LINA_SIM_FAR };          /* inside a node, between nodes */

/* Each field [2] is forward, backward; seconds and bytes are one rank's. */
typedef struct {
  double dense_s[2];             /* attention, norms, a dense FFN */
  int moe;                       /* 0: the fields from here to expert_bytes are not read */
  double glue_s[2]; /* gate and sort, or combine's backward: right before the dispatch,
                                    which is imminent while it runs */
  lina_link pass[2]; /* experts' seconds over rows: launch and weights, a row */
  lina_link late;    /* those of pass[LINA_SIM_BACKWARD] after its results (pipeline.h) */
  double own_rows, remote_rows; /* tokens of this rank, and of others, for this rank's experts */
  double dispatch_bytes[2], return_bytes[2]; /* that leave the rank */
  int64_t expert_bytes; /* gradients of this rank's experts */
  int64_t tensors; /* dense parameters: the next `tensors` of tensor_bytes */
} lina_sim_layer;

/* What a test breaks, to see that it is found out. */
enum {
  LINA_SIM_SOUND,
  LINA_SIM_SWAPPED, /* odd ranks submit every second bucket before the one ahead of it */
  LINA_SIM_ONE_AT_A_TIME, /* a rank starts no collective while it holds another (Lina's own queue) */
};

typedef struct {
  const lina_sim_layer *layers; /* [layer_count], forward order */
  int64_t layer_count;
  const int64_t *tensor_bytes; /* [tensor_count], forward order: every layer's dense gradients */
  int64_t tensor_count;
  int64_t ranks, ep, node; /* node: ranks that a node holds; ep divides ranks */
  lina_link a2a[2], reduce[2]; /* near, far; bytes a rank */
  double share; /* pace of a collective beside another, 0 < share <= 1 */
  int gated; /* 1: a2a first; 0: reductions start whenever ready */
  double micro_op_s; /* 0: buckets travel whole */
  int64_t micro_op_bytes; /* > 0: fixed size, micro_op_s is not read */
  int64_t unit; /* bytes, >= 1 */
  int64_t degree[2]; /* 1 .. max_degree, or 0: the best by pipeline.h, for each layer */
  int64_t max_degree; /* 1 .. LINA_PIPELINE_MAX */
  int64_t bucket_bytes, first_bucket_bytes; /* >= 1 */
  int experts_last; /* 1: experts' gradients go after the whole backward */
  double optimizer_s;
  double straggle_s; /* each operation is up to this much late on each rank, uniform */
  uint64_t seed;
  int fault;
  const int64_t *watch; /* [watch_count] ranks whose spans are kept */
  int64_t watch_count;
} lina_sim_args;

enum { LINA_SIM_COMPUTE, LINA_SIM_A2A, LINA_SIM_REDUCE }; /* streams */
enum {
  LINA_SIM_DENSE,
  LINA_SIM_GLUE,
  LINA_SIM_PASS,
  LINA_SIM_OPTIMIZER, /* compute */
  LINA_SIM_DISPATCH,
  LINA_SIM_RETURN, /* a2a */
  LINA_SIM_BUCKET,
  LINA_SIM_EXPERTS, /* reduce */
};

typedef struct {
  int64_t rank, layer; /* layer: -1 the optimizer; of a BUCKET, the bucket */
  int32_t stream, kind, phase;
  double start_s, stop_s, bytes; /* bytes: 0 on the compute stream */
} lina_sim_span;

typedef struct {
  double step_s, first_s; /* the last rank ends, the first one ends */
  /* Mean over ranks, 0 .. step_s: time in each state, bit 0 compute, bit 1 a2a, bit 2 reduce. */
  double state_s[8];
  double a2a_s, a2a_alone_s; /* sum over a2a's of the time taken, and of that with the link alone */
  double stretch_s; /* the most by which sharing lengthened one a2a */
  int64_t a2a_count, reduce_count; /* collectives done */
  int64_t behind; /* micro-ops that a rank took while it had an a2a queued, running or
                                    imminent: 0 where the policy keeps its word */
  double waited_s; /* the most that an a2a waited though all its members were ready */
  int64_t reduced_bytes; /* summed over ranks; checked: every byte of every bucket once */
  int64_t decisions; /* calls of lina_policy_next */
  int64_t events;
  double degree[2]; /* mean over MoE layers */
  lina_sim_span *spans; /* [span_count], by end; from malloc */
  int64_t span_count;
} lina_sim_result;

/* Errors: LINA_EINVAL (limits; a step that can never end: the text names the
 * ranks that wait for each other), LINA_ENOMEM; *result is then empty.
 * lina_simulate_free may follow either way. */
int lina_simulate(const lina_sim_args *args, lina_sim_result *result);
void lina_simulate_free(lina_sim_result *result);

#ifdef __cplusplus
}
#endif
#endif
