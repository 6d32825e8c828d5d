"""What one rank computes: a pass over its experts, a dense product, a copy in its memory.

All ranks do the same at the same time, since they share a machine's cores or power.
"""

from __future__ import annotations

from typing import Any

import torch

import lina
from lina.parallel import DTYPES, ExpertShape
from lina.profile.links import KIB, random_bytes
from lina.profile.measure import Ranks, Run

# Rows an expert: from a decode batch to a long training batch; the CPU's times are long enough sooner.
ROWS = {"cuda": (32, 128, 512, 2048), "cpu": (8, 32, 128, 512)}
# Beyond the caches: 16 MiB to 128 MiB, 64 MiB to 1 GiB.
COPIES = {"cpu": tuple(16384 * KIB * 2**i for i in range(4)),
          "cuda": tuple(65536 * KIB * 2**i for i in range(5))}


def default_shape(device: str, ep: int) -> ExpertShape:
    """On CUDA one of Qwen3-30B-A3B's layers, spread over ``ep`` ranks; else one of `lina train`'s."""
    if device == "cuda":
        return ExpertShape(2048, 768, max(1, 128 // ep), "bfloat16")
    return ExpertShape(128, 192, max(1, 8 // ep), "float32")


def default_top_k(device: str) -> int:
    """Of the layers that :func:`default_shape` is of."""
    return 8 if device == "cuda" else 2


def expert_rows(shape: ExpertShape, device: str) -> list[int]:
    """The numbers of rows that a pass is measured at."""
    return [shape.local * each for each in ROWS[device]]


class Experts:
    """The experts of one shape, with random weights. Rows are spread over them evenly, in random
    order, one expert a token."""

    def __init__(self, ranks: Ranks, shape: ExpertShape) -> None:
        options: dict[str, Any] = dict(device=ranks.device, dtype=DTYPES[shape.dtype])
        up = 2 * shape.ffn_dim if shape.activation in lina.ops.GATED else shape.ffn_dim
        self.shape, self.options = shape, options
        self.w_up = torch.randn(shape.local, up, shape.dim, **options).mul_(shape.dim**-0.5)
        self.w_down = torch.randn(shape.local, shape.dim, shape.ffn_dim, **options).mul_(shape.ffn_dim**-0.5)
        self.form = (lina.ops.ACTIVATIONS[shape.activation], False, 1.702, 7.0)

    def _tokens(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, self.shape.dim, **self.options)
        device = self.options["device"]
        ids = (torch.randperm(rows, device=device) % self.shape.local).int()[:, None]
        return x, torch.rand(rows, 1, device=device), ids

    def forward(self, rows: int) -> Run:
        """As a layer in training does it: sort, the products with what backward needs kept, combine."""
        x, weight, ids = self._tokens(rows)
        ops = torch.ops.lina

        def run() -> None:
            offset, row_pair, pair_row = ops.sort(ids, self.shape.local)
            y, _ = ops.experts_fwd(x, offset, row_pair, self.w_up, None, self.w_down, None, 1, *self.form,
                                   True)
            ops.combine_fwd(y, weight, pair_row)
        return run

    def backward(self, rows: int) -> Run:
        """All gradients: of tokens, router weights and both weights."""
        given, need = self._passed(rows), lina.ops.moe_needs(True, True, True, False, True, False)
        return lambda: torch.ops.lina.experts_bwd(*given, *[None] * 3, *self.form, need)

    def late(self, rows: int) -> Run:
        """Both weights' gradients, from what the call before kept that gave the others."""
        given, ops = self._passed(rows), torch.ops.lina
        first = lina.ops.moe_needs(True, True, *[False] * 4) | lina.ops.NEED_KEPT
        *_, dh, a = ops.experts_bwd(*given, *[None] * 3, *self.form, first)
        need = lina.ops.moe_needs(False, False, True, False, True, False)
        return lambda: ops.experts_bwd(*given, None, dh, a, *self.form, need)

    def _passed(self, rows: int) -> tuple[torch.Tensor, ...]:
        """What backward is given of a pass."""
        x, weight, ids = self._tokens(rows)
        ops = torch.ops.lina
        offset, row_pair, pair_row = ops.sort(ids, self.shape.local)
        _, h = ops.experts_fwd(x, offset, row_pair, self.w_up, None, self.w_down, None, 1, *self.form, True)
        return (torch.randn_like(x), weight, x, h, offset, row_pair, pair_row, self.w_up, self.w_down)


def gemm_flops(shape: ExpertShape, device: str) -> list[int]:
    """Floating-point operations of the products that are measured: [rows, D] by [D, 4 D]."""
    return [8 * rows * shape.dim**2 for rows in ((256, 1024, 4096, 16384) if device == "cuda"
                                                 else (64, 256, 1024, 4096))]


def gemm(ranks: Ranks, shape: ExpertShape, flops: int) -> Run:
    """One dense product of that many operations."""
    options: dict[str, Any] = dict(device=ranks.device, dtype=DTYPES[shape.dtype])
    a = torch.randn(flops // (8 * shape.dim**2), shape.dim, **options)
    b = torch.randn(shape.dim, 4 * shape.dim, **options)
    out = a @ b
    return lambda: torch.mm(a, b, out=out)


def copy(ranks: Ranks, n: int) -> Run:
    """``n`` bytes read and written."""
    source = random_bytes(n, ranks.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
