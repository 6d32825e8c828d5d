"""lina.trace over several ranks: one time axis, names of layers on every rank, one file."""

from __future__ import annotations

from ranks import Run, each_scenario

SCENARIOS = ["clocks", "alone", "missing", *(f"layers:{how}" for how in ("plain", "reentrant", "kept"))]
RUNS = {backend: Run("trace_worker", SCENARIOS, 2, backend) for backend in ("gloo", "nccl")}


@each_scenario(RUNS)
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)
