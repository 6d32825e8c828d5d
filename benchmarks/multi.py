"""What the benchmarks of several ranks share: starting, agreeing, timing what all ranks do together.

CUDA: before each repetition the L2 cache is flushed, the stream put to sleep, so that launches stay out of
the time between events as far as a design does not itself wait for the GPU, and the ranks start together
on the device. CPU: the ranks start together at a barrier.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from common import Timing, machine
from torch import Tensor

from lina.profile.layers import uncollected

STAND_IN = "through host memory (NCCL_P2P_DISABLE=1), a stand-in for a 200 Gb/s network"
Stage = Callable[[], object]


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20, help="timed repetitions")
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial on a CPU; times mean nothing")
    parser.add_argument("--json", metavar="FILE", help="also write every number here")
    return parser


def start(device: str, timeout_s: float = 180) -> torch.device:
    """Join the ranks that torchrun started; this rank's device."""
    if "LOCAL_RANK" not in os.environ:
        sys.exit(f"start it by torchrun: torchrun --standalone --nproc-per-node 2 {sys.argv[0]}")
    timeout = timedelta(seconds=timeout_s)
    if device == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timeout)
        return torch.device("cpu")
    here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(here)
    dist.init_process_group("nccl", device_id=here, timeout=timeout)
    return here


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def facts(device: torch.device) -> dict[str, Any]:
    """Printed by rank 0, and kept with the numbers."""
    found = machine(device.type) | {"ranks": dist.get_world_size()}
    found["command"] = shlex.join(["torchrun", "--nproc-per-node", str(dist.get_world_size()), *sys.argv])
    found["nccl settings"] = {k: v for k, v in os.environ.items() if k.startswith("NCCL_")}
    if device.type == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["links"] = STAND_IN if os.environ.get("NCCL_P2P_DISABLE") == "1" else "as NCCL finds them"
    say("\n".join(f"{key}: {value}" for key, value in found.items()))
    return found


def save(path: str | None, title: str, found: dict[str, Any], cases: list[dict]) -> None:
    if path and dist.get_rank() == 0:
        with open(path, "w") as file:
            json.dump(dict(title=title, machine=found, cases=cases), file, indent=1)


def end() -> None:
    """Leave together, without the teardown of whatever a peer's library holds."""
    dist.barrier()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def slowest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of all ranks' values, place by place."""
    shared = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def first_error(why: str | None) -> str | None:
    """The first rank's reason, on all ranks; None if no rank has one."""
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, why)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text), None)


def attempt(call: Callable[[], object]) -> str | None:
    """Why ``call`` does not work on some rank, or None. A rank that fails where others wait for it shows
    after the process group's timeout."""
    why = None
    try:
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:               # whatever a library raises: report it, go on with the others
        why = f"{type(error).__name__}: {str(error).strip()[:400]}"
        if os.environ.get("BENCH_TRACEBACK"):
            raise
    return first_error(why)


def designs(text: str) -> list[tuple[str, str, tuple[int, int]]]:
    """"nccl@2,p2p" -> (label, name, degrees forward and backward); "nccl@2/3" has both, none is 1."""
    found = []
    for label in text.split(","):
        name, _, degree = label.partition("@")
        forward, _, backward = degree.partition("/")
        found.append((label, name, (int(forward or 1), int(backward or forward or 1))))
    return found


class Clock:
    """Times of what all ranks do together, without Python's garbage collector."""

    def __init__(self, device: torch.device, repeats: int, head_start_ms: float = 10.0) -> None:
        self.device, self.repeats, self.cuda = device, repeats, device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(4 * cache, dtype=torch.int8, device=device)
            self.meet = torch.zeros(1, device=device)
            self.cycles = int(head_start_ms * 2e6)           # at about 2 GHz

    def stages(self, stages: Sequence[Stage], before: Stage | None = None) -> list[Timing]:
        """Seconds of each stage, one after the other: the slowest rank's in each repetition."""
        rows = []
        with uncollected():
            for _ in range(self.repeats + 5):
                if before:
                    before()
                rows.append(self._cuda(stages) if self.cuda else self._cpu(stages))
        kept = rows[5:]
        flat = slowest([t for row in kept for t in row], self.device)
        columns = [flat[i::len(stages)] for i in range(len(stages))]
        return [Timing.of(column) for column in columns]

    def _cuda(self, stages: Sequence[Stage]) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        self.flush.zero_()
        torch.cuda._sleep(self.cycles)
        dist.all_reduce(self.meet)
        marks[0].record()
        for stage, mark in zip(stages, marks[1:], strict=True):
            stage()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]

    def _cpu(self, stages: Sequence[Stage]) -> list[float]:
        dist.barrier()
        marks = [time.perf_counter()]
        for stage in stages:
            stage()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]

    def host(self, stages: Sequence[Stage], before: Stage | None = None, turns: int = 7) -> list[float]:
        """Seconds until each call returns to the host on an idle device: its own work, and its waits for
        the GPU. The median, of the slowest rank."""
        rows = []
        for _ in range(turns):
            if before:
                before()
            dist.barrier()
            if self.cuda:
                torch.cuda.synchronize()
            row = []
            for stage in stages:
                begin = time.perf_counter()
                stage()
                row.append(time.perf_counter() - begin)
                if self.cuda:
                    torch.cuda.synchronize()
            rows.append(row)
        return slowest([Timing.of([row[i] for row in rows]).median for i in range(len(stages))], self.device)


def off(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Error by norm, and of the worst element relative to the largest one; NaN if either has one."""
    got, want = got.double(), want.double()
    if want.numel() == 0:
        return 0.0, 0.0
    error = got - want
    norm, most = want.norm().clamp(min=1e-300), want.abs().max().clamp(min=1e-300)
    return (error.norm() / norm).item(), (error.abs().max() / most).item()
