"""The layer on the CPU, forward and backward, against plain PyTorch loops over experts, in one run.

    python benchmarks/bench_layer_cpu.py [--threads 2] [--seconds 20] [--shape T,D,F,E,K] [--json FILE]

Every design gets the same tokens, router and expert weights, all as parameters; its result and every
gradient are first compared with float64. Then the designs run in turn, so that all of them see the same
clocks and neighbours; gradients are dropped before each run, as optimizers do. FLOPs counted are those of
the products: 6 T K D F forward, twice that backward.
"""

from __future__ import annotations

import functools
import sys

import torch
import torch.nn.functional as F
from common import Case, arguments, measure
from torch import Tensor, nn

from lina import ops, reference

SHAPE = (2048, 512, 1024, 16, 2)


def route(x: Tensor, w: Tensor, K: int) -> tuple[Tensor, Tensor]:
    weight, expert = F.linear(x, w).softmax(-1).topk(K, -1)
    return weight / weight.sum(-1, keepdim=True), expert


class Stacked(nn.Module):
    """Weights as lina holds them: one tensor for all experts."""

    def __init__(self, values: dict[str, Tensor], K: int) -> None:
        super().__init__()
        self.K = K
        self.router = nn.Parameter(values["router"].clone())
        self.w_up, self.w_down = (nn.Parameter(values[n].clone()) for n in ("w_up", "w_down"))

    def grads(self) -> list[Tensor]:
        return [p.grad for p in (self.router, self.w_up, self.w_down)]


class Listed(nn.Module):
    """One parameter for each expert: no gradient of a slice has to be added into the whole."""

    def __init__(self, values: dict[str, Tensor], K: int) -> None:
        super().__init__()
        self.K = K
        self.router = nn.Parameter(values["router"].clone())
        self.w_up = nn.ParameterList([w.clone() for w in values["w_up"]])
        self.w_down = nn.ParameterList([w.clone() for w in values["w_down"]])

    def grads(self) -> list[Tensor]:
        return [self.router.grad, *(torch.stack([p.grad for p in w]) for w in (self.w_up, self.w_down))]


