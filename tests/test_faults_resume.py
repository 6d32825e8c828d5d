"""`lina train` with a rank killed in the middle: it ends with an error, and its last checkpoint goes on
as a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lina import cli
from lina.train import checkpoint

from ranks import PROMPT, environment, needs_gpus, spawned

pytestmark = [pytest.mark.multi,
              pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]

# The smallest with experts on both ranks; far more steps than it will be let do.
TINY = ["--dim=16", "--layers=2", "--heads=2", "--ffn-dim=16", "--experts=4", "--seq=32", "--batch=4",
        "--heldout-kib=2", "--sample=0", "--ranks=2", "--steps=100000", "--quiet"]
EVERY, MORE = 4, 6           # steps between checkpoints; steps after the one that is resumed
LIMIT_S = 120                # for starting, which is most of it


def start(*argv: str) -> subprocess.Popen:
    env = environment(**PROMPT)
    return subprocess.Popen([sys.executable, "-m", "lina.cli", "train", *argv], env=env, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(run: subprocess.Popen) -> tuple[int, str]:
    try:
        _, said = run.communicate(timeout=LIMIT_S)
        return run.returncode, said
    finally:
        run.kill()


def steps_saved(out: Path) -> int:
    try:
        return checkpoint.manifest(out / "checkpoint")["step"]
    except (OSError, ValueError):
        return 0


def state_of(out: Path) -> list[dict]:
    folder = out / "checkpoint"
    return [torch.load(folder / shard, weights_only=True, map_location="cpu")
            for shard in checkpoint.manifest(folder)["shards"]]


def bits_by_step(out: Path) -> dict[int, float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["bits_per_byte"] for row in rows}


def kill_a_rank(out: Path, *argv: str) -> None:
    """Once two checkpoints are there; every rank and the launcher are gone soon, with one error."""
    run = start(*TINY, f"--save-every={EVERY}", f"--out={out}", *argv)
    deadline = time.monotonic() + LIMIT_S
    try:
        while steps_saved(out) < 2 * EVERY:
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline, f"no second checkpoint within {LIMIT_S} s"
            time.sleep(0.01)
        ranks = spawned(run)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
    except BaseException:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    code, said = end(run)
    assert time.monotonic() - killed < 20 and code == cli.FAILED, (code, said)
    assert not any(Path(f"/proc/{p}").exists() for p in ranks)
    errors = [line for line in said.splitlines() if line.startswith("lina train: error: ")]
    assert len(errors) == 1 and "rank" in errors[0] and "Traceback" not in said, said


def assert_same(got: torch.Tensor, want: torch.Tensor, exactly: bool, name: str) -> None:
    """Equal; on a GPU, where attention's backward adds in any order, but for bf16's rounding."""
    if exactly:
        assert torch.equal(got, want), name
        return
    error, size = (got.double() - want.double()).norm(), want.double().norm()
    assert error <= 4 * torch.finfo(torch.bfloat16).eps * size, f"{name}: off by {error} of {size}"


CASES = [("cpu", "lina", "c10d"),      # test_train.py resumes plain runs
         *(pytest.param("cuda", "lina", t, marks=pytest.mark.gpu) for t in ("c10d", "nccl", "p2p"))]


@pytest.mark.parametrize("device,schedule,transport", CASES)
def test_last_checkpoint_resumes(tmp_path: Path, text: str, device: str, schedule: str,
                                 transport: str) -> None:
    if device == "cuda":
        needs_gpus(2)
    how = [f"--device={device}", f"--data={text}", f"--schedule={schedule}", f"--transport={transport}"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    kill_a_rank(out, *how)
    saved = steps_saved(out)
    stop = f"--stop={saved + MORE}"
    runs = [start(f"--resume={out}/checkpoint", f"--out={out}", f"--data={text}", "--sample=0", "--quiet",
                  f"--save-every={EVERY}", stop, f"--schedule={schedule}", f"--transport={transport}")]
    if device == "cuda":
        runs[0].wait(LIMIT_S)              # one GPU a rank
    runs.append(start(*TINY, f"--save-every={EVERY}", f"--out={whole}", stop, *how))
    for run in runs:
        code, said = end(run)
        assert code == 0, said
    assert steps_saved(out) == steps_saved(whole) == saved + MORE
    for got, want in zip(state_of(out), state_of(whole), strict=True):
        assert got["model"].keys() == want["model"].keys()
        for name, weight in want["model"].items():
            assert_same(got["model"][name], weight, device == "cpu", name)
        for i, moments in want["optimizer"]["state"].items():
            for name, moment in moments.items():
                assert_same(got["optimizer"]["state"][i][name], moment, device == "cpu", f"{name} of {i}")
    got, want = bits_by_step(out), bits_by_step(whole)
    assert got.keys() == want.keys() and saved + MORE in want
    assert device != "cpu" or got == want
