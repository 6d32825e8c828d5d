"""One time axis: every rank's host clock brought to rank 0's, every device's event clock to its host's.

Hosts: a collective ends on no rank before it has started on all. So with rank r's clock ahead of rank
0's by o, each round of one small allreduce says

    start_r - end_0 <= o <= end_r - start_0    (each by its own rank's clock),

and the rounds' bounds hold together: o is the middle of what is left, off by at most half of its width.
That is the time of an allreduce at worst, less where ranks come late in turn. Clocks of two machines
may since drift apart, some 10 us per second of trace.

Devices: an event is recorded on an idle stream between two readings of the host's clock, at the start of
the trace and at its end; in between time runs evenly. Off by at most half of the time between the
readings, of the closest of several tries.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_ROUNDS = 16
_TRIES = 5


class Hosts(NamedTuple):
    """Seconds to add to ``time.perf_counter()`` for rank 0's seconds since 1970, and how far off at most."""

    epoch: float
    error: float


def alone() -> Hosts:
    """By this rank's own clock."""
    return Hosts(time.time() - time.perf_counter(), 0.0)


def agree() -> Hosts:
    """By rank 0's clock. A collective over the default group: a few milliseconds at most, once the
    last rank has come."""
    on = torch.device("cpu")
    if dist.get_backend() == "nccl":
        on = torch.device("cuda", torch.cuda.current_device())
    here = alone()
    beat = torch.zeros(1, device=on)
    readings = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        dist.all_reduce(beat)
        beat.item()                # on CUDA the host waits here
        readings += [start, time.perf_counter()]
    zeros = torch.tensor([here.epoch, *readings], dtype=torch.float64, device=on)
    dist.broadcast(zeros, src=0)
    epoch, *theirs = zeros.tolist()
    low, high = bounds(readings, theirs)
    return Hosts(epoch - (low + high) / 2, abs(high - low) / 2)


def bounds(mine: list[float], theirs: list[float]) -> tuple[float, float]:
    """Least and largest lead of this clock over the other; starts and ends of the same rounds, in turn."""
    return (max(start - end for start, end in zip(mine[::2], theirs[1::2], strict=True)),
            min(end - start for start, end in zip(theirs[::2], mine[1::2], strict=True)))


def event(stream: Any) -> Any:
    found = torch.cuda.Event(enable_timing=True)
    found.record(stream)
    return found


class Device:
    """A device's events in seconds of ``time.perf_counter()``. Waits for the device when made."""

    def __init__(self, stream: Any) -> None:
        self._device = stream.device
        self.error = 0.0
        self._first = self._anchor(stream)
        self._last: tuple[Any, float] | None = None

    def _anchor(self, stream: Any) -> tuple[Any, float]:
        torch.cuda.synchronize(self._device)
        tries = []
        for _ in range(_TRIES):
            before = time.perf_counter()
            found = event(stream)
            found.synchronize()
            after = time.perf_counter()
            tries.append(((after - before) / 2, before, found))
        half, before, found = min(tries, key=lambda t: t[0])
        self.error = max(self.error, half)
        return found, before + half

    def close(self) -> None:
        """The second anchor; waits for the device."""
        with torch.cuda.device(self._device):
            self._last = self._anchor(torch.cuda.current_stream())

    def seconds(self, at: Any) -> float:
        """When the event `at` happened; after ``close``."""
        assert self._last is not None
        (first, start), (last, stop) = self._first, self._last
        length = first.elapsed_time(last)
        return start + first.elapsed_time(at) * ((stop - start) / length if length > 0 else 1e-3)
