"""One training step on up to 8,192 ranks, simulated with the compiled policy that runs on real ones.

``step`` takes a list of layers (yours, or ``models.build``'s) and says how long a step takes under
a schedule, how much of the all-to-alls and reductions is hidden, and how long the links idle. What
is modelled, and what is not, is in ``csrc/plan/simulate.h``. ``timeline.draw`` draws results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from lina import _C

__all__ = ["FAULTS", "SCHEDULES", "Experts", "Layer", "Links", "Result", "Span", "step"]

SCHEDULES = ("plain", "lina", "fixed")
FAULTS = ("none", "swapped", "one at a time")       # csrc/plan/simulate.h, what a test breaks
FIXED_BYTES = 30_000_000                            # Lina's micro-op, arXiv:2210.17223
_STREAMS = ("compute", "a2a", "reduce")
_KINDS = ("dense", "gate", "experts", "optimizer", "dispatch", "return", "bucket", "experts' gradients")
_MIB = 1 << 20
Line = tuple[float, float]                          # alpha seconds, beta seconds a unit
Pair = tuple[float, float]                          # forward, backward


@dataclasses.dataclass(frozen=True)
class Experts:
    """A layer's experts on one rank. Pairs are forward, backward; seconds and bytes a rank.

    pass_s: line of an expert pass over its rows: alpha for launch and weights, beta a row.
    own_rows, remote_rows: rows (token-expert pairs) of this rank's tokens, and of others'.
    dispatch_bytes, return_bytes: what leaves the rank in an exchange.
    grad_bytes: gradients of this rank's experts.
    gate_s: gate and sort; combine's backward. Comes right before the dispatch.
    late_s: line of that part of a pass backward that follows its results: weights' gradients.
    """

    pass_s: tuple[Line, Line]
    own_rows: float
    remote_rows: float
    dispatch_bytes: Pair
    return_bytes: Pair
    grad_bytes: int
    gate_s: Pair = (0.0, 0.0)
    late_s: Line = (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense part (seconds forward, backward; bytes of each parameter's gradient), then experts."""

    name: str
    dense_s: Pair
    dense_grads: tuple[int, ...] = ()
    experts: Experts | None = None


@dataclasses.dataclass(frozen=True)
class Links:
    """Lines (alpha seconds, beta seconds a byte) of a rank's links inside a node and between nodes.

    node: ranks in a node. share: the pace of a collective while another one runs beside it on the
    same links; 1/2 is a fair share, 1/2.17 was measured on two H200.
    """

    node: int
    a2a: tuple[Line, Line]
    reduce: tuple[Line, Line]
    share: float = 0.5


class Span(NamedTuple):
    """What a stream of a watched rank did, in seconds from the step's start."""

    rank: int
    stream: str
    name: str
    start: float
    stop: float
    nbytes: float


@dataclasses.dataclass(frozen=True)
class Result:
    """A simulated step. Seconds without further words are means over ranks.

    step_s: until the last rank has ended; first_s: until the first one has.
    compute_s, a2a_s, reduce_s: each stream busy (a collective: while its bytes move).
    exposed_a2a_s: an a2a moves and nothing is computed. exposed_s: the same for any collective.
    link_idle: share of the step without any collective.
    a2a_hidden, reduce_hidden: share of their time beside compute; None without any.
    slowdown: time of all a2a's over their time with the link to themselves; None without any.
    stretch_s: the most that sharing added to one a2a.
    waited_s: the most that an a2a waited when all its members were ready; 0 in a sound schedule.
    behind: micro-ops that a rank started with an a2a of its own queued, running or imminent.
    a2a_count, reduce_count: collectives. reduced_bytes: over all ranks; each byte was seen once.
    decisions: questions to the policy. degrees: mean pipeline degree forward, backward.
    spans: of the watched ranks.
    """

    schedule: str
    ranks: int
    ep: int
    step_s: float
    first_s: float
    compute_s: float
    a2a_s: float
    reduce_s: float
    exposed_a2a_s: float
    exposed_s: float
    link_idle: float
    a2a_hidden: float | None
    reduce_hidden: float | None
    slowdown: float | None
    stretch_s: float
    waited_s: float
    behind: int
    a2a_count: int
    reduce_count: int
    reduced_bytes: int
    decisions: int
    events: int
    degrees: Pair
    spans: tuple[Span, ...] = dataclasses.field(repr=False)


