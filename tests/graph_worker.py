"""What every rank does in test_spread.py: layers over c10d and nccl as CUDA graphs hold them."""

from __future__ import annotations

import time
from unittest import mock

import torch
import torch.distributed as dist
from parallel_worker import error_of
from spread_worker import LOCAL, TOKENS, K, assert_equal, exact, results, tokens, weights

import lina
from lina import parallel
from lina.parallel.tokens import padded


def padded_rows(device) -> None:
    """The way of a graph capture, outside one: all to all ranks, the same sums, every gradient; ranks that
    differ learn it at once."""
    world, me = dist.get_world_size(), dist.get_rank()
    mesh, experts = lina.mesh(ep=world), LOCAL * world
    w = weights(device, exact(device), bias=True, gated=True)
    for counts in TOKENS.values():
        for kind in ("random", "one", "none"):
            for frozen in ((), (0,), (1,), (2, 3, 4, 5)):
                given = (*tokens(device, exact(device), counts[me], experts, kind), experts, w, frozen)
                want = results(mesh, None, *given)
                with mock.patch.object(padded, "capturing", lambda x: True):
                    assert_equal(results(mesh, (1, 1), *given), want, 1, f"{counts}, {kind}, frozen {frozen}")
    x, weight, expert = tokens(device, exact(device), 3, experts)
    few = K if me == 0 else K - 1
    ids = expert[:, :few].contiguous()
    with mock.patch.object(padded, "capturing", lambda x: True):
        text = error_of(ValueError, parallel.moe, x, weight[:, :few], ids, *w[:2], experts=experts, mesh=mesh)
    values = [K] + [K - 1] * (world - 1)
    assert text == f"dispatch: the ranks of one expert group disagree on K: {values} by rank"


def graph(device, transport: str) -> None:
    """Captured once, without gradients and with; replayed with other tokens and routes. A rank has none."""
    world, me, dtype = dist.get_world_size(), dist.get_rank(), torch.bfloat16
    mesh, experts = lina.mesh(ep=world, transport=transport), LOCAL * world
    w = [t.to(dtype) for t in weights(device, exact(device), bias=False, gated=True)[:2]]
    x, weight, expert = tokens(device, dtype, TOKENS["uneven"][me], experts)
    if transport == "nccl":
        text = error_of(RuntimeError, captured, lambda: run_once(mesh, x, weight, expert, experts, w, False))
        assert "run the layer once before" in text, text
    for grad in (False, True):
        def run(grad=grad) -> list:
            return run_once(mesh, x, weight, expert, experts, w, grad)

        with torch.cuda.stream(torch.cuda.Stream()):
            run()
        torch.cuda.synchronize()
        replay, got = captured(run)
        for turn in range(20):
            draw = torch.Generator().manual_seed(100 * turn + me)
            x.copy_(torch.randn(x.shape, generator=draw))
            weight.copy_(torch.rand(weight.shape, generator=draw))
            expert.copy_(torch.rand(len(x), experts + 2, generator=draw).argsort(-1)[:, :K] - 1)
            if me == turn % world:
                time.sleep(0.01)                                  # ranks drift apart
            replay()
            want = run()
            torch.cuda.synchronize()
            assert_equal(got + [None] * 2, want + [None] * 2, 1, f"replay {turn}, gradients {grad}")


def captured(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        got = run()
    return graph.replay, got


def run_once(mesh, x, weight, expert, experts, w, grad: bool) -> list:
    """out, and with ``grad`` the gradients of x, weight and both weights."""
    leaves = [t.detach().requires_grad_(grad) for t in (x, weight, *w)]
    out = parallel.moe(*leaves[:2], expert, *leaves[2:], experts=experts, mesh=mesh)
    if grad:
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    return [out, *[None] * 4]
