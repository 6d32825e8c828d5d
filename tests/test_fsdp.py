"""torch's fully_shard beside spread experts, over gloo: exact, in micro-ops that let all-to-alls pass."""

from __future__ import annotations

import pytest

from ranks import Run, each_scenario, launch

# "flat": sharded over all ranks; "hsdp": over "ep" ranks and replicated over "dp"
SCENARIOS = ["parity:2:plain:flat", "parity:2:lina:flat", "parity:2:lina:hsdp",
             "parity:4:lina:flat:topk",          # no replicas, experts with biases
             "parity:1:lina:flat:softmax",       # nothing spread: experts are fully_shard's
             "accumulation", "exact", "held", "errors"]
ON_GPUS = [*(f"parity:{ep}:lina:flat:deepseek:{over}" for ep in (1, 2) for over in ("c10d", "nccl")), "exact",
           "held_on_device"]
WORLD = 4
TIMEOUT_S = 6                 # the process group's, where a rank dies


@each_scenario(Run("fsdp_worker", SCENARIOS, WORLD))
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


@each_scenario(Run("fsdp_worker", ON_GPUS, 2, "nccl"))
def test_gpus(run: Run, scenario: str) -> None:
    """The same over NCCL, by torch's process groups and by communicators of lina's own."""
    run.check(scenario)


@pytest.mark.multi
def test_a_rank_dies() -> None:
    ended = launch("fsdp_worker", ["left_alone"], WORLD, timeout_s=TIMEOUT_S)
    for rank, end in enumerate(ended[:-1]):
        assert end.code == 0, f"rank {rank}: exit code {end.code}\n{end.err[-2000:]}"
        assert f"among ranks [0, 1, 2, 3] failed on rank {rank}" in end.out, end.out
        assert "later fsdp: no reduce-scatter after an earlier failure" in end.out, end.out
