"""lina.trace: names of layers, clocks and memory, in one process."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lina
from lina import tracing
from lina.tracing import clock


class Net(nn.Module):
    def __init__(self, how=None):
        super().__init__()
        self.how = how
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"moe": _Spy()}) for _ in range(2))

    def forward(self, x):
        x = _Span.apply(self.first(x))       # of no layer
        for block in self.blocks:
            x = x + (block["moe"](x) if self.how is None else
                     checkpoint(block["moe"], x, use_reentrant=self.how == "reentrant"))
        return x


class _Spy(nn.Module):
    """A layer that holds experts and opens a span each in its autograd node's forward and backward."""

    def __init__(self):
        super().__init__()
        self.experts = lina.nn.Experts(8, 8, 2)

    def forward(self, x):
        weight, expert = torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int32)
        return _Span.apply(self.experts(x.tanh(), weight, expert)).sin()


class _Span(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        with tracing.span("a2a", "out"):
            return x * 2

    @staticmethod
    def backward(ctx, grad):
        with tracing.span("a2a", "back"):
            return grad * 2


def _layers(recorder, name):
    return [s.args.get("layer") for s in recorder.spans if s.name == name]


@pytest.mark.parametrize("how", [None, "reentrant", "kept"])
@pytest.mark.parametrize("named", [True, False])
def test_forward_and_backward_spans_carry_their_layer(how, named):
    net = Net(how)
    x = torch.randn(4, 8, requires_grad=True)
    with tracing.trace(model=net if named else None) as recorder:
        net(x).sum().backward()
    want = ["blocks.0.moe", "blocks.1.moe"] if named else ["_Spy 1", "_Spy 2"]
    # checkpointed: once more, in backward; "kept" stops each recomputation when it has what it needs
    assert _layers(recorder, "out") == [None, *want, *([] if how is None else want[::-1])]
    assert _layers(recorder, "back") == [*want[::-1], None]
    assert set(want) <= {s.name for s in recorder.spans if s.track == "compute"}
    assert ("Net backward" in {s.name for s in recorder.spans}) is named


def test_backward_in_another_thread_and_after_the_trace():
    """A node keeps its name; what a trace put on the model and its tensors does nothing afterwards."""
    net = Net()
    with tracing.trace(model=net) as first:
        y = net(torch.randn(4, 8)).sum()
        thread = threading.Thread(target=lambda: y.backward(retain_graph=True))
        thread.start()
        thread.join()
    assert _layers(first, "back") == ["blocks.1.moe", "blocks.0.moe", None]
    hooks = [h for m in net.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks == []
    y.backward()
    with tracing.trace() as second:
        with tracing.span("a2a", "out"):
            pass
    assert len(_layers(first, "back")) == 3 and _layers(second, "out") == [None]


def test_a_layer_that_raises_leaves_no_name():
    net = Net()
    with tracing.trace(model=net) as recorder:
        with pytest.raises(ValueError):
            net.blocks[0]["moe"](torch.randn(4, 9))         # width 9 instead of 8
        assert tracing.current_layer() is None
        with tracing.span("a2a", "after"):
            pass
    assert _layers(recorder, "after") == [None]


def test_named_by_hand_and_by_thread():
    seen = []
    with tracing.layer("off"):
        assert tracing.current_layer() is None              # nothing is traced
    with tracing.trace() as recorder, tracing.layer("outer"):
        with tracing.layer("inner"), tracing.span("a2a", "x"):
            thread = threading.Thread(target=lambda: seen.append(tracing.current_layer()))
            thread.start()
            thread.join()
        Net()(torch.randn(4, 8))
        with tracing.span("a2a", "y", layer="mine"):
            pass
    assert _layers(recorder, "x") == ["inner"] and _layers(recorder, "y") == ["mine"] and seen == [None]
    assert set(_layers(recorder, "out")) == {"outer"}       # a name given by hand holds inside


def test_owners_of_parameters():
    net = Net()
    assert tracing.owners(net.parameters()) is None
    with tracing.trace(model=torch.compile(net, backend="eager")):
        assert tracing.owners(net.blocks[1].parameters()) == "blocks.1.moe.experts"
        assert tracing.owners(reversed(list(net.parameters()))) == "first .. blocks.1.moe.experts"
        assert tracing.owners([torch.ones(1)]) is None


def test_traced_modules_compile_without_a_break():
    net, x = nn.Sequential(lina.MoE(8, 8, 4, 2), nn.Tanh()), torch.randn(4, 8)
    want = net(x)
    with tracing.trace(model=net) as recorder:
        got = torch.compile(net, backend="eager", fullgraph=True)(x)
    assert torch.equal(got, want) and recorder.spans == []


def test_a_function_among_the_args_is_called_at_the_end():
    rows = torch.zeros(2, dtype=torch.int64)
    with tracing.trace() as recorder, tracing.span("a2a", "rows", bytes=lambda: 4 * int(rows.sum())):
        rows += 3
    assert recorder.spans[0].args == {"bytes": 24}


@given(st.floats(-100, 100), st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=6))
def test_the_lead_lies_within_its_bounds(lead, rounds):
    """Rounds in which each rank comes late by chance, and leaves some time after both have come."""
    mine, theirs, now = [], [], 0.0
    for late_mine, late_theirs, leave_mine, leave_theirs in rounds:
        met = now + max(late_mine, late_theirs)
        mine += [now + late_mine + lead, met + leave_mine + lead]
        theirs += [now + late_theirs, met + leave_theirs]
        now = met + 2
    low, high = clock.bounds(mine, theirs)
    assert low - 1e-9 <= lead <= high + 1e-9            # roundings of numbers below 200
    assert high - low <= min(a[2] + a[3] + abs(a[0] - a[1]) for a in rounds) + 1e-9


def test_a_device_clock_that_runs_fast_is_held_by_both_ends(monkeypatch):
    class Event:                    # of a device whose clock gains 1 in 1000 and started 5 s before
        def __init__(self):
            self.ms = 1e3 * (5 + host[0] * 1.001)

        def elapsed_time(self, other):
            return other.ms - self.ms

        def synchronize(self):
            host[0] += 1e-5         # the host hears of it 10 us later

    class Stream:
        device = torch.device("cpu")

    host = [100.0]
    monkeypatch.setattr(clock, "event", lambda stream: Event())
    monkeypatch.setattr(clock.time, "perf_counter", lambda: host[0])
    for name in ("synchronize", "current_stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: torch.no_grad())
    device = clock.Device(Stream())
    host[0] = 110.0
    middle, at = Event(), host[0]
    host[0] = 120.0
    device.close()
    assert device.error == pytest.approx(5e-6, rel=1e-3)
    assert abs(device.seconds(middle) - at) <= device.error * 1.01     # without the second anchor: 10 ms


def test_peak_memory_is_that_of_the_trace():
    size = 64 << 20
    torch.ones(4 * size, dtype=torch.uint8)             # before: not of the trace, and larger
    with tracing.trace() as recorder:
        torch.ones(size, dtype=torch.uint8)
    memory = recorder.memory
    if memory is None:
        pytest.skip("the system does not tell a process's resident memory")
    growth = memory["peak_bytes"] - memory["start_bytes"]
    assert memory["kind"] == "rss" and 0.9 * size < growth < 2 * size
    assert memory["stop_bytes"] - memory["start_bytes"] < 0.5 * size
