"""Time spans of compute, a2a and allreduce, written as one Chrome/Perfetto trace.

Off by default: ``span`` and ``begin`` then cost one check of a module
attribute. On, a span is two ``perf_counter`` readings, or, on CUDA, two events
on the current stream (never a synchronisation inside the step; they are
converted once, when the trace ends) and an NVTX range.

A thread (on CUDA: a stream) that is inside an a2a or allreduce ``span`` is not
computing: a compute span around it is cut there. Work that runs beside
compute uses ``begin`` and ``end``, which cut nothing. So a blocking wait is a
``span`` and an asynchronous collective a ``begin`` ... ``end``.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lina.tracefile import TRACKS, Interval, Span, busy, events, length, subtract, union, write_json


class _Mark(NamedTuple):
    """A started span; `at` is seconds or a CUDA event, `lane` a thread or stream."""

    recorder: Recorder
    track: str
    name: str
    device: torch.device | None     # None: host clock
    at: Any
    lane: Any                       # None: asynchronous, cuts no compute span
    nvtx: int | None
    args: dict[str, Any]


class _Off:
    """What ``span`` returns while nothing is traced; made anew, as torch.compile needs it."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None


class _Open:
    def __init__(self, recorder: Recorder, track: str, name: str,
                 device: torch.device | None, args: dict[str, Any]) -> None:
        self._start = (recorder, track, name, device, args)

    def __enter__(self) -> None:
        recorder, track, name, device, args = self._start
        self._mark = recorder._begin(track, name, device, args, True)

    def __exit__(self, *exc: object) -> None:
        end(self._mark)


_recorder: Recorder | None = None


def span(track: str, name: str, *, device: torch.device | None = None, **args: Any) -> Any:
    """Context manager: one span of `track` ("compute", "a2a" or "allreduce").

    `args` (bytes, kernel path, layer) are shown beside the span. `device`
    defaults to the trace's. Raises ValueError for another track while tracing.
    """
    if _recorder is None or torch.compiler.is_compiling():
        return _Off()
    return _Open(_recorder, track, name, device, args)


def begin(track: str, name: str, device: torch.device | None = None, **args: Any) -> _Mark | None:
    """Start of asynchronous work; pass the token to ``end``, from any thread.

    On the compute track: a compute span of the calling thread or stream, to be
    cut like any other, that ends where no ``with`` block could.
    """
    if _recorder is None or torch.compiler.is_compiling():
        return None
    return _recorder._begin(track, name, device, args, track == "compute")


def end(token: _Mark | None) -> None:
    """End of work started by ``begin``; on CUDA as of the current stream."""
    if token is not None:
        token.recorder._end(token)


def active() -> bool:
    """Whether a trace is being recorded in this process."""
    return _recorder is not None


