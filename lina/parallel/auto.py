"""``lina.ddp(..., schedule="auto")``: steps in the plain order, observed, then a plan.

    1. when the model is wrapped, rank 0's cost model goes to all ranks;
    2. ``observe`` steps run in the plain order, one pass a layer (plan/observe.py);
    3. before the next one all ranks' observations meet; rank 0 decides (plan/decide.py), all ranks take that;
    4. transport and degrees hold from that step on, the order of gradients from the next, when every kernel
       has run once: one that is launched for the first time while gradients wait on the device may stop
       the host;
    5. from there as many steps are observed again. Where another transport promises less than the least that
       was measured, the best way over that is next, each transport once;
    6. so is, with ``regroup``, another ep that promises as much: experts move there;
    7. then the fastest that was measured holds: of the plans, unless the plain order took less than all: then
       all ranks go back to what ran before. Experts move back for that.

Source: Lina, arXiv:2210.17223, section 5, packs experts after ten steps of observation. Differs: degrees
and order of gradients are chosen too, by a cost model, FSMoE, arXiv:2501.10714, section 4.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lina.parallel.experts import together
from lina.parallel.gradients.hook import HookState, user_settings
from lina.parallel.gradients.watched import Order
from lina.parallel.mesh import ep_size, groups
from lina.parallel.plan.cost import CostModel
from lina.parallel.plan.decide import Plan, Trial, decide, unchanged
from lina.parallel.plan.observe import Observer
from lina.parallel.plan.predict import links
from lina.parallel.regroup import check_movable, regroup
from lina.parallel.settings import TRANSPORTS, Settings, chosen, meshes, settings
from lina.parallel.workload import observed, spread_layers, state, step_s

SLOWER = 0.02          # than the plain order: then the plan is left again; and what another has to promise
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Options:
    """What :func:`lina.ddp` was told for "auto"; all but the optimizer equal on every rank."""

    degree: tuple[int, int] | None = None
    hook: HookState | None = None
    observe: int = 10
    optimizer: Optimizer | None = None
    regroup: bool = False

    def check(self) -> None:
        if self.degree is not None:
            self.degree = Settings(degree=self.degree).degree
        if isinstance(self.observe, bool) or not isinstance(self.observe, int) or self.observe < 1:
            raise ValueError(f"ddp: observe is {self.observe}, must be a number of steps, at least 1")
        if self.regroup and not isinstance(self.optimizer, Optimizer):
            raise ValueError("ddp: regroup=True moves optimizer state too; give optimizer, of torch.optim")

    def facts(self) -> str:
        hook = self.hook and (*user_settings(self.hook).values(), self.hook.transport)
        return f"degree={self.degree}, hook={hook}, observe={self.observe}, regroup={self.regroup}"


def agreed_cost(mesh: DeviceMesh, options: Options) -> tuple[CostModel, tuple[str, ...]]:
    """The cost model that rank 0 of ``mesh`` finds, and the transports it allows; on every rank.

    Raises:
        ValueError: there is none, it is another machine's, or has no line of what the mesh uses; ranks that
            were told different things. On all ranks. Nothing has been changed.
        RuntimeError: anything else that goes wrong on one rank; on all ranks.
    """
    group = groups(mesh).world

    def known() -> tuple[str, str, Any, tuple[str, ...]]:
        try:
            options.check()
            if group.rank() != 0:
                return options.facts(), "", None, ()
            cost = CostModel.load(device=mesh.device_type)
            return options.facts(), "", cost.as_json(), _transports(mesh, cost, options.hook)
        except (ValueError, OSError) as error:
            told = str(error).startswith(("ddp: ", "mesh: ", "HookState: "))
            problem = str(error) if told else f"ddp: schedule 'auto' needs a run of `lina profile`: {error}"
            return options.facts(), problem, None, ()

    said = together("ddp: schedule 'auto'", group, known)
    problems = [p for _, p, _, _ in said if p]
    if problems:
        raise ValueError(said[group.rank()][1] or problems[0])
    if len({facts for facts, *_ in said}) > 1:
        raise ValueError(f"ddp: the ranks were given different options with schedule 'auto'; "
                         f"here: {options.facts()}")
    return CostModel.from_json(said[0][2]), tuple(said[0][3])


def _transports(mesh: DeviceMesh, cost: CostModel, hook: HookState | None) -> tuple[str, ...]:
    """That may be chosen, the one in use first. ValueError if its links were not measured."""
    world, now = groups(mesh).world.size(), chosen(mesh)
    links(cost, now, "lina", ep=ep_size(mesh), world=world)
    if hook is not None and hook.bound:
        hook.check([mesh], hook.bound)
        return (now,)
    if settings(mesh).transport != "auto" or mesh.device_type != "cuda":
        return (now,)
    # p2p needs a limit on tokens, which only the user knows
    barred = (now,) if settings(mesh).tokens else (now, "p2p")
    return (now, *(t for op, t in cost.links if op == "a2a" and t in TRANSPORTS and t not in barred))


class Auto:
    """Watches a wrapped model, decides once, watches what comes of it, and lets go."""

    def __init__(self, mesh: DeviceMesh, cost: CostModel, transports: tuple[str, ...], options: Options,
                 device: torch.device) -> None:
        self.mesh, self.cost, self.transports, self.options = mesh, cost, transports, options
        self.device = device
        self.order = Order(groups(mesh).world, Observer(device))
        self.steps = 0                 # begun under the observer
        self.plan: Plan | None = None
        self.entered = False           # the plan's first step, which allocates and connects, has run
        self.last = False              # what is entered next is not watched: it was before
        self.former: list[tuple[DeviceMesh, str, tuple[int, int]]] = []     # the settings before the plan
        self.done = False

    @property
    def observer(self) -> Observer:
        return self.order.observer

    def before(self, wrapper: Any) -> None:
        """Forward of ``wrapper`` comes."""
        if not (torch.is_grad_enabled() and wrapper.require_backward_grad_sync):
            self.observer.other_work()
            return
        if self.plan is not None and not self.entered:
            self._enter(wrapper)
            if self.last:
                self._end()
                return
        if self.steps < self.options.observe:
            self.steps += 1
            self.observer.begin()
        elif self.plan is None:
            self._decide(wrapper)
        else:
            self._compare(wrapper, self.plan)

    def after(self) -> None:
        """It has ended, or raised."""
        self.observer.forward_ends()

    @torch.no_grad()
    def _decide(self, wrapper: Any) -> None:
        group = groups(self.mesh).world
        self.order.watched = False
        said = together("ddp: schedule 'auto'", group, lambda: self._facts(wrapper))
        plan, *_ = together("ddp: schedule 'auto'", group, lambda: self._plan(wrapper, said).as_json()
                            if group.rank() == 0 else None)
        self.plan = wrapper.plan = Plan.from_json(plan)
        self._apply(wrapper, self.plan, not any(s["refused"] for s in said))

    def _facts(self, wrapper: Any) -> dict[str, Any]:
        """What only this rank knows."""
        refused = ""
        if self.options.regroup:
            try:
                check_movable(wrapper, self.options.optimizer)
            except ValueError as error:
                refused = str(error)
        room = None
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            room = free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return dict(step=self.observer.facts(), refused=refused, room=room)

    def _plan(self, wrapper: Any, said: list[dict[str, Any]]) -> Plan:
        options, notes = self.options, list[str]()
        load, why = observed(wrapper, self.mesh, self.device, [s["step"] for s in said if s["step"]], notes)
        unplanned = partial(unchanged, load, chosen(self.mesh), options.degree or (1, 1))
        if why:
            return unplanned(why)
        refused = next((s["refused"] for s in said if s["refused"]), "")
        if refused:
            notes.append(f"experts stay: {refused}")
        rooms = [s["room"] for s in said if s["room"] is not None]
        try:
            return decide(load, self.cost, transports=self.transports, degree=options.degree,
                          micro_op_s=options.hook.micro_op_s if options.hook else None,
                          state=state(spread_layers(wrapper), options.optimizer, min(rooms, default=None)),
                          may_move=options.regroup and not refused, notes=tuple(notes))
        except ValueError as error:
            return unplanned(f"nothing can be predicted: {error}", *notes)

    def _apply(self, wrapper: Any, plan: Plan, move: bool) -> None:
        _log.info("%s", plan)
        now = chosen(self.mesh), settings(self.mesh).degree, "plain"
        found = meshes(wrapper, self.mesh)
        self.former = [(mesh, settings(mesh).transport, settings(mesh).degree) for mesh in found]
        for mesh in found:
            settings(mesh).transport, settings(mesh).degree = plan.transport, plan.degree
        if now == (plan.transport, plan.degree, plan.schedule):
            self._go_on(wrapper, plan.ran(plan.load.step_s), move)

    def _enter(self, wrapper: Any) -> None:
        """From this step on gradients let all-to-alls pass, if they shall, and steps are observed again."""
        assert self.plan is not None           # _decide
        self.entered, self.steps = True, 0
        self.order.observer, self.order.watched = Observer(self.device), True
        if self.plan.schedule == "plain":
            return
        hook = self.options.hook or HookState(micro_op_s=self.plan.micro_op_s, link=self.plan.link)
        state = hook.over(self.mesh)
        state.queue(self.device)               # by all ranks together
        self.order.gently = state
        wrapper.gently = state
        self.order.sequence = wrapper.expert_reducer.carry(state.queue, groups(self.mesh).world)

    @torch.no_grad()
    def _compare(self, wrapper: Any, plan: Plan) -> None:
        """What came of the plan; on all ranks, by the same numbers."""
        self.order.watched = False
        said = together("ddp: schedule 'auto'", groups(self.mesh).world, lambda: self._facts(wrapper))
        facts = [one["step"] for one in said if one["step"] is not None]
        if not plan.trials or not (facts or plan.tried):
            self._end()                        # nothing to compare, or with
        else:                                  # none seen whole: all that was measured is better
            took = max(map(step_s, facts), default=math.inf)
            self._go_on(wrapper, plan.ran(took), not any(one["refused"] for one in said))

    def _go_on(self, wrapper: Any, plan: Plan, move: bool) -> None:
        """Try what promises more than what was measured, or end with the fastest; ``move``: experts may."""
        move = move and self.options.regroup
        # a hook of the user's serves one transport
        tries = plan.tried and not self.options.hook and (move or plan.ep == plan.load.ep)
        more = plan.promising(self.options.degree, SLOWER, move) if tries else None
        best = plan.fastest(SLOWER)
        self.plan = wrapper.plan = plan
        if more is not None:
            why = f"{more.label} promises {1e3 * more.step_s:.2f} ms, less than all that was measured"
            self._take(wrapper, plan, more, why)
        elif best in (None, plan.chosen) or (best.ep != plan.ep and not move):     # experts cannot move back
            self._end()
        elif best == plan.trials[0]:
            self._back(wrapper, plan)
        else:
            self.last = True
            self._take(wrapper, plan, best, f"{best.label} was the fastest")
        _log.info("%s", self.plan)

    def _take(self, wrapper: Any, plan: Plan, trial: Trial, why: str) -> None:
        """Another way to run: where experts are, transport and passes now, the order of gradients from the
        next step on."""
        self._leave(wrapper, trial.ep)
        self.plan = wrapper.plan = plan.taking(trial, self.cost, why)
        for mesh in meshes(wrapper, self.mesh):
            settings(mesh).transport, settings(mesh).degree = trial.transport, trial.degree
        self.entered = False

    def _back(self, wrapper: Any, plan: Plan) -> None:
        """The plain order again, as it was seen, and no other."""
        ran = plan.schedule, chosen(self.mesh), settings(self.mesh).degree, plan.ep
        self._leave(wrapper, plan.load.ep)
        now = chosen(self.mesh), settings(self.mesh).degree
        if ran != ("plain", *now, plan.load.ep):       # else a given degree leaves nothing to go back to
            self.plan = wrapper.plan = plan.back(*now)
        self._end()

    def _end(self) -> None:
        self.order.watched, self.done, self.options.optimizer = False, True, None

    def _leave(self, wrapper: Any, ep: int) -> None:
        """Settings and the order of gradients are as before the plan, but a degree that was given stays; and
        experts are spread over ``ep`` ranks."""
        gently, self.order.gently = self.order.gently, None
        wrapper.gently, self.order.sequence = None, wrapper.expert_reducer.carry(None)
        if gently is not None and self.options.hook is None:   # before the transport is another one
            gently.queue(self.device).close()  # all ranks' devices are done: the observer has waited
        if self.plan is not None and self.plan.ep != ep:       # of the layers: the wrapper's mesh may differ
            self.mesh = regroup(wrapper, self.options.optimizer, ep)
        given = self.options.degree            # it stays, where the transport can have it
        for mesh, transport, degree in self.former:
            settings(mesh).transport = transport
            fits = given is not None and (given[0] == given[1] or chosen(mesh) != "p2p")
            settings(mesh).degree = given if given is not None and fits else degree
