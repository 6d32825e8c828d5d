"""combine, forward and backward, against an eager gather, product with the router's weights and sum.

    python benchmarks/bench_combine.py [--device cpu|cuda] [--threads N] [--compiled] [--json FILE]

Traffic counted, N = T K rows of D elements: forward reads N D and writes T D, backward reads N D + T D and
writes N D; besides, 4 bytes for each pair of every index, weight and weight gradient.
"""

from __future__ import annotations

import torch
from common import Case, allowed, arguments, measure, try_compile
from torch import Tensor

from lina import ops

SHAPES = {  # T, D, E, K
    "cuda": [(32768, 2048, 128, 8), (24576, 1536, 32, 2), (32768, 4096, 64, 4), (128, 2048, 128, 8)],
    "cpu": [(2048, 512, 16, 2), (1024, 1024, 64, 8)],
}


def eager(y: Tensor, row: Tensor, weight: Tensor) -> Tensor:
    """What plain models do: in the rows' dtype, the sum's accumulation aside."""
    T, K = weight.shape
    return (y.index_select(0, row).view(T, K, -1) * weight[..., None].to(y.dtype)).sum(1)


class Inputs:
    def __init__(self, T: int, D: int, E: int, K: int, dtype: torch.dtype, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)
        there = dict(generator=draw, device=device)
        expert = torch.rand(T, E, **there).topk(K).indices.int()
        self.rows = ops.sort(expert, E)
        self.index = self.rows.pair_row_TK.flatten().long()
        self.y = torch.randn(T * K, D, **there, dtype=dtype).requires_grad_()
        self.weight = torch.rand(T, K, **there).requires_grad_()
        self.dout = torch.randn(T, D, **there, dtype=dtype)
        self.name = f"{T=} {D=} {E=} {K=} {dtype}"

    def ours(self) -> Tensor:
        return ops.combine(self.y, self.rows, self.weight)

    def theirs(self) -> Tensor:
        return eager(self.y, self.index, self.weight)

    def grads(self, out: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(out, (self.y, self.weight), self.dout, retain_graph=True)

    def check(self) -> None:
        """Output and gradients against float64, some tokens at a time to save memory."""
        out = self.ours()
        dy, dweight = self.grads(out)
        (T, K), D = self.weight.shape, self.y.shape[1]
        for part in torch.arange(T, device=out.device).split(4096):
            row = self.index.view(T, K)[part]
            y, w, g = (t.detach().double() for t in (self.y[row], self.weight[part], self.dout[part]))
            terms = y * w[..., None]
            allowed(out[part], terms.sum(1), terms.abs().sum(1), K, "out")
            allowed(dy[row], g[:, None] * w[..., None], torch.zeros((), device=out.device), 0, "dy")
            terms = y * g[:, None]
            allowed(dweight[part], terms.sum(-1), terms.abs().sum(-1), D, "dweight")


def cases(shape: tuple, dtype: torch.dtype, device: str, compiled: bool) -> list[Case]:
    v = Inputs(*shape, dtype, device)
    T, D, _, K = shape
    N, item = T * K, v.y.element_size()
    forward = {"lina": torch.no_grad()(v.ours), "eager": torch.no_grad()(v.theirs)}
    ours, theirs = v.ours(), v.theirs()
    backward = {"lina": lambda: v.grads(ours), "eager": lambda: v.grads(theirs)}
    info = {}
    if compiled:
        function, why = try_compile(eager, v.y, v.index, v.weight)
        if function is None:
            info["compiled"] = f"not measured: {why}"
        else:
            forward["compiled"] = torch.no_grad()(lambda: function(v.y, v.index, v.weight))
    return [
        Case(f"forward {v.name}", forward, item * (N + T) * D + 8 * N, f"{item} (N + T) D + 8 N",
             check=v.check, info=info),
        Case(f"backward {v.name}", backward, item * (2 * N + T) * D + 16 * N, f"{item} (2 N + T) D + 16 N",
             repeats=20),
    ]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="also torch.compile's forward (slow start)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtypes = (torch.bfloat16,) if args.device == "cuda" else (torch.float32, torch.bfloat16)
    measure("combine", [case for dtype in dtypes for shape in SHAPES[args.device]
                        for case in cases(shape, dtype, args.device, args.compiled)], args)


if __name__ == "__main__":
    main()
