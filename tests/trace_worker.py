"""What the ranks of test_tracing_ranks.py do."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from trace_case import assert_chrome

import lina
from lina import tracefile, tracing

AHEAD_S = {"perf_counter": 3.0, "time": -1000.0}      # rank 1's clocks, after alignment and before

_PART = re.compile(r"( \d+/\d+)?(: wait)?$")           # of a span's name: its chunk, or the wait for it


class Net(nn.Module):
    def __init__(self, mesh, how):
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(lina.MoE(16, 16, 4, 2, mesh=mesh) for _ in range(2))
        self.last = nn.Linear(16, 16)

    def forward(self, x):
        for block in self.blocks:
            x = x + (block(x) if self.how == "plain" else
                     checkpoint(block, x, use_reentrant=self.how == "reentrant"))
        return self.last(x)


def _shared(name):
    """A path that every rank knows; rank 0's folder, which the caller removes."""
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return Path(box[0]) / name


def _remove(path):
    dist.barrier()                       # every rank has read it
    if dist.get_rank() == 0:
        for file in path.parent.iterdir():
            file.unlink()
        path.parent.rmdir()


def clocks(device):
    """Rank 1's clocks lead or lag, yet what all ranks do at once stands at one place of the axis."""
    true, ahead = {}, {}
    for name, by in AHEAD_S.items():
        true[name] = clock = getattr(time, name)
        ahead[name] = by if dist.get_rank() == 1 else 0.0
        setattr(time, name, lambda clock=clock, by=ahead[name]: clock() + by)
    path = _shared("clocks.json")
    try:
        with lina.trace(path) as recorder:
            for _ in range(5):
                time.sleep(0.01 * dist.get_rank())
                with tracing.span("a2a", "meet"):
                    dist.barrier()
    finally:
        for name, clock in true.items():
            setattr(time, name, clock)
    # this machine's ranks share one true clock: where on the axis each thinks that its zero is
    zeros, errors = [None] * 2, [None] * 2
    dist.all_gather_object(zeros, recorder._hosts.epoch + ahead["perf_counter"])
    dist.all_gather_object(errors, recorder._hosts.error)
    assert abs(zeros[0] - zeros[1]) <= errors[1] + 1e-6, (zeros, errors)      # eps of seconds since 1970
    dist.all_gather_object(errors, recorder.clock_error)
    assert errors[0] < 0.5 and errors[1] < 0.5            # far below what was amiss
    ranks = tracefile.read(path)
    assert list(ranks) == [0, 1]
    for first, second in zip(ranks[0].spans, ranks[1].spans, strict=True):
        assert max(first.start, second.start) <= min(first.stop, second.stop) + sum(errors)
    told = [1e-6 * ranks[r].facts["clock_error_us"] for r in range(2)]
    assert all(abs(a - b) < 1e-9 for a, b in zip(told, errors, strict=True))
    _remove(path)


def layers(device, how):
    """Every a2a is of a layer, forward and backward; every rank's file parts are well formed."""
    mesh = lina.mesh(ep=2)
    model = lina.ddp(Net(mesh, how).to(device), mesh, schedule="lina")
    x = torch.randn(32, 16, device=device, requires_grad=True)
    model(x).sum().backward()            # connections are made
    path = _shared("layers.json")
    with lina.trace(path, model=model) as recorder:
        model(x).sum().backward()
    times = 1 if how == "plain" else 2   # forward again in backward
    for name, count in (("dispatch", times), ("collect", times), ("collect backward", 1),
                        ("dispatch backward", 1)):
        for layer in ("blocks.0", "blocks.1"):
            found = [s for s in recorder.spans
                     if s.args.get("layer") == layer and _PART.sub("", s.name) == name]
            chunks = len({s.name for s in found})
            assert chunks and len(found) == count * chunks, (name, layer, recorder.spans)
    loose = [s for s in recorder.spans if s.track == "a2a" and "layer" not in s.args]
    assert loose == []
    names = {s.name for s in recorder.spans if s.track == "compute"}
    assert {"Net forward", "Net backward", "blocks.0", "blocks.1"} <= names
    dist.barrier()                       # rank 0 has written it
    events = json.loads(path.read_text())["traceEvents"]
    assert_chrome(events, ranks=2)
    summary = tracefile.summary(tracefile.read(path))
    sizes = [of["bytes"] for of in summary["layers"].values()]
    assert list(summary["layers"]) == ["blocks.0", "blocks.1"] and sum(sizes) == summary["bytes"]["a2a"]
    # the dense gradients, whole: both routers and the last product, in float32
    dense = 4 * (2 * 4 * 16 + 16 * 16 + 16)
    assert [row["bytes"]["allreduce"] for row in summary["by_rank"]] == [dense, dense]
    assert all(row["memory"]["peak_bytes"] > 0 for row in summary["by_rank"])
    _remove(path)


def missing(device):
    """A folder that one rank has not, a trace that one rank is in already: the same error on every rank."""
    path, rank = _shared("missing.json"), dist.get_rank()
    for given, inside, text in ((path.parent / "none" / "x.json" if rank == 1 else path, False,
                                 "folder does not exist on rank 1"),
                                (path, rank == 1, "already being recorded in this process on rank 1")):
        said = [None] * 2
        with lina.trace() if inside else contextlib.nullcontext():
            try:
                with lina.trace(given):
                    raise AssertionError("recording has started")
            except (FileNotFoundError, RuntimeError) as error:
                dist.all_gather_object(said, repr(error))
        assert said[0] == said[1] and text in said[0], said
    with lina.trace(path):
        dist.barrier()
    dist.barrier()                       # rank 0 has written it
    assert path.is_file()
    _remove(path)


def alone(device):
    """gather=False: no collective, so one rank may trace by itself."""
    path = _shared("alone.json")
    if dist.get_rank() == 1:
        with lina.trace(path, gather=False), tracing.span("compute", "x"):
            pass
        (rank, found), = tracefile.read(path.with_name("alone.rank1.json")).items()
        assert rank == 1 and [s.name for s in found.spans] == ["x"]
    dist.barrier()
    _remove(path)
