"""torch's fully_shard beside spread experts, over gloo: exact, in micro-ops that let all-to-alls pass."""

from __future__ import annotations

import pytest
import torch

from ranks import launch, results

# "flat": sharded over all ranks; "hsdp": over "ep" ranks and replicated over "dp"
SCENARIOS = ["parity:2:plain:flat", "parity:2:lina:flat", "parity:2:lina:hsdp",
             "parity:4:lina:flat:topk",          # no replicas, experts with biases
             "parity:1:lina:flat:softmax",       # nothing spread: experts are fully_shard's
             "accumulation", "exact", "held", "errors"]
ON_GPUS = [*(f"parity:{ep}:lina:flat:deepseek:{over}" for ep in (1, 2) for over in ("c10d", "nccl")), "exact",
           "held_on_device"]
WORLD = 4
TIMEOUT_S = 6                 # the process group's, where a rank dies
_done: dict[str, str] = {}    # one start of all ranks serves all scenarios
_on_gpus: dict[str, str] = {}


@pytest.mark.multi
@pytest.mark.parametrize("scenario", [*SCENARIOS, "exit"])
def test_ranks(scenario: str) -> None:
    """``exit``: every rank ended by itself, with code 0."""
    if not _done:
        _done.update(results(launch("fsdp_worker", SCENARIOS, WORLD)))
        _done.setdefault("exit", "")
    found = _done.get(scenario, "not reached: an earlier scenario failed")
    assert not found, found


@pytest.mark.gpu
@pytest.mark.multi
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("scenario", [*ON_GPUS, "exit"])
def test_gpus(scenario: str) -> None:
    """The same over NCCL, by torch's process groups and by communicators of lina's own."""
    if not _on_gpus:
        _on_gpus.update({"exit": "", **results(launch("fsdp_worker", ON_GPUS, 2, backend="nccl"))})
    found = _on_gpus.get(scenario, "not reached: an earlier scenario failed")
    assert not found, found


@pytest.mark.multi
def test_a_rank_dies() -> None:
    ended = launch("fsdp_worker", ["left_alone"], WORLD, timeout_s=TIMEOUT_S, limit_s=60 + 4 * TIMEOUT_S)
    for rank, end in enumerate(ended[:-1]):
        assert end.code == 0, f"rank {rank}: exit code {end.code}\n{end.err[-2000:]}"
        assert f"among ranks [0, 1, 2, 3] failed on rank {rank}" in end.out, end.out
        assert "later fsdp: no reduce-scatter after an earlier failure" in end.out, end.out
