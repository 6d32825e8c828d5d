"""Lines t = alpha + n * beta, fitted to measured times, of links, passes over experts and whole layers.

Source: FSMoE, arXiv:2501.10714, section 4. Differs: see csrc/plan/link.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import torch

from lina import _C

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Point:
    """One size, measured: ``n`` units took ``time_s`` seconds (median), ``low_s`` to ``high_s``, on
    the slowest rank of each repetition."""

    n: float
    time_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True)
class Line:
    """t = ``alpha_s`` + n * ``beta_s``, and the points that it was fitted to.

    Attributes:
        r2: 1 - (squared relative errors) / (those of the best constant time); 1 is exact.
    """

    alpha_s: float
    beta_s: float
    r2: float
    points: tuple[Point, ...] = ()

    @staticmethod
    def fit(points: Sequence[Point]) -> Line:
        """The line of least squared relative errors; neither term is negative.

        Raises:
            ValueError: fewer than two sizes, or a time that is not positive and finite.
        """
        alpha, beta, r2 = _C.fit([p.n for p in points], [p.time_s for p in points])
        return Line(alpha, beta, r2, tuple(points))

    def time(self, n: float) -> float:
        """Seconds that ``n`` units take; nothing takes none."""
        return self.alpha_s + n * self.beta_s if n > 0 else 0.0

    def units(self, seconds: float) -> float:
        """How many units ``seconds`` are enough for: 0 below alpha; infinity where beta is 0."""
        if not seconds >= self.alpha_s:
            return 0.0
        return (seconds - self.alpha_s) / self.beta_s if self.beta_s > 0 else math.inf

    @property
    def off(self) -> float:
        """The largest relative error of the line at its points."""
        return max((abs(1 - self.time(p.n) / p.time_s) for p in self.points), default=0.0)


def _along(points: Sequence[tuple[float, float]], n: float) -> float:
    """Seconds at ``n`` by (n, seconds) of one point or more; never negative."""
    (first, seconds), *rest = points = sorted(points)
    if n <= first or not rest:
        return max(0.0, seconds)
    (n_p, s_p), (n_q, s_q) = next((pair for pair in pairwise(points) if n <= pair[1][0]), points[-2:])
    slope = (s_q - s_p) / (n_q - n_p)
    return max(0.0, s_q + (n - n_q) * (slope if n <= n_q else max(0.0, slope)))


@dataclass(frozen=True)
class LayerLine(Line):
    """What a whole spread layer takes one way beside its exchanges and experts, by bytes of its tokens
    (tokens * dim * itemsize).

    That is no straight line where the host's work shows for few tokens alone: between points it is taken
    straight from one to the next, below the first as there, and beyond the last as between the last two,
    unless it fell there.

    Attributes:
        points: of that rest: measured seconds less those of exchanges and experts by their own lines.
        passes: (bytes, seconds of each expert pass beyond the first): the host's launches for few tokens, for
            many that what runs beside each other is slower than alone.
        whole_s: the layer's measured seconds at each point; ``r2`` and ``off`` are of these.
    """

    passes: tuple[tuple[float, float], ...] = ()
    whole_s: tuple[float, ...] = ()

    def rest(self, n: float, degree: int) -> float:
        """Seconds beside exchanges and experts of a layer of ``n`` bytes in ``degree`` passes."""
        return self.time(n) + ((degree - 1) * _along(self.passes, n) if self.passes else 0.0)

    def time(self, n: float) -> float:
        """The rest in one pass; never negative."""
        if len(self.points) < 2:
            return self.alpha_s + n * self.beta_s
        return _along([(p.n, p.time_s) for p in self.points], n)

    @property
    def off(self) -> float:
        """The largest error of the straight line at its points, relative to the whole layer."""
        return max((abs(self.alpha_s + p.n * self.beta_s - p.time_s) / whole
                    for p, whole in zip(self.points, self.whole_s, strict=True)), default=0.0)


@dataclass(frozen=True)
class ExpertShape:
    """The experts of one rank in one layer: ``local`` of them, D = ``dim``, F = ``ffn_dim``.

    Raises:
        ValueError: a number below 1, more than 1024 experts, or another dtype than float32,
            bfloat16 and float16.
    """

    dim: int
    ffn_dim: int
    local: int
    dtype: str = "float32"
    activation: str = "swiglu"

    def __post_init__(self) -> None:
        for name, limit in (("dim", None), ("ffn_dim", None), ("local", 1024)):
            value = getattr(self, name)
            if not (isinstance(value, int) and 1 <= value <= (limit or math.inf)):
                raise ValueError(f"ExpertShape: {name} is {value}, must be a whole number "
                                 + (f"from 1 to {limit}" if limit else "of at least 1"))
        if self.dtype not in DTYPES:
            raise ValueError(f"ExpertShape: dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class ExpertPass:
    """Seconds by rows (token-expert pairs) of one pass over a rank's experts.

    Attributes:
        late: of weights' gradients, a part of ``backward`` that may follow what the pass gives back.
    """

    shape: ExpertShape
    forward: Line
    backward: Line
    late: Line = Line(0.0, 0.0, 1.0)

    @property
    def lines(self) -> tuple[Line, Line, Line]:
        return self.forward, self.backward, self.late


def read_line(value: dict[str, Any]) -> Line:
    """The line of a file. KeyError, TypeError or ValueError if it is none."""
    points = tuple(Point(*(float(p[name]) for name in ("n", "time_s", "low_s", "high_s")))
                   for p in value["points"])
    line = Line(float(value["alpha_s"]), float(value["beta_s"]), float(value["r2"]), points)
    if not all(math.isfinite(number) for p in points for number in astuple(p)):
        raise ValueError("a point that is not finite")
    if not (0 <= line.alpha_s < math.inf and 0 <= line.beta_s < math.inf):
        raise ValueError(f"alpha {line.alpha_s} s, beta {line.beta_s} s, must be finite and not negative")
    return line


def read_layer_line(value: dict[str, Any]) -> LayerLine:
    """As :func:`read_line`."""
    line, passes = read_line(value), tuple((float(n), float(s)) for n, s in value["passes"])
    whole_s, sizes = tuple(map(float, value["whole_s"])), [[p.n for p in line.points], [n for n, _ in passes]]
    if not all(0 <= x < math.inf for each in passes for x in each) or len(whole_s) != len(line.points):
        raise ValueError(f"a layer's passes {passes}, {len(whole_s)} times of {len(line.points)} points")
    if any(len(set(each)) < len(each) for each in sizes):
        raise ValueError(f"a layer's sizes {sizes}, one of them twice")
    return LayerLine(line.alpha_s, line.beta_s, line.r2, line.points, passes, whole_s)
