"""What every rank does in test_sequence.py: experts' gradients that are averaged during backward."""

from __future__ import annotations

import copy
import gc
import os
import random
import time

import torch
import torch.distributed as dist
from faults_worker import late
from parallel_worker import GATES, assert_same, batch, error_of, everyone, loss_of, terms
from sequence_case import LINK, at_end, build, early, logged, pack, reference, steps

import lina
from lina import parallel
from lina.parallel.gradients import reduce
from lina.parallel.gradients.sequence import _LEARN

from helpers import assert_within_rounding

ROUTES = ("", "skip", "swap")
LATE = max(5, int(os.environ.get("LINA_DELAY_RUNS", "0")))     # steps in which ranks are late by chance


def started(device, gate: str, transport: str = "c10d") -> None:
    """At the end of backward until the order is known, during backward from then on; anew once experts have
    moved, with as many replicas as ranks, and back; hooks go with the wrapper."""
    world = dist.get_world_size()
    built = build(device, world // 2 if world > 2 else world, gate, transport=transport)
    if world == 2:
        built = pack(built, 1)
    net, wrapped = built[1], built[2]
    experts = {n for n, _ in net.named_parameters() if ".experts." in n}
    for ep in (None, 1) if world > 2 else (None,):
        built = built if ep is None else pack(built, ep)
        for i, log in enumerate(steps(device, built, _LEARN + 2)):
            want = (set(), experts) if i < _LEARN else (experts, set())
            assert (early(log), at_end(log)) == want, (i, log)
            if i >= _LEARN:                       # between the buckets, in the order of backward
                places = [log.index(f"moe{n}.experts.w_up") for n in (2, 1)]
                assert places[0] < places[1] and log.index("bucket 0") < places[1], log
    if world > 2:
        pack(built, world)                        # without replicas
        assert not early(steps(device, (*built[:3], wrapped.module.moe1.experts.mesh), 1)[0])
    params = [p for n, p in net.named_parameters() if n in experts]
    del built, wrapped
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in params)


def small(device) -> None:
    """Small gradients of experts travel together at the end, and hold up neither large ones nor buckets."""
    before, reduce._SMALL = reduce._SMALL, 400
    try:
        built = _, net, _, _ = build(device, 2, "topk")
        logs = steps(device, built, _LEARN + 2)
    finally:
        reduce._SMALL = before
    large = {n for n, p in net.named_parameters() if ".experts." in n and p.nbytes >= 400}
    assert 0 < len(large) < sum(".experts." in n for n, _ in net.named_parameters())
    for log in logs[_LEARN:]:
        assert early(log) == large and at_end(log) == {"small experts"}, log
        assert not any("bucket" in key for key in log[log.index("end"):]), log


