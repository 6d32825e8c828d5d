"""The picture of a trace."""

from __future__ import annotations

import os

from lina.tracefile.chrome import RankTrace
from lina.tracefile.intervals import TRACKS, Interval, busy, subtract
from lina.tracefile.summary import summary

COLORS = {"compute": "#4477aa", "a2a": "#ee6677", "allreduce": "#ccbb44"}
HIDDEN = "#f7b6be"       # a2a with compute beside it


def draw(ranks: dict[int, RankTrace], path: str | os.PathLike[str]) -> None:
    """A PNG: one row per rank and track, time in milliseconds; hidden a2a is pale."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = summary(ranks)
    zero = min(trace.window[0] for trace in ranks.values())
    figure, axes = pyplot.subplots(figsize=(12, 1.4 + 0.35 * len(TRACKS) * len(ranks)), layout="constrained")
    labels: list[str] = []

    def bars(spans: list[Interval], color: str) -> None:
        axes.broken_barh([(1e3 * (a - zero), 1e3 * (b - a)) for a, b in spans], (len(labels) - 0.4, 0.8),
                         color=color)

    for row in found["by_rank"]:
        spans = ranks[row["rank"]].spans
        for track in TRACKS:
            on = busy(spans, track)
            if track == "a2a":
                bars(on, HIDDEN)
                on = subtract(on, busy(spans, "compute"))
            bars(on, COLORS[track])
            said = [f"rank {row['rank']} {track}"]
            if row["bytes"][track]:
                said.append(f"{row['bytes'][track] / 1e6:.1f} MB")
            if track == "a2a" and row["a2a_hidden"] is not None:
                said.append(f"{row['a2a_hidden']:.0%} hidden")
            labels.append(", ".join(said))
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * (max(trace.window[1] for trace in ranks.values()) - zero))
    axes.set_xlabel("ms")
    title = [f"waiting {found['waiting']:.0%}"]
    if found["a2a_hidden"] is not None:
        title.append(f"a2a {found['a2a_hidden']:.0%} hidden (pale)")
    if found["peak_bytes"] is not None:
        title.append(f"peak memory {found['peak_bytes'] / 1e6:,.0f} MB")
    axes.set_title(", ".join(title), fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