def step(layers: Sequence[Layer], ranks: int, ep: int, links: Links, schedule: str = "lina", *,
         degrees: tuple[int, int] | None = None, max_degree: int = 8, micro_op_s: float = 5e-4,
         unit: int = 512, bucket_bytes: int = 25 * _MIB, first_bucket_bytes: int = _MIB,
         experts_last: bool = False, optimizer_s: float = 0.0, straggle_s: float = 0.0, seed: int = 0,
         watch: Sequence[int] = (), fault: str = "none") -> Result:
    """Simulate one training step of `layers`, forward order, on `ranks` ranks.

    ep: ranks that a layer's experts are spread over; a divisor of `ranks`.
    schedule: "plain": buckets are reduced whole and as soon as they are ready, beside a2a's, and
        layers are not pipelined, nothing is late; "lina": a2a's first, buckets cut into micro-ops of
        `micro_op_s` seconds, layers pipelined; "fixed": as "lina", with micro-ops of 30 MB.
    degrees: passes of a layer forward, backward; 0 is the best by the cost model, up to
        `max_degree`, for each layer. None: 1, 1 for "plain", else 0, 0.
    unit: micro-ops are whole multiples of so many bytes.
    bucket_bytes, first_bucket_bytes: as DistributedDataParallel's.
    experts_last: experts' gradients are reduced after the whole backward pass, not layer by layer.
    straggle_s: every operation is late on every rank by up to this much, drawn from `seed`.
    watch: ranks whose spans the result keeps.
    fault: "none"; "swapped": odd ranks submit their buckets in another order; "one at a time": a
        rank holds one collective at most. Both can make ranks wait for each other for ever.

    Raises ValueError naming the argument, its value and its limit; or, where the step could never
    end, the ranks that wait for each other.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"simulate: schedule={schedule!r}, one of {', '.join(SCHEDULES)}")
    if fault not in FAULTS:
        raise ValueError(f"simulate: fault={fault!r}, one of {', '.join(FAULTS)}")
    if schedule == "lina" and not micro_op_s > 0:
        raise ValueError(f"simulate: micro_op_s={micro_op_s}, over 0")
    plain = schedule == "plain"
    found = _C.simulate(
        tuple(_layer(layer, plain) for layer in layers),
        tuple(grad for layer in layers for grad in layer.dense_grads),
        ranks, ep, links.node, links.a2a, links.reduce, links.share, not plain,
        micro_op_s if schedule == "lina" else 0.0, FIXED_BYTES if schedule == "fixed" else 0, unit,
        degrees if degrees is not None else (1, 1) if plain else (0, 0), max_degree,
        bucket_bytes, first_bucket_bytes, experts_last, optimizer_s, straggle_s, seed,
        FAULTS.index(fault), tuple(watch))
    return _result(found, layers, schedule, ranks, ep)


_NO_EXPERTS = Experts(((0.0, 0.0), (0.0, 0.0)), 0.0, 0.0, (0.0, 0.0), (0.0, 0.0), 0)


def _layer(layer: Layer, plain: bool) -> tuple[Any, ...]:
    e = layer.experts or _NO_EXPERTS
    return (layer.dense_s, layer.experts is not None, e.gate_s, *e.pass_s, (0.0, 0.0) if plain else e.late_s,
            e.own_rows, e.remote_rows, e.dispatch_bytes, e.return_bytes, e.grad_bytes, len(layer.dense_grads))


def _result(found: dict[str, Any], layers: Sequence[Layer], schedule: str, ranks: int, ep: int) -> Result:
    state = found["state_s"]                        # bit 0 compute, bit 1 a2a, bit 2 reduce
    compute, a2a, reduce = (sum(s for bits, s in enumerate(state) if bits >> n & 1) for n in range(3))
    idle = state[0] + state[1]
    exposed_a2a = state[2] + state[6]
    same = ("step_s", "first_s", "stretch_s", "waited_s", "behind", "a2a_count", "reduce_count",
            "reduced_bytes", "decisions", "events")
    return Result(
        schedule=schedule, ranks=ranks, ep=ep, **{name: found[name] for name in same},
        compute_s=compute, a2a_s=a2a, reduce_s=reduce, exposed_a2a_s=exposed_a2a,
        exposed_s=exposed_a2a + state[4], link_idle=idle / found["step_s"] if found["step_s"] else 1.0,
        a2a_hidden=1 - exposed_a2a / a2a if a2a else None,
        reduce_hidden=(state[5] + state[7]) / reduce if reduce else None,
        slowdown=found["a2a_s"] / found["a2a_alone_s"] if found["a2a_alone_s"] else None,
        degrees=found["degree"], spans=tuple(_span(span, layers) for span in found["spans"]))


def _span(span: tuple[Any, ...], layers: Sequence[Layer]) -> Span:
    rank, layer, stream, kind, phase, start, stop, nbytes = span
    name = _KINDS[kind]
    if name == "bucket":
        name += f" {layer}"
    elif layer >= 0:
        name = f"{layers[layer].name} {name}" + (" backward" if phase and stream < 2 else "")
    return Span(rank, _STREAMS[stream], name, start, stop, nbytes)
