"""Spans and sets of time intervals."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

TRACKS = ("compute", "a2a", "allreduce")
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
    stops = [stop for _, stop in cut]
    for start, stop in union(spans):
        for a, b in itertools.islice(cut, bisect.bisect_right(stops, start), None):
            if a >= stop:
                break
            if a > start:
                left.append((start, a))
            start = b
        if start < stop:
            left.append((start, stop))
    return left


def length(spans: Iterable[Interval]) -> float:
    """Total length of the union of `spans`."""
    return sum(stop - start for start, stop in union(spans))


def busy(spans: Iterable[Span], track: str) -> list[Interval]:
    """When `track` was busy."""
    return union((s.start, s.stop) for s in spans if s.track == track)
