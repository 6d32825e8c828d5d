"""lina.trace: intervals, what cuts what, the file, and the summary of it."""

from __future__ import annotations

import itertools
import json
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trace_case import assert_chrome

from lina import tracefile, tracing

# Small integers: ends that touch, nest and repeat are then common.
INTERVALS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda p: (min(p), max(p))),
                     max_size=8)


def _cells(spans):
    """The unit cells [i, i + 1) that `spans` cover, the plain way."""
    return {i for a, b in spans for i in range(a, b)}


@given(INTERVALS, INTERVALS)
def test_interval_arithmetic_is_that_of_sets(a, b):
    assert _cells(tracefile.union(a)) == _cells(a)
    assert _cells(tracefile.subtract(a, b)) == _cells(a) - _cells(b)
    assert tracefile.length(a) == len(_cells(a))
    merged = tracefile.union(a)
    assert all(p[1] < q[0] for p, q in itertools.pairwise(merged))


def test_off_records_nothing():
    with tracing.span("compute", "work"):
        token = tracing.begin("a2a", "rows")
    assert token is None
    tracing.end(token)
    assert not tracing.active()
    with tracing.trace() as recorder:
        pass
    assert recorder.spans == [] and set(recorder.totals().values()) == {0.0}


def test_network_span_cuts_the_compute_around_it():
    with tracing.trace() as recorder:
        with tracing.span("compute", "forward"):
            time.sleep(0.01)
            with tracing.span("a2a", "dispatch"):
                time.sleep(0.02)
            time.sleep(0.01)
    compute = [s for s in recorder.spans if s.track == "compute"]
    a2a = next(s for s in recorder.spans if s.track == "a2a")
    assert [s.name for s in compute] == ["forward", "forward"]
    assert compute[0].stop <= a2a.start and a2a.stop <= compute[1].start
    assert recorder.waiting() == pytest.approx(recorder.totals()["a2a"])


@pytest.mark.parametrize("how", ["thread", "token"])       # another thread's work, or asynchronous work
def test_work_beside_compute_cuts_nothing(how):
    def exchange():
        with tracing.span("a2a", "dispatch"):
            time.sleep(0.01)

    with tracing.trace() as recorder, tracing.span("compute", "forward"):
        if how == "thread":
            thread = threading.Thread(target=exchange)
            thread.start()
            thread.join()
        else:
            token = tracing.begin("a2a", "dispatch")
            time.sleep(0.01)
            tracing.end(token)
    assert [s.name for s in recorder.spans if s.track == "compute"] == ["forward"]
    assert recorder.totals()["a2a"] >= 0.01
    assert recorder.waiting() == 0.0


def test_totals_are_unions_and_tokens_end_on_any_thread():
    with tracing.trace() as recorder:
        tokens = [tracing.begin("allreduce", f"bucket {i}") for i in range(8)]      # all at once
        time.sleep(0.01)
        threads = [threading.Thread(target=tracing.end, args=(t,)) for t in tokens]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(recorder.spans) == 8
    assert 0.01 <= recorder.totals()["allreduce"] <= recorder.seconds()


def test_what_ends_late_is_left_out():
    with tracing.trace() as recorder:
        token = tracing.begin("a2a", "rows")
    tracing.end(token)
    assert recorder.spans == []


def test_errors(tmp_path):
    with tracing.trace():
        with pytest.raises(ValueError, match=r"track='network'.*compute, a2a, allreduce"):
            with tracing.span("network", "x"):
                pass
        with pytest.raises(RuntimeError, match="already being recorded"):
            with tracing.trace():
                pass
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        with tracing.trace(tmp_path / "none" / "x.json"):
            pass
    assert not tracing.active()


def test_file_is_chrome_json_and_reads_back(tmp_path):
    path = tmp_path / "step.json"
    with tracing.trace(path) as recorder:
        with tracing.span("compute", "experts", path="cpu", bytes=7):
            tokens = [tracing.begin("allreduce", "a")]
            time.sleep(0.002)
            tokens.append(tracing.begin("allreduce", "b"))      # overlaps a without nesting
            time.sleep(0.002)
            tracing.end(tokens[0])
            time.sleep(0.002)
            tracing.end(tokens[1])
    events = json.loads(path.read_text())["traceEvents"]
    assert_chrome(events, ranks=1)
    spans = [e for e in events if e["ph"] == "X"]
    named = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(named.values()) == {"compute", "a2a", "allreduce", "allreduce 2"}
    assert [named[e["tid"]] for e in spans if e["cat"] == "allreduce"] == ["allreduce", "allreduce 2"]
    assert next(e for e in spans if e["cat"] == "compute")["args"] == {"path": "cpu", "bytes": 7}
    summary = tracefile.summary(tracefile.read(path))
    for track, seconds in recorder.totals().items():    # microseconds since 1970 are exact to 0.25
        assert summary["share"][track] * summary["seconds"] == pytest.approx(seconds, abs=2e-6)
    assert summary["clock_error_us"] == 0.0             # of one rank
    tracefile.draw(tracefile.read(path), tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": []}'])
def test_other_files_are_one_clear_error(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: .*not a trace written by lina"):
        tracefile.read(path)


def test_spans_compile_without_a_break():
    def f(x):
        with tracing.span("compute", "double", path="eager"):
            return x * 2

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    with tracing.trace():
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.gpu
def test_cuda_spans_are_timed_on_the_stream(tmp_path):
    x = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    x @ x
    torch.cuda.synchronize()
    with tracing.trace(tmp_path / "gpu.json") as recorder:
        with tracing.span("compute", "products"):
            began.record()
            for _ in range(20):
                x @ x
            ended.record()
            with tracing.span("a2a", "on this stream"):
                x.clone()
        with torch.cuda.stream(side):
            token = tracing.begin("allreduce", "beside")
            x.clone()
            tracing.end(token)
    compute = [s for s in recorder.spans if s.track == "compute"]
    a2a = next(s for s in recorder.spans if s.track == "a2a")
    assert len(compute) == 2 and compute[0].stop <= a2a.start + 1e-6
    assert recorder.totals()["compute"] >= 0.99e-3 * began.elapsed_time(ended)
    assert all(recorder.start <= s.start <= s.stop <= recorder.stop for s in recorder.spans)
