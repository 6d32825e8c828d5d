"""Chrome JSON, as chrome://tracing and ui.perfetto.dev show it.

One "X" event per span: pid = rank, tid = a row of its track, cat = track, times in microseconds since
the epoch, args with bytes and layer. "C" events: memory. The metadata event "trace_window" says when
the rank's trace began and stopped, how well its clock is known and how much memory it took.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lina.tracefile.intervals import TRACKS, Interval, Span

_NO_FACTS: Mapping[str, Any] = {}


def events(spans: list[Span], window: Interval, rank: int,
           facts: Mapping[str, Any] = _NO_FACTS) -> list[dict[str, Any]]:
    """Events of one rank, metadata first, the others in the order of their starts.

    Spans that overlap without nesting go to further rows of their track,
    since a viewer draws one row as a stack. ``facts``: RankTrace's.
    """
    start_us, stop_us = window[0] * 1e6, window[1] * 1e6

    def meta(kind: str, tid: int = 0, **args: Any) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": rank, "tid": tid, "args": args}

    found = [meta("process_name", name=f"rank {rank}"), meta("process_sort_index", sort_index=rank),
             meta("trace_window", start_us=start_us, stop_us=stop_us, **facts)]
    timed: list[dict[str, Any]] = []
    for t, track in enumerate(TRACKS):
        rows: list[list[float]] = [[]]               # per row the ends of the spans still open
        for s in sorted((s for s in spans if s.track == track), key=lambda s: (s.start, -s.stop)):
            for row in itertools.count():
                if row == len(rows):
                    rows.append([])
                rows[row] = [stop for stop in rows[row] if stop > s.start]
                if not rows[row] or min(rows[row]) >= s.stop:
                    break
            rows[row].append(s.stop)
            timed.append({"ph": "X", "name": s.name, "cat": track, "pid": rank, "tid": 100 * t + row,
                          "ts": s.start * 1e6, "dur": (s.stop - s.start) * 1e6, "args": s.args})
        for row in range(len(rows)):
            found.append(meta("thread_name", 100 * t + row, name=track if row == 0 else f"{track} {row + 1}"))
            found.append(meta("thread_sort_index", 100 * t + row, sort_index=100 * t + row))
    memory: Any = facts.get("memory")
    for ts, name in ((start_us, "start"), (stop_us, "stop")) if memory else ():
        for counter, size in (("memory", memory[f"{name}_bytes"]), ("peak memory", memory["peak_bytes"])):
            timed.append({"ph": "C", "name": counter, "pid": rank, "tid": 0, "ts": ts,
                          "args": {"MB": size / 1e6}})
    return found + sorted(timed, key=lambda e: (e["ts"], -e.get("dur", 0.0)))


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
    """One rank's spans and window, seconds since the epoch.

    ``facts``, as far as known: "clock_error_us", and "memory": a dict of "kind" ("cuda": torch's
    allocator, "rss": the process), "start_bytes", "stop_bytes", "peak_bytes" and, on CUDA,
    "peak_reserved_bytes".
    """

    spans: list[Span]
    window: Interval
    facts: Mapping[str, Any] = _NO_FACTS


def read(path: str | os.PathLike[str]) -> dict[int, RankTrace]:
    """The ranks of a trace file. ValueError, one line, if it is not one of ours."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        ranks: dict[int, RankTrace] = {}
        for e in found:
            if e.get("ph") == "M" and e["name"] == "trace_window":
                facts = dict(e["args"])
                window = facts.pop("start_us") / 1e6, facts.pop("stop_us") / 1e6
                ranks[e["pid"]] = RankTrace([], window, facts)
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
