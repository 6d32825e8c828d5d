"""lina.regroup on four ranks over gloo and on two GPUs: nothing is lost, and training goes on the same."""

from __future__ import annotations

import pytest
import torch

from ranks import launch, results

SCENARIOS = ["there_and_back:moe:adamw", "there_and_back:swap:adamw", "there_and_back:swap_transposed:sgd",
             "there_and_back:swap:fused", "continues:moe:sgd", "continues:moe:adamw",
             "continues:swap:foreach", "continues:swap_transposed:adamw", "bare", "mixed", "refusals"]
RUNS = {"gloo": 4, "nccl": 2}             # backend -> ranks
CASES = [pytest.param(backend, name, id=f"{backend}-{name}",
                      marks=[pytest.mark.multi, *([pytest.mark.gpu] * (backend == "nccl"))])
         for backend in RUNS for name in [*SCENARIOS, "exit"]]
_done: dict[str, dict[str, str]] = {}     # one start of all ranks serves all scenarios of a backend


@pytest.mark.parametrize("backend,scenario", CASES)
def test_ranks(backend: str, scenario: str) -> None:
    if backend == "nccl" and torch.cuda.device_count() < RUNS[backend]:
        pytest.skip(f"needs {RUNS[backend]} GPUs, there are {torch.cuda.device_count()}")
    if backend not in _done:
        _done[backend] = {"exit": "", **results(launch("regroup_worker", SCENARIOS, RUNS[backend],
                                                       backend=backend))}
    found = _done[backend].get(scenario, "not reached: an earlier scenario failed")
    assert not found, found
