"""Gate and moe (sort, experts, combine), forward and with backward, against plain PyTorch.

    python benchmarks/bench_experts.py [--device cpu|cuda] [--threads N] [--shape T,D,F,E,K] [--compiled]
                                       [--json FILE]

All start from the same logits and hold the same leaves. `loop` takes the experts one by one; `grouped` is
eager code around torch._grouped_mm: sort, gather, grouped product, silu * up, grouped product, scatter, sum.
FLOPs are those of the products, 6 T K D F forward and 18 T K D F with backward. Every design's output and
gradients are first compared with float64 on a small shape, lina's output also on the shape that is timed. The
peers wait for the GPU inside a run (nonzero, bincount): that is part of their time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Case, arguments, measure, try_compile
from torch import Tensor

from lina import ops, reference

SHAPES = {  # T, D, F, E, K
    "cuda": [(32768, 2048, 768, 128, 8), (24576, 1536, 1024, 32, 2), (32768, 4096, 1024, 64, 4)],
    "cpu": [(1024, 256, 256, 16, 2)],
}
CHECK = (512, 64, 48, 16, 4)
Leaves = tuple[Tensor, ...]  # x, logits, w_up, w_down


def lina(x: Tensor, logits: Tensor, w_up: Tensor, w_down: Tensor, K: int) -> Tensor:
    routing = ops.gate(logits, K, score="topk_softmax")
    return ops.moe(x, routing.weight_TK, routing.expert_TK, w_up, w_down)


def route(logits: Tensor, K: int) -> tuple[Tensor, Tensor]:
    value, expert = logits.topk(K)
    return value.softmax(-1, dtype=torch.float32), expert


def loop(x: Tensor, logits: Tensor, w_up: Tensor, w_down: Tensor, K: int) -> Tensor:
    weight, expert = route(logits, K)
    out = torch.zeros_like(x)
    for e, (up, down) in enumerate(zip(w_up.unbind(), w_down.unbind(), strict=True)):
        t, k = (expert == e).nonzero(as_tuple=True)
        g, u = F.linear(x.index_select(0, t), up).chunk(2, -1)
        out.index_add_(0, t, F.linear(F.silu(g) * u, down) * weight[t, k, None].to(x.dtype))
    return out


def grouped(x: Tensor, logits: Tensor, w_up: Tensor, w_down: Tensor, K: int) -> Tensor:
    weight, expert = route(logits, K)
    pairs = expert.flatten()
    order = pairs.argsort(stable=True)
    ends = torch.bincount(pairs, minlength=w_up.shape[0]).cumsum(0).int()
    h = torch._grouped_mm(x.index_select(0, order // K), w_up.transpose(1, 2), offs=ends)
    g, u = h.chunk(2, -1)
    y = torch._grouped_mm(F.silu(g) * u, w_down.transpose(1, 2), offs=ends)
    y = torch.empty_like(y).index_copy(0, order, y).view(*weight.shape, -1)
    return (y * weight[..., None].to(y.dtype)).sum(1)


DESIGNS: dict[str, Callable[..., Tensor]] = {"lina": lina, "grouped": grouped, "loop": loop}


def inputs(T: int, D: int, W: int, E: int, K: int, dtype: torch.dtype, device: str) -> tuple[Leaves, Tensor]:
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=draw, device=device, dtype=dtype) * scale

    # Steps of 1/16, exact in bf16, in random order: no ties, so that every design chooses alike.
    logits = (torch.rand(T, E, generator=draw, device=device).argsort(-1) - E // 2).to(dtype) / 16
    leaves = normal(T, D), logits, normal(E, 2 * W, D, scale=D**-0.5), normal(E, D, W, scale=W**-0.5)
    return tuple(t.requires_grad_() for t in leaves), normal(T, D)


def step(design: Callable, leaves: Leaves, K: int, dout: Tensor) -> list[Tensor]:
    """Forward and backward into fresh gradients, as after an optimizer's zero_grad."""
    for leaf in leaves:
        leaf.grad = None
    out = design(*leaves, K)
    out.backward(dout)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def truth(x: Tensor, logits: Tensor, w_up: Tensor, w_down: Tensor, K: int) -> Tensor:
    routing = reference.gate(logits, K, score="topk_softmax")
    return reference.moe(x, routing.weight_TK, routing.expert_TK, w_up, w_down)


def close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, terms: int) -> None:
    """Of the largest element: 16 roundings of stored values (h, a, y, their gradients and products, the
    router's weight), and of float32 sums four times the square root of their length."""
    limit = 16 * torch.finfo(dtype).eps + 4 * terms**0.5 * torch.finfo(torch.float32).eps
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    if not error <= limit:
        sys.exit(f"{name}: relative error {error:.2e}, allowed {limit:.2e}: not timed")


def check_small(dtype: torch.dtype, device: str) -> dict[str, str]:
    """Each design's output and gradients on a small shape; gives those that do not run here, and why."""
    leaves, dout = inputs(*CHECK, dtype, device)
    T, D, W, _, K = CHECK
    exact = tuple(t.detach().double().requires_grad_() for t in leaves)
    want = step(truth, exact, K, dout.double())
    missing = {}
    for name, design in DESIGNS.items():
        try:
            got = step(design, leaves, K, dout)
        except (RuntimeError, AttributeError) as error:
            if name != "grouped":
                raise
            missing[name] = f"not measured: {str(error).strip().splitlines()[0][:100]}"
            continue
        for part, g, w in zip(("out", "dx", "dlogits", "dw_up", "dw_down"), got, want, strict=True):
            close(f"{name} {part}", g, w, dtype, max(T, D, W))
    return missing


def cases(shape: tuple, dtype: torch.dtype, device: str, compiled: bool) -> list[Case]:
    T, D, W, E, K = shape
    leaves, dout = inputs(T, D, W, E, K, dtype, device)
    info = check_small(dtype, device)
    designs = {n: f for n, f in DESIGNS.items() if n not in info}

    def check() -> None:
        some = 32
        few = leaves[0][:some], leaves[1][:some], *leaves[2:]
        with torch.no_grad():
            want = truth(*(t.double() for t in few), K)
            close("lina", lina(*leaves, K)[:some], want, dtype, max(D, W))

    if compiled:
        design = designs.get("grouped", loop)
        function, why = try_compile(design, *leaves, K)
        if function is None:
            info["compiled"] = f"not measured: {why}"
        else:
            designs["compiled"] = function
    name = f"{T=} {D=} F={W} {E=} {K=} swiglu {dtype}"
    timing = dict(repeats=12, head_start_us=5000.0, info=info)
    flops = 6 * T * K * D * W
    forward = {n: functools.partial(f, *leaves, K) for n, f in designs.items()}
    both = {n: functools.partial(step, f, leaves, K, dout) for n, f in designs.items()}
    return [Case(f"forward {name}", forward, flops=flops, check=check, **timing),
            Case(f"forward + backward {name}", both, flops=3 * flops, **timing)]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="T,D,F,E,K; may be given several times")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of grouped (slow start)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = [tuple(map(int, s.split(","))) for s in args.shape or []] or SHAPES[args.device]
    dtypes = (torch.bfloat16,) if args.device == "cuda" else (torch.float32, torch.bfloat16)
    measure("experts", [case for dtype in dtypes for shape in shapes
                        for case in cases(shape, dtype, args.device, args.compiled)], args)


if __name__ == "__main__":
    main()
