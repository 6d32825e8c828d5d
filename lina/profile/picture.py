"""A picture of a cost model: times by size, and the lines fitted to them."""

from __future__ import annotations

import os

from lina.parallel import CostModel

PANELS = {"bytes": "bytes", "rows": "rows (token-expert pairs)", "flops": "floating-point operations"}


def draw(model: CostModel, path: str | os.PathLike[str]) -> None:
    """A PNG with a panel for bytes, rows and operations: medians with the range of the
    repetitions, and each operation's line; both axes logarithmic. OSError if it cannot be written."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = model.rows()
    units = [unit for unit in PANELS if any(row[2] == unit for row in rows)]
    figure, panels = pyplot.subplots(1, len(units), figsize=(5.5 * len(units), 4.5), layout="constrained",
                                     squeeze=False)
    for axes, unit in zip(panels[0], units, strict=True):
        for op, how, _, line in (row for row in rows if row[2] == unit):
            n = [p.n for p in line.points]
            ms = [1e3 * p.time_s for p in line.points]
            spread = [[1e3 * (p.time_s - p.low_s) for p in line.points],
                      [1e3 * (p.high_s - p.time_s) for p in line.points]]
            bars = axes.errorbar(n, ms, spread, fmt="o", markersize=4, capsize=2)
            fine = [n[0] * (n[-1] / n[0]) ** (i / 60) for i in range(61)]
            axes.plot(fine, [1e3 * line.time(x) for x in fine], color=bars[0].get_color(), linewidth=1,
                      label=f"{op} {how}, r2 {line.r2:.4f}")
        axes.set(xscale="log", yscale="log", xlabel=PANELS[unit], ylabel="ms")
        axes.legend(fontsize=8)
    figure.suptitle(f"{model.world} ranks on {model.device}, {model.date}", fontsize=10)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
