"""Scenarios of auto_worker.py: plans that are left for what ran before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from auto_case import GIVEN, KINDS, OBSERVE, SLOW, STEPS, TOKENS, assert_same, build, save, train
from parallel_worker import everyone

import lina
from lina import parallel
from lina.parallel import Line, auto
from lina.parallel.plan.observe import Observer
from lina.parallel.transport import carriers
from lina.parallel.transport.c10d import C10d


def left(device, kind: str) -> None:
    """A plan whose steps take longer than the plain ones is given up by all ranks; training goes on as it
    would have. A degree that was given stays."""
    save(kind)
    world = dist.get_world_size()
    plain, mesh = build(device, lina.mesh(ep=world)), lina.mesh(ep=world)
    want = train(*plain, STEPS + 2)
    given = GIVEN.get(kind, {})
    with mock.patch.object(auto, "SLOWER", -1.0):          # than which nothing is faster
        wrapped, net, optimizer = build(device, mesh, schedule="auto", observe=OBSERVE, **given)
        got = train(wrapped, net, optimizer, 2 * OBSERVE + 1)
        chosen, gently = wrapped.plan, wrapped.gently
        degree, schedule = KINDS[kind][3:]
        assert (chosen.degree, chosen.schedule, chosen.measured_s) == (degree, schedule, None), f"{chosen}"
        assert parallel.settings(mesh).degree == degree and (gently is not None) == (schedule == "lina")
        got += train(wrapped, net, optimizer, 3, first=2 * OBSERVE + 1)
    plan = wrapped.plan
    assert wrapped._auto is None and len(set(everyone(repr(plan)))) == 1
    assert (plan.transport, plan.schedule, plan.degree, plan.micro_op_bytes) == ("c10d", "plain", (1, 1), 0)
    assert plan.left == chosen.chosen.label and plan.left in plan.predicted
    assert plan.chosen.label == "c10d plain 1/1, ep 2" and plan.trials == chosen.trials
    text = f"{plan.left} took {1e3 * plan.measured_s:.2f} ms, the steps before {1e3 * plan.load.step_s:.2f}"
    assert plan.reasons[-1] == f"{text}: back to plain, 1/1 passes over c10d", plan.reasons[-1]
    now = parallel.settings(mesh)
    assert now.degree == (1, 1) and now.transport == "auto", "as before, and not what it stands for"
    assert wrapped.gently is None and wrapped.expert_reducer.queue is None
    if gently is not None:                     # its thread has ended
        assert not gently.queue(device)._thread.is_alive()
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(a, b, f"{kind}: loss {i}")
    kept = build(device, lina.mesh(ep=world), schedule="auto", observe=1, degree=(3, 3))
    with mock.patch.object(auto, "SLOWER", -1.0):
        train(*kept, 4)
    assert kept[0].plan.degree == (3, 3) and kept[0].plan.measured_s > 0, f"{kept[0].plan}"


def left_transport(device) -> None:
    """The same where the plan had changed the transport: here to another name of c10d's."""
    half = Line(SLOW.alpha_s / 2, SLOW.beta_s / 2, 1.0)
    save("gentle", links={(op, name): line for op in ("a2a", "allreduce")
                          for name, line in (("c10d", SLOW), ("nccl", half))})
    mesh = lina.mesh(ep=dist.get_world_size())
    with (mock.patch.object(auto, "SLOWER", -1.0), mock.patch.dict(carriers.makers, nccl=C10d),
          mock.patch.object(auto, "_transports", lambda *_: ("c10d", "nccl"))):
        wrapped, net, optimizer = build(device, mesh, schedule="auto", observe=OBSERVE, **GIVEN["gentle"])
        train(wrapped, net, optimizer, 2 * OBSERVE + 1)
        plan = wrapped.plan
        assert (plan.transport, plan.schedule) == ("nccl", "lina"), f"{plan}"
        train(wrapped, net, optimizer, 3, first=2 * OBSERVE + 1)
    assert wrapped.plan.left == plan.chosen.label and parallel.settings(mesh).transport == "auto"
    assert wrapped.gently is None and wrapped._auto is None


PLAIN_S = 90.0


@contextmanager
def scripted(*seconds: float) -> Iterator[None]:
    """Steps are seen to take these, in turn; all of them are looked at."""
    facts, given = Observer.facts, iter(seconds)

    def told(observer):
        half_s = next(given) / 2
        return {**facts(observer), "forward_s": half_s, "backward_s": half_s, "outside_s": 0.0}

    with mock.patch.object(Observer, "facts", told):
        yield
    assert next(given, None) is None, "fewer were measured"


