"""The trace file: what ``lina.trace`` writes, ``lina trace FILE`` reads and draws.

Chrome JSON: one "X" event per span, pid = rank, cat = track, times in
microseconds since the epoch. The metadata event "trace_window" says when the
rank's trace began and stopped.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

TRACKS = ("compute", "a2a", "allreduce")
COLORS = {"compute": "#4477aa", "a2a": "#ee6677", "allreduce": "#ccbb44"}
Interval = tuple[float, float]


class Span(NamedTuple):
    """A finished span: seconds since the epoch, and where it ran."""

    track: str
    name: str
    start: float
    stop: float
    args: dict[str, Any]


def union(spans: Iterable[Interval]) -> list[Interval]:
    """The same set as sorted intervals that do not touch."""
    merged: list[Interval] = []
    for start, stop in sorted(spans):
        if stop <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def subtract(spans: Iterable[Interval], holes: Iterable[Interval]) -> list[Interval]:
    """What of `spans` lies in none of `holes`."""
    left = []
    cut = union(holes)
    for start, stop in union(spans):
        for a, b in cut:
            if b <= start or a >= stop:
                continue
            if a > start:
                left.append((start, a))
            start = max(start, b)
        if start < stop:
            left.append((start, stop))
    return left


def length(spans: Iterable[Interval]) -> float:
    """Total length of the union of `spans`."""
    return sum(stop - start for start, stop in union(spans))


def busy(spans: Iterable[Span], track: str) -> list[Interval]:
    """When `track` was busy."""
    return union((s.start, s.stop) for s in spans if s.track == track)


def events(spans: list[Span], window: Interval, rank: int) -> list[dict[str, Any]]:
    """Chrome events of one rank. Times are microseconds since the epoch.

    Spans that overlap without nesting go to further rows of their track,
    since a viewer draws one row as a stack.
    """
    meta: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}},
        {"ph": "M", "name": "trace_window", "pid": rank, "tid": 0,
         "args": {"start_us": window[0] * 1e6, "stop_us": window[1] * 1e6}}]
    found = []
    for t, track in enumerate(TRACKS):
        rows: list[list[float]] = [[]]               # per row the ends of the spans still open
        for s in (s for s in spans if s.track == track):
            for row in itertools.count():
                if row == len(rows):
                    rows.append([])
                rows[row] = [stop for stop in rows[row] if stop > s.start]
                if not rows[row] or min(rows[row]) >= s.stop:
                    break
            rows[row].append(s.stop)
            found.append({"ph": "X", "name": s.name, "cat": track, "pid": rank, "tid": 100 * t + row,
                           "ts": s.start * 1e6, "dur": (s.stop - s.start) * 1e6, "args": s.args})
        for row in range(len(rows)):
            name = track if row == 0 else f"{track} {row + 1}"
            meta.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": 100 * t + row,
                         "args": {"name": name}})
    return meta + found


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`value` as JSON at `path`, a file that is replaced at once or not at all, or a pipe or device."""
    if os.path.exists(path) and not os.path.isfile(path):
        Path(path).write_text(json.dumps(value, default=str) + "\n", encoding="utf-8")
        return
    target = Path(os.path.realpath(path))       # a link stays one
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(value, default=str) + "\n", encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


class RankTrace(NamedTuple):
    """One rank's spans and window, seconds since the epoch."""

    spans: list[Span]
    window: Interval


def read(path: str | os.PathLike[str]) -> dict[int, RankTrace]:
    """The ranks of a trace file. ValueError, one line, if it is not one of ours."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        ranks: dict[int, RankTrace] = {}
        for e in found:
            if e.get("ph") == "M" and e["name"] == "trace_window":
                ranks[e["pid"]] = RankTrace([], (e["args"]["start_us"] / 1e6, e["args"]["stop_us"] / 1e6))
        for e in found:
            if e.get("ph") == "X":
                start = e["ts"] / 1e6
                ranks[e["pid"]].spans.append(
                    Span(e["cat"], e["name"], start, start + e["dur"] / 1e6, e.get("args", {})))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"trace: {os.fspath(path)}: not a trace written by lina "
                         f"({type(error).__name__}: {error})") from error
    if not ranks:
        raise ValueError(f"trace: {os.fspath(path)}: no trace window, not a trace written by lina")
    return dict(sorted(ranks.items()))


def summary(ranks: dict[int, RankTrace]) -> dict[str, Any]:
    """Seconds and shares of the trace, each the mean over ranks.

    `waiting`: share of the trace with an a2a or an allreduce in flight and no
    compute span running. `a2a_hidden`: share of the a2a time with a compute
    span beside it; None without an a2a.
    """
    rows = []
    for spans, window in ranks.values():
        seconds = window[1] - window[0]
        on = {track: busy(spans, track) for track in TRACKS}
        waiting = length(subtract(on["a2a"] + on["allreduce"], on["compute"]))
        exposed = length(subtract(on["a2a"], on["compute"]))
        rows.append((seconds, *(length(on[track]) for track in TRACKS), waiting, exposed))
    seconds, *busy_s, waiting, exposed = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    share = {track: s / seconds if seconds else 0.0 for track, s in zip(TRACKS, busy_s, strict=True)}
    return {"ranks": len(ranks), "seconds": seconds, "share": share,
            "waiting": waiting / seconds if seconds else 0.0,
            "a2a_hidden": 1 - exposed / busy_s[1] if busy_s[1] else None}


def draw(ranks: dict[int, RankTrace], path: str | os.PathLike[str]) -> None:
    """A PNG: one row per rank and track, time in milliseconds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    zero = min(trace.window[0] for trace in ranks.values())
    figure, axes = pyplot.subplots(figsize=(12, 1.2 + 0.35 * len(TRACKS) * len(ranks)), layout="constrained")
    labels: list[str] = []
    for rank, (spans, _) in ranks.items():
        for track in TRACKS:
            bars = [(1e3 * (a - zero), 1e3 * (b - a)) for a, b in busy(spans, track)]
            axes.broken_barh(bars, (len(labels) - 0.4, 0.8), color=COLORS[track])
            labels.append(f"rank {rank} {track}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * (max(trace.window[1] for trace in ranks.values()) - zero))
    axes.set_xlabel("ms")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
