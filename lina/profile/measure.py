"""Timing on several ranks at once: all repeat a call equally often and keep the slowest's time.

Every decision (how often, which sizes, when to stop) is taken from numbers that all ranks share.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lina.parallel import Line, Point, point_of

Run = Callable[[], object]          # does the operation once
Prepare = Callable[[int], Run]      # allocates for so many units

BATCH_S = 2e-3          # calls shorter than this are timed several together
MOST_CALLS = 32         # of them: CUDA's queue takes about a thousand launches
ROUND, MOST = 5, 60     # batches between two looks at their spread, and most of a size
STEADY = 0.04           # enough batches once half of the times lie this close, relative to their median
FEWEST = 3              # sizes that are measured whatever they cost: r2 means nothing with two
HEAD_START = 200_000    # cycles a call that the GPU sleeps first (0.1 ms), so that the host is ahead of it


@dataclass(frozen=True)
class Ranks:
    """The ranks that measure together, and on what.

    Attributes:
        world: all of them; None for one alone.  ep: those that tokens are exchanged among.
        device: this rank's.
    """

    world: dist.ProcessGroup | None
    ep: dist.ProcessGroup | None
    device: torch.device

    def slowest(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks' values, place by place; collective, and no rank is past it
        before all have come to it."""
        if self.world is None or self.world.size() == 1:
            return [float(v) for v in values]
        shared = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.world)
        return [float(v) for v in shared.tolist()]

    def first_error(self, error: Exception | None) -> str | None:
        """The same line on all ranks if any brings an error, else None; collective."""
        if self.slowest([error is not None])[0] == 0:
            return None
        mine = None if error is None else f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if self.world is None or self.world.size() == 1:
            return mine
        said: list[str | None] = [None] * self.world.size()
        dist.all_gather_object(said, mine, group=self.world)
        rank = next(r for r, text in enumerate(said) if text is not None)
        return f"rank {rank}: {said[rank]}"


def sweep(ranks: Ranks, prepare: Prepare, sizes: Sequence[int], seconds: float,
          each: int = 1) -> tuple[Line | None, str]:
    """The line through the times of several sizes, smallest first, in about ``seconds``; a run does the
    operation ``each`` times.

    The first FEWEST sizes are always measured; a larger one only if the time left is likely to do.
    Returns no line, and one line of text saying why, if some rank could not prepare that many.
    """
    points: list[Point] = []
    left = seconds
    for n in sorted(sizes):
        likely = each * points[-1].time_s * n / points[-1].n if points else 0.0
        if len(points) >= FEWEST and (ROUND + 3) * likely > left:
            break
        start = time.perf_counter()
        run, error = _prepared(ranks, prepare, n)
        if run is None:
            if len(points) >= 2:            # too large for some rank's memory: the others tell enough
                break
            return None, error
        # half now, so that the larger sizes, which say most of beta, get theirs
        points.append(point_of(float(n), [t / each for t in times(ranks, run, left / 2)]))
        del run
        left -= ranks.slowest([time.perf_counter() - start])[0]
    return Line.fit(points), ""


def _prepared(ranks: Ranks, prepare: Prepare, n: int) -> tuple[Run | None, str]:
    run, error = None, None
    try:
        run = prepare(n)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
    except Exception as failed:     # any library's: it is told, and the other ranks hear of it
        error = failed
    said = ranks.first_error(error)
    return (run, "") if said is None else (None, said)


def times(ranks: Ranks, run: Run, seconds: float) -> list[float]:
    """Seconds of one call of ``run``, several times: the mean of a few calls in a row, on the slowest
    rank. Takes ``seconds`` at most, if that is enough for one round, and stops once the times are
    steady. Collective."""
    timed = _timed_cuda if ranks.device.type == "cuda" else _timed_cpu
    run()                           # connections, kernels and caches
    once = max(min(ranks.slowest([timed(ranks, run, 1)])[0] for _ in range(2)), 1e-9)
    calls = max(1, min(MOST_CALLS, math.ceil(BATCH_S / once)))
    found: list[float] = []
    while not found or (len(found) < MOST and sum(found) * calls * (1 + ROUND / len(found)) < seconds):
        found += ranks.slowest([timed(ranks, run, calls) / calls for _ in range(ROUND)])
        low, middle, high = statistics.quantiles(found, n=4)
        if high - low < STEADY * middle:
            break
    return found


def _timed_cpu(ranks: Ranks, run: Run, calls: int) -> float:
    ranks.slowest([0.0])
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def _timed_cuda(ranks: Ranks, run: Run, calls: int) -> float:
    """GPU time between events, with every launch queued before the first one starts."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START * (calls + 1))
    if ranks.world is not None and ranks.world.size() > 1:      # the GPUs start together
        dist.all_reduce(torch.zeros(1, device=ranks.device), group=ranks.world)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