def moved(device, steps: str, regroup: str) -> None:
    """On a link this slow every expert everywhere is best; with regroup=True it comes about, and is undone
    where it takes longer than the plain steps."""
    save("far")
    world, measured = dist.get_world_size(), [*map(float, filter(None, steps.split(",")))]
    plain, total = build(device, lina.mesh(ep=world)), (len(measured) + 2) * (OBSERVE + 1)
    want = train(*plain, total)
    with mock.patch.object(auto, "SLOWER", 0.02), scripted(PLAIN_S, *measured):
        wrapped, net, optimizer = build(device, lina.mesh(ep=world), schedule="auto", observe=OBSERVE,
                                        regroup=regroup == "True")
        got = train(wrapped, net, optimizer, OBSERVE + 1)
        assert net.moe1.experts.local == (8 if measured else 8 // world), f"{wrapped.plan}"
        got += train(wrapped, net, optimizer, total - len(got), first=len(got))
    plan, stays = wrapped.plan, bool(measured) and measured[0] < PLAIN_S
    assert wrapped._auto is None and len(set(everyone(repr(plan)))) == 1
    assert plan.packed_ep == 1 and {row["ep"] for row in plan.packing} == {1, world}
    assert plan.ep == (1 if stays else world) and bool(plan.left) == (bool(measured) and not stays), f"{plan}"
    assert [s for i, s in plan.tried if plan.trials[i].ep == 1] == measured
    assert net.moe1.experts.local == (8 if stays else 8 // world)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(a, b, f"{steps}: loss {i}")


def next_best(device, steps: str, runs: str) -> None:
    """Two transports, of which the plan takes the one with the faster link; ``steps``: the seconds that are
    then measured, in turn; ``runs``: what ran for each, by its transport, and what holds in the end."""
    half = Line(SLOW.alpha_s / 2, SLOW.beta_s / 2, 1.0)
    save("slow", links={(op, name): line for op in ("a2a", "allreduce")
                        for name, line in (("c10d", SLOW), ("nccl", half))})
    world = dist.get_world_size()
    plain, mesh = build(device, lina.mesh(ep=world)), lina.mesh(ep=world)
    measured = [*map(float, steps.split(","))]
    *ran, holds = runs.split(",")
    total = (len(ran) + 2) * (OBSERVE + 1)
    want = train(*plain, total)
    seen: list[str] = []
    with (mock.patch.object(auto, "SLOWER", 0.02), mock.patch.dict(carriers.makers, nccl=C10d),
          mock.patch.object(auto, "_transports", lambda *_: ("c10d", "nccl")),
          scripted(PLAIN_S, *measured)):
        wrapped, net, optimizer = build(device, mesh, schedule="auto", observe=OBSERVE)
        got = train(wrapped, net, optimizer, OBSERVE + 1)
        for i in range(len(ran)):
            assert wrapped.plan is not None and len(wrapped.plan.tried) == i, f"{i}: {wrapped.plan}"
            seen.append(parallel.settings(mesh).transport)
            assert seen[-1] == wrapped.plan.transport
            got += train(wrapped, net, optimizer, OBSERVE + 1, first=len(got))
        got += train(wrapped, net, optimizer, total - len(got), first=len(got))
    plan = wrapped.plan
    assert seen == ran and wrapped._auto is None, f"{seen} {plan}"
    assert [s for _, s in plan.tried] == measured and len(set(everyone(repr(plan)))) == 1
    where = f"{plan.transport} {plan.schedule}"
    assert holds == ("back" if plan.left else plan.transport), f"{where}: {plan}"
    assert parallel.settings(mesh).transport == ("auto" if plan.left else holds)
    assert plan.left or plan.measured_s == min(measured), f"{plan}"
    assert (wrapped.gently is not None) == (plan.schedule == "lina")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(a, b, f"loss {i}")


def on_gpus(device, name: str) -> None:
    """A plan takes another transport up, and keeps it or leaves it; training goes on as the plain order's."""
    half, world = Line(SLOW.alpha_s / 2, SLOW.beta_s / 2, 1.0), dist.get_world_size()
    lines = {"c10d": SLOW, "nccl": SLOW} | {name: half}
    save("gentle", device=device.type, links={(op, t): line for op in ("a2a", "allreduce")
                                              for t, line in lines.items()})
    plain = build(device, lina.mesh(ep=world))
    want = train(*plain, STEPS + 2)
    for slower in (float("inf"), -1.0):
        mesh = lina.mesh(ep=world, tokens=TOKENS + 3 * (world - 1) if name == "p2p" else None)
        with mock.patch.object(auto, "SLOWER", slower):
            wrapped, net, optimizer = build(device, mesh, schedule="auto", observe=OBSERVE, **GIVEN["gentle"])
            got = train(wrapped, net, optimizer, 2 * OBSERVE + 1)
            found = wrapped.plan.transport, wrapped.plan.schedule, parallel.settings(mesh).transport
            assert found == (name, "lina", name), f"{wrapped.plan}"
            got += train(wrapped, net, optimizer, 3, first=2 * OBSERVE + 1)
        left = slower < 0
        assert (wrapped.plan.left != "") == left, f"{wrapped.plan}"
        assert parallel.settings(mesh).transport == ("auto" if left else name)
        assert (wrapped.gently is None) == left
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"{name}, left {left}: loss {i}")
