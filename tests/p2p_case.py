"""Layers over peers' memory and over c10d, and what compares them; for p2p_worker.py and p2p_rounds.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lina import ops, parallel
from lina.parallel.tokens.p2p import moe
from lina.parallel.transport.peers import Peers

from helpers import assert_within_rounding

TOKENS = (37, 0, 300, 5)          # uneven; none; more than one agreement step of 128
NAMES = ("x", "weight", "w_up", "w_down", "b_up", "b_down")


def world() -> int:
    return dist.get_world_size()


def inputs(device, T: int, D: int, F: int, K: int, dtype, kind: str, seed: int = 0, bias: bool = True):
    """This rank's tokens and experts: random ids, some absent; all to one expert; or none."""
    E = 2 * world() if kind != "wide" else 8 * world()
    rank = dist.get_rank()
    draw = torch.Generator().manual_seed(10 * seed + rank)
    x, weight = torch.randn(T, D, generator=draw), torch.rand(T, K, generator=draw)
    expert = torch.rand(T, E + 2 + K, generator=draw).argsort(-1)[:, :K] - 1       # -1 and from E on: absent
    if kind in ("one", "none"):
        expert.fill_(E - 1 if kind == "one" else -1)
    L = E // world()
    shapes = [(L, 2 * F, D), (L, D, F), *([(L, 2 * F), (L, D)] if bias else [])]
    weights = [torch.randn(s, generator=draw) * s[-1] ** -0.5 for s in shapes]
    leaves = [t.to(device, dtype) for t in (x, *weights)]
    leaves.insert(1, weight.to(device))
    return [t.requires_grad_() for t in leaves], expert.to(device, torch.int32), E


def plain(leaves, expert, E: int, group):
    x, weight, w_up, w_down, *bias = leaves
    options = dict(zip(("b_up", "b_down"), bias, strict=False))
    x_RD, weight_RK, expert_RK, route = parallel.dispatch(x, weight, expert, E, group)
    return parallel.collect(ops.moe(x_RD, weight_RK, expert_RK, w_up, w_down, **options), route)


def ours(leaves, expert, E: int, peers: Peers | list[Peers], **more):
    x, weight, w_up, w_down, *bias = leaves
    options = dict(zip(("b_up", "b_down"), bias, strict=False), **more)
    several = peers if isinstance(peers, list) else [peers]
    return moe(x, weight, expert, w_up, w_down, experts=E, peers=several, **options)


wrong: list[str] = []


def settle() -> None:
    """Raise what differed. Only at a scenario's end: until then the ranks stay in step."""
    found, wrong[:] = wrong[:], []
    assert not found, f"{len(found)} wrong:\n" + "\n".join(found[:8])


def same(got, want, what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not torch.equal(a, b):
            wrong.append(f"{what}: result {i} has other bits")


def compare(got, want, terms: int, what: str) -> None:
    # the rows' order and every sum's are the same; products may be tiled otherwise. Rounded to the dtype on
    # the way: pre-activation, activation, an expert's output, a rank's sum, and their gradients
    for name, g, w in zip(("out", *NAMES), got, want, strict=False):
        try:
            assert g.dtype == w.dtype, f"{what}: {name} is of {g.dtype}"
            assert_within_rounding(g, w.double(), terms, inner=8, name=f"{what}: {name}")
        except AssertionError as error:
            wrong.append(str(error))


def both(leaves, expert, E: int, peers: Peers, group, what: str, grad: bool = True) -> None:
    terms = leaves[0].shape[1] + leaves[3].shape[2] + sum(TOKENS)
    if not grad:
        with torch.no_grad():
            compare([ours(leaves, expert, E, peers)], [plain(leaves, expert, E, group)], terms, what)
        return
    results = []
    for call in (lambda: ours(leaves, expert, E, peers), lambda: plain(leaves, expert, E, group)):
        out = call()
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent)])
    compare(*results, terms, what)


def on_fresh(layer, leaves, grad: bool, *more) -> list:
    """Output and gradients. Of fresh leaves over the same memory: autograd remembers on which stream a leaf
    was first used, and a capture may have nothing to do with the default stream."""
    fresh = [t.detach().requires_grad_(grad) for t in leaves]
    out = layer(fresh, *more)
    return [out.detach(), *(torch.autograd.grad(out, fresh, torch.ones_like(out)) if grad else ())]
