"""What a few steps of a model show: each spread layer's traffic, and where the step's time goes.

Only what the host knows anyway is kept: shapes, counts that a transport has read, and marks in time around
each layer, forward and backward. Nothing waits for a device before :meth:`Observer.facts`.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


@dataclass
class Call:
    """One spread layer, once forward, on one rank. Rows: copies of tokens; pairs: of token and expert.

    sent, received: rows to and from other ranks; -1: known to the device alone.
    own_pairs, remote_pairs: for experts here, of tokens here and of other ranks'; -1: not known.
    """

    experts: int
    top_k: int
    dim: int
    ffn_dim: int
    local: int
    ep: int
    dtype: str
    activation: str
    expert_bytes: int              # gradients of this rank's experts
    expert_params: int             # of one expert
    tokens: float
    sent: float = -1.0
    received: float = -1.0
    own_pairs: float = -1.0
    remote_pairs: float = -1.0


class Span:
    """One layer's time, forward and backward: from when its results' gradient is there, to its inputs'."""

    def __init__(self, now: Callable[[], Any]) -> None:
        self._now = now
        self.forward = [now()]
        self.backward: list[Any] = []

    def enters(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What the layer is to take instead of these: their gradients come as soon as it is done, before
        whatever lies between it and where these were computed."""
        return tuple(t.view_as(t) if t.requires_grad else t for t in given)

    def ends(self, out: Tensor, *given: Tensor) -> None:
        """Forward, with ``out``; backward with the gradient of the first of ``given``, what entered, that has
        one."""
        self.forward.append(self._now())
        first = next((t for t in given if t.grad_fn is not None), None)
        if out.requires_grad and first is not None:
            out.register_hook(self._mark)
            first.register_hook(self._mark)

    def _mark(self, grad: Tensor) -> None:
        self.backward.append(self._now())


_looks: tuple[Observer, _Step] | None = None       # whose forward pass runs; None: nobody's


def saw_layer(x_TD: Tensor, expert_TK: Tensor, weights: tuple[Tensor | None, ...], experts: int,
              activation: str) -> Span | None:
    """A layer begins; ``weights`` are w_up, w_down, and biases where there are some. None: nobody looks."""
    if _looks is None:
        return None
    observer, step = _looks
    dtype, kind, held = x_TD.dtype, x_TD.device.type, [w for w in weights if w is not None]
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    local, dim, ffn_dim = held[1].shape
    step.calls.append(Call(experts, expert_TK.shape[1], dim, ffn_dim, local, experts // local,
                           str(dtype).removeprefix("torch."), activation, sum(w.nbytes for w in held),
                           sum(w.numel() for w in held) // local, float(x_TD.shape[0])))
    step.spans.append(Span(observer.now))
    return step.spans[-1]


def saw_rows(sent: list[int], received: list[int], me: int,
             pairs: tuple[int, int] | None = None) -> None:
    """Rows to and from each rank, for the layer that began last; ``pairs``: own and remote ones."""
    if _looks is None or not _looks[1].calls:
        return
    call = _looks[1].calls[-1]
    call.sent, call.received = (float(sum(n) - n[me]) for n in (sent, received))
    if pairs is not None:
        call.own_pairs, call.remote_pairs = map(float, pairs)


@dataclass
class _Step:
    start: Any
    calls: list[Call] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)        # of the calls
    forward: Any = None            # when forward ended
    computed: Any = None           # when backward had computed all; reductions may go on
    backward: Any = None           # when backward ended, with its reductions
    next: Any = None               # when the next step began; None: something else ran between


class Observer:
    """Of one model on one device, between :meth:`begin` and :meth:`facts`.

    A step begins with a forward pass whose gradients will be reduced. Times are the host's, or on
    CUDA those of events on the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[_Step] = []
        self._open = False             # forward of the last step runs
        self._follows = False          # nothing but that step has run since it began
        self._queued = False

    def begin(self) -> None:
        """Forward of a step begins."""
        global _looks
        now = self.now()
        if self.steps and self._follows:
            self.steps[-1].next = now
        self.steps.append(_Step(now))
        _looks = self, self.steps[-1]
        self._open, self._follows, self._queued = True, True, False

    def forward_ends(self) -> None:
        """Also where forward raised."""
        global _looks
        if self._open:
            _looks, self._open = None, False
            self.steps[-1].forward = self.now()

    def other_work(self) -> None:
        """A forward pass that is no step: what follows the last step is not timed."""
        self._follows = False

    def in_backward(self) -> None:
        """From within a step's backward pass, while reductions are still to come."""
        if not self._queued and self.steps:
            self._queued = True
            # Those who wait for the reductions have queued, or will, before this one's second turn.
            Variable._execution_engine.queue_callback(self._computed)

    def _computed(self) -> None:
        self.steps[-1].computed = self.now()
        Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        self.steps[-1].backward = self.now()

    def now(self) -> Any:
        """A mark in time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def facts(self) -> dict[str, Any] | None:
        """forward_s, backward_s and outside_s (from there to the next step): medians; dense_s: of forward and
        of backward's computation, what is outside the layers, None if that was not seen; calls: the
        layers', means. None if no step was whole. Ends the observation; on CUDA waits for the device."""
        self.forward_ends()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        whole = [s for s in self.steps if s.forward is not None and s.backward is not None]
        later = whole[len(whole) // 3:]            # the first steps load and allocate
        if not later:
            return None
        outside = [self._between(s.backward, s.next) for s in later if s.next is not None]
        return dict(
            forward_s=statistics.median(self._between(s.start, s.forward) for s in later),
            backward_s=statistics.median(self._between(s.forward, s.backward) for s in later),
            outside_s=statistics.median(outside) if outside else 0.0,
            dense_s=self.dense(later),
            calls=[dataclasses.asdict(c) for c in _means([s.calls for s in whole])])

    def dense(self, steps: list[_Step]) -> tuple[float, float] | None:
        found: list[list[float]] = [[], []]
        for s in steps:
            for way, (start, stop) in enumerate(((s.start, s.forward), (s.forward, s.computed))):
                spans = [(span.forward, span.backward)[way] for span in s.spans]
                if not all(len(span) == 2 for span in spans):
                    return None
                apart = self._between(start, stop) - sum(self._between(*span) for span in spans)
                found[way].append(max(0.0, apart))
        forward, backward = map(statistics.median, found)
        return forward, backward

    def _between(self, start: Any, stop: Any) -> float:
        return stop - start if self.device.type != "cuda" else start.elapsed_time(stop) / 1e3


def _means(steps: list[list[Call]]) -> list[Call]:
    """The i-th layer's mean over the steps that have as many layers as the longest one."""
    most = max(map(len, steps))
    alike = [calls for calls in steps if len(calls) == most]
    found = []
    for calls in zip(*alike, strict=True):
        means = {name: statistics.fmean(getattr(c, name) for c in calls)
                 for name in ("tokens", "sent", "received", "own_pairs", "remote_pairs")}
        found.append(dataclasses.replace(calls[-1], **means))
    return found
