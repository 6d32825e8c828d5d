"""Whole spread layers, timed as a model's steps feel them: several in a row forward, then backward.

Nothing synchronises between them but what a transport does itself, so that the host's work counts where
it shows and only there. On CUDA the device sleeps first while the host goes ahead, as a model's
dense part lets it: a transport that reads counts stops the host in each layer's forward pass all the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lina.parallel import DTYPES, TRANSPORTS, ExpertShape, LayerLoad, LayerTimes, moe, point_of, settings
from lina.profile.compute import Experts
from lina.profile.measure import Ranks

LAYERS = 4
# A rank's; of the fewest only what is constant counts.
TOKENS = {"cuda": (64, 2048, 8192, 32768), "cpu": (16, 256, 1024, 4096)}
REPEATS, FEWEST = 7, 3          # of a case; if time is short
LEAST = 4                       # the cases that are timed whatever they cost
# On CUDA each timed run has one before it: after a rest products are faster than in a step, by a sixth.
RUNS = {"cuda": 2, "cpu": 1}
MOST_AHEAD_S = 10e-3            # that the host gets on CUDA: longer than what it can queue


def cases(device: str, transport: str) -> list[tuple[int, int]]:
    """(tokens, passes each way), the most important first."""
    few, some, many, most = TOKENS[device]
    several = 2 if transport == "p2p" else 4         # of which plans are likely to choose
    return [(few, 1), (some, 1), (some, 2), (many, 1), (most, 1), (many, several), (most, several), (few, 2)]


def timed(ranks: Ranks, mesh: DeviceMesh, transport: str, shape: ExpertShape, top_k: int,
          seconds: float) -> tuple[list[LayerTimes], str]:
    """A layer's times over ``transport`` in about ``seconds``, connecting not counted, by :func:`cases`; the
    slowest rank's, medians. And one line of text where a case could not be run, the same on all ranks."""
    held = settings(mesh)
    before = held.transport, held.degree, held.tokens
    found: list[LayerTimes] = []
    why = ""
    try:
        held.transport = transport
        stack = Stack(ranks, mesh, shape, top_k)
        left, took = seconds, {1: 0.0}                     # seconds of a run by tokens, the longest of each
        for i, (tokens, passes) in enumerate(cases(ranks.device.type, transport)):
            nearest = max(n for n in took if n <= tokens)
            likely = took[nearest] * tokens / nearest
            if i >= LEAST and (FEWEST + 2) * RUNS[ranks.device.type] * likely > left:
                continue
            held.degree, held.tokens = (passes, passes), tokens
            start = time.perf_counter()
            error = _attempt(ranks, stack, tokens)         # connects, allocates, loads
            if error is not None:
                why = f"{passes} passes of {tokens} tokens: {error}"
                break
            if i == 0:
                start = time.perf_counter()                # connecting is not counted
            rows = _repeated(ranks, stack, left)
            load, n = stack.load(tokens), float(tokens * shape.dim * stack.itemsize)
            found.append(LayerTimes(load, passes, *(point_of(n, way) for way in zip(*rows, strict=True))))
            spent, longest = ranks.slowest([time.perf_counter() - start, LAYERS * max(map(sum, rows))])
            left, took[tokens] = left - spent, max(longest, took.get(tokens, 0.0))
    finally:
        held.transport, held.degree, held.tokens = before
    return found, why


def mesh_of(ranks: Ranks, given: DeviceMesh | None) -> DeviceMesh:
    """The mesh given, or one over the exchanging ranks, which are then all."""
    if given is not None:
        return given
    assert ranks.ep is not None             # exchanges
    return DeviceMesh.from_group(ranks.ep, ranks.device.type, mesh_dim_names=("ep",))


def supported(transport: str) -> bool:
    """Whether layers can be told to use it: lina's own, and not what was only registered here."""
    return transport in TRANSPORTS and transport != "auto"


