"""The layers that bench_ep.py times, their inputs, and the dense truth they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import plain_experts, plain_route
from multi import off
from torch import Tensor

import lina
from lina import ops, parallel

ROUNDINGS = 16             # stored values between the inputs and a result, at most


class Shape(NamedTuple):
    title: str
    T: int      # tokens a rank
    D: int
    F: int
    E: int
    K: int


class Problem:
    """The inputs of a shape on this rank; the weights are leaves that all designs share."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.rank, self.world = shape, dist.get_rank(), dist.get_world_size()
        _, T, D, W, E, _ = shape
        self.local = E // self.world
        draw = torch.Generator(device).manual_seed(7)          # the same on every rank, which keeps its share
        options: dict[str, Any] = dict(device=device, dtype=dtype)

        def share(*size: int) -> Tensor:
            mine = torch.empty(0)
            for rank in range(self.world):
                part = torch.randn(self.local, *size, generator=draw, **options).mul_(size[-1] ** -0.5)
                mine = part if rank == self.rank else mine
            return mine.requires_grad_()

        self.router = torch.randn(E, D, generator=draw, **options).mul_(D**-0.5).requires_grad_()
        self.w_up, self.w_down = share(2 * W, D), share(D, W)
        own = torch.Generator(device).manual_seed(100 + self.rank)
        self.x = torch.randn(T, D, generator=own, **options).requires_grad_()
        self.dout = torch.randn(T, D, generator=own, **options)
        self.mesh = lina.mesh(self.world)

    def leaves(self) -> dict[str, Tensor]:
        return dict(x=self.x, router=self.router, w_up=self.w_up, w_down=self.w_down)


class Design:
    """One way to compute the layer. ``experts(x, weight, ids)``; ``route(logits)`` gives weight and ids."""

    def __init__(self, p: Problem) -> None:
        self.p = p

    def ready(self) -> None:
        """Called before each use."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return plain_route(logits, self.p.shape.K)

    def experts(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        raise AssertionError("each design has its own")

    def __call__(self) -> Tensor:
        return self.experts(self.p.x, *self.route(F.linear(self.p.x, self.p.router)))

    def clear(self) -> None:
        for leaf in self.p.leaves().values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: leaf.grad for name, leaf in self.p.leaves().items()}


class Plain(Design):
    select = False

    def experts(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        p = self.p
        return plain_experts(x, weight, ids, p.w_up, p.w_down, p.shape.E, dist.group.WORLD,
                             select=self.select)


class PlainSelect(Plain):
    select = True


class Lina(Design):
    def __init__(self, p: Problem, transport: str, degree: tuple[int, int]) -> None:
        super().__init__(p)
        self.transport, self.degree = transport, degree

    def ready(self) -> None:
        chosen = parallel.settings(self.p.mesh)
        chosen.transport, chosen.degree = self.transport, self.degree

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gate(logits, self.p.shape.K, score="topk_softmax")[:2]

    def experts(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        p = self.p
        return parallel.moe(x, weight, ids, p.w_up, p.w_down, experts=p.shape.E, mesh=p.mesh)


class LigerCute(Design):
    """liger-kernel 0.8.5 with liger-cute-kernels 0.8.5; configured once a process, for its largest shape."""

    largest: tuple[int, int, int, int] = (0, 0, 0, 0)         # T, D, E, K
    configured = False

    def __init__(self, p: Problem) -> None:
        super().__init__(p)
        from liger_cute_kernels import MoEConfig, configure
        from liger_kernel.ops.cute.ops.moe import moe_fused

        self.fused = moe_fused
        if not LigerCute.configured:
            T, D, E, K = self.largest
            configure(moe=MoEConfig(max_tokens=T, hidden_size=D, num_experts=E, top_k=K, num_hosts=1,
                                    gpus_per_host=p.world))
            LigerCute.configured = True
        self.halves = [half.detach().clone().requires_grad_() for half in p.w_up.chunk(2, 1)]

    def experts(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        p = self.p
        return self.fused(x, ids.int(), weight.bfloat16(), *self.halves, p.w_down, p.shape.E, p.shape.K)

    def clear(self) -> None:
        super().clear()
        for half in self.halves:
            half.grad = None

    def gradients(self) -> dict[str, Tensor | None]:
        parts = [half.grad for half in self.halves if half.grad is not None]
        return super().gradients() | {"w_up": torch.cat(parts, 1) if len(parts) == 2 else None}


def make(name: str, degree: tuple[int, int], p: Problem) -> Design:
    plain: dict[str, Callable[[Problem], Design]] = {
        "torch": Plain, "torch-select": PlainSelect, "ligercute": LigerCute}
    return plain[name](p) if name in plain else Lina(p, name, degree)


def dense(p: Problem, ids: Tensor) -> dict[str, Tensor]:
    """Output and gradients in float64, every expert on every rank. Logits are rounded as the designs round
    them; ``ids`` are the design's own, since torch does not say which of two equal ones it takes."""
    x, router = (t.detach().double().requires_grad_() for t in (p.x, p.router))
    whole = []
    for w in (p.w_up, p.w_down):
        parts = [torch.empty(w.shape, device=w.device, dtype=torch.float64) for _ in range(p.world)]
        dist.all_gather(parts, w.detach().double())
        whole.append(torch.cat(parts).requires_grad_())
    exact = x @ router.T
    logits = exact + (F.linear(p.x, p.router).double() - exact).detach()
    weight = logits.gather(1, ids).softmax(-1)
    out = torch.zeros_like(x)
    for e in range(p.shape.E):
        t, k = (ids == e).nonzero(as_tuple=True)
        a, b = (x[t] @ whole[0][e].T).chunk(2, -1)
        out = out.index_add(0, t, (F.silu(a) * b) @ whole[1][e].T * weight[t, k, None])
    out.backward(p.dout.double())
    shares = []
    for w in whole:                              # each rank's tokens add to every expert's gradient
        dist.all_reduce(w.grad)
        shares.append(w.grad[p.rank * p.local:(p.rank + 1) * p.local])
    return dict(out=out.detach(), x=x.grad, router=router.grad, w_up=shares[0], w_down=shares[1])


