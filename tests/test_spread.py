"""Layers in several passes, over gloo (and, on two GPUs, NCCL): equal to the plain way."""

from __future__ import annotations

import pytest
import torch

from ranks import launch, results

RUNS = {                                  # name -> (module, scenarios, ranks, backend)
    "spread4": ("spread_worker", ["degrees:4", "degrees:2", "kinds", "repeats", "refusals", "delays:2:12",
                                  "delays:4:8"], 4, "gloo"),
    "train4": ("parallel_worker", [*(f"parity:{ep}:deepseek:lina" for ep in (1, 2, 4)),
                                   "parity:2:topk:lina:c10d", "accumulation:2:lina", "unused:2:find:lina",
                                   "unused:2:static:lina", "low_precision:lina"], 4, "gloo"),
    "ways4": ("exchange_worker", [f"same_as_plain:{how}:lina" for how in
                                  ("checkpoint", "reentrant", "trace", "compile")], 4, "gloo"),
    "gpu-spread2": ("spread_worker", [
        f"{name}:{transport}" for transport in ("c10d", "nccl")
        for name in ("degrees:2", "kinds", "repeats", "refusals", "delays:2:5")], 2, "nccl"),
    "gpu-train2": ("parallel_worker", [f"parity:{ep}:deepseek:lina:{transport}" for ep in (1, 2)
                                       for transport in ("c10d", "nccl")], 2, "nccl"),
}
CASES = [pytest.param(run, name, id=f"{run}-{name}", marks=[pytest.mark.multi, *([pytest.mark.gpu] * gpu)])
         for run, (_, scenarios, _, backend) in RUNS.items() for name in [*scenarios, "exit"]
         for gpu in [backend == "nccl"]]
_done: dict[str, dict[str, str]] = {}     # one start of all ranks serves all scenarios of a run


@pytest.mark.parametrize("run,scenario", CASES)
def test_ranks(run: str, scenario: str) -> None:
    """``exit``: every rank ended by itself, with code 0."""
    module, scenarios, world, backend = RUNS[run]
    if backend == "nccl" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, there are {torch.cuda.device_count()}")
    if run not in _done:
        _done[run] = results(launch(module, scenarios, world, backend=backend))
    found = _done[run].get(scenario, "" if scenario == "exit" else "not reached: an earlier scenario failed")
    assert not found, found