class Stack:
    """LAYERS spread layers, each the next one's input. Their weights share memory, not gradients."""

    def __init__(self, ranks: Ranks, mesh: DeviceMesh, shape: ExpertShape, top_k: int) -> None:
        assert ranks.ep is not None         # exchanges
        self.device, self.mesh, self.shape, self.ep = ranks.device, mesh, shape, ranks.ep.size()
        self.experts = shape.local * self.ep
        self.top_k = top_k
        self.make = partial(Experts, ranks, shape)
        self.itemsize = DTYPES[shape.dtype].itemsize
        self.weights: list[tuple[torch.Tensor, ...]] = []
        self.leaves: list[torch.Tensor] = []
        self.routing: torch.Tensor | None = None
        self.ahead_s = 0.0

    def load(self, tokens: int) -> LayerLoad:
        """By what is expected of ids drawn evenly."""
        s = self.shape
        return LayerLoad("layer", self.experts, self.top_k, s.dim, s.ffn_dim, s.local, s.dtype, s.activation,
                         tokens, 0.0, 0.0, 0.0, 0, 0).spread(self.ep)

    def prepare(self, tokens: int) -> None:
        if not self.weights:
            own = self.make()
            self.weights = [tuple(w.detach().requires_grad_() for w in (own.w_up, own.w_down))
                            for _ in range(LAYERS)]
            del own
            # Too little memory for gradients is found out here, and not while other ranks wait for tokens.
            room = [torch.empty_like(w) for both in self.weights for w in both]
            del room
        options: dict[str, Any] = dict(device=self.device, dtype=DTYPES[self.shape.dtype])
        x = torch.randn(tokens, self.shape.dim, **options).requires_grad_()
        weight = torch.rand(tokens, self.top_k, device=self.device).requires_grad_()
        self.leaves = [x, weight]
        self.routing = torch.rand(tokens, self.experts, device=self.device).topk(self.top_k)[1].int()
        self.dout = torch.randn_like(x)

    @torch.enable_grad()
    def run(self, mark: Callable[[], Any]) -> list[Any]:
        """What ``mark`` gives before, between forward and backward, and after."""
        x, weight = self.leaves
        assert self.routing is not None     # prepare
        marks = [mark()]
        for w_up, w_down in self.weights:
            x = moe(x, weight, self.routing, w_up, w_down, experts=self.experts, mesh=self.mesh,
                    activation=self.shape.activation)
        marks.append(mark())
        x.backward(self.dout)
        marks.append(mark())
        for leaf in (*self.leaves, *(w for both in self.weights for w in both)):
            leaf.grad = None
        return marks


def _attempt(ranks: Ranks, stack: Stack, tokens: int) -> str | None:
    """Twice: the second time says how far the host may be ahead."""
    error: Exception | None = None
    try:
        stack.prepare(tokens)
    except Exception as failed:             # any library's: it is told, and the other ranks hear of it
        error = failed
    said = ranks.first_error(error)
    if said is not None:
        return said
    try:
        stack.run(time.perf_counter)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
            first, *_, last = stack.run(time.perf_counter)
            stack.ahead_s = min(MOST_AHEAD_S, last - first)
            torch.cuda.synchronize(ranks.device)
    except Exception as failed:
        error = failed
    return ranks.first_error(error)


def _repeated(ranks: Ranks, stack: Stack, seconds: float) -> list[list[float]]:
    """Seconds forward and backward of one layer, several times; the slowest rank's of each."""
    once = _on_cuda if ranks.device.type == "cuda" else _on_cpu
    rows: list[list[float]] = []
    start = time.perf_counter()
    with uncollected():
        for i in range(REPEATS):
            rows.append([s / LAYERS for s in ranks.slowest(once(ranks, stack))])
            spent = ranks.slowest([time.perf_counter() - start])[0]
            if i + 1 >= FEWEST and spent * (i + 2) > seconds * (i + 1):
                break
    return rows


def _on_cpu(ranks: Ranks, stack: Stack) -> list[float]:
    ranks.slowest([0.0])
    start, middle, end = stack.run(time.perf_counter)
    return [middle - start, end - middle]


def _on_cuda(ranks: Ranks, stack: Stack) -> list[float]:
    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    torch.cuda.synchronize(ranks.device)
    torch.cuda._sleep(int(2e9 * stack.ahead_s))                 # at about 2 GHz
    dist.all_reduce(torch.zeros(1, device=ranks.device), group=ranks.world)     # they start together
    stack.run(lambda: None)
    start, middle, end = stack.run(mark)
    end.synchronize()
    return [start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3]


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector, which stops a rank for tens of milliseconds now and then."""
    on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