class Lina(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        r = ops.gate(F.linear(x, self.router), self.K, renormalize=True)
        return ops.moe(x, r.weight_TK, r.expert_TK, self.w_up, self.w_down)


def loop(x: Tensor, weight: Tensor, expert: Tensor, w_up: list, w_down: list) -> Tensor:
    """index_select, linear, index_add for each expert."""
    out = torch.zeros_like(x)
    for e, (up, down) in enumerate(zip(w_up, w_down, strict=True)):
        t, k = (expert == e).nonzero(as_tuple=True)
        g, u = F.linear(x.index_select(0, t), up).chunk(2, -1)
        out.index_add_(0, t, F.linear(F.silu(g) * u, down) * weight[t, k, None])
    return out


class LoopListed(Listed):
    def forward(self, x: Tensor) -> Tensor:
        return loop(x, *route(x, self.router, self.K), list(self.w_up), list(self.w_down))


class LoopUnbound(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        return loop(x, *route(x, self.router, self.K), self.w_up.unbind(), self.w_down.unbind())


class LoopSplitUp(Listed):
    """Gate and up as two products."""

    def __init__(self, values: dict[str, Tensor], K: int) -> None:
        super().__init__(values, K)
        self.w_gate, self.w_only_up = (nn.ParameterList([w.chunk(2)[i].clone() for w in values["w_up"]])
                                       for i in range(2))
        del self.w_up

    def grads(self) -> list[Tensor]:
        up = [torch.cat((g.grad, u.grad)) for g, u in zip(self.w_gate, self.w_only_up, strict=True)]
        return [self.router.grad, torch.stack(up), torch.stack([p.grad for p in self.w_down])]

    def forward(self, x: Tensor) -> Tensor:
        weight, expert = route(x, self.router, self.K)
        out = torch.zeros_like(x)
        for e, (gate, up, down) in enumerate(zip(self.w_gate, self.w_only_up, self.w_down, strict=True)):
            t, k = (expert == e).nonzero(as_tuple=True)
            xe = x.index_select(0, t)
            y = F.linear(F.silu(F.linear(xe, gate)) * F.linear(xe, up), down)
            out.index_add_(0, t, y * weight[t, k, None])
        return out


class SortedListed(Listed):
    """Rows sorted once, one split, one index_add."""

    def forward(self, x: Tensor) -> Tensor:
        weight, expert = route(x, self.router, self.K)
        pairs = expert.flatten()
        order = pairs.argsort(stable=True)
        token = order // self.K
        parts = x.index_select(0, token).split(torch.bincount(pairs, minlength=len(self.w_up)).tolist())
        rows = []
        for xe, up, down in zip(parts, self.w_up, self.w_down, strict=True):
            g, u = F.linear(xe, up).chunk(2, -1)
            rows.append(F.linear(F.silu(g) * u, down))
        y = torch.cat(rows) * weight.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add_(0, token, y)


DESIGNS = {"lina": Lina, "loop, list of weights": LoopListed, "loop, stacked weights": LoopUnbound,
           "loop, gate and up apart": LoopSplitUp, "sorted, list of weights": SortedListed}


def check(values: dict[str, Tensor], K: int, x: Tensor, dout: Tensor) -> None:
    """Each design against the reference in float64, to n roundings of the largest element."""
    leaves = [v.double().requires_grad_() for v in (x, *values.values())]
    rx, router, up, down = leaves
    routing = reference.gate(rx @ router.T, K, renormalize=True)
    want = reference.moe(rx, routing.weight_TK, routing.expert_TK, up, down)
    truth = [want, *torch.autograd.grad(want, leaves, dout.double())]
    terms = max(x.shape[0], up.shape[1])
    for name, design in DESIGNS.items():
        model, leaf = design(values, K), x.clone().requires_grad_()
        out = model(leaf)
        out.backward(dout)
        for got, ref in zip((out, leaf.grad, *model.grads()), truth, strict=True):
            error = ((got.double() - ref).abs().max() / ref.abs().max()).item()
            if not error <= 4 * terms**0.5 * torch.finfo(torch.float32).eps:
                sys.exit(f"{name}: relative error {error:.2e}: not timed")


def step(model: nn.Module, x: Tensor, dout: Tensor) -> None:
    """Forward and backward into fresh gradients, as after an optimizer's zero_grad."""
    model.zero_grad(set_to_none=True)
    x.grad = None
    model(x).backward(dout)


def case(T: int, D: int, W: int, E: int, K: int) -> Case:
    draw = torch.Generator().manual_seed(0)
    values = {
        "router": torch.randn(E, D, generator=draw) * D**-0.5,
        "w_up": torch.randn(E, 2 * W, D, generator=draw) * D**-0.5,
        "w_down": torch.randn(E, D, W, generator=draw) * W**-0.5,
    }
    x, dout = torch.randn(T, D, generator=draw), torch.randn(T, D, generator=draw)
    leaf = x.clone().requires_grad_()
    models = {name: design(values, K) for name, design in DESIGNS.items()}
    return Case(
        f"forward + backward, gate included, {T=} {D=} F={W} {E=} {K=} swiglu float32",
        {name: functools.partial(step, model, leaf, dout) for name, model in models.items()},
        flops=18 * T * K * D * W,
        check=lambda: check(values, K, x, dout),
    )


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(device="cpu", seconds=20.0)
    parser.add_argument("--shape", default=",".join(map(str, SHAPE)), help="T,D,F,E,K")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("this benchmark is of the CPU")
    torch.set_num_threads(args.threads or 2)
    measure("layer on the CPU", [case(*map(int, args.shape.split(",")))], args)


if __name__ == "__main__":
    main()
