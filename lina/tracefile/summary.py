"""What a trace says in numbers: shares of the time, hidden a2a, bytes, memory; by rank and by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lina.tracefile.chrome import RankTrace
from lina.tracefile.intervals import TRACKS, Interval, Span, busy, length, subtract

_SHOWN = 16          # rows of a table in a terminal


def volume(spans: Iterable[Span], track: str) -> int:
    """Bytes of `track`. A span inside one of its own name is a part of it, and not counted again."""
    total = 0
    until: dict[str, float] = {}
    for s in sorted((s for s in spans if s.track == track), key=lambda s: (s.start, -s.stop)):
        size = s.args.get("bytes")
        if not isinstance(size, int | float) or s.stop <= until.get(s.name, s.start - 1):
            continue
        total += int(size)
        until[s.name] = s.stop
    return total


def _hidden(a2a: list[Interval], compute: list[Interval]) -> tuple[float, float]:
    """Seconds of a2a, and those of them with no compute beside."""
    return length(a2a), length(subtract(a2a, compute))


def _share(exposed: float, whole: float) -> float | None:
    return 1 - exposed / whole if whole else None


def summary(ranks: dict[int, RankTrace]) -> dict[str, Any]:
    """Seconds, shares and bytes of the trace, each the mean over ranks; largest memory and clock error.

    `waiting`: share of the trace with an a2a or an allreduce in flight and no
    compute span running. `a2a_hidden`: share of the a2a time with a compute
    span beside it; None without an a2a. `by_rank`: the same for each rank.
    `layers`: by layer, a2a's seconds and bytes (means over ranks) and `a2a_hidden`.
    """
    rows, columns = [], []
    layers: dict[str, list[tuple[float, float, int]]] = {}
    for rank, (spans, window, facts) in ranks.items():
        seconds = window[1] - window[0]
        on = {track: busy(spans, track) for track in TRACKS}
        waiting = length(subtract(on["a2a"] + on["allreduce"], on["compute"]))
        a2a, exposed = _hidden(on["a2a"], on["compute"])
        size = [volume(spans, track) for track in TRACKS]
        times = [length(on[track]) for track in TRACKS]
        columns.append((seconds, waiting, exposed, *times, *size))
        rows.append({"rank": rank, **_shares(seconds, waiting, exposed, times), "a2a_hidden":
                     _share(exposed, a2a), "bytes": dict(zip(TRACKS, size, strict=True)), **facts})
        of: dict[str, list[Span]] = {}
        for s in spans:
            if s.track == "a2a" and isinstance(s.args.get("layer"), str):
                of.setdefault(s.args["layer"], []).append(s)
        for name, some in of.items():
            layers.setdefault(name, []).append(
                (*_hidden(busy(some, "a2a"), on["compute"]), volume(some, "a2a")))
    n = len(ranks)
    seconds, waiting, exposed, *rest = (sum(column) / n for column in zip(*columns, strict=True))
    times, size = rest[:len(TRACKS)], rest[len(TRACKS):]
    by_layer = {}
    for name, found in layers.items():
        a2a, bare, sent = (sum(column) for column in zip(*found, strict=True))
        by_layer[name] = {"a2a_seconds": a2a / n, "a2a_hidden": _share(bare, a2a), "bytes": sent / n}
    memory = [r.facts["memory"]["peak_bytes"] for r in ranks.values() if r.facts.get("memory")]
    errors = [r.facts["clock_error_us"] for r in ranks.values() if "clock_error_us" in r.facts]
    return {"ranks": n, **_shares(seconds, waiting, exposed, times),
            "a2a_hidden": _share(exposed, times[1]), "bytes": dict(zip(TRACKS, size, strict=True)),
            "peak_bytes": max(memory, default=None), "clock_error_us": max(errors, default=None),
            "by_rank": rows, "layers": by_layer}


def _shares(seconds: float, waiting: float, exposed: float, times: list[float]) -> dict[str, Any]:
    def part(s: float) -> float:
        return s / seconds if seconds else 0.0

    return {"seconds": seconds, "share": {t: part(s) for t, s in zip(TRACKS, times, strict=True)},
            "waiting": part(waiting)}


def lines(found: dict[str, Any]) -> list[str]:
    """``summary`` for a terminal."""
    clock = found["clock_error_us"]
    aligned = "" if clock is None or found["ranks"] == 1 else f", clocks aligned within {clock:.0f} us"
    said = [f"{found['ranks']} ranks, {1e3 * found['seconds']:.2f} ms{aligned}"]
    for track, share in found["share"].items():
        size = found["bytes"][track]
        said.append(f"{track:<10}{share:7.1%} of the time" + (f", {_mb(size)} MB a rank" if size else ""))
    said.append(f"{'waiting':<10}{found['waiting']:7.1%} of the time: a2a or allreduce in flight, no compute")
    if found["a2a_hidden"] is not None:
        said.append(f"{'hidden':<10}{found['a2a_hidden']:7.1%} of a2a beside compute")
    if found["peak_bytes"] is not None:
        said.append(f"{'memory':<10}{_mb(found['peak_bytes'])} MB at its peak on a rank")
    if found["ranks"] > 1:
        said += _table([["rank", *TRACKS, "waiting", "a2a hidden", "a2a MB", "allreduce MB", "peak MB"],
                        *map(_rank_row, found["by_rank"])])
    if found["layers"]:
        rows = [[name, f"{1e3 * of['a2a_seconds']:.3f}", _percent(of["a2a_hidden"]), _mb(of["bytes"])]
                for name, of in found["layers"].items()]
        said += _table([["layer", "a2a ms", "a2a hidden", "a2a MB"], *rows])
    return said


def _rank_row(found: dict[str, Any]) -> list[str]:
    memory = found.get("memory")
    return [str(found["rank"]), *(_percent(found["share"][track]) for track in TRACKS),
            _percent(found["waiting"]), _percent(found["a2a_hidden"]), _mb(found["bytes"]["a2a"]),
            _mb(found["bytes"]["allreduce"]), _mb(memory["peak_bytes"]) if memory else "-"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.2f}"


def _table(rows: list[list[str]]) -> list[str]:
    """A heading, and as many rows as are read on a terminal."""
    shown, left = rows[:1 + _SHOWN], len(rows) - 1 - _SHOWN
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    said = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in shown]
    return [*said, f"... {left} more in --json"] if left > 0 else said
