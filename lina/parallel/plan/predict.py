"""How long a step takes by a cost model, for each way to run it: the simulator's answer (csrc/plan).

A workload is what was observed under the plain order. Its dense time is what was seen outside the spread
layers; where that was not seen, it is what the observed step leaves beside its parts by the cost model,
and takes up what that has wrong.
What a layer takes beside exchanges and experts is the observed transport's in one, the predicted
one's and its passes' in the other; gradients that give way wait meanwhile, for exchanges are imminent.

Not modelled: ranks that differ (each is taken for the one with most to do), and more ranks than some
groups of ep, whose replicas are simulated for all.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from lina import _C
from lina.parallel.plan.cost import CostModel
from lina.parallel.plan.lines import DTYPES, ExpertPass, ExpertShape, Line
from lina.parallel.settings import UNIT

MICRO_OP_S = 0.5e-3
WORTH = 0.005          # what something less simple must save: below it predictions mean little
MAX_RANKS = 16                 # simulated, or two groups of ep where those are more
# The pace of an all-to-all beside an allreduce: measured on two GPUs; where one host drives both, half.
SHARE = {"cuda": 1 / 2.17, "cpu": 0.5}
Pair = tuple[float, float]     # forward, backward


@dataclass(frozen=True)
class LayerLoad:
    """A spread layer, on the rank with most to do. ``rows``: copies of tokens to, or from, other ranks."""

    name: str
    experts: int
    top_k: int
    dim: int
    ffn_dim: int
    local: int
    dtype: str
    activation: str
    tokens: float
    rows: float
    own_pairs: float
    remote_pairs: float
    expert_bytes: int              # gradients of this rank's experts
    expert_params: int             # of one expert

    @property
    def width(self) -> int:
        """Bytes of a token's activation."""
        return self.dim * (8 if self.dtype == "float64" else DTYPES[self.dtype].itemsize)

    def out_bytes(self) -> Pair:
        """Of one row, to the experts: with ids and weights; backward a gradient alone."""
        return self.width + 8.0 * self.top_k, float(self.width)

    def back_bytes(self) -> Pair:
        return float(self.width), self.width + 4.0 * self.top_k

    def expert_pass(self, cost: CostModel) -> ExpertPass:
        """ValueError as CostModel's. There are no lines of float64: those of float32, twice."""
        wide = self.dtype == "float64"
        found = cost.expert_pass(ExpertShape(self.dim, self.ffn_dim, self.local,
                                             "float32" if wide else self.dtype, self.activation))
        if not wide:
            return found
        lines = [dataclasses.replace(line, alpha_s=2 * line.alpha_s, beta_s=2 * line.beta_s)
                 for line in found.lines]
        return ExpertPass(found.shape, *lines)

    def spread(self, ep: int) -> LayerLoad:
        """As it would be over ``ep`` ranks, were tokens routed evenly."""
        local, pairs = self.experts // ep, self.tokens * self.top_k
        return dataclasses.replace(
            self, local=local, rows=self.tokens * copies(self.experts, self.top_k, ep),
            own_pairs=pairs / ep, remote_pairs=pairs - pairs / ep,
            expert_bytes=self.expert_bytes // self.local * local)


def copies(experts: int, top_k: int, ep: int) -> float:
    """Other ranks that a token is sent to, expected, if it chooses experts evenly (packing.h: (ep-1) p)."""
    top_k = min(top_k, experts)
    return (ep - 1) * (1 - math.comb(experts - experts // ep, top_k) / math.comb(experts, top_k))


@dataclass(frozen=True)
class Workload:
    """A step of a model on one rank of ``world``; seconds measured, dense ones by :func:`calibrate` from
    what was seen of them.

    dense_grads: bytes of each dense gradient before the first layer's experts, between them and the
    next, ..., after the last. forward_s, backward_s: with all that they wait for.
    outside_s: optimizer and the rest.
    """

    world: int
    ep: int
    device: str
    layers: tuple[LayerLoad, ...]
    dense_grads: tuple[tuple[int, ...], ...]
    forward_s: float
    backward_s: float
    outside_s: float
    bucket_bytes: int = 25 << 20
    first_bucket_bytes: int = 1 << 20
    dense_s: Pair = field(default=(0.0, 0.0))
    seen_dense_s: Pair | None = None           # outside the spread layers

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.outside_s


def links(cost: CostModel, transport: str, schedule: str, *, ep: int, world: int) -> tuple[Line, Line]:
    """Of all-to-alls and of gradients. ValueError naming what was not measured."""
    nothing = Line(0.0, 0.0, 1.0)
    carriers = (transport, "nccl") if schedule == "lina" and transport != "c10d" else ()
    reducer = next((name for name in carriers if ("allreduce", name) in cost.links), "c10d")
    return (cost.line("a2a", transport) if ep > 1 else nothing,
            cost.line("allreduce", reducer) if world > 1 else nothing)


def hides(transport: str, degree: int) -> bool:
    """Whether weights' gradients are computed while what a pass gives back travels: not over p2p, nor over
    c10d in one pass, where an operator computes all of backward (tokens/spread.py, p2p.py)."""
    return transport == "nccl" or (transport == "c10d" and degree > 1)


def late(found: ExpertPass, transport: str, degree: int) -> Pair:
    """The line of what follows a pass's results backward."""
    return (found.late.alpha_s, found.late.beta_s) if hides(transport, degree) else (0.0, 0.0)


def pipeline(layer: LayerLoad, cost: CostModel, transport: str, way: int, degree: int) -> float:
    """Seconds of a layer's experts and exchanges; ``way`` 0 forward, 1 backward."""
    found = layer.expert_pass(cost)
    line, a2a = found.lines[way], cost.line("a2a", transport) if layer.rows else Line(0.0, 0.0, 1.0)
    return _C.pipeline(
        a2a=(a2a.alpha_s, a2a.beta_s), dispatch_bytes=layer.rows * layer.out_bytes()[way],
        return_bytes=layer.rows * layer.back_bytes()[way], expert=(line.alpha_s, line.beta_s),
        own_rows=layer.own_pairs, remote_rows=layer.remote_pairs, degree=degree,
        late=late(found, transport, degree) if way else (0.0, 0.0))["seconds"]


def rest(layer: LayerLoad, cost: CostModel, transport: str, way: int, degree: int) -> float:
    """Seconds of a spread layer beside its exchanges and experts. Over a transport of which no whole layer
    was measured it takes what it does over the slowest one that was; 0 if there is none."""
    known = [cost.layers[transport]] if transport in cost.layers else list(cost.layers.values())
    return max((lines[way].rest(layer.tokens * layer.width, degree) for lines in known), default=0.0)


def layers_s(load: Workload, cost: CostModel, transport: str, way: int, degree: int) -> float:
    """Seconds of all spread layers without the dense part, each alone; ``way`` as :func:`pipeline`'s."""
    seconds = sum(pipeline(layer, cost, transport, way, degree) for layer in load.layers)
    if load.ep > 1:
        seconds += sum(rest(layer, cost, transport, way, degree) for layer in load.layers)
    return seconds


def predict(load: Workload, cost: CostModel, *, transport: str = "c10d", schedule: str = "plain",
            degree: tuple[int, int] = (1, 1), micro_op_s: float = MICRO_OP_S) -> float:
    """Seconds of a step of ``load``, from one forward pass to the next.

    Args:
        transport: "c10d", "nccl" or "p2p", as ``cost`` has them.
        schedule: "plain": gradients beside all-to-alls, in DistributedDataParallel's buckets.  "lina":
            all-to-alls first, gradients in micro-ops of ``micro_op_s`` seconds.
        degree: expert passes forward, backward.

    Raises:
        ValueError: a link or a dtype of experts was not measured; a number outside its limits.

    Source: csrc/plan/simulate.h.
    """
    a2a, reduce = links(cost, transport, schedule, ep=load.ep, world=load.world)
    groups = min(load.world // load.ep, max(2, MAX_RANKS // load.ep))
    ring = 2 * (load.world - 1) / load.world or 1.0        # the line is over the buffer's bytes
    near, over = (a2a.alpha_s, a2a.beta_s), (reduce.alpha_s, reduce.beta_s / ring)
    forward, backward = (s / max(1, len(load.layers)) for s in load.dense_s)
    more = [tuple(rest(layer, cost, transport, way, degree[way]) if load.ep > 1 else 0.0 for way in range(2))
            for layer in load.layers]
    layers: list[Any] = [((forward, backward), True, around,
                          *_experts(layer, cost, transport, max(degree)), len(grads))
                         for layer, around, grads in zip(load.layers, more, load.dense_grads, strict=False)]
    last = load.dense_s if not load.layers else (0.0, 0.0)
    layers.append((last, False, *[(0.0, 0.0)] * 4, 0.0, 0.0, (0.0, 0.0), (0.0, 0.0), 0,
                   len(load.dense_grads[-1])))
    found = _C.simulate(
        tuple(layers), tuple(n for grads in load.dense_grads for n in grads), groups * load.ep, load.ep,
        groups * load.ep, (near, near), (over, over), SHARE[load.device], schedule == "lina",
        micro_op_s if schedule == "lina" else 0.0, 0, UNIT, degree, 64, load.bucket_bytes,
        load.first_bucket_bytes, schedule == "plain", load.outside_s, 0.0, 0, 0, ())
    return found["step_s"]


def _experts(layer: LayerLoad, cost: CostModel, transport: str, degree: int) -> tuple[Any, ...]:
    found, out, back = layer.expert_pass(cost), layer.out_bytes(), layer.back_bytes()
    return ((found.forward.alpha_s, found.forward.beta_s), (found.backward.alpha_s, found.backward.beta_s),
            late(found, transport, degree), layer.own_pairs, layer.remote_pairs,
            (layer.rows * out[0], layer.rows * out[1]), (layer.rows * back[0], layer.rows * back[1]),
            layer.expert_bytes)


def calibrate(load: Workload, cost: CostModel, transport: str) -> Workload:
    """``load``, observed under the plain order in one pass, with the dense seconds that were seen, or that
    explain its step.

    Raises:
        ValueError: as :func:`predict`.
    """
    if load.seen_dense_s is not None:
        return dataclasses.replace(load, dense_s=load.seen_dense_s)
    forward = max(0.0, load.forward_s - layers_s(load, cost, transport, 0, 1))
    backward = 0.0
    for _ in range(12):        # the step grows with it by 1 or less, so this ends below the answer or at it
        made = dataclasses.replace(load, dense_s=(forward, backward))
        short = load.step_s - predict(made, cost, transport=transport)
        if abs(short) <= 1e-4 * load.step_s or backward + short < 0:
            break
        backward += short
    return dataclasses.replace(load, dense_s=(forward, backward))


def best_degree(load: Workload, cost: CostModel, transport: str, most: int) -> tuple[int, int]:
    """The fewest passes, forward and backward, that all layers together are as good as fastest in."""
    found = []
    for way in range(2):
        times = {r: layers_s(load, cost, transport, way, r) for r in range(1, most + 1)}
        least = min(times.values())
        found.append(next(r for r, s in times.items() if s * (1 - WORTH) <= least))
    return found[0], found[1]
