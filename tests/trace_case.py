"""What the files written by lina.trace must be."""

from __future__ import annotations

import itertools


def assert_chrome(events, ranks):
    """Chrome's trace event format, as far as viewers depend on it; `ranks` processes, each named."""
    kinds = {"X": {"name", "cat", "pid", "tid", "ts", "dur", "args"}, "C": {"name", "pid", "ts", "args"},
             "M": {"name", "pid", "args"}}
    for e in events:
        assert e["ph"] in kinds and kinds[e["ph"]] <= e.keys(), e
        assert e.get("dur", 0) >= 0, e
    pids = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert pids == {rank: f"rank {rank}" for rank in range(ranks)} and {e["pid"] for e in events} == set(pids)
    timed = [e["ts"] for e in events if e["ph"] != "M"]
    assert timed == sorted(timed)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert len(named) == sum(e["name"] == "thread_name" for e in events)
    rows = {}
    for e in events:
        if e["ph"] == "X":
            rows.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    assert rows.keys() <= named
    for row in rows.values():           # a stack: the next span starts after this one, or inside it
        for (_, stop), (start, later) in itertools.pairwise(row):
            assert start >= stop - 0.5 or later <= stop + 0.5       # two roundings of 0.25 us
    windows = {e["pid"]: e["args"] for e in events if e["name"] == "trace_window"}
    assert windows.keys() == pids.keys()
    for e in events:
        if e["ph"] != "M":
            window = windows[e["pid"]]
            assert window["start_us"] - 0.5 <= e["ts"] <= window["stop_us"] + 0.5, e
