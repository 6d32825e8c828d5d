"""Records the spans of one trace."""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from lina.tracefile import TRACKS, Interval, Span, busy, length, subtract, union
from lina.tracing import clock
from lina.tracing.layers import Names
from lina.tracing.memory import Memory


class Mark(NamedTuple):
    """A started span; `at` is seconds or a CUDA event, `lane` a thread or stream."""

    recorder: Recorder
    track: str
    name: str
    device: torch.device | None     # None: host clock
    at: Any
    lane: Any                       # None: asynchronous, cuts no compute span
    nvtx: int | None
    args: dict[str, Any]


class Recorder:
    """The spans of one trace. Made by ``trace``; readable once that has ended.

    Attributes:
        spans: what was recorded, in seconds since 1970 by rank 0's clock, by start.
        start, stop: when the trace began and ended, by the same clock.
        memory: peak memory, as :class:`lina.tracefile.RankTrace`'s facts; None where it is not known.
        clock_error: seconds that this rank's times may be off from rank 0's, and on CUDA the device's
            from the host's besides.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        if device is None and torch.cuda.is_available() and torch.cuda.is_initialized():
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device if device is not None and device.type == "cuda" else None
        self.spans: list[Span] = []
        self.start = self.stop = 0.0
        self.memory: dict[str, Any] | None = None
        self.clock_error = 0.0
        self.closed = False
        self._lock = threading.Lock()
        self._raw: list[tuple[Mark, Any]] = []
        self._clocks: dict[torch.device, clock.Device] = {}
        self._hosts = clock.Hosts(0.0, 0.0)

    def begin(self, track: str, name: str, device: torch.device | None, args: dict[str, Any],
              cuts: bool) -> Mark | None:
        """A span from now, or from here on the current stream; it is of the layer that runs."""
        if track not in TRACKS:
            raise ValueError(f"trace: track={track!r}, expected one of {', '.join(TRACKS)}")
        layer = args.pop("layer", None) or self.names.current()
        if layer is not None:
            args["layer"] = layer
        device = self.device if device is None else device
        if device is None or device.type != "cuda":
            lane = threading.get_ident() if cuts else None
            return Mark(self, track, name, None, time.perf_counter(), lane, None, args)
        if torch.cuda.is_current_stream_capturing():
            return None                  # a captured event would belong to the graph
        stream = torch.cuda.current_stream(device)
        device = stream.device           # with its index
        with self._lock:
            if device not in self._clocks:
                self._clocks[device] = clock.Device(stream)
        nvtx = torch.cuda.nvtx.range_start(f"{track}: {name}")
        return Mark(self, track, name, device, clock.event(stream),
                    (device, stream.cuda_stream) if cuts else None, nvtx, args)

    def end(self, mark: Mark | None) -> None:
        if mark is None:
            return
        if mark.device is None:
            stop: Any = time.perf_counter()
        else:
            stop = clock.event(torch.cuda.current_stream(mark.device))
            torch.cuda.nvtx.range_end(mark.nvtx)
        with self._lock:
            if not self.closed:          # what ends after the trace is not part of it
                self._raw.append((mark, stop))

    def open(self, model: nn.Module | None, together: bool) -> None:
        """`together`: with every rank of the default process group."""
        self._hosts = clock.agree() if together else clock.alone()
        if self.device is not None:
            with torch.cuda.device(self.device):
                stream = torch.cuda.current_stream()
                self._clocks[stream.device] = clock.Device(stream)
        self._memory = Memory(self.device)
        self.names = Names(self, model)
        self.start = time.perf_counter() + self._hosts.epoch

    def close(self) -> None:
        self.names.close()
        with self._lock:
            self.closed = True
        for device in self._clocks.values():
            device.close()
        self.stop = time.perf_counter() + self._hosts.epoch
        self.memory = self._memory.stop()
        self.clock_error = self._hosts.error + max((d.error for d in self._clocks.values()), default=0.0)
        timed = [(mark, self._seconds(mark, mark.at), self._seconds(mark, stop)) for mark, stop in self._raw]
        timed.sort(key=lambda t: t[1])       # so that parts of equal times, cut alike, stay in this order
        blocked: dict[Any, list[Interval]] = {}
        for mark, start, stop in timed:
            if mark.track != "compute" and mark.lane is not None:
                blocked.setdefault(mark.lane, []).append((start, stop))
        blocked = {lane: union(spans) for lane, spans in blocked.items()}
        for mark, start, stop in timed:
            cut = blocked.get(mark.lane, []) if mark.track == "compute" else []
            for name, value in mark.args.items():
                if callable(value):
                    mark.args[name] = value()
            for a, b in subtract([(start, stop)], cut):
                self.spans.append(Span(mark.track, mark.name, a, b, mark.args))
        self.spans.sort(key=lambda s: (s.start, -s.stop))
        self._raw.clear()

    def _seconds(self, mark: Mark, at: Any) -> float:
        host = at if mark.device is None else self._clocks[mark.device].seconds(at)
        return float(host) + self._hosts.epoch

    def facts(self) -> dict[str, Any]:
        """What the file says beside the spans."""
        return {"clock_error_us": 1e6 * self.clock_error, "memory": self.memory}

    def seconds(self) -> float:
        """Length of the trace in seconds."""
        return self.stop - self.start

    def totals(self) -> dict[str, float]:
        """Seconds in which each track was busy: the union of its spans, not their sum."""
        return {track: length(busy(self.spans, track)) for track in TRACKS}

    def waiting(self) -> float:
        """Seconds with an a2a or an allreduce in flight and no compute span running."""
        network = busy(self.spans, "a2a") + busy(self.spans, "allreduce")
        return length(subtract(network, busy(self.spans, "compute")))
