"""lina's operators: gate, sort, experts, combine, and moe, which is the last three in one autograd node;
and dispatch_layout, by which tokens travel to experts on other ranks.

Each has a CPU and a CUDA kernel (``torch.ops.lina.*``), a contract in ``csrc/ops/<op>.h`` and a definition in
plain PyTorch in ``lina.reference``.
"""

from lina.ops.combine import combine
from lina.ops.dispatch import CHUNKS, COLUMNS, MAX_DEGREE, MAX_RANKS, Dispatch, dispatch_layout
from lina.ops.dtypes import FLOATS, sum_dtype
from lina.ops.experts import ACTIVATIONS, GATED, NEED_KEPT, experts
from lina.ops.gate import Routing, balance_loss, check_gate, gate, jitter, update_bias
from lina.ops.moe import moe, moe_arguments, moe_needs
from lina.ops.once import needs_grad, once, ties
from lina.ops.sort import MAX_EXPERTS, Rows, sort

__all__ = [
    "ACTIVATIONS",
    "CHUNKS",
    "COLUMNS",
    "FLOATS",
    "GATED",
    "MAX_DEGREE",
    "MAX_EXPERTS",
    "MAX_RANKS",
    "NEED_KEPT",
    "Dispatch",
    "Routing",
    "Rows",
    "balance_loss",
    "check_gate",
    "combine",
    "dispatch_layout",
    "experts",
    "gate",
    "jitter",
    "moe",
    "moe_arguments",
    "moe_needs",
    "needs_grad",
    "once",
    "sort",
    "sum_dtype",
    "ties",
    "update_bias",
]
