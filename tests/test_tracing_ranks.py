"""lina.trace over several ranks: one time axis, names of layers on every rank, one file."""

from __future__ import annotations

import pytest
import torch

from ranks import launch, results

SCENARIOS = ["clocks", "alone", *(f"layers:{how}" for how in ("plain", "reentrant", "kept"))]
_done: dict[str, dict[str, str]] = {}     # one start of all ranks serves all scenarios of a backend


@pytest.mark.parametrize("scenario", [*SCENARIOS, "exit"])
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
@pytest.mark.multi
def test_ranks(backend: str, scenario: str) -> None:
    """``exit``: every rank ended by itself, with code 0."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there are {torch.cuda.device_count()}")
    if backend not in _done:
        _done[backend] = results(launch("trace_worker", SCENARIOS, 2, backend=backend))
    found = _done[backend].get(scenario, "" if scenario == "exit" else "not reached: an earlier one failed")
    assert not found, found
