"""The verdict of benchmarks/compare_schedules.py: alike where only noise differs, else not."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import pytest

_spec = importlib.util.spec_from_file_location(
    "compare_schedules", Path(__file__).parents[1] / "benchmarks" / "compare_schedules.py")
compare_schedules = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compare_schedules)


def runs(seed: int, shift: float = 0.0, n: int = 5) -> compare_schedules.Runs:
    """Falling curves whose seeds lie 0.02 apart, with noise of 0.01 a line, and ``shift`` in the middle."""
    draw, steps = np.random.default_rng(seed), np.arange(100)
    noise = 0.02 * draw.standard_normal((n, 1)) + 0.01 * draw.standard_normal((n, 100))
    curves = 2 + 5 * np.exp(-steps / 20) + noise
    return compare_schedules.Runs(steps, curves + shift * ((steps >= 40) & (steps < 60)),
                                  curves[:, -10:].mean(1))


def test_noise_agrees() -> None:
    """Draws of one distribution: the tests err in 8 and 5 of 100, so 43.5 of 50 agree, give or take 2.4."""
    agreed = [compare_schedules.compare(runs(2 * i), runs(2 * i + 1), 5)["agrees"] for i in range(50)]
    assert sum(agreed) >= 37, sum(agreed)


def test_the_same_agrees() -> None:
    found = compare_schedules.compare(runs(0), runs(0), 5)
    assert found["agrees"] and found["curve_rarity"] == 1 and found["heldout_difference"] == 0


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_a_bump_is_seen(shift: float) -> None:
    """Five spreads of the seeds, on a fifth of the way, gone at the end."""
    found = compare_schedules.compare(runs(0), runs(1, shift), 5)
    assert found["heldout_agrees"] and not found["curve_agrees"] and not found["agrees"]
    assert found["curve_rarity"] == pytest.approx(2 / 252)      # no deal but this one and its mirror


def test_a_worse_end_is_seen() -> None:
    first = runs(0)
    other = first._replace(heldout=first.heldout + 0.1)
    found = compare_schedules.compare(first, other, 5)
    assert found["curve_agrees"] and not found["heldout_agrees"] and not found["agrees"]


def test_options() -> None:
    assert compare_schedules.options_of("plain") == ["--schedule", "plain", "--transport", "c10d"]
    assert compare_schedules.options_of("auto") == ["--schedule", "auto", "--transport", "auto"]
    assert compare_schedules.options_of("lina/nccl/3:2") == ["--schedule", "lina", "--transport", "nccl",
                                                            "--degree", "3,2"]


@pytest.mark.parametrize("jobs", [1, 4])
def test_gathers_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    """Later runs that end first are still their own seed's and design's; one that fails is an error."""
    def train(folder: Path, argv: list[str]) -> tuple[np.ndarray, np.ndarray, float]:
        seed, schedule = int(argv[argv.index("--seed") + 1]), argv[argv.index("--schedule") + 1]
        time.sleep(0.02 * (3 - seed))
        if schedule == "auto":
            sys.exit("failed")
        return np.arange(2), np.array([seed, len(schedule)]), float(seed)

    monkeypatch.setattr(compare_schedules, "train", train)
    found = compare_schedules.gather(tmp_path, ["plain", "lina"], 3, jobs, ["--steps", "2"])
    assert found["plain"].heldout.tolist() == [0, 1, 2]
    assert found["lina"].curves.tolist() == [[0, 4], [1, 4], [2, 4]]
    with pytest.raises(SystemExit, match="failed"):
        compare_schedules.gather(tmp_path, ["plain", "auto"], 3, jobs, [])
