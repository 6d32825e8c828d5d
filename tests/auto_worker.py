"""What every rank does in test_auto.py: some steps are observed, then a plan holds on all ranks."""

from __future__ import annotations

import os
import time
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from auto_case import DENSE, FREE, GIVEN, KINDS, OBSERVE, STEPS, TOKENS, assert_same, build, save, train
from auto_left import left, left_transport, moved, next_best, on_gpus
from parallel_worker import batch, error_of, everyone, loss_of, spread_net, whole_net
from torch import nn

import lina
from lina import parallel
from lina.parallel import CostModel, machine_facts
from lina.parallel.tokens import dispatch
from lina.parallel.transport.c10d import C10d

__all__ = ["left", "left_transport", "moved", "next_best", "on_gpus"]          # scenarios as those below


def chosen(device, kind: str) -> None:
    """The known answer; the same on all ranks though they measured differently; losses as plain's."""
    save(kind)
    world = dist.get_world_size()
    mesh, other = lina.mesh(ep=world), lina.mesh(ep=world)
    plain = build(device, other)
    want = train(*plain, STEPS)
    wrapped, net, optimizer = build(device, mesh, schedule="auto", observe=OBSERVE,
                                    **GIVEN.get(kind, {}))
    seen = []
    facts = wrapped._auto._facts
    wrapped._auto._facts = lambda model: seen.append(facts(model)) or seen[-1]
    got = train(wrapped, net, optimizer, OBSERVE)
    assert wrapped.plan is None and parallel.settings(mesh).degree == (1, 1)
    with torch.no_grad():                      # no step, and on no account the moment of the decision
        wrapped(torch.zeros(2, 4, dtype=got[0].dtype))
    with wrapped.no_sync():
        loss_of(wrapped, *batch(0, 99, next(net.parameters()))).backward()
    assert wrapped.plan is None
    optimizer.zero_grad()
    got += train(wrapped, net, optimizer, STEPS - OBSERVE, first=OBSERVE)
    plan, (degree, schedule) = wrapped.plan, KINDS[kind][3:]
    assert plan is not None and wrapped._auto is None, "no decision"
    assert len(set(everyone(repr(plan)))) == 1
    assert len(set(everyone(repr(seen[0]["step"]["forward_s"])))) == world, "ranks measured the same?"
    assert plan.degree == degree == parallel.settings(mesh).degree, f"{plan}"
    assert plan.transport == parallel.settings(mesh).transport == "c10d"
    assert plan.schedule == schedule, f"{plan}"
    assert (wrapped.expert_reducer.queue is not None) == (schedule == "lina")
    same = (schedule, degree) == ("plain", (1, 1))
    assert plan.measured_s > 0 and plan.left == "", f"{plan}"
    assert same == (plan.measured_s == plan.load.step_s), f"{plan}"
    assert f"ms  {plan.chosen.label}" in str(plan).split("measured")[1], f"{plan}"
    if schedule == "lina":
        policy = wrapped.expert_reducer.queue(device)._state.policy
        assert policy.size == plan.micro_op_bytes and policy.started > 0 and policy.pending == 0
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(a, b, f"{kind}: loss {i}")
    for (name, a), b in zip(net.named_parameters(), plain[1].parameters(), strict=True):
        assert_same(a.detach(), b.detach(), f"{kind}: {name}")
    traffic(plan, seen[0]["step"], world)


def traffic(plan, step, world: int) -> None:
    """What was observed: tokens and rows of the rank with most, every pair once."""
    load, most = plan.load, TOKENS + 3 * (world - 1)
    assert [layer.name for layer in load.layers] == ["moe1.experts", "moe2.experts"]
    dense = sum(sum(grads) for grads in load.dense_grads)
    # first, middle, last and two routers, in float64
    assert dense == 8 * (6 * 5 + 6 * 7 + 4 * 7 + 2 * 8 * 6), load.dense_grads
    assert load.dense_grads[-1] == (8 * 24, 8 * 4), "the last layer's come after the experts"
    for layer, call in zip(load.layers, step["calls"], strict=True):
        assert (layer.tokens, layer.top_k, layer.experts, layer.dtype) == (most, 3, 8, "float64")
        everywhere = [torch.tensor(call[name]) for name in ("sent", "received")]
        for total in everywhere:
            dist.all_reduce(total)
        assert everywhere[0] == everywhere[1] > 0
        assert layer.rows <= most
        rows = torch.tensor(max(call["sent"], call["received"]))
        dist.all_reduce(rows, dist.ReduceOp.MAX)
        assert layer.rows == rows.item()
        assert 0 < layer.own_pairs + layer.remote_pairs <= 3 * world * most
    assert load.step_s >= load.forward_s > 0 and load.backward_s > 0 and load.outside_s > 0


def counted(device) -> None:
    """A transport that reads its counts says how many pairs are computed where: all of them."""
    save("slow")
    world = dist.get_world_size()
    mesh = lina.mesh(ep=world)
    observer = parallel.plan.observe.Observer(device)
    net = spread_net(whole_net("softmax", device), "softmax", mesh)
    x, _ = batch(dist.get_rank(), 0, next(net.parameters()), tokens=TOKENS)
    found = {}
    for degree in ((1, 1), (4, 2)):
        parallel.settings(mesh).degree = degree
        observer.begin()
        net(x)
        observer.forward_ends()
        found[degree] = observer.steps[-1].calls
    for plain, passes in zip(*found.values(), strict=True):
        assert (plain.sent, plain.received) == (passes.sent, passes.received)
        pairs = torch.tensor([passes.own_pairs + passes.remote_pairs])
        dist.all_reduce(pairs)
        assert pairs.item() == world * TOKENS * 3
        assert plain.own_pairs == -1
    net(x)
    assert len(observer.steps[-1].calls) == 2, "nobody looks any more"


