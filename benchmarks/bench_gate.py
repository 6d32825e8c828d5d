"""gate against eager and compiled softmax + topk, forward, with statistics, and backward.

    python benchmarks/bench_gate.py [--device cpu|cuda] [--threads N] [--backward] [--json FILE]

Traffic counted: logits read, weights (float32) and ids (int32) written; backward
reads logits, ids and weight gradients and writes logit gradients.
"""

from __future__ import annotations

import torch
from common import Case, arguments, measure, try_compile

from lina import ops, reference

SHAPES = [(16384, 8, 2), (16384, 64, 8), (16384, 128, 8), (16384, 256, 8)]


def eager(x: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a plain router does: in float32, as lina."""
    weight, expert = x.softmax(-1, dtype=torch.float32).topk(K)
    return weight, expert.int()


def forward(T: int, E: int, K: int, dtype: torch.dtype, device: str, compiled: bool) -> Case:
    x = torch.randn(T, E, generator=torch.Generator().manual_seed(E)).to(device=device, dtype=dtype)

    def check() -> None:
        got, want = ops.gate(x, K), reference.gate(x.double(), K)
        assert torch.equal(got.expert_TK, want.expert_TK)
        limit = 4 * (E / 16 + K + 8) * torch.finfo(torch.float32).eps * want.weight_TK.max()
        assert (got.weight_TK - want.weight_TK).abs().max() <= limit

    runs = {
        "lina": lambda: ops.gate(x, K),
        "eager": lambda: eager(x, K),
        "lina with stats": lambda: ops.gate(x, K, stats=True),
    }
    info = {}
    if compiled:
        function, why = try_compile(lambda x: eager(x, K), x)
        if function is None:
            info["compiled"] = f"not measured: {why}"
        else:
            runs["compiled"] = lambda: function(x)
    return Case(
        f"forward {T=} {E=} {K=} {dtype}",
        runs,
        x.nbytes + 8 * T * K,
        "logits + 8 T K",
        check=check,
        info=info,
    )


def backward(T: int, E: int, K: int, dtype: torch.dtype, device: str) -> Case:
    x = torch.randn(T, E, generator=torch.Generator().manual_seed(E)).to(device=device, dtype=dtype)
    x.requires_grad_()
    weight, plain = ops.gate(x, K).weight_TK, eager(x, K)[0]
    dweight = torch.randn(T, K, generator=torch.Generator().manual_seed(1)).to(device)

    def run(output: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(output, x, dweight, retain_graph=True)[0]

    def check() -> None:
        # torch breaks ties in any order: rows where it chose otherwise (many in bf16) are not compared.
        got, want = run(weight).double(), run(plain).double()
        limit = (
            torch.finfo(dtype).eps * want.abs() + 4 * (E / 16 + K + 8) * torch.finfo(torch.float32).eps * 4
        )
        chosen = (ops.gate(x, K).expert_TK == eager(x, K)[1]).all(-1)
        assert chosen.float().mean() > 0.5 and ((got - want).abs() <= 2 * limit)[chosen].all()

    return Case(
        f"backward {T=} {E=} {K=} {dtype}",
        {"lina": lambda: run(weight), "eager": lambda: run(plain)},
        2 * x.nbytes + 8 * T * K,
        "2 logits + 8 T K",
        check=check,
    )


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--backward", action="store_true", help="also the backward")
    parser.add_argument(
        "--compiled", action="store_true", help="also torch.compile's softmax + topk (slow to start)"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [
        forward(T, E, K, dtype, args.device, args.compiled)
        for dtype in (torch.float32, torch.bfloat16)
        for T, E, K in SHAPES
    ]
    if args.backward:
        cases += [
            backward(T, E, K, dtype, args.device)
            for dtype in (torch.float32, torch.bfloat16)
            for T, E, K in SHAPES
        ]
    measure("gate", cases, args)


if __name__ == "__main__":
    main()