def routes(device, ep: str) -> None:
    """Replicas that leave a layer out, or use layers in another order, whenever: no rank waits for ever, and
    gradients are one process's, on time and late."""
    built = build(device, 2)
    built = built if ep == "2" else pack(built, 1)
    steps(device, built, _LEARN)
    draw = random.Random(5)
    plan = [["", ""], ["", "swap"], ["skip", ""], ["skip", "swap"]]          # of each half of the ranks
    plan += [[draw.choice(ROUTES) for _ in range(2)] for _ in range(4 + LATE)]

    def route(step: int, rank: int) -> str:
        return plan[step][rank // 2]

    logs = steps(device, built, len(plan) - LATE, route)
    with late(device, built[1].parameters(), random.Random(dist.get_rank()), limit_s=0.02) as waits:
        logs += steps(device, built, LATE, route, first=len(plan) - LATE)
    assert len(waits) > LATE
    for i, log in enumerate(logs):
        how = route(i, dist.get_rank())
        assert how or len(early(log)) == 4, log           # started before backward ends, where it uses all
        assert how != "skip" or "moe2.experts.w_up" in at_end(log), log


def accumulated(device) -> None:
    """no_sync starts nothing, and what it left is averaged with the rest, also by a replica that leaves the
    layer out of the last pass."""
    built = whole, net, wrapped, mesh = build(device, 2)
    steps(device, built, _LEARN)
    rank, like, world = dist.get_rank(), next(whole.parameters()), dist.get_world_size()

    def route(pass_: int, r: int) -> str:
        return "skip" if pass_ == 1 and r < 2 else ""

    wrapped.zero_grad()
    want = copy.deepcopy(whole)
    for i in range(3):                            # the last without zero_grad before
        with logged(wrapped, net, device) as log:
            if i == 0:
                with wrapped.no_sync():
                    loss_of(wrapped, *batch(rank, i, like)).backward()
                assert log == [], log
            else:
                loss_of(wrapped, *batch(rank, i, like), how=route(i, rank)).backward()
        (sum(loss_of(want, *batch(r, i, like), how=route(i, r)) for r in range(world)) / world).backward()
    assert len(early(log)) == 4, log
    assert_same(wrapped, want, mesh, "accumulated")


def narrow(device) -> None:
    """Dense gradients in 16 bits, held or not; experts in full."""
    mesh = lina.mesh(ep=2)
    built = whole, net, wrapped, _ = build(device, 2, hook=lina.HookState(mesh, link=LINK, compress="bf16"))
    like, n = next(whole.parameters()), dist.get_world_size()
    for step in range(5):
        wrapped.zero_grad()
        how = "skip" if dist.get_rank() < 2 and step > 2 else ""
        loss_of(wrapped, *batch(dist.get_rank(), step, like), how=how).backward()
        want = reference(whole, step, lambda r, step=step: "skip" if r < 2 and step > 2 else "", like)
        local = {e.name for e in parallel.expert_parameters(net)}
        for (name, p), q in zip(net.named_parameters(), want.parameters(), strict=True):
            if name in local:
                assert_within_rounding(p.grad, parallel.shard(q.grad, mesh), terms(),
                                       scale=q.grad.abs().max().item(), name=name)
            else:       # the mean of absolute values is at most some times that of the average, by design
                limit = n * torch.finfo(torch.bfloat16).eps * max(q.grad.abs().max().item(), 0.1) * n
                assert (p.grad - q.grad).abs().max().item() <= limit, name
    assert built[2] is wrapped


def raised(device) -> None:
    """A backward pass that raises with gradients held and on their way; the next ones are right, with and
    without no_sync in between."""
    # nothing dense before the second layer's experts: DistributedDataParallel has not begun where it raises
    built = whole, net, wrapped, _ = build(device, 2, frozen=("last",))
    params = [p for p in net.parameters() if not p.requires_grad]
    for p in params:
        p.grad = torch.zeros_like(p)              # assert_same compares all
    for p in whole.parameters():
        p.grad = None if p.requires_grad else torch.zeros_like(p)
    rank, like = dist.get_rank(), next(whole.parameters())

    def run(count: int, **kw) -> list[list[str]]:
        return steps(device, built, count, **kw)

    wrapped.zero_grad = lambda: [setattr(p, "grad", None) for p in net.parameters() if p.requires_grad]
    run(_LEARN + 1)
    for again in (False, True):
        def fail(_):
            raise ValueError("everyone's mistake")

        hook = net.moe2.router.weight.register_hook(fail)
        with logged(wrapped, net, device) as log:
            text = error_of(ValueError, loss_of(wrapped, *batch(rank, 0, like)).backward)
        assert text == "everyone's mistake" and len(early([*log, "end"])) == 2, log
        hook.remove()
        if again:
            with wrapped.no_sync(), logged(wrapped, net, device) as log:
                loss_of(wrapped, *batch(rank, 0, like)).backward()
            # torch's reducer, still prepared for the pass that raised, takes this one for it
            assert not [key for key in log if "experts" in key], log
        assert len(early(run(1)[0])) == 4


def twice(device) -> None:
    """A layer whose gradient comes in two parts goes at the end if that was seen in time; else an error."""
    built = build(device, 2)
    logs = steps(device, built, _LEARN + 2, lambda step, rank: "twice")
    assert early(logs[-1]) == {"moe1.experts.w_up", "moe1.experts.w_down"}, logs[-1]
    built = whole, _, wrapped, _ = build(device, 2)
    steps(device, built, _LEARN + 1, lambda step, rank: "inner")
    loss = loss_of(wrapped, *batch(0, 0, next(whole.parameters())), how="twice")
    text = error_of(RuntimeError, loss.backward)
    assert "a second part of the gradient of moe2.experts.w_" in text and "use_reentrant=False" in text, text


def pair(device) -> None:
    """Two models in one backward pass, by one queue."""
    mesh = lina.mesh(ep=2)
    state = lina.HookState(mesh, link=LINK)
    first, second = (build(device, 2, gate, hook=state) for gate in list(GATES)[:2])
    steps(device, second, 1)                      # they learn in different passes
    rank, like = dist.get_rank(), next(first[0].parameters())
    for step in range(6):
        def route(r: int, step: int = step) -> str:
            return ROUTES[(r // 2 + step) % 3]

        for built in (first, second):
            built[2].zero_grad()
        loss = sum(loss_of(b[2], *batch(rank, step, like), how=route(rank)) for b in (first, second))
        loss.backward()
        for b in (first, second):
            assert_same(b[2], reference(b[0], step, route, like), mesh, f"step {step}")


def frozen(device) -> None:
    """Experts that are frozen later are passed over; unfrozen ones are learned anew."""
    built = whole, net, wrapped, mesh = build(device, 2)
    steps(device, built, _LEARN + 1)
    for model in (whole, net):
        model.moe2.experts.requires_grad_(False)
    like = next(whole.parameters())
    wrapped.zero_grad()
    with logged(wrapped, net, device) as log:
        loss_of(wrapped, *batch(dist.get_rank(), 0, like)).backward()
    assert early(log) == {"moe1.experts.w_up", "moe1.experts.w_down"} and not at_end(log), log
    assert len(set(everyone(repr(log)))) == 1
    net.moe1.experts.requires_grad_(False)
    reborn = lina.ddp(net, mesh, schedule="lina", hook=lina.HookState(mesh, link=LINK), bucket_cap_mb=0.0002)
    for model in (whole, net):
        for layer in (model.moe1, model.moe2):
            layer.experts.requires_grad_(True)
    logs = steps(device, (whole, net, reborn, mesh), _LEARN + 1)
    assert not early(logs[0]) and len(early(logs[-1])) == 4, logs


def dying(device) -> None:
    """A rank fails in backward after its first experts' gradients went: every rank ends with an error."""
    built = whole, net, wrapped, _ = build(device, 2)
    steps(device, built, _LEARN + 1)
    rank, like = dist.get_rank(), next(whole.parameters())
    loss = loss_of(wrapped, *batch(rank, 0, like, tokens=5))
    print(f"failing at {time.time()}", flush=True)
    if rank == dist.get_world_size() - 1:
        def leave(_) -> None:
            print(f"gone {len(wrapped.expert_reducer.early.gone)}", flush=True)
            os._exit(7)

        net.moe2.router.weight.register_hook(leave)
    loss.backward()
    print("a whole step", flush=True)
