/* simulate_inner.h - what the files of the simulator share. Contract: simulate.h. */
#ifndef LINA_PLAN_SIMULATE_INNER_H
#define LINA_PLAN_SIMULATE_INNER_H

#include "policy.h"
#include "simulate.h"

/* ---- the program: the same for every rank ---- */

enum {
  SIM_RUN,    /* compute for `seconds` */
  SIM_RAISE,  /* `arg` more a2a's are imminent */
  SIM_ISSUE,  /* exchange `arg` is queued */
  SIM_WAIT,   /* until exchange `arg` is done */
  SIM_SUBMIT, /* bucket `arg` is ready */
  SIM_DRAIN,  /* until every bucket is reduced */
};

typedef struct {
  int32_t op, kind, phase;
  int64_t arg, layer;
  double seconds;
} sim_step;

typedef struct {
  int32_t kind, phase;
  int64_t layer;
  double bytes;
} sim_exchange;

typedef struct {
  int64_t bytes, layer;
  int experts;
} sim_bucket;

typedef struct {
  sim_step *steps;
  sim_exchange *exchanges;
  sim_bucket *buckets;
  int64_t step_count, exchange_count, bucket_count;
  int64_t step_room, exchange_room, bucket_room;
  int64_t expert_bytes;
  double degree_sum[2];
  int64_t moe_layers;
  lina_link cut;                 /* what the policy cuts by: the reduction over all ranks */
  double micro_op_s;
  int64_t unit;
} sim_program;

int lina_sim_check(const lina_sim_args *args);
int lina_sim_build(const lina_sim_args *args, sim_program *program);
void lina_sim_program_free(sim_program *program);

/* ---- a communicator: one collective at a time, in the order its members agree on ---- */

typedef struct {
  int32_t stream;                /* LINA_SIM_A2A or LINA_SIM_REDUCE */
  int32_t level;                 /* of links it moves over */
  int64_t first, stride, count;  /* members */
  int64_t per_node;              /* members that a node has */
  /* The collective that gathers or runs. */
  int64_t key, offset;           /* exchange; bucket and offset. key -1: none */
  int64_t joined;
  int running;
  int64_t shared;                /* members on which it runs beside another */
  uint32_t version;              /* of its end event; older ones are stale */
  double bytes, alone_s;         /* alone_s: seconds with the link to itself */
  double begun_s, since_s;       /* since_s: `left_s` was true then */
  double left_s, pace;
} sim_flow;

void lina_sim_flow_init(const lina_sim_args *args, sim_flow *flow, int stream, int64_t first,
                        int64_t stride, int64_t count);
/* An exchange of about `bytes` a rank; then seconds of one of exactly `bytes`. */
lina_link lina_sim_a2a_link(const lina_sim_args *args, const sim_flow *flow, double bytes);
double lina_sim_a2a_s(const lina_sim_args *args, const sim_flow *flow, double bytes);
lina_link lina_sim_reduce_link(const lina_sim_args *args, const sim_flow *flow);

/* ---- ranks, events, the run ---- */

enum { SIM_IDLE, SIM_LATE, SIM_HELD, SIM_JOINED }; /* a collective on a rank's stream */

typedef struct {
  /* compute */
  int64_t pc;
  int doing;                     /* 0 free or waiting, 1 late, 2 computing, 3 finished */
  double from_s;                 /* the running computation's start */
  /* a2a */
  int64_t issued, done, outstanding;
  int a2a;                       /* SIM_* */
  double ready_s;
  /* reduce */
  lina_policy policy;
  lina_micro_op op;
  int reduce;                    /* SIM_* */
  int64_t bucket, flow;          /* of `op` */
  int64_t next_id, next_offset;  /* what must come next */
  /* accounts */
  int bits;                      /* streams that run */
  double since_s, state_s[8];
  uint32_t draws[3];
  int watched;
} sim_rank;

enum { SIM_EVENT_COMPUTE, SIM_EVENT_A2A, SIM_EVENT_REDUCE, SIM_EVENT_FLOW };

typedef struct {
  double at_s;
  uint64_t order;                /* events of one time: first made, first served */
  int32_t index;
  uint32_t version;
  int32_t what;
} sim_event;

typedef struct {
  const lina_sim_args *args;
  sim_program program;
  sim_rank *ranks;
  sim_flow *flows;               /* a2a groups, then the world's reduction, then replicas' */
  int64_t groups, flow_count;
  sim_event *heap;
  int64_t heap_count, heap_room;
  uint64_t order;
  double now_s;
  int64_t finished, span_room;
  lina_sim_result *out;
} sim_run;

int lina_sim_push(sim_run *run, double at_s, int what, int64_t index, uint32_t version);
int lina_sim_next(sim_run *run, sim_event *event); /* 1, or 0: no event is left */
void lina_sim_turn(sim_run *run, sim_rank *rank, int stream, int on); /* a stream runs or stops */
int lina_sim_log(sim_run *run, int64_t rank, const lina_sim_span *span);
/* A member reaches its collective; the last one starts it. */
int lina_sim_join(sim_run *run, int64_t flow, int64_t key, int64_t offset, double bytes);
/* The flow's collective is over: its links are free, its members' streams stop. */
int lina_sim_leave(sim_run *run, int64_t flow);
/* The rank's program, until it computes, waits or has ended. */
int lina_sim_advance(sim_run *run, sim_rank *rank);
int lina_sim_serve(sim_run *run, sim_event event);

#endif
