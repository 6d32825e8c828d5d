"""Do schedules train alike? `lina train` for several seeds under each, and whether their curves agree.

    python benchmarks/compare_schedules.py --out FOLDER [--designs plain,lina/nccl] -- --steps 2000 ...

A design is SCHEDULE[/TRANSPORT[/FORWARD:BACKWARD]], by default over c10d, but auto over what it chooses; what
follows `--` goes to every `lina train`. Each run has a folder below FOLDER; one that is whole is not run
again. --jobs N makes N runs at a time; where one fails, those under way still end, and no other begins. A
seed gives every design the same first weights and the same batches, so what differs is rounding, and what
rounding grows to.

Each design is compared with the first. They agree if both hold:
1. the mean held-out bits differ by at most 2 standard errors, sqrt(var_a / n + var_b / n) over n seeds
   (with 5 seeds chance alone goes beyond in 8 of 100 comparisons);
2. the curves' largest distance is no rarer than 1 in 20. Curves are smoothed over --smooth lines of
   metrics.jsonl; the distance is the largest difference of the two means along them. How rare it is,
   is counted: among all ways to deal the 2n curves into two groups of n, the share whose distance is at
   least as large. (Standard errors at each step would not do: steps depend on each other.)
With fewer than 4 seeds 2. cannot fail, and the output says so. The differences seed by seed are printed
besides: they are much smaller than the seeds' spread where only rounding differs.

Writes curves.png and result.json into FOLDER; the exit code is 0 if all agree, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import lina
from lina.tracefile import write_json

RARE = 0.05
ERRORS = 2.0                # standard errors that the means may differ by


class Runs(NamedTuple):
    """One design's: steps [L], curves [n, L] and held-out figures [n], in bits per byte."""

    steps: np.ndarray
    curves: np.ndarray
    heldout: np.ndarray


def smoothed(curves: np.ndarray, width: int) -> np.ndarray:
    """Means of ``width`` neighbours, as many fewer at the ends: [n, L] to [n, L - width + 1]."""
    width = min(width, curves.shape[1])
    sums = np.cumsum(np.pad(curves, ((0, 0), (1, 0))), axis=1)
    return (sums[:, width:] - sums[:, :-width]) / width


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of the mean curves."""
    return float(np.abs(a.mean(0) - b.mean(0)).max())


def rarity(a: np.ndarray, b: np.ndarray) -> float:
    """The share of all ways to deal the curves into groups of these sizes with at least this distance."""
    every = np.concatenate([a, b])
    found = distance(a, b) * (1 - 1e-12)         # sums in another order are no difference
    deals = list(combinations(range(len(every)), len(a)))
    far = sum(distance(every[list(deal)], np.delete(every, deal, axis=0)) >= found for deal in deals)
    return far / len(deals)


def compare(first: Runs, other: Runs, width: int) -> dict[str, Any]:
    """The verdict on two designs over the same seeds; see the module's text."""
    n = len(first.heldout)
    difference = float(other.heldout.mean() - first.heldout.mean())
    error = float(np.sqrt(first.heldout.var(ddof=1) / n + other.heldout.var(ddof=1) / n))
    a, b = smoothed(first.curves, width), smoothed(other.curves, width)
    p = rarity(a, b)
    return {"heldout_difference": difference, "heldout_standard_error": error,
            "heldout_agrees": abs(difference) <= ERRORS * error, "curve_distance": distance(a, b),
            "curve_spread": float(np.concatenate([a - a.mean(0), b - b.mean(0)]).std()),
            "curve_rarity": p, "curve_agrees": p >= RARE,
            "by_seed": {"heldout": (other.heldout - first.heldout).tolist(),
                        "curve": np.abs(other.curves - first.curves).max(1).tolist()},
            "agrees": abs(difference) <= ERRORS * error and p >= RARE}


def options_of(design: str) -> list[str]:
    schedule, *more = design.split("/")
    usual = "auto" if schedule == "auto" else "c10d"
    found = ["--schedule", schedule, "--transport", more[0] if more else usual]
    if len(more) > 1:
        found += ["--degree", more[1].replace(":", ",")]
    return found


