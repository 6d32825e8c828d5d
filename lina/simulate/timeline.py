"""A PNG of simulated steps: one panel a schedule, one row for each stream of the watched ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lina.simulate import Result

COLORS = {"compute": "#4477aa", "a2a": "#ee6677", "reduce": "#ccbb44"}


def draw(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Draw the spans of `results`, all on one time axis in milliseconds, into a PNG.

    Raises ValueError where a result has no spans, OSError where `path` cannot be written.
    """
    for result in results:
        if not result.spans:
            raise ValueError(f"simulate: {result.schedule} has no spans; step(..., watch=[0]) keeps some")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [sorted({(s.rank, list(COLORS).index(s.stream)) for s in result.spans}) for result in results]
    figure, panels = pyplot.subplots(
        len(results), squeeze=False, sharex=True, layout="constrained",
        figsize=(14, sum(0.8 + 0.3 * len(r) for r in rows)), height_ratios=[1 + len(r) for r in rows])
    for axes, result, streams in zip(panels[:, 0], results, rows, strict=True):
        for row, (rank, stream) in enumerate(streams):
            name = list(COLORS)[stream]
            bars = [(1e3 * s.start, 1e3 * (s.stop - s.start)) for s in result.spans
                    if s.rank == rank and s.stream == name]
            axes.broken_barh(bars, (row - 0.4, 0.8), color=COLORS[name], edgecolor="white", linewidth=0.2)
        axes.set_yticks(range(len(streams)), [f"rank {r} {list(COLORS)[s]}" for r, s in streams])
        axes.invert_yaxis()
        axes.set_title(f"{result.schedule}: {1e3 * result.step_s:.1f} ms on {result.ranks} ranks", loc="left")
    panels[-1, 0].set_xlim(0, 1e3 * max(result.step_s for result in results))
    panels[-1, 0].set_xlabel("ms")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
