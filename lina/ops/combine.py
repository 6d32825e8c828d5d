"""Each token's weighted sum of its rows. Contract: csrc/ops/combine.h.

T tokens, K rows for each, D width, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lina.ops.devices import check_devices
from lina.ops.dtypes import FLOATS, check_float, sum_dtype
from lina.ops.experts import check_rows, wanted
from lina.ops.once import needs_grad, once
from lina.ops.sort import Rows


def combine(y_ND: Tensor, rows: Rows, weight_TK: Tensor | None = None) -> Tensor:
    """``out[t] = sum_k weight[t, k] * y[pair_row[t, k]]``, summed in order of k in float32 and rounded once.

    Args:
        y_ND: [N, D] rows in order of their expert: float32, bfloat16, float16 or, on the CPU, float64.
        rows: where each pair's row lies, from :func:`lina.ops.sort`. Absent pairs add nothing.
        weight_TK: [T, K], of a float dtype not wider than float32 (float64 for float64 rows), or None: all 1.

    Returns:
        out_TD: [T, D] in y's dtype. No atomics: results repeat bitwise.

    Differentiable, once, in y and weight; rows without a pair get zero gradients.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape or device that does not fit; K is 1 to 1024.
    """
    check_float("combine", "y_ND", y_ND)
    if y_ND.dim() != 2:
        raise ValueError(f"combine: y_ND has {y_ND.dim()} dimensions, must have 2: rows, width")
    if y_ND.shape[0] != rows.row_pair_N.shape[0]:
        raise ValueError(
            f"combine: y_ND has {y_ND.shape[0]} rows, the sorted pairs are {rows.row_pair_N.shape[0]}"
        )
    check_rows("combine", rows, y_ND)
    weight_TK = router_weight("combine", weight_TK, y_ND, rows.pair_row_TK.shape)
    if needs_grad(y_ND, weight_TK):
        return _Combine.apply(y_ND, weight_TK, rows.pair_row_TK, rows.row_pair_N)
    return torch.ops.lina.combine_fwd(y_ND, weight_TK, rows.pair_row_TK)


def router_weight(op: str, weight_TK: Tensor | None, like: Tensor, shape: tuple) -> Tensor | None:
    """The router's weights in the dtype of sums; a narrower float dtype is widened, which is exact."""
    if weight_TK is None:
        return None
    if not isinstance(weight_TK, Tensor):
        raise TypeError(f"{op}: weight_TK is a {type(weight_TK).__name__}, must be a Tensor")
    dtype = sum_dtype(like.dtype)
    if weight_TK.shape != shape:
        raise ValueError(f"{op}: weight_TK has shape {tuple(weight_TK.shape)}, must be {tuple(shape)}")
    if weight_TK.device != like.device:
        raise ValueError(f"{op}: weight_TK lies on {weight_TK.device}, must lie on {like.device}")
    if weight_TK.dtype == dtype:
        return weight_TK
    if weight_TK.dtype not in FLOATS or weight_TK.dtype == torch.float64:
        raise TypeError(f"{op}: weight_TK is of {weight_TK.dtype}, must be a float dtype up to {dtype}")
    return weight_TK.to(dtype)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, weight_TK, pair_row, row_pair):
        ctx.save_for_backward(y_ND, weight_TK, pair_row, row_pair)
        return torch.ops.lina.combine_fwd(y_ND, weight_TK, pair_row)

    @staticmethod
    @once
    def backward(ctx, saved, dout_TD):
        dy, dweight = torch.ops.lina.combine_bwd(dout_TD, *saved)
        return wanted(ctx.needs_input_grad, (dy, dweight, None, None))


@torch.library.register_fake("lina::combine_fwd")
def _fake_fwd(y, weight, pair_row):
    check_devices("combine", y, weight=weight, pair_row=pair_row)
    return y.new_empty((pair_row.shape[0], y.shape[1]))


@torch.library.register_fake("lina::combine_bwd")
def _fake_bwd(dout, y, weight, pair_row, row_pair):
    check_devices("combine_bwd", y, dout=dout, weight=weight, pair_row=pair_row, row_pair=row_pair)
    acc = sum_dtype(y.dtype)
    return y.new_empty(y.shape), y.new_empty((0,) if weight is None else pair_row.shape, dtype=acc)