def train(folder: Path, argv: list[str]) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps, their bits and the held-out bits of one run, which is made unless it is there."""
    asked = folder / "asked.json"
    if not ((folder / "summary.json").is_file() and asked.is_file()
            and json.loads(asked.read_text(encoding="utf-8")) == argv):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)
        asked.write_text(json.dumps(argv), encoding="utf-8")
        command = [sys.executable, "-m", "lina.cli", "train", *argv, "--out", str(folder), "--quiet"]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"compare_schedules: {' '.join(command)} ended with {done.returncode}:\n"
                     f"{done.stdout[-3000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return (np.array([row["step"] for row in rows]), np.array([row["bits_per_byte"] for row in rows]),
            summary["held_out_bits_per_byte"])


def gather(out: Path, designs: list[str], seeds: int, jobs: int, given: list[str]) -> dict[str, Runs]:
    found: dict[str, list] = {design: [] for design in designs}
    asked = [(seed, design) for seed in range(seeds)      # designs take turns: what changes with time is in
             for design in designs]                       # all of them

    def run(seed: int, design: str) -> tuple[np.ndarray, np.ndarray, float]:
        folder = out / design.replace("/", "_").replace(":", "-") / f"seed{seed}"
        return train(folder, [*given, "--seed", str(seed), *options_of(design)])

    with ThreadPoolExecutor(jobs) as pool:
        for (seed, design), one in zip(asked, pool.map(run, *zip(*asked, strict=True)), strict=True):
            found[design].append(one)
            print(f"seed {seed}, {design}: held-out {one[2]:.4f} bits per byte", flush=True)
    return {design: Runs(runs[0][0], np.stack([bits for _, bits, _ in runs]),
                         np.array([heldout for *_, heldout in runs])) for design, runs in found.items()}


def picture(path: Path, runs: dict[str, Runs], width: int) -> None:
    """The mean curves with the seeds' spread; below, differences from the first with 2 standard errors."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, figsize=(8, 6.5), sharex=True, layout="constrained")
    first = smoothed(next(iter(runs.values())).curves, width)
    for (name, one), color in zip(runs.items(), ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee"),
                                  strict=False):
        curves = smoothed(one.curves, width)
        steps, mean, spread = one.steps[-curves.shape[1]:], curves.mean(0), curves.std(0, ddof=1)
        above.plot(steps, mean, "--" if above.lines else "-", color=color,      # the first shows through
                   label=f"{name} (held-out {one.heldout.mean():.3f})")
        above.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        below.plot(steps, mean - first.mean(0), color=color)
        error = ERRORS * np.sqrt((curves.var(0, ddof=1) + first.var(0, ddof=1)) / len(curves))
        below.fill_between(steps, -error, error, color=color, alpha=0.1, linewidth=0)
    above.set_ylabel("bits per byte")
    above.legend()
    below.set_ylabel("difference of means")
    below.set_xlabel("step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    given = argv[cut + 1:]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--designs", default="plain,lina")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--smooth", type=int, default=5, help="lines of metrics.jsonl")
    args = parser.parse_args(argv[:cut])
    designs = args.designs.split(",")
    if (min(args.seeds - 1, args.jobs, args.smooth) < 1 or not 2 <= len(designs) <= 5
            or len(set(designs)) < len(designs)):
        parser.error(f"--seeds {args.seeds}, at least 2; --jobs {args.jobs}, --smooth {args.smooth}, at "
                     f"least 1; --designs {args.designs}, 2 to 5 different ones")
    runs = gather(args.out, designs, args.seeds, args.jobs, given)
    first, *others = designs
    verdicts = {other: compare(runs[first], runs[other], args.smooth) for other in others}
    picture(args.out / "curves.png", runs, args.smooth)
    versions = {"lina": lina.__version__, "torch": torch.__version__, "numpy": np.__version__}
    curves = {design: {"steps": one.steps.tolist(), "bits": one.curves.tolist(),
                       "heldout": one.heldout.tolist()} for design, one in runs.items()}
    write_json(args.out / "result.json", {
        "command": sys.argv, "versions": versions, "seeds": args.seeds, "smooth": args.smooth, "first": first,
        "compared": verdicts, "runs": curves})
    for other, v in verdicts.items():
        by_seed = v["by_seed"]["heldout"]
        print(f"{other} against {first}, {args.seeds} seeds: {'agree' if v['agrees'] else 'DIFFER'}\n"
              f"  held-out  {v['heldout_difference']:+.5f} bits, standard error "
              f"{v['heldout_standard_error']:.5f}; by seed {min(by_seed):+.5f} to {max(by_seed):+.5f}\n"
              f"  curves    {v['curve_distance']:.5f} bits apart at most, spread of seeds "
              f"{v['curve_spread']:.5f}; {v['curve_rarity']:.0%} of chance deals are as far apart")
    if args.seeds < 4:
        print(f"{args.seeds} seeds are too few for the curves to be told apart: at least 4")
    return 0 if all(v["agrees"] for v in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
