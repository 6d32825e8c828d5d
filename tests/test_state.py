"""Two ranks: whose experts a state_dict holds, loss scaling, and the way back from a mesh."""

from __future__ import annotations

import torch

import lina

from ranks import Run, each_scenario

SCENARIOS = ["checkpoint:layer", "checkpoint:swap", "scaler:step", "scaler:unscale", "scaler:fused",
             "way_back"]
RUNS = {backend: Run("state_worker", SCENARIOS, 2, backend) for backend in ("gloo", "nccl")}


@each_scenario(RUNS)
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


def test_scaler_alone():
    """Without a process group it is torch's."""
    p = torch.nn.Parameter(torch.ones(2))
    scaling = lina.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD([p], lr=1.0)
    scaling.scale((p * torch.tensor([1.0, float("inf")])).sum()).backward()
    scaling.step(optimizer)
    scaling.update()
    assert scaling.get_scale() == 4.0 and torch.equal(p, torch.ones(2))
    optimizer.zero_grad()
    scaling.scale(p.sum()).backward()
    scaling.step(optimizer)
    assert torch.equal(p, torch.zeros(2))


def test_gathered_where_nothing_is_spread():
    moe = lina.MoE(8, 8, 4, 2)
    got, want = lina.gathered_state_dict(moe), moe.state_dict()
    assert list(got) == list(want) and all(torch.equal(got[k], want[k]) for k in want)