class Recorder:
    """The spans of one trace. Made by ``trace``; readable once that has ended."""

    def __init__(self, device: torch.device | None = None) -> None:
        if device is None and torch.cuda.is_available() and torch.cuda.is_initialized():
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device if device is not None and device.type == "cuda" else None
        self.spans: list[Span] = []
        self.start = self.stop = 0.0
        self._closed = False
        self._lock = threading.Lock()
        self._raw: list[tuple[_Mark, Any]] = []
        self._base: dict[torch.device, tuple[Any, float]] = {}
        # perf_counter is shared by a machine's processes; the epoch aligns machines
        self._epoch = time.time() - time.perf_counter()

    def _begin(self, track: str, name: str, device: torch.device | None, args: dict[str, Any],
               cuts: bool) -> _Mark | None:
        if track not in TRACKS:
            raise ValueError(f"trace: track={track!r}, expected one of {', '.join(TRACKS)}")
        device = self.device if device is None else device
        if device is None or device.type != "cuda":
            lane = threading.get_ident() if cuts else None
            return _Mark(self, track, name, None, time.perf_counter(), lane, None, args)
        if torch.cuda.is_current_stream_capturing():
            return None                  # a captured event would belong to the graph
        stream = torch.cuda.current_stream(device)
        device = stream.device           # with its index
        with self._lock:
            if device not in self._base:
                self._base[device] = self._base_event(stream)
        nvtx = torch.cuda.nvtx.range_start(f"{track}: {name}")
        return _Mark(self, track, name, device, self._event(stream),
                     (device, stream.cuda_stream) if cuts else None, nvtx, args)

    def _end(self, mark: _Mark) -> None:
        if mark.device is None:
            stop: Any = time.perf_counter()
        else:
            stop = self._event(torch.cuda.current_stream(mark.device))
            torch.cuda.nvtx.range_end(mark.nvtx)
        with self._lock:
            if not self._closed:         # what ends after the trace is not part of it
                self._raw.append((mark, stop))

    @staticmethod
    def _event(stream: Any) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _base_event(self, stream: Any) -> tuple[Any, float]:
        """An event whose host time is known: the device is idle when it is recorded."""
        torch.cuda.synchronize(stream.device)
        event = self._event(stream)
        event.synchronize()
        return event, time.perf_counter()

    def _open(self) -> None:
        if self.device is not None:
            with torch.cuda.device(self.device):
                self._base[self.device] = self._base_event(torch.cuda.current_stream())
        self.start = time.perf_counter() + self._epoch

    def _close(self) -> None:
        for device in self._base:
            torch.cuda.synchronize(device)
        self.stop = time.perf_counter() + self._epoch
        with self._lock:
            self._closed = True
        blocked: dict[Any, list[Interval]] = {}
        timed = [(mark, self._seconds(mark, mark.at), self._seconds(mark, stop))
                 for mark, stop in self._raw]
        for mark, start, stop in timed:
            if mark.track != "compute" and mark.lane is not None:
                blocked.setdefault(mark.lane, []).append((start, stop))
        blocked = {lane: union(spans) for lane, spans in blocked.items()}
        for mark, start, stop in timed:
            cut = blocked.get(mark.lane, []) if mark.track == "compute" else []
            for a, b in subtract([(start, stop)], cut):
                self.spans.append(Span(mark.track, mark.name, a, b, mark.args))
        self.spans.sort(key=lambda s: (s.start, -s.stop))
        self._raw.clear()

    def _seconds(self, mark: _Mark, at: Any) -> float:
        if mark.device is None:
            return float(at) + self._epoch
        event, host = self._base[mark.device]
        return host + self._epoch + event.elapsed_time(at) / 1e3

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


@contextlib.contextmanager
def trace(path: str | os.PathLike[str] | None = None, *, device: torch.device | str | None = None,
          gather: bool = True) -> Iterator[Recorder]:
    """Records the block's compute, a2a and allreduce spans and writes them to `path`.

    The file is Chrome JSON (chrome://tracing, ui.perfetto.dev, ``lina trace``):
    pid is the rank, tid the track, times in microseconds. `path` None writes
    nothing. Yields the Recorder, whose ``totals()`` are readable afterwards.

    With a process group of several ranks, leaving the block is a collective:
    rank 0 writes every rank's spans on one time axis. ``gather=False``, or a
    block that raises, writes ``name.rankN.suffix`` for this rank alone.

    Spans that have not ended when the block ends are left out. Raises
    RuntimeError if a trace is already being recorded, OSError if `path`
    cannot be written; its folder must exist.
    """
    global _recorder
    if _recorder is not None:
        raise RuntimeError("trace: one is already being recorded in this process")
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"trace: path={os.fspath(path)!r}, its folder does not exist")
    recorder = Recorder(None if device is None else torch.device(device))
    recorder._open()
    _recorder = recorder
    alone = True
    try:
        yield recorder
        alone = not gather
    finally:
        _recorder = None
        recorder._close()
        if path is not None:
            _write(recorder, Path(path), alone)


def _write(recorder: Recorder, path: Path, alone: bool) -> None:
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank = dist.get_rank() if several else 0
    mine = events(recorder.spans, (recorder.start, recorder.stop), rank)
    if several and not alone:
        parts: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(mine, parts, dst=0)
        if parts is None:
            return
        mine = [event for part in parts for event in part]
    elif several:
        path = path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
    write_json(path, {"traceEvents": mine, "displayTimeUnit": "ms"})
