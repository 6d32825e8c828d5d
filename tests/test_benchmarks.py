"""The benchmarks of several ranks run on CPUs at tiny sizes, and their checks refuse wrong designs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lina

from ranks import launch, results

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
    folders = [str(Path(lina.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
           "LINA_PROFILE": str(tmp_path / "none.json"), "PYTHONPATH": os.pathsep.join(folders),
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(FOLDER / script), *options, "--device", "cpu", "--tiny", "--repeats", "1",
               "--json", str(found)]
    ranks = [subprocess.Popen(command, env={**env, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in "01"]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    told = json.loads(found.read_text())
    labels = options[options.index("--designs") + 1].split(",")
    timed = list(told["cases"][0]["designs"])
    assert timed == [label for label in labels if label != "p2p"], said[0][-3000:]
    assert list(told["machine"]["not_timed"]) == ["p2p"] * ("p2p" in labels)
    if name == "step":
        rows = told["cases"][0]["designs"]
        assert rows["torch"]["a2a alone"]["median"] > 0 and rows["plain"]["predicted_s"] > 0
        assert 0 <= rows["c10d@3"]["hidden_by_trace"] <= 1 and rows["c10d@3"]["loss_error"] <= 1
        # the plain design sends a row for each pair: all of this rank's, whichever rank they go to
        assert {sum(sent) for sent in rows["torch"]["rows_to_each_rank"]} == {64 * 4}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


CHECKS = [f"layer:{fault}" for fault in ("row", "scale", "nan")] + ["steps:gradient", "steps:loss"]
_done: dict[str, str] = {}


@pytest.mark.multi
@pytest.mark.parametrize("scenario", [*CHECKS, "exit"])
def test_checks_refuse(scenario: str) -> None:
    if not _done:
        _done.update(results(launch("benchmark_worker", CHECKS, 2)))
    found = _done.get(scenario, "" if scenario == "exit" else "not reached: an earlier scenario failed")
    assert not found, found
