"""The benchmarks of several ranks run on CPUs at tiny sizes, and their checks refuse wrong designs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ranks import Run, each_scenario, torchrun

FOLDER = Path(__file__).parents[1] / "benchmarks"
RUNS = {
    # degrees of both kinds, with rounding; a transport that is not here is said to be missing
    "ep": ["bench_ep.py", "--shapes", "decode", "--designs", "torch,torch-select,c10d@1,c10d@2/3,p2p",
           "--dtype", "bfloat16"],
    # grouped queries, rotary positions, gated experts; a prediction
    "step": ["bench_step.py", "--model", "qwen3", "--designs", "torch,plain,c10d@3", "--predict",
             "--budget", "1"],
}


@pytest.mark.multi
@pytest.mark.parametrize("name", RUNS)
def test_runs(name: str, tmp_path: Path) -> None:
    script, *options = RUNS[name]
    found = tmp_path / "found.json"
    command = [sys.executable, str(FOLDER / script), *options, "--device", "cpu", "--tiny", "--repeats", "1",
               "--json", str(found)]
    (said, _), _ = torchrun(command, CUDA_VISIBLE_DEVICES="", LINA_PROFILE=str(tmp_path / "none.json"))
    told = json.loads(found.read_text())
    labels = options[options.index("--designs") + 1].split(",")
    timed = list(told["cases"][0]["designs"])
    assert timed == [label for label in labels if label != "p2p"], said[-3000:]
    assert list(told["machine"]["not_timed"]) == ["p2p"] * ("p2p" in labels)
    if name == "step":
        rows = told["cases"][0]["designs"]
        assert rows["torch"]["a2a alone"]["median"] > 0 and rows["plain"]["predicted_s"] > 0
        assert 0 <= rows["c10d@3"]["hidden_by_trace"] <= 1 and rows["c10d@3"]["loss_error"] <= 1
        # the plain design sends a row for each pair: all of this rank's, whichever rank they go to
        assert {sum(sent) for sent in rows["torch"]["rows_to_each_rank"]} == {64 * 4}


CHECKS = [f"layer:{fault}" for fault in ("row", "scale", "nan")] + ["steps:gradient", "steps:loss"]


@each_scenario(Run("benchmark_worker", CHECKS, 2))
def test_checks_refuse(run: Run, scenario: str) -> None:
    run.check(scenario)
