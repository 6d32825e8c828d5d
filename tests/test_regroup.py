"""lina.regroup on four ranks over gloo and on two GPUs: nothing is lost, and training goes on the same."""

from __future__ import annotations

from ranks import Run, each_scenario

SCENARIOS = ["there_and_back:moe:adamw", "there_and_back:swap:adamw", "there_and_back:swap_transposed:sgd",
             "there_and_back:swap:fused", "continues:moe:sgd", "continues:moe:adamw",
             "continues:swap:foreach", "continues:swap_transposed:adamw", "bare", "mixed", "refusals"]
RUNS = {"gloo": Run("regroup_worker", SCENARIOS, 4), "nccl": Run("regroup_worker", SCENARIOS, 2, "nccl")}


@each_scenario(RUNS)
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)
