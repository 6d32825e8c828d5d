"""What ranks tell each other before a layer's rows travel: one small all-to-all, the same in every way to
run the layer, so that ranks that run it differently learn that, instead of waiting for each other.

A row for each rank of the group, int64: the facts that all must have in common, as AGREED; then rows and
pairs by chunk, forward and backward (ops.dispatch_layout).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lina import ops

# Degrees first: ranks that differ there may mean other things by the rest.
AGREED = ("degree forward", "degree backward", "D", "K", "number of experts", "dtype of x", "dtype of weight",
          "need of gradients")
FIRST = len(AGREED)


def facts(degree: tuple[int, int], x_TD: Tensor, weight_TK: Tensor, experts: int,
          needs: tuple[bool, bool, bool]) -> tuple[int, ...]:
    """``needs``: gradients of x, of weight, of what the experts are made of."""
    return (*degree, x_TD.shape[1], weight_TK.shape[1], experts, ops.FLOATS.index(x_TD.dtype),
            ops.FLOATS.index(weight_TK.dtype), sum(needed << bit for bit, needed in enumerate(needs)))


def said(numbers: tuple[int, ...]) -> Tensor:
    """``numbers`` as ops.dispatch_layout takes them."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def check(theirs: list[list[int]]) -> None:
    """ValueError, on every rank of the group, unless all have said the same; lines by rank."""
    for f, name in enumerate(AGREED):
        values = [line[f] for line in theirs]
        if len(set(values)) > 1:
            shown: list[Any] = [str(ops.FLOATS[v]) for v in values] if name.startswith("dtype") else values
            raise ValueError(f"dispatch: the ranks of one expert group disagree on {name}: {shown} by rank")
