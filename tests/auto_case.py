"""What the scenarios of schedule="auto" share: made-up cost models, and training by them."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_worker import batch, loss_of, spread_net, whole_net

import lina
from lina.parallel import CostModel, ExpertPass, ExpertShape, Line, auto, machine_facts
from lina.parallel.plan.observe import Observer

OBSERVE = 4
STEPS = 2 * OBSERVE + 2         # the plan's first step, which nobody times, and one with the decision made
TOKENS = 24
# Seconds a byte or a pair that make all that a tiny layer does seconds, so that what is predicted for
# it does not hang on what this machine needs for its steps.
SLOW = Line(0.0, 1e-3, 1.0)
FREE = Line(0.0, 0.0, 1.0)
KINDS = {   # all-to-all, allreduce, expert pass; then what must be found: degree, schedule
    # half of the own rows takes longer than an exchange, and passes cost nothing to start: three hide all
    "slow": (SLOW, FREE, Line(0.0, 0.1, 1.0), (3, 3), "plain"),
    "free": (FREE, FREE, Line(0.01, 0.1, 1.0), (1, 1), "plain"),     # nothing to hide, and each pass costs
    "far": (SLOW, FREE, Line(0.0, 1e-6, 1.0), None, None),           # nearly all is exchange
    "started": (SLOW, FREE, Line(1e3, 0.1, 1.0), (1, 1), "plain"),   # a second pass costs more than it hides
    # gradients that double the all-to-alls beside them, which experts could hide; in one pass, as given
    "gentle": (SLOW, SLOW, Line(0.0, 0.01, 1.0), (1, 1), "lina"),
}
# Made-up costs choose what is slower here: only the scenario that is about it lets plans be left for that.
auto.SLOWER = float("inf")
# And they know nothing of what was seen: dense time is to explain the step.
DENSE, Observer.dense = Observer.dense, lambda self, steps: None
GIVEN: dict[str, dict] = {"gentle": dict(degree=(1, 1), bucket_cap_mb=0.00025)}      # of 262 bytes


def save(kind: str, **changes) -> None:
    """A cost model where lina looks for it; another file for each rank, but rank 0's counts."""
    a2a, reduce, experts, *_ = KINDS[kind]
    world = dist.get_world_size()
    shape = ExpertShape(6, 10, 8 // world)
    model = CostModel(**{**dict(
        machine=machine_facts(), device="cpu", world=world, ep=world,
        links={("a2a", "c10d"): a2a, ("allreduce", "c10d"): reduce},
        experts=(ExpertPass(shape, experts, experts),)), **changes})
    os.environ["LINA_PROFILE"] = str(Path(tempfile.mkdtemp()) / "profile.json")
    model.save()


def build(device, mesh, **options):
    whole = whole_net("softmax", device)
    net = spread_net(whole, "softmax", mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    if options.get("regroup"):
        options["optimizer"] = optimizer
    return lina.ddp(net, mesh, **options), net, optimizer


def train(wrapped, net, optimizer, steps, first: int = 0) -> list[torch.Tensor]:
    rank, losses = dist.get_rank(), []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(wrapped, *batch(rank, step, next(net.parameters()), tokens=TOKENS + 3 * rank))
        loss.backward()
        optimizer.step()
        time.sleep(0.002 * rank)               # ranks measure different steps
        losses.append(loss.detach())
    return losses


def assert_same(got, want, what: str) -> None:
    """Of STEPS steps of the same sums in another order: a few hundred terms each."""
    limit = STEPS * 1000 * torch.finfo(want.dtype).eps * max(1.0, want.abs().max().item())
    assert (got - want).abs().max().item() <= limit, f"{what}: {got} {want}"