class Slow(torch.autograd.Function):
    """Dense work of so many seconds, forward and backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds[1]
        time.sleep(seconds[0])
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        time.sleep(ctx.seconds)
        return dx, None


def in_backward(observer, grad) -> None:
    observer.in_backward()


def apart(device) -> None:
    """What is seen outside the layers is what is slow there, and no exchange counts, slow as it is."""
    save("free")
    dense, exchange, tokens = (0.06, 0.1), 0.03, TOKENS + 3 * dist.get_rank()

    def slowly(*args, **kw):
        time.sleep(exchange)
        return exchanged(*args, **kw)

    exchanged, start = dispatch._exchange, C10d.start
    half = dense[0] / 2, dense[1] / 2          # between two layers, and between router and experts
    for degree in ((1, 1), (2, 2)):            # separate nodes of autograd, and a single one
        mesh = lina.mesh(ep=dist.get_world_size())
        parallel.settings(mesh).degree = degree
        observer = parallel.plan.observe.Observer(device)
        net = spread_net(whole_net("softmax", device), "softmax", mesh)
        net.middle.register_forward_hook(lambda module, given, out: Slow.apply(out, half))
        net.moe1.experts.register_forward_pre_hook(
            lambda module, given: (Slow.apply(given[0], half), *given[1:]))
        with (mock.patch.object(dispatch, "_exchange", slowly),
              mock.patch.object(C10d, "start", lambda *args: time.sleep(exchange) or start(*args))):
            for step in range(3):
                observer.begin()
                loss = loss_of(net, *batch(dist.get_rank(), step, next(net.parameters()), tokens=tokens))
                observer.forward_ends()
                loss.register_hook(partial(in_backward, observer))
                loss.backward()
        seen, whole = DENSE(observer, observer.steps), observer.facts()
        for way, name in enumerate(("forward_s", "backward_s")):
            slow = 4 * exchange                          # two layers, rows out and back
            assert whole[name] >= dense[way] + slow, whole
            assert dense[way] <= seen[way] < dense[way] + slow / 2, (degree, seen, whole)


def failing(device) -> None:
    """Whatever goes wrong on one rank while all wait for the decision reaches all of them."""
    world = dist.get_world_size()
    for where in ("_plan", "_facts"):          # of rank 0 alone, and of any rank
        save("free")
        rank = 0 if where == "_plan" else world - 1
        wrapped, net, optimizer = build(device, lina.mesh(ep=world), schedule="auto", observe=OBSERVE)
        if dist.get_rank() == rank:
            setattr(wrapped._auto, where, lambda *_: {}["nowhere"])
        train(wrapped, net, optimizer, OBSERVE)
        text = error_of(RuntimeError, train, wrapped, net, optimizer, 1)
        assert f"ddp: schedule 'auto' failed on rank {rank}: KeyError: 'nowhere'" in text, text
        assert len(set(everyone(text))) == 1
    save("free")
    with mock.patch.object(CostModel, "load", side_effect=ZeroDivisionError("of a file")):
        text = error_of(RuntimeError, build, device, lina.mesh(ep=world), schedule="auto")
    assert "failed on rank 0: ZeroDivisionError: of a file" in text, text


def refused(device) -> None:
    """Before anything is changed, on every rank, though rank 0 alone knows."""
    world = dist.get_world_size()
    mesh = lina.mesh(ep=world)
    net = nn.Sequential(nn.Linear(4, 4), lina.MoE(4, 4, 8, 2, mesh=mesh))
    before = {name: p.clone() for name, p in net.named_parameters()}
    cases: list[tuple[dict, str]] = []
    for make, text in ((lambda: os.environ.update(LINA_PROFILE="/nowhere/profile.json"),
                        "ddp: schedule 'auto' needs a run of `lina profile`: .*no such file"),
                       (lambda: save("free", machine={**machine_facts(), "cpu": "abacus"}),
                        "was measured elsewhere: cpu there abacus, here "),
                       (lambda: save("free", links={("allreduce", "c10d"): FREE}),
                        "'a2a' was not measured")):
        make()
        cases.append(({}, text))
        assert_refused(net, mesh, *cases[-1])
    save("free")
    assert_refused(net, mesh, dict(observe=0), "observe is 0, must be a number of steps")
    assert_refused(net, mesh, dict(degree=(3, 9)), "degree is .3, 9., must be two numbers from 1 to 8")
    assert_refused(net, mesh, dict(regroup=True), "give optimizer")
    assert_refused(net, mesh, dict(observe=3 + dist.get_rank()), "given different options")
    assert_refused(net, mesh, dict(schedule="plain", observe=3), "are for schedule 'auto', not 'plain'")
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert parallel.settings(mesh).degree == (1, 1)


def assert_refused(net, mesh, options: dict, text: str) -> None:
    import re
    said = str(error_of(ValueError, lina.ddp, net, mesh, **{"schedule": "auto", **options}))
    assert re.search(text, said), said
