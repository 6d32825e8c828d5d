"""What every rank does in test_faults*.py: late, odd, broken and dying ranks."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from parallel_worker import (
    TOKENS,
    assert_same,
    batch,
    error_of,
    everyone,
    loss_of,
    spread_net,
    terms,
    whole_net,
)
from torch import nn

import lina
from lina import _C, parallel
from lina.parallel.transport import nccl
from lina.parallel.transport.base import gate

from helpers import assert_within_rounding, passes

SMALL = (0.0, 2e-7)          # a link on which half a millisecond is 2500 bytes: several micro-ops a step
LATEST_S = 0.05              # of a rank at a collective
PROMPT_S = 15                # half the process group's timeout: for errors that wait for nothing but a start
# Cycles a second that a GPU surely makes: what is asked of it in these takes no longer than on the host.
CYCLES = 1.7e9


class Case:
    """The net of parallel_worker, whole and wrapped."""

    def __init__(self, device: torch.device, ep: int, transport: str, schedule: str) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        options = dict(tokens=max(TOKENS)) if transport == "p2p" else {}
        self.mesh = lina.mesh(ep=ep, transport=transport, **options)
        self.whole = whole_net("softmax", device)
        self.like = next(self.whole.parameters())
        self.net = spread_net(self.whole, "softmax", self.mesh)
        if device.type == "cuda":      # a kernel's first launch stops the host while a stream waits
            loss_of(self.net, *self.batch(0)).backward()
            self.net.zero_grad()
        hook = lina.HookState(self.mesh, link=SMALL) if schedule == "lina" else None
        self.wrapped = lina.ddp(self.net, self.mesh, schedule=schedule, hook=hook, bucket_cap_mb=0.0005,
                                degree=passes(schedule, transport))

    def batch(self, step: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of as many tokens as parallel_worker's ranks have, another number in each of 4 steps; one is 0."""
        rank = self.rank if rank is None else rank
        return batch(rank, step, self.like, tokens=TOKENS[(rank + step) % 4])

    def reference(self, step: int) -> tuple[nn.Module, torch.Tensor]:
        """One process's gradients and loss for the batches of all ranks together."""
        net = copy.deepcopy(self.whole)
        loss = sum(loss_of(net, *self.batch(step, r)) for r in range(self.world)) / self.world
        loss.backward()
        return net, loss.detach()

    def compare(self, ref: nn.Module, want: torch.Tensor, step: int, what: str) -> None:
        """A step from the first weights gives the reference's loss and gradients."""
        self.wrapped.zero_grad()
        loss = loss_of(self.wrapped, *self.batch(step))
        loss.backward()
        got = loss.detach().clone()
        dist.all_reduce(got)
        assert_within_rounding(got / self.world, want, terms(), name=f"{what}: loss")
        assert_same(self.wrapped, ref, self.mesh, what)
        assert gate.outstanding == 0, f"{what}: the gate was left closed"


# ---- late ranks ----


@contextmanager
def late(device: torch.device, params: Any, draw: random.Random, limit_s: float = LATEST_S) -> Iterator[list]:
    """Every collective starts up to ``limit_s`` late on this rank; gives the delays there were, so far."""
    waits: list[float] = []
    if device.type == "cuda":
        torch.cuda._sleep(1)            # loaded while no stream waits

    def wait() -> None:
        waits.append(limit_s * draw.random() ** 8)         # often early, at times very late
        if device.type == "cuda" and draw.random() < 0.5:  # the host on time, the device late
            torch.cuda._sleep(int(waits[-1] * CYCLES))
        else:
            time.sleep(waits[-1])

    def delayed(call: Callable) -> Callable:
        def after(*args: Any, **kw: Any) -> Any:
            wait()
            return call(*args, **kw)
        return after

    def ready(_: Any) -> None:      # before a bucket that torch reduces by itself
        if draw.random() < 0.2:
            wait()

    where = [(dist, "all_to_all_single"), (dist, "all_reduce"), (nccl.NCCL, "_run"),
             (nccl.Reducer, "all_reduce"), (_C, "peers_dispatch"), (_C, "peers_collect")]
    former = [(owner, name, getattr(owner, name)) for owner, name in where]
    hooks = [p.register_post_accumulate_grad_hook(ready) for p in params]
    try:
        for owner, name, call in former:
            setattr(owner, name, delayed(call))
        yield waits
    finally:
        for owner, name, call in former:
            setattr(owner, name, call)
        for hook in hooks:
            hook.remove()


