/* register.h - the operator table: every torch.ops.lina.* and its C function.
 *
 * One boxed function serves the CPU and the CUDA key of an operator; it reads
 * the device off its first tensor argument.
 */
#ifndef LINA_REGISTER_H
#define LINA_REGISTER_H

#include "tensor.h"

typedef void lina_boxed(lina_value *stack, uint64_t nargs, uint64_t nouts);

lina_boxed lina_gate_fwd_boxed, lina_gate_bwd_boxed;
lina_boxed lina_sort_boxed;
lina_boxed lina_dispatch_layout_boxed;
lina_boxed lina_experts_fwd_boxed, lina_experts_bwd_boxed;
lina_boxed lina_combine_fwd_boxed, lina_combine_bwd_boxed;

/* Looks libtorch's functions up and registers every operator, once a process.
 * LINA_ETORCH with a text naming the missing symbol and the torch version
 * needed; nothing is then registered. */
int lina_register(void);

#endif
