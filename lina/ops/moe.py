"""sort, experts and combine in one autograd node: the hot path of a layer.

Contracts: csrc/ops/sort.h, experts.h, combine.h. T tokens, K experts for each, E experts, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lina.ops.combine import router_weight
from lina.ops.experts import (
    ACTIVATIONS,
    NEED_DB_DOWN,
    NEED_DB_UP,
    NEED_DW_DOWN,
    NEED_DW_UP,
    NEED_DWEIGHT,
    NEED_DX,
    autocast,
    check,
    wanted,
)
from lina.ops.once import needs_grad, once
from lina.ops.sort import check_ids, sort


def moe(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """``out[t] = sum_k weight[t, k] * expert_k(x[t])``, with the arguments of :func:`experts`.

    Args:
        x_TD: [T, D] tokens: float32, bfloat16, float16 or, on the CPU, float64.
        weight_TK: [T, K] the router's weights, of a float dtype up to float32 (float64 for float64 x).
        expert_TK: [T, K] ids, int32 (int64 is converted); ids outside [0, E) add nothing.
        w_up, w_down, b_up, b_down, activation, interleaved, alpha, limit: see :func:`experts`.

    Returns:
        out_TD: [T, D] in x's dtype (autocast's dtype under autocast).

    Differentiable, once, in x, weight_TK, weights and biases. Saves x and the pre-activations alone, not the
    experts' outputs: the router's gradient is taken from the activations. Results repeat bitwise.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, device or option outside its limits.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 1.
    """
    x_TD, weight, w_up, b_up, w_down, b_down, options = moe_arguments(
        "moe", x_TD, weight_TK, expert_TK, w_up, w_down, b_up=b_up, b_down=b_down, activation=activation,
        interleaved=interleaved, alpha=alpha, limit=limit,
    )  # fmt: skip
    rows = sort(expert_TK, w_up.shape[0])
    if needs_grad(x_TD, weight, w_up, w_down, b_up, b_down):
        return _MoE.apply(x_TD, weight, *rows, w_up, b_up, w_down, b_down, options)
    y_ND, _ = torch.ops.lina.experts_fwd(
        x_TD, rows.offset_E1, rows.row_pair_N, w_up, b_up, w_down, b_down, expert_TK.shape[1], *options, False
    )
    return torch.ops.lina.combine_fwd(y_ND, weight, rows.pair_row_TK)


def moe_arguments(
    op: str,
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> tuple:
    """What :func:`moe` makes of its arguments, checked and cast as it says, for layers that call the
    operators themselves: x, weight, w_up, b_up, w_down, b_down and the operators' activation options."""
    x_TD, w_up, w_down, b_up, b_down = autocast(op, x_TD, w_up, w_down, b_up, b_down)
    check(op, x_TD, w_up, w_down, b_up, b_down, activation, limit)
    check_ids(op, expert_TK)
    if expert_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(f"{op}: expert_TK has {expert_TK.shape[0]} tokens, x_TD has {x_TD.shape[0]}")
    if expert_TK.device != x_TD.device:
        raise ValueError(f"{op}: expert_TK lies on {expert_TK.device}, must lie on {x_TD.device}")
    if weight_TK is None:
        raise TypeError(f"{op}: weight_TK is None, must be a Tensor")
    weight = router_weight(op, weight_TK, x_TD, expert_TK.shape)
    options = ACTIVATIONS[activation], bool(interleaved), float(alpha), float(limit)
    return x_TD, weight, w_up, b_up, w_down, b_down, options


def moe_needs(dx: bool, dweight: bool, dw_up: bool, db_up: bool, dw_down: bool, db_down: bool) -> int:
    """The gradients that ``torch.ops.lina.experts_bwd`` computes, as it takes them."""
    return (
        NEED_DX * dx
        | NEED_DWEIGHT * dweight
        | NEED_DW_UP * dw_up
        | NEED_DB_UP * db_up
        | NEED_DW_DOWN * dw_down
        | NEED_DB_DOWN * db_down
    )


class _MoE(torch.autograd.Function):
    """y is not saved: dweight = <dout @ w_down, a> + <dout, b_down>."""

    @staticmethod
    def forward(ctx, x_TD, weight_TK, offset, row_pair, pair_row, w_up, b_up, w_down, b_down, options):
        y_ND, h_NU = torch.ops.lina.experts_fwd(
            x_TD, offset, row_pair, w_up, b_up, w_down, b_down, pair_row.shape[1], *options, True
        )
        out_TD = torch.ops.lina.combine_fwd(y_ND, weight_TK, pair_row)
        ctx.save_for_backward(weight_TK, x_TD, h_NU, offset, row_pair, pair_row, w_up, w_down, b_down)
        ctx.options = options
        return out_TD

    @staticmethod
    @once
    def backward(ctx, saved, dout_TD):
        need = ctx.needs_input_grad
        mask = moe_needs(need[0], need[1], *need[5:9])
        dx, dweight, *dw = torch.ops.lina.experts_bwd(dout_TD, *saved, None, None, *ctx.options, mask)[:6]
        return wanted(need, (dx, dweight, None, None, None, *dw, None))
