"""The summary of a trace: hidden a2a, bytes and layers of spans that are known."""

from __future__ import annotations

import pytest

from lina import tracefile
from lina.tracefile import RankTrace, Span


def _a2a(start, stop, layer, size):
    return Span("a2a", "dispatch", start, stop, {"layer": layer, "bytes": size})


def test_summary_of_known_spans():
    spans = [Span("compute", "f", 0.0, 4.0, {}), Span("a2a", "d", 3.0, 6.0, {}),
             Span("allreduce", "b", 5.0, 7.0, {})]
    one = tracefile.summary({0: RankTrace(spans, (0.0, 10.0))})
    assert one["share"] == {"compute": 0.4, "a2a": 0.3, "allreduce": 0.2}
    assert one["waiting"] == pytest.approx(0.3)             # 4 to 7
    assert one["a2a_hidden"] == pytest.approx(1 / 3)        # 3 to 4 of 3 to 6
    idle = RankTrace([], (0.0, 10.0))
    two = tracefile.summary({0: RankTrace(spans, (0.0, 10.0)), 1: idle})
    assert two["waiting"] == pytest.approx(0.15) and two["ranks"] == 2
    assert [row["a2a_hidden"] for row in two["by_rank"]] == [pytest.approx(1 / 3), None]


def test_layers_and_bytes_of_two_ranks():
    def rank(shift):                # compute from 0 to 4; layer a's exchange is hidden, b's is half or not
        return RankTrace([Span("compute", "f", 0.0, 4.0, {}), _a2a(1.0, 3.0, "a", 100),
                          _a2a(3.0 + shift, 5.0 + shift, "b", 50)], (0.0, 10.0),
                         {"clock_error_us": 20.0 + shift, "memory": {"peak_bytes": 1000 + shift}})

    found = tracefile.summary({0: rank(0.0), 1: rank(1.0)})
    assert found["layers"] == {"a": {"a2a_seconds": 2.0, "a2a_hidden": 1.0, "bytes": 100.0},
                               "b": {"a2a_seconds": 2.0, "a2a_hidden": 0.25, "bytes": 50.0}}
    assert [row["a2a_hidden"] for row in found["by_rank"]] == [0.75, 0.5]
    assert found["a2a_hidden"] == 1 - 3 / 8                 # seconds of both ranks, not a mean of shares
    assert found["bytes"] == {"compute": 0, "a2a": 150, "allreduce": 0}
    assert found["peak_bytes"] == 1001.0 and found["clock_error_us"] == 21.0
    said = "\n".join(tracefile.lines(found))
    assert "clocks aligned within 21 us" in said and "62.5% of a2a beside compute" in said


def test_parts_are_not_counted_twice():
    def allreduce(name, start, stop, **args):
        return Span("allreduce", name, start, stop, args)

    bucket = [allreduce("bucket 0", 0.0, 5.0, bytes=100), allreduce("bucket 0", 1.0, 2.0, bytes=60),
              allreduce("bucket 0", 2.0, 5.0, bytes=40)]
    assert tracefile.volume(bucket, "allreduce") == 100
    assert tracefile.volume(bucket[1:], "allreduce") == 100                 # a queue alone: its micro-ops
    outside = [*bucket, allreduce("bucket 0", 6.0, 7.0, bytes=7), allreduce("bucket 1", 1.0, 2.0, bytes=3)]
    assert tracefile.volume(outside, "allreduce") == 110
    unknown = [allreduce("experts", 0.0, 5.0), allreduce("experts", 1.0, 2.0, bytes=60)]
    assert tracefile.volume(unknown, "allreduce") == 60


def test_long_tables_are_cut():
    ranks = {r: RankTrace([_a2a(0.0, 1.0, f"layer {r}", 1)], (0.0, 1.0)) for r in range(40)}
    said = tracefile.lines(tracefile.summary(ranks))
    assert said.count("... 24 more in --json") == 2 and len(said) < 45
