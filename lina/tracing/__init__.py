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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lina.tracefile import events, write_json
from lina.tracing.recorder import Mark, Recorder

__all__ = ["Recorder", "active", "begin", "current_layer", "end", "layer", "owners", "span", "trace"]


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
        self._mark = recorder.begin(track, name, device, args, True)

    def __exit__(self, *exc: object) -> None:
        end(self._mark)


class _Layer:
    def __init__(self, stack: list[Any], name: str) -> None:
        self._stack, self._name = stack, name

    def __enter__(self) -> None:
        self._stack.append((self._name, None, None, 0))

    def __exit__(self, *exc: object) -> None:
        self._stack.pop()


_recorder: Recorder | None = None


def span(track: str, name: str, *, device: torch.device | None = None, **args: Any) -> Any:
    """Context manager: one span of `track` ("compute", "a2a" or "allreduce").

    `args` are shown beside the span: bytes that leave this rank, kernel path; layer, by default the
    one that runs. One that is a function is called when the trace ends: a number that only the
    device knows, say.
    `device` defaults to the trace's. Raises ValueError for another track while tracing.
    """
    if _recorder is None or torch.compiler.is_compiling():
        return _Off()
    return _Open(_recorder, track, name, device, args)


def begin(track: str, name: str, device: torch.device | None = None, **args: Any) -> Mark | None:
    """Start of asynchronous work; pass the token to ``end``, from any thread.

    On the compute track: a compute span of the calling thread or stream, to be
    cut like any other, that ends where no ``with`` block could.
    """
    if _recorder is None or torch.compiler.is_compiling():
        return None
    return _recorder.begin(track, name, device, args, track == "compute")


def end(token: Mark | None) -> None:
    """End of work started by ``begin``; on CUDA as of the current stream."""
    if token is not None:
        token.recorder.end(token)


def active() -> bool:
    """Whether a trace is being recorded in this process."""
    return _recorder is not None


def layer(name: str) -> Any:
    """Context manager: spans that this thread opens inside are of layer `name`, whatever module runs.

    Not those of the backward pass of what is computed inside; modules' names reach there.
    """
    if _recorder is None or torch.compiler.is_compiling():
        return _Off()
    return _Layer(_recorder.names.stack, name)


def current_layer() -> str | None:
    """The layer whose forward or backward runs on this thread; None outside, and while nothing is traced.

    For work that is handed to another thread: pass it there, as a span's `layer`.
    """
    return None if _recorder is None else _recorder.names.current()


def owners(params: Iterable[Tensor]) -> str | None:
    """The modules that have `params`, "first .. last" by the model's order, for a span's `layer`.

    None while nothing is traced, or no model was given to ``trace``.
    """
    return None if _recorder is None else _recorder.names.owners(params)


@contextlib.contextmanager
def trace(path: str | os.PathLike[str] | None = None, *, model: nn.Module | None = None,
          device: torch.device | str | None = None, gather: bool = True) -> Iterator[Recorder]:
    """Records the block's compute, a2a and allreduce spans and writes them to `path`.

    The file is Chrome JSON (chrome://tracing, ui.perfetto.dev, ``lina trace``):
    pid is the rank, tid the track, times in microseconds. `path` None writes
    nothing. Yields the Recorder, whose ``totals()`` are readable afterwards.

    `model` (wrapped or not): spans of its MoE layers, in forward and backward, carry their qualified
    names, and its forward and backward are compute spans. Without it layers are called by class and
    order. Modules that torch.compile has compiled are not seen.

    With a process group of several ranks, entering and leaving the block are collectives:
    all clocks are brought to rank 0's (lina/tracing/clock.py says how well; the file says by
    how much each may be off), and rank 0 writes every rank's spans on one time axis.
    ``gather=False``, or a block that raises, writes ``name.rankN.suffix`` for this rank alone; with
    ``gather=False`` by its own clock and with no collective.

    Peak memory is counted from the start of the block: torch's peak counters of the device, or the
    process's high-water mark of resident memory, begin anew.

    Spans that have not ended when the block ends are left out. Raises
    RuntimeError if a trace is already being recorded, OSError if `path`
    cannot be written; its folder must exist, on every rank. Where entering is a collective both are
    raised on all ranks if on one.
    """
    global _recorder
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    together = several and gather and path is not None
    problem: Exception | None = None
    if _recorder is not None:
        problem = RuntimeError("trace: one is already being recorded in this process")
    elif path is not None and not Path(path).absolute().parent.is_dir():
        problem = FileNotFoundError(f"trace: path={os.fspath(path)!r}, its folder does not exist")
    if together:
        problem = _first(problem)
    if problem is not None:
        raise problem
    recorder = Recorder(None if device is None else torch.device(device))
    recorder.open(model, together)
    _recorder = recorder
    alone = True
    try:
        yield recorder
        alone = not gather
    finally:
        _recorder = None
        recorder.close()
        if path is not None:
            _write(recorder, Path(path), several, alone)


def _first(problem: Exception | None) -> Exception | None:
    """The first problem of any rank, on every rank of the default group."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if problem is None else (type(problem), str(problem)))
    for rank, found in enumerate(said):
        if found is not None:
            kind, text = found
            return kind(f"{text} on rank {rank}")
    return None


def _write(recorder: Recorder, path: Path, several: bool, alone: bool) -> None:
    rank = dist.get_rank() if several else 0
    mine = events(recorder.spans, (recorder.start, recorder.stop), rank, recorder.facts())
    if several and not alone:
        parts: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(mine, parts, dst=0)
        if parts is None:
            return
        mine = [event for part in parts for event in part]
        mine.sort(key=lambda e: e.get("ts", 0.0))      # stable: metadata first, outer spans before inner ones
    elif several:
        path = path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
    write_json(path, {"traceEvents": mine, "displayTimeUnit": "ms"})
