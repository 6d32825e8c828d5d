"""What the benchmarks share: a case with its runs, timing on CPU and CUDA, the report.

CPU: the runs of a case take turns, so that a busy machine disturbs all alike.
CUDA: the L2 cache is flushed and the stream put to sleep before each run, so
that neither warm caches nor launch cost enter the GPU's time between events;
the host's own time for a call is measured and reported apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Case:
    """One row: ``runs`` by name, all doing the same work on the same inputs.

    ``bytes`` is the least memory traffic, ``formula`` says how it is counted;
    ``check`` raises if the first run's results are wrong.
    """

    name: str
    runs: dict[str, Callable[[], object]]
    bytes: int = 0
    formula: str = ""
    flops: int = 0
    check: Callable[[], None] | None = None
    info: dict = field(default_factory=dict)
    repeats: int = 50  # CUDA: runs of each
    head_start_us: float = 300.0  # CUDA: more than the host takes to launch a run


@dataclass
class Timing:
    """Seconds: the median and the 10th and 90th percentile; ``host`` is the host's time for a call (CUDA)."""

    median: float
    low: float
    high: float
    runs: int
    host: float | None = None

    @staticmethod
    def of(seconds: list[float], host: list[float] | None = None) -> Timing:
        ordered = sorted(seconds)
        n = len(ordered)
        return Timing(
            statistics.median(ordered),
            ordered[n // 10],
            ordered[n - 1 - n // 10],
            n,
            statistics.median(host) if host else None,
        )


def time_cpu(
    runs: dict[str, Callable[[], object]], seconds: float = 3.0, most: int = 100, warmup: int = 2
) -> dict[str, Timing]:
    """Interleaved runs of each callable, for about ``seconds`` in all."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + seconds
    while len(next(iter(taken.values()))) < most:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
        if time.perf_counter() > stop and len(taken[name]) >= 5:
            break
    return {name: Timing.of(values) for name, values in taken.items()}


def time_cuda(
    runs: dict[str, Callable[[], object]], repeats: int = 50, warmup: int = 5, head_start_us: float = 300.0
) -> dict[str, Timing]:
    """GPU time between events behind a sleeping kernel, after an L2 flush; and host time per call."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device="cuda")
    cycles = int(head_start_us * 2000)  # at about 2 GHz
    for _ in range(warmup):
        for run in runs.values():
            run()
    torch.cuda.synchronize()
    taken: dict[str, list[tuple]] = {name: [] for name in runs}
    host: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(cycles)
            begin.record()
            start = time.perf_counter()
            run()
            host[name].append(time.perf_counter() - start)
            end.record()
            taken[name].append((begin, end))
        torch.cuda.synchronize()
    return {
        name: Timing.of([b.elapsed_time(e) / 1e3 for b, e in events], host[name])
        for name, events in taken.items()
    }


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case on the CPU")
    parser.add_argument("--json", metavar="FILE", help="also write every number here")
    return parser


def machine(device: str) -> dict:
    """What a number means nothing without."""
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "device": device,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
    }
    try:
        with open("/proc/cpuinfo") as lines:
            facts["cpu"] = next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
        with open("/proc/loadavg") as line:
            facts["load"] = line.read().split()[0]
    except (OSError, StopIteration):
        pass
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def try_compile(function: Callable, *inputs: object) -> tuple[Callable | None, str]:
    """torch.compile's version after one call, or None and the reason it does not work here."""
    compiled = torch.compile(function, dynamic=False)
    try:
        compiled(*inputs)
    except Exception as error:  # any backend or compiler failure: report, go on
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    return compiled, ""


def allowed(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, terms: float, name: str) -> None:
    """Raises unless ``got`` is ``want`` (float64) rounded once, summed in float32 from ``terms`` values
    whose absolute sum is ``size``."""
    limit = torch.finfo(got.dtype).eps * want.abs() + (terms + 1) * torch.finfo(torch.float32).eps * size
    excess = (got.double() - want).abs() - limit
    assert not excess.isnan().any() and (excess <= 0).all(), f"{name}: wrong by {excess.max():.3g}; not timed"


def measure(title: str, cases: list[Case], args: argparse.Namespace) -> list[dict]:
    """Checks, times and prints every case; the first run of each is the one compared with the others."""
    facts = machine(args.device)
    print(f"# {title}\n" + "\n".join(f"{key}: {value}" for key, value in facts.items()))
    rows = []
    for case in cases:
        if case.check:
            case.check()
        if args.device == "cuda":
            timings = time_cuda(case.runs, case.repeats, min(5, case.repeats // 4), case.head_start_us)
        else:
            timings = time_cpu(case.runs, args.seconds)
        ours = next(iter(timings.values())).median
        formula = f"   {case.bytes / 1e6:.2f} MB = {case.formula}" if case.bytes else ""
        print(f"\n{case.name}{formula}")
        for name, t in timings.items():
            print(
                f"  {name:16s} {t.median * 1e6:10.1f} us"
                + f"  ({t.low * 1e6:.1f} .. {t.high * 1e6:.1f}, {t.runs} runs)"
                + (f"  {case.bytes / t.median / 1e9:8.1f} GB/s" if case.bytes else "")
                + (f"  {case.flops / t.median / 1e12:8.2f} TFLOP/s" if case.flops else "")
                + (f"  host {t.host * 1e6:.1f} us" if t.host is not None else "")
                + f"  x{t.median / ours:.2f}"
            )
        for key, value in case.info.items():
            print(f"  {key}: {value}")
        rows.append(
            {
                "case": case.name,
                "bytes": case.bytes,
                "flops": case.flops,
                "info": case.info,
                "runs": {name: vars(t) for name, t in timings.items()},
            }
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"title": title, "machine": facts, "cases": rows}, file, indent=1)
    return rows
