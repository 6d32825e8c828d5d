"""From times of whole spread layers to lines of what they take beside exchanges and experts.

That rest is packing, gathering and combining, which grow with the tokens' bytes, and the host's work
where it shows: transports that read counts wait for the device in each forward pass.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lina.parallel.plan.cost import CostModel
from lina.parallel.plan.lines import LayerLine, Point
from lina.parallel.plan.predict import LayerLoad, pipeline


@dataclass(frozen=True)
class LayerTimes:
    """A whole layer, measured: ``forward`` and ``backward`` by bytes of its tokens, in ``degree`` passes
    each way."""

    load: LayerLoad
    degree: int
    forward: Point
    backward: Point


def layer_lines(cost: CostModel, transport: str, times: Sequence[LayerTimes]) -> tuple[LayerLine, LayerLine]:
    """Forward and backward: the rest of layers over ``transport``, whose exchanges ``cost`` has.

    Source: least squares as csrc/plan/link.h, of errors relative to the whole layer's time, for the rest
    is a difference of times and may be nothing; no term is negative. What a pass more costs is each size's
    own mean.

    Raises:
        ValueError: fewer than two sizes in one pass; a link or a dtype of experts was not measured.
    """
    return _fitted(cost, transport, times, 0), _fitted(cost, transport, times, 1)


def _fitted(cost: CostModel, transport: str, times: Sequence[LayerTimes], way: int) -> LayerLine:
    whole: dict[tuple[float, int], Point] = {}
    rest: dict[tuple[float, int], Point] = {}
    for t in times:
        point = (t.forward, t.backward)[way]
        known = pipeline(t.load, cost, transport, way, t.degree)
        whole[point.n, t.degree] = point
        rest[point.n, t.degree] = replace(point, time_s=point.time_s - known, low_s=point.low_s - known,
                                          high_s=point.high_s - known)
    once = [n for n, degree in rest if degree == 1]
    if len(set(once)) < 2:
        raise ValueError(f"layers: {len(set(once))} sizes in one pass, at least 2 needed")
    points = [rest[n, 1] for n in once]
    took = [whole[n, 1].time_s for n in once]
    alpha, beta = _least([(1.0, p.n, p.time_s, w) for p, w in zip(points, took, strict=True)])
    each = {n: [(s.time_s - rest[n, 1].time_s) / (degree - 1) for (m, degree), s in rest.items()
                if m == n and degree > 1] for n in once}
    passes = tuple((n, max(0.0, statistics.fmean(found))) for n, found in each.items() if found)
    level = sum(1 / w for w in took) / sum(1 / w**2 for w in took)         # the best constant
    spread = sum((1 - level / w) ** 2 for w in took)
    errors = sum(((alpha + beta * p.n - p.time_s) / w) ** 2 for p, w in zip(points, took, strict=True))
    r2 = max(0.0, 1 - errors / spread) if spread > 1e-28 * len(took) else 1.0
    return LayerLine(alpha, beta, r2, tuple(points), passes, tuple(took))


def _least(rows: Sequence[tuple[float, float, float, float]]) -> tuple[float, float]:
    """(a, b), neither negative, of least squared errors of a u + b v = y in parts of w, for rows
    (u, v, y, w). Where these do not tell the two apart, all is a's."""
    us, vs, ys = zip(*((u / w, v / w, y / w) for u, v, y, w in rows), strict=True)
    uu, uv, vv, uy, vy = (sum(map(float.__mul__, a, b)) for a, b in
                          ((us, us), (us, vs), (vs, vs), (us, ys), (vs, ys)))
    det = uu * vv - uv * uv
    if det <= 1e-12 * uu * vv:
        return max(0.0, uy / uu), 0.0
    a, b = (vv * uy - uv * vy) / det, (uu * vy - uv * uy) / det
    if a >= 0 and b >= 0:
        return a, b

    def error(end: tuple[float, float]) -> float:
        return sum((end[0] * u + end[1] * v - y) ** 2 for u, v, y in zip(us, vs, ys, strict=True))

    return min(((max(0.0, uy / uu), 0.0), (0.0, max(0.0, vy / vv))), key=error)      # it lies on an axis


def point_of(n: float, seconds: Sequence[float]) -> Point:
    """Median and range of repetitions."""
    return Point(n, statistics.median(seconds), min(seconds), max(seconds))
