"""The decision of ``lina.ddp(..., schedule="auto")``: from an observed step and a cost model, how to run.

A pure function of both: :func:`decide`. What is tried, each by :func:`lina.parallel.predict`: the
plain order and all-to-alls first, in one pass and in the degrees that the layers are fastest in by
csrc/plan/pipeline.h, over each transport that may be used, with several sizes of micro-ops.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lina import _C
from lina.parallel.plan.cost import CostModel
from lina.parallel.plan.packing import State, packing, packing_reason
from lina.parallel.plan.predict import (
    MICRO_OP_S,
    WORTH,
    LayerLoad,
    Workload,
    best_degree,
    calibrate,
    layers_s,
    links,
    predict,
)
from lina.parallel.settings import MAX_DEGREE, UNIT

MICRO_OPS_S = (MICRO_OP_S, 0.25e-3, 1e-3, 2e-3)        # tried in this order
OFF = 0.05             # of the observed step: beyond it what the cost model has wrong is told
_FIRST = ("plain", "lina")


@dataclass(frozen=True)
class Trial:
    """One way to run, and its predicted step."""

    transport: str
    schedule: str
    degree: tuple[int, int]
    micro_op_s: float
    ep: int
    step_s: float

    @property
    def label(self) -> str:
        """For example "nccl lina 3/4, ep 8"."""
        return f"{self.transport} {self.schedule} {self.degree[0]}/{self.degree[1]}, ep {self.ep}"


@dataclass(frozen=True)
class Plan:
    """What was chosen, from what, and why.

    Attributes:
        transport, schedule, degree, micro_op_s, ep: how the model runs from here on.
        micro_op_bytes: of a full micro-op by ``link``, (alpha, beta) of an allreduce; 0 with "plain".
        trials: all that was predicted.  load: the step that was observed, with its dense seconds.
        packing: a row for each ep, as csrc/plan/packing.h's.  packed_ep: the best; None: not known.
        reasons: one line each.  measured: the cost model's date.
        tried: what ran, in turn: the index in ``trials``, and seconds of a step as it then ran, observed as
            the plain ones were.
        left: the label in ``predicted`` of what ran last, where all that was tried was slower than the plain
            order and that was taken up again; else empty.
    """

    transport: str
    schedule: str
    degree: tuple[int, int]
    micro_op_s: float
    ep: int
    micro_op_bytes: int
    link: tuple[float, float]
    trials: tuple[Trial, ...]
    load: Workload
    packing: tuple[dict[str, Any], ...]
    packed_ep: int | None
    reasons: tuple[str, ...]
    measured: str
    tried: tuple[tuple[int, float], ...] = ()
    left: str = ""

    @property
    def predicted(self) -> dict[str, float]:
        """Seconds of a step by :attr:`Trial.label`, with its best size of micro-ops."""
        found: dict[str, float] = {}
        for trial in self.trials:
            found[trial.label] = min(trial.step_s, found.get(trial.label, trial.step_s))
        return found

    @property
    def chosen(self) -> Trial | None:
        """The trial that was chosen; None where nothing could be predicted."""
        mine = (self.transport, self.schedule, self.degree, self.micro_op_s, self.ep)
        return next((t for t in self.trials if dataclasses.astuple(t)[:5] == mine), None)

    @property
    def measured_s(self) -> float | None:
        """Seconds of a step, measured: of what holds, or of ``left`` if that was not tried; None until it is
        known."""
        found = [s for i, s in self.tried if self.trials[i] == self.chosen] or [s for _, s in self.tried[-1:]]
        return found[0] if found else None

    def as_json(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_json` takes it back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Plan:
        """Raises ValueError for anything but what :meth:`as_json` gives."""
        try:
            value = {name: _tuples(v) for name, v in value.items()}
            load = dict(value["load"])
            load["layers"] = tuple(LayerLoad(**layer) for layer in load["layers"])
            return Plan(**{**value, "load": Workload(**load),
                           "trials": tuple(Trial(**t) for t in value["trials"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan written by lina ({type(error).__name__}: {error})") from error

    def __str__(self) -> str:
        load, way = self.load, f"{self.degree[0]}/{self.degree[1]} passes over {self.transport}, ep {self.ep}"
        lines = [f"schedule {self.schedule}, {way}" + (
            f", micro-ops of {1e3 * self.micro_op_s:g} ms ({self.micro_op_bytes / 1e6:.1f} MB)"
            if self.schedule == "lina" else "")]
        lines.append(f"observed step {1e3 * load.step_s:.2f} ms (forward {1e3 * load.forward_s:.2f}, "
                     f"backward {1e3 * load.backward_s:.2f}, outside {1e3 * load.outside_s:.2f}); dense part "
                     f"{1e3 * load.dense_s[0]:.2f} + {1e3 * load.dense_s[1]:.2f}")
        lines += [f"predicted {1e3 * s:10.2f} ms  {label}" for label, s in self.predicted.items()]
        lines += [f"{layer.name}: {layer.tokens:.0f} tokens, {layer.rows:.0f} rows to other ranks, pairs "
                  f"{layer.own_pairs:.0f} own and {layer.remote_pairs:.0f} remote" for layer in load.layers]
        lines += [f"measured  {1e3 * s:10.2f} ms  {self.trials[i].label}" for i, s in self.tried]
        return "\n".join([*lines, *self.reasons])

    def ran(self, step_s: float) -> Plan:
        """This plan, whose steps took ``step_s``."""
        if self.chosen is None:
            return self
        return dataclasses.replace(self, tried=(*self.tried, (self.trials.index(self.chosen), step_s)))

    def promising(self, degree: tuple[int, int] | None, gain: float, move: bool = False) -> Trial | None:
        """What to run next: the best over a transport that has not run, or with experts moved (``move``: they
        may), if its prediction is shorter than all that was measured, by a share of ``gain`` or more."""
        def kind(t: Trial) -> tuple[int, str]:
            return t.ep, t.transport if t.ep == self.load.ep else ""

        ran = {kind(self.trials[i]) for i, _ in self.tried}
        rest = [t for t in self.trials[1:] if kind(t) not in ran and (move or t.ep == self.load.ep)]
        each = [_pick([t for t in rest if kind(t) == k], degree) for k in dict.fromkeys(map(kind, rest))]
        best = min(each, key=lambda t: t.step_s, default=None)         # the first of all was seen
        least = min([self.load.step_s, *(s for _, s in self.tried)])
        return best if best is not None and best.step_s < least * (1 - gain) else None

    def fastest(self, slower: float) -> Trial | None:
        """Of what was measured; the plain order, which was seen, only where all else took longer by more than
        a share of ``slower``. None: nothing was measured."""
        if not self.tried:
            return None
        others = [(i, s) for i, s in self.tried if i != 0]
        best, step_s = min(others, key=lambda t: t[1], default=(0, math.inf))
        return self.trials[best if step_s <= self.load.step_s * (1 + slower) else 0]

    def taking(self, trial: Trial, cost: CostModel, why: str) -> Plan:
        """This plan, where ``trial`` runs from here on."""
        link, size = _micro_ops(trial, self.load, cost)
        return dataclasses.replace(
            self, transport=trial.transport, schedule=trial.schedule, degree=trial.degree, ep=trial.ep,
            micro_op_s=trial.micro_op_s, micro_op_bytes=size, link=link, reasons=(*self.reasons, why))

    def back(self, transport: str, degree: tuple[int, int]) -> Plan:
        """This plan, left for the plain order over that transport, in those passes."""
        i, step_s = self.tried[-1]
        name = self.trials[i].label
        reason = (f"{name} took {1e3 * step_s:.2f} ms, the steps before {1e3 * self.load.step_s:.2f}: "
                  f"back to plain, {degree[0]}/{degree[1]} passes over {transport}")
        return dataclasses.replace(
            self, transport=transport, degree=degree, schedule="plain", ep=self.load.ep,
            micro_op_s=self.trials[0].micro_op_s, micro_op_bytes=0, link=(0.0, 0.0), left=name,
            reasons=(*self.reasons, reason))


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def decide(load: Workload, cost: CostModel, *, transports: tuple[str, ...],
           degree: tuple[int, int] | None = None, micro_op_s: float | None = None, state: State | None = None,
           may_move: bool = False, notes: tuple[str, ...] = ()) -> Plan:
    """The plan for ``load``, which was observed over ``transports[0]`` in the plain order, one pass a layer.

    Args:
        transports: that may be chosen.  degree, micro_op_s: given, or None to choose.
        state: of a rank, for packing.  may_move: whether another ep is predicted, for :meth:`Plan.promising`.

    Raises:
        ValueError: the cost model lacks a link, or a dtype of experts.
    """
    reasons = list(notes)
    if load.layers and cost.ep != load.ep:
        reasons.append(f"all-to-alls were measured among {cost.ep} ranks, the model's are among {load.ep}")
    load = calibrate(load, cost, transports[0])
    trials = _tried(load, cost, transports, degree, micro_op_s)
    found = _pick(trials, degree)
    rows, packed = (), None
    if state is not None and load.layers and load.world > 1:
        packs = packing(load, cost, transports[0], state)
        if isinstance(packs, str):
            reasons.append(packs)
        else:
            rows, packed = tuple(packs["rows"]), packs["ep"]
            reasons.append(packing_reason(packs, load.ep))
    if may_move and packed is not None and packed != load.ep:
        moved = dataclasses.replace(load, ep=packed, layers=tuple(x.spread(packed) for x in load.layers))
        trials += _tried(moved, cost, transports, degree, micro_op_s)
    reasons += _why(load, cost, trials, found)
    link, size = _micro_ops(found, load, cost)
    return Plan(found.transport, found.schedule, found.degree, found.micro_op_s, found.ep, size, link,
                tuple(trials), load, rows, packed, tuple(reasons), cost.date)


def _micro_ops(trial: Trial, load: Workload, cost: CostModel) -> tuple[tuple[float, float], int]:
    """The link that gradients travel over, and bytes of a micro-op."""
    if trial.schedule == "plain" or load.world == 1:
        return (0.0, 0.0), 0
    line = links(cost, trial.transport, "lina", ep=trial.ep, world=load.world)[1]
    link = line.alpha_s, line.beta_s
    return link, _C.Policy(link, trial.micro_op_s, UNIT).size


def unchanged(load: Workload, transport: str, degree: tuple[int, int], *reasons: str) -> Plan:
    """The plan of a model about which nothing can be predicted."""
    return Plan(transport, "plain", degree, MICRO_OP_S, load.ep, 0, (0.0, 0.0), (), load, (), None,
                reasons, "")


def _tried(load: Workload, cost: CostModel, transports: tuple[str, ...], degree: tuple[int, int] | None,
           micro_op_s: float | None) -> list[Trial]:
    """Simplest first."""
    made: list[Trial] = []
    for schedule in _FIRST if load.layers and load.ep > 1 else ("plain",):
        for name in transports:
            if (schedule, name, load.device) == ("lina", "c10d", "cuda"):
                continue       # the host's thread, far ahead of the GPU, would hold gradients back to the end
            best = (1, 1)
            if name == "p2p":                        # whose passes take SMs, of which the model knows nothing
                best = degree if degree is not None and degree[0] == degree[1] else best
            elif load.ep > 1 and load.layers:
                best = degree or best_degree(load, cost, name, MAX_DEGREE)
            for passes in dict.fromkeys([(1, 1), best]):
                sizes = MICRO_OPS_S if micro_op_s is None else (micro_op_s,)
                for size in sizes if schedule == "lina" else sizes[:1]:
                    made.append(Trial(name, schedule, passes, size, load.ep, predict(
                        load, cost, transport=name, schedule=schedule, degree=passes, micro_op_s=size)))
    return made


def _pick(trials: list[Trial], degree: tuple[int, int] | None) -> Trial:
    uneven = degree is not None and degree[0] != degree[1]              # which p2p cannot have
    open_to = [t for t in trials if degree is None or t.degree == degree
               or (uneven and t.transport == "p2p")] or trials
    least = min(t.step_s for t in open_to)
    return next(t for t in open_to if t.step_s * (1 - WORTH) <= least)


def _why(load: Workload, cost: CostModel, trials: list[Trial], found: Trial) -> list[str]:
    if not load.layers or load.ep == 1:
        return ["no layer is spread over ranks: nothing to overlap"]
    plain = trials[0]
    said = [f"{found.label}: {1e3 * found.step_s:.2f} ms, {plain.step_s / found.step_s:.2f} x {plain.label}"
            f"; an order less simple must save {WORTH:.1%} of the step"]
    if found.ep == load.ep:
        for way, name in enumerate(("forward", "backward")):
            one, many = (layers_s(load, cost, found.transport, way, r) for r in (1, found.degree[way]))
            said.append(f"{name}: all layers' experts, exchanges and what is around them take "
                        f"{1e3 * one:.2f} ms in one pass, {1e3 * many:.2f} in {found.degree[way]}")
    if load.device == "cuda" and {t.transport for t in trials} == {"c10d"}:
        said.append("over c10d on GPUs gradients give way to nothing")
    other = sorted({layer.top_k for layer in load.layers} - {cost.top_k})
    if other and cost.layers:
        said.append(f"whole layers were measured with {cost.top_k} experts a token, the model has "
                    f"{', '.join(map(str, other))}: what these need around is another (lina profile --top-k)")
    unknown = [t for t in dict.fromkeys(t.transport for t in trials) if t not in cost.layers]
    if unknown:
        said.append(f"no whole layer was measured over {', '.join(unknown)}: what one needs beside experts "
                    f"and exchanges is {'taken for that of the slowest' if cost.layers else 'not predicted'}")
    over = plain.step_s / load.step_s
    if abs(over - 1) > OFF:
        said.append(f"the cost model would have the observed step take {over:.2f} x as long")
    return said


__all__ = ["Plan", "Trial", "decide", "unchanged"]