def delays(device: torch.device, ep: str, transport: str, schedule: str, runs: str) -> None:
    """Every rank late by chance at every collective: loss and gradients stay one process's."""
    case = Case(device, int(ep), transport, schedule)
    wants = [case.reference(step) for step in range(4)]
    for step, (ref, want) in enumerate(wants):
        case.compare(ref, want, step, f"on time, step {step}")
    with late(device, case.net.parameters(), random.Random(case.rank)) as waits:
        for run in range(int(runs)):
            if schedule == "lina" and transport != "p2p":       # which takes one pass
                parallel.settings(case.mesh).degree = (1 + run % 4, 1 + run // 4 % 3)
            case.compare(*wants[run % 4], run % 4, f"{transport}, {schedule}, run {run}")
    # 2 layers of 2 all-to-alls each way, and the gradients; none where all experts are everywhere
    assert int(ep) == 1 or len(waits) >= 8 * int(runs), f"only {len(waits)} delays in {runs} runs"


# ---- ranks that disagree ----


def layer(device: torch.device, mesh: Any, D: int = 6, K: int = 2, E: int = 8, dtype: Any = torch.float32,
          grad: bool = True) -> torch.Tensor:
    """A layer of random experts over ``mesh``; its output for 4 tokens."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    L = E // parallel.ep_size(mesh)
    x, w_up, w_down = (torch.randn(s, generator=draw).to(device, dtype).requires_grad_(grad)
                       for s in ((4, D), (L, 10, D), (L, D, 5)))
    weight = torch.rand(4, K, generator=draw).to(device)
    expert = torch.rand(4, E, generator=draw).argsort(-1)[:, :K].to(device, torch.int32)
    return parallel.moe(x, weight, expert, w_up, w_down, experts=E, mesh=mesh)


ODD = {"D": dict(D=8), "K": dict(K=3), "number of experts": dict(E=16),
       "dtype of x": dict(dtype=torch.bfloat16), "need of gradients": dict(grad=False)}


def odd_one(device: torch.device, ep: str, transport: str, degree: str) -> None:
    """The last rank differs: one error on all that share its experts, none elsewhere; then all goes on."""
    last = dist.get_world_size() - 1
    for what, other in ODD.items():
        mesh = lina.mesh(ep=int(ep), transport=transport)
        parallel.settings(mesh).degree = (int(degree), int(degree))
        start = time.time()
        said = error_of(ValueError, layer, device, mesh, **(other if dist.get_rank() == last else {}))
        assert time.time() - start < PROMPT_S, "an error that waits for a timeout"
        texts = everyone(said)
        for rank, text in enumerate(texts):
            if rank // int(ep) == last // int(ep):
                assert f"disagree on {what}: [" in text and text == texts[last], (rank, text)
            else:
                assert text == "", (rank, text)
        assert gate.outstanding == 0
        layer(device, mesh).sum().backward()


def odd_model(device: torch.device, ep: str) -> None:
    """A model of another width or dtype on one rank is refused on every rank, before it trains."""
    mesh, last = lina.mesh(ep=int(ep)), dist.get_world_size() - 1
    for other in (dict(dim=10), dict(dtype=torch.bfloat16)):
        here = {**dict(dim=6, dtype=torch.float32), **(other if dist.get_rank() == last else {})}
        net = nn.Sequential(nn.Linear(4, 6), lina.MoE(here.pop("dim"), 10, 8, 2, mesh=mesh, **here))
        net.to(device)
        said = everyone(error_of(ValueError, lina.ddp, net, mesh, schedule="lina"))
        assert all("the ranks differ in names, shapes, dtypes" in text for text in said), said


def over_the_cap(device: torch.device) -> None:
    """One rank's receive buffer may not be as large as a step needs: one error on every rank, then life."""
    cap = 1000 if dist.get_rank() == 0 else None
    mesh = lina.mesh(ep=dist.get_world_size(), transport="p2p", cap_bytes=cap)
    start, texts = time.time(), set()
    for _ in range(2):                      # again: nothing is half made
        texts |= set(everyone(error_of(ValueError, layer, device, mesh)))
    text, = texts
    assert "bytes are needed to receive" in text and "the cap is 1000" in text, text
    assert time.time() - start < PROMPT_S
    layer(device, lina.mesh(ep=dist.get_world_size(), transport="p2p")).sum().backward()
    torch.cuda.synchronize()


# ---- NaN ----


def nan(device: torch.device, ep: str, transport: str, schedule: str) -> None:
    """Tokens that are NaN on one rank.

    Forward: NaN comes out for them alone; every other token's output, so every other rank's loss, is
    what it was. Backward ends on every rank. As with DistributedDataParallel the averages of dense
    gradients are NaN on all ranks; of the experts, those that got such a token: a router puts a
    token whose logits are all NaN to experts 0 to K - 1. Clipping refuses it on every rank.
    """
    case = Case(device, int(ep), transport, schedule)
    x, y = batch(case.rank, 0, case.like, tokens=5)
    ill = x.clone()
    odd = torch.zeros(5, dtype=torch.bool, device=device)
    if case.rank == case.world - 1:
        odd[[1, 3]] = True
        ill[odd] = torch.nan
    with torch.no_grad():
        want, got = (case.net(rows)["out"] for rows in (x, ill))
    assert got[odd].isnan().all() and got[~odd].isfinite().all()
    assert_within_rounding(got[~odd], want[~odd], terms(), scale=want.abs().max().item(), name="other tokens")

    case.wrapped.zero_grad()
    loss = loss_of(case.wrapped, ill, y)
    assert bool(loss.isnan()) == bool(odd.any())
    loss.backward()
    local = {e.name for e in parallel.expert_parameters(case.net)}
    first = parallel.ep_rank(case.mesh) * (8 // parallel.ep_size(case.mesh))
    for name, p in case.net.named_parameters():
        if name in local:
            bad = [first + i for i, g in enumerate(p.grad) if not g.isfinite().all()]
            assert set(bad) == {e for e in range(3) if first <= e < first + len(p)}, (name, bad)
        elif "router" not in name:
            assert p.grad.isnan().any(), f"{name} is finite on rank {case.rank}"
    before = [p.detach().clone() for p in case.net.parameters()]
    said = everyone(error_of(RuntimeError, lina.clip_grad_norm_, case.wrapped, 1.0, error_if_nonfinite=True))
    assert all("not finite" in text for text in said), said
    assert all(torch.equal(a, b) for a, b in zip(before, case.net.parameters(), strict=True))
    case.compare(*case.reference(1), 1, "a step after it")


# ---- a rank that fails ----


def fail(how: str, hang_s: float) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(hang_s)
        os._exit(3)
    raise ValueError("this rank's own mistake")


def failing(device: torch.device, ep: str, transport: str, schedule: str, where: str, how: str,
            hang_s: str) -> None:
    """Two good steps; in the third the last rank fails, between the exchanges of the first layer or in
    the optimizer."""
    case = Case(device, int(ep), transport, schedule)
    optimizer = torch.optim.SGD(case.net.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        if step == 2:
            print(f"failing at {time.time()}", flush=True)
        if step == 2 and case.rank == case.world - 1:
            def now(*_: Any) -> None:
                fail(how, float(hang_s))
            if where == "forward":
                case.net.moe1.router.register_forward_hook(now)
            elif where == "backward":
                case.net.moe1.experts.register_forward_hook(
                    lambda module, args, y: y.register_hook(now) and None)
            else:
                optimizer.register_step_pre_hook(now)
        loss = loss_of(case.wrapped, *batch(case.rank, step, case.like, tokens=5))
        loss.backward()
        lina.clip_grad_norm_(case.wrapped, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()                     # as in most loops: on CUDA the host would run ahead of a failure
    print("four steps done", flush=True)
