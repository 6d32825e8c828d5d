"""sort, alone and behind gate, against a stable sort with bincount and cumsum.

    python benchmarks/bench_sort.py [--device cpu|cuda] [--threads N] [--compiled] [--json FILE]

Traffic counted: ids read, both index tensors and the offsets written, all int32; with the gate also logits
read, weights (float32) and ids written. The eager peer makes the same three tensors; its bincount waits for
the GPU, which then is part of its time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Case, arguments, measure, try_compile
from torch import Tensor

from lina import ops, reference

SHAPES = {
    "cuda": [(32768, 128, 8), (24576, 32, 2), (32768, 64, 4), (128, 128, 8)],  # the last: decoding
    "cpu": [(16384, 128, 8), (16384, 8, 2), (64, 64, 8)],
}


def eager(expert: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = expert.flatten()
    order = torch.sort(pairs, stable=True).indices
    offset = F.pad(torch.bincount(pairs, minlength=E).cumsum(0), (1, 0))
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return offset.int(), order.int(), row.int().view_as(expert)


def eager_gate(x: Tensor, K: int) -> tuple[Tensor, Tensor]:
    weight, expert = x.softmax(-1, dtype=torch.float32).topk(K)
    return weight, expert.int()


def logits(T: int, E: int, device: str) -> Tensor:
    draw = torch.Generator().manual_seed(E)
    return torch.randn(T, E, generator=draw).to(device=device, dtype=torch.bfloat16)


def alone(T: int, E: int, K: int, device: str, compiled: bool) -> Case:
    expert = ops.gate(logits(T, E, device), K).expert_TK
    runs = {"lina": lambda: ops.sort(expert, E), "eager": lambda: eager(expert, E)}
    info = {}

    def check() -> None:
        for run in runs.values():
            for got, want in zip(run(), reference.sort(expert, E), strict=True):
                assert torch.equal(got, want)

    if compiled:
        function, why = try_compile(eager, expert, E)
        if function is None:
            info["compiled"] = f"not measured: {why}"
        else:
            runs["compiled"] = lambda: function(expert, E)
    return Case(f"sort {T=} {E=} {K=}", runs, 12 * T * K + 4 * (E + 1), "12 T K + 4 (E + 1)",
                check=check, info=info)


def behind_gate(T: int, E: int, K: int, device: str) -> Case:
    x = logits(T, E, device)

    def ours() -> tuple:
        routing = ops.gate(x, K)
        return routing.weight_TK, *ops.sort(routing.expert_TK, E)

    def theirs() -> tuple:
        weight, expert = eager_gate(x, K)
        return weight, *eager(expert, E)

    def check() -> None:
        want = reference.gate(x.double(), K)
        for got, ref in zip(ours()[1:], reference.sort(want.expert_TK, E), strict=True):
            assert torch.equal(got, ref)
        assert torch.equal(theirs()[1][-1:], ours()[1][-1:])  # torch breaks ties in any order

    return Case(f"gate and sort {T=} {E=} {K=} {x.dtype}", {"lina": ours, "eager": theirs},
                x.nbytes + 20 * T * K + 4 * (E + 1), "logits + 20 T K + 4 (E + 1)", check=check)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="also torch.compile's version (slow start)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = SHAPES[args.device]
    cases = [alone(*shape, args.device, args.compiled) for shape in shapes]
    measure("sort", cases + [behind_gate(*shape, args.device) for shape in shapes], args)


if __name__ == "__main__":
    main()