def limits(dtype: torch.dtype, terms: int) -> tuple[float, float]:
    """Of the error in norm, and of the worst element; sums of ``terms`` are kept in float32 at least."""
    eps, sums = torch.finfo(dtype).eps, terms**0.5 * torch.finfo(torch.float32).eps
    return ROUNDINGS**0.5 * eps / 2 + sums, ROUNDINGS * eps + 4 * sums


def check(design: Design) -> dict[str, float]:
    """Errors in norm of the output and all gradients; RuntimeError naming what is wrong. On all ranks."""
    p = design.p
    design.ready()
    design.clear()
    out = design()
    out.backward(p.dout)
    logits = F.linear(p.x, p.router).detach()
    ids = design.route(logits)[1].long()
    rest = logits.scatter(1, ids, float("-inf")).amax(1)
    distinct = bool((ids.sort(1).values.diff(dim=1) > 0).all())
    found, want = {"out": out.detach(), **design.gradients()}, dense(p, ids)
    bounds = limits(p.x.dtype, p.world * p.shape.T)
    highest = distinct and bool((logits.gather(1, ids).amin(1) >= rest).all())
    wrong = [] if highest else ["not the top experts"]
    measured: dict[str, float] = {}
    for name, truth in want.items():
        got = found[name]
        errors = (1.0, 1.0) if got is None else off(got, truth)
        measured[name] = errors[0]
        if not (errors[0] <= bounds[0] and errors[1] <= bounds[1]):
            wrong.append(f"{name} off by {errors[0]:.4f} in norm, {errors[1]:.4f} at worst; "
                         f"allowed {bounds[0]:.4f}, {bounds[1]:.4f}")
    design.clear()
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return measured
