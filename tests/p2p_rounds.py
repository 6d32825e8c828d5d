"""Scenarios of p2p_worker.py about single rounds: large ones, priority over gradients, passes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from p2p_case import both, inputs, on_fresh, ours, same, settle, world, wrong
from parallel_worker import error_of

import lina
from lina import _C, parallel
from lina.parallel.tokens.round import Round
from lina.parallel.transport.peers import Peers, peers_of


def large(device) -> None:
    """Rows of 32 MB, from which either half of a round is three kernels: as over c10d, the same bits again
    and replayed. One rank above that and one below; both above; no whole vectors; slots counted in sending.
    """
    group = dist.group.WORLD
    for T, D, K in ((4099, 4096, 3), (4200, 4096, 8), (5700, 3001, 1), (500, 40000, 2)):
        leaves, expert, E = inputs(device, T - 7 * dist.get_rank(), D, 32, K, torch.bfloat16, "wide")
        peers, what = Peers(group, tokens=T, timeout_s=10), f"{T=} {D=} {K=}"
        both(leaves, expert, E, peers, group, what)
        def run(leaves=leaves, expert=expert, E=E, peers=peers) -> list:
            return on_fresh(lambda fresh: ours(fresh, expert, E, peers), leaves, True)

        first, again = run(), run()
        same(again, first, what)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            held = run()
        for _ in range(2):
            captured.replay()
            same(held, first, f"{what}, replayed")
        torch.cuda.synchronize()
        peers.close()
    settle()


def priority(device) -> None:
    """The word that gradients respect: raised from dispatch to collect in training, not without gradients;
    down after forward and backward; a replayed graph raises it anew."""
    peers, index = Peers(dist.group.WORLD, tokens=4200, timeout_s=10), torch.cuda.current_device()

    def raised() -> bool:
        torch.cuda.synchronize()
        return _C.read_priority(index)[0]

    for T, D, on in ((8, 64, False), (8, 64, True), (4200, 4096, True)):    # the last by three kernels
        K, E = 2, 2 * world()
        layer = peers.layer(T, D, K, E, torch.bfloat16, True)
        expert = torch.arange(T * K, device=device, dtype=torch.int32).view(T, K) % E
        x, weight = torch.ones(T, D, device=device, dtype=torch.bfloat16), torch.ones(T, K, device=device)
        slot, count = expert.new_empty(T, world()), expert.new_empty(2, world())
        y = x.new_ones(world() * layer.C, D)
        received = weight.new_empty(len(y), K), expert.new_empty(len(y), K)
        call = Round(peers, layer, T, D, K, E, torch.bfloat16, on, on)
        sent = x, expert, weight, slot, count, None, *received
        returned = y, None, None, None, slot, count, expert, torch.empty_like(x), None
        def out(call=call, sent=sent) -> None:
            call.dispatch("out", *sent)
        def back(call=call, returned=returned) -> None:
            call.collect("back", *returned)
        out(), back()
        graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
        for graph, half in zip(graphs, (out, back), strict=True):
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                half()
        for half, other in [(out, back), (out, back), (graphs[0].replay, graphs[1].replay)]:
            if raised():
                wrong.append(f"raised before, {T=} {on=}")
            dist.barrier()                   # or the watch might lower it while a late rank is waited for
            half()
            if raised() != on:               # synchronize, then read: far less than the 0.25 s it may stay
                wrong.append(f"{'not raised' if on else 'raised'} between dispatch and collect")
            other()
    if raised():
        wrong.append("raised after collect")
    leaves, expert, E = inputs(device, 20, 64, 32, 2, torch.bfloat16, "random")
    out = ours(leaves, expert, E, peers)
    if raised():
        wrong.append("raised after forward")
    out.sum().backward()
    if raised():
        wrong.append("raised after backward")
    peers.close()
    settle()


def degree(device) -> None:
    """Several passes: results as over c10d, the same bits again, in a graph too; other degrees backward are
    refused before anything is sent; what lina.ddp chooses by itself is one pass."""
    mesh = lina.mesh(ep=world(), transport="p2p")
    leaves, expert, E = inputs(device, 20, 64, 32, 2, torch.bfloat16, "random", bias=False)

    def call():
        return parallel.moe(leaves[0], leaves[1], expert, *leaves[2:], experts=E, mesh=mesh)

    parallel.settings(mesh).degree = 2, 1
    assert "as many passes as forward" in error_of(ValueError, call)
    group = parallel.groups(mesh).ep
    for r in (2, 3):
        peers = peers_of(group, r, tokens=1001)
        for T in (1001 - 7 * dist.get_rank(), r - 1):
            many, ids, wide = inputs(device, T, 256, 64, 4, torch.bfloat16, "wide")
            both(many, ids, wide, peers, group, f"{r} passes, {T=}")
            def run(many=many, ids=ids, wide=wide, peers=peers) -> list:
                return on_fresh(lambda fresh: ours(fresh, ids, wide, peers), many, True)

            first, again = run(), run()
            same(again, first, f"{r} passes, {T=}")
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, capture_error_mode="thread_local"):
                held = run()
            captured.replay()
            same(held, first, f"{r} passes, {T=}, replayed")
            torch.cuda.synchronize()
    net = lina.MoE(64, 32, E, 2, mesh=mesh, device=device)
    lina.ddp(net, mesh, schedule="lina")
    assert parallel.settings(mesh).degree == (1, 1)
    call().float().sum().backward()
