"""``lina.ddp(..., schedule="auto")``: steps in the plain order, observed, then a plan.

    1. when the model is wrapped, rank 0's cost model goes to all ranks;
    2. ``observe`` steps run in the plain order, one pass a layer (plan/observe.py);
    3. before the next one all ranks' observations meet; rank 0 decides (plan/decide.py), all ranks take that;
    4. transport and degrees hold from that step on, the order of gradients from the next, when every kernel
       has run once: one that is launched for the first time while gradients wait on the device may stop
       the host;
    5. from there as many steps are observed again. Where they take longer than the plain ones did, all ranks
       go back to what ran before, unless experts have moved: then the plan stays.

Source: Lina, arXiv:2210.17223, section 5, packs experts after ten steps of observation. Differs: degrees
and order of gradients are chosen too, by a cost model, FSMoE, arXiv:2501.10714, section 4.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook as at_once
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lina.parallel.experts import together
from lina.parallel.gradients.hook import HookState, ordered_hook, user_settings
from lina.parallel.gradients.sequence import Sequence
from lina.parallel.mesh import ep_size, groups
from lina.parallel.plan.cost import CostModel
from lina.parallel.plan.decide import Plan, decide, unchanged
from lina.parallel.plan.observe import Call, Observer
from lina.parallel.plan.predict import Workload, links
from lina.parallel.regroup import regroup
from lina.parallel.settings import TRANSPORTS, Settings, chosen, meshes, settings
from lina.parallel.slots import check_gradients, layers, slots
from lina.parallel.workload import bucket_bytes, merged, segments, sizes, spread_layers, state

SLOWER = 0.02          # than the plain order: then the plan is left again
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


class Order:
    """The state of :func:`ordered`: how gradients travel. Kept by the reducer, so it keeps no model."""

    def __init__(self, group: dist.ProcessGroup, observer: Observer) -> None:
        self.group, self.observer = group, observer
        self.gently: HookState | None = None
        self.sequence: Sequence | None = None
        self.watched = True


def ordered(order: Order, bucket):  # torch reads annotations and wants them absent or its own
    """A communication hook: at once, as DistributedDataParallel without one, or giving way."""
    if order.watched:
        order.observer.in_backward()
    if order.gently is not None:
        return ordered_hook((order.gently, order.sequence), bucket)
    return at_once(order.group, bucket)


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
        self._apply(wrapper, self.plan)

    def _facts(self, wrapper: Any) -> dict[str, Any]:
        """What only this rank knows."""
        refused = ""
        if self.options.regroup:
            try:
                check_gradients(wrapper, slots(layers(wrapper)))
            except ValueError as error:
                refused = str(error)
        room = None
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            room = free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return dict(step=self.observer.facts(), refused=refused, room=room)

    def _plan(self, wrapper: Any, said: list[dict[str, Any]]) -> Plan:
        options, found = self.options, spread_layers(wrapper)
        steps = [s["step"] for s in said if s["step"] is not None]
        world, ep = groups(self.mesh).world.size(), ep_size(self.mesh)
        load = Workload(world, ep, self.device.type, (), (sizes(wrapper, []),), 0.0, 0.0, 0.0)
        degree = options.degree or (1, 1)
        if not steps:
            return unchanged(load, chosen(self.mesh), degree, "no step was seen whole: nothing is known")
        most = max(len(s["calls"]) for s in steps)
        calls = [[Call(**c) for c in s["calls"]] for s in steps if len(s["calls"]) == most]
        if len({c.ep for rank in calls for c in rank}) > 1:
            return unchanged(load, chosen(self.mesh), degree,
                             "layers are spread over different numbers of ranks: left as they are")
        names = [name for name, _ in found] if len(found) == most else [f"layer {i}" for i in range(most)]
        notes: list[str] = []
        loads = tuple(merged(name, list(ranks), notes) for name, *ranks in zip(names, *calls, strict=True))
        slowest = max(steps, key=_step_s)
        load = Workload(world, calls[0][0].ep if most else 1, self.device.type, loads,
                        segments(wrapper, found, most), slowest["forward_s"], slowest["backward_s"],
                        slowest["outside_s"], *bucket_bytes(wrapper),
                        # with replicas the end of backward holds their reductions too
                        seen_dense_s=slowest["dense_s"] if most and calls[0][0].ep == world else None)
        refused = next((s["refused"] for s in said if s["refused"]), "")
        if refused:
            notes.append(f"experts stay: {refused}")
        rooms = [s["room"] for s in said if s["room"] is not None]
        try:
            return decide(load, self.cost, transports=self.transports, degree=options.degree,
                          micro_op_s=options.hook.micro_op_s if options.hook else None,
                          state=state(found, options.optimizer, min(rooms, default=None)),
                          may_move=options.regroup and not refused, notes=tuple(notes))
        except ValueError as error:
            return unchanged(load, chosen(self.mesh), degree, f"nothing can be predicted: {error}", *notes)

    def _apply(self, wrapper: Any, plan: Plan) -> None:
        _log.info("%s", plan)
        now = chosen(self.mesh), settings(self.mesh).degree, "plain", plan.load.ep
        if plan.ep != plan.load.ep:
            self.mesh = regroup(wrapper, self.options.optimizer, plan.ep)
        found = meshes(wrapper, self.mesh)
        self.former = [(mesh, settings(mesh).transport, settings(mesh).degree) for mesh in found]
        for mesh in found:
            settings(mesh).transport, settings(mesh).degree = plan.transport, plan.degree
        self.options.optimizer = None
        if now == (plan.transport, plan.degree, plan.schedule, plan.ep):
            self.done = True
            if plan.trials:
                self.plan = wrapper.plan = plan.ran(plan.load.step_s)

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
        """Back to what ran before, if that was faster; on all ranks, by the same numbers."""
        self.order.watched, self.done = False, True
        said = together("ddp: schedule 'auto'", groups(self.mesh).world, self.observer.facts)
        facts = [step for step in said if step is not None]
        if not facts or not plan.trials:
            return                             # nothing to compare, or with
        step_s = max(map(_step_s, facts))
        back = None
        if plan.ep == plan.load.ep and step_s > plan.load.step_s * (1 + SLOWER):
            back = self._back(wrapper, plan)
        self.plan = wrapper.plan = plan.ran(step_s, back)
        _log.info("%s", self.plan.reasons[-1] if back else f"a step takes {1e3 * step_s:.2f} ms as planned")

    def _back(self, wrapper: Any, plan: Plan) -> tuple[str, tuple[int, int]] | None:
        """The transport and degrees that hold from here on; None: there is nothing to go back to."""
        ran = chosen(self.mesh), settings(self.mesh).degree
        gently, self.order.gently = self.order.gently, None
        wrapper.gently, self.order.sequence = None, wrapper.expert_reducer.carry(None)
        if gently is not None and self.options.hook is None:   # before the transport is another one
            gently.queue(self.device).close()  # all ranks' devices are done: the observer has waited
        given = self.options.degree            # it stays, where the transport can have it
        for mesh, transport, degree in self.former:
            settings(mesh).transport = transport
            fits = given is not None and (given[0] == given[1] or chosen(mesh) != "p2p")
            settings(mesh).degree = given if given is not None and fits else degree
        if plan.schedule == "plain" and ran == (chosen(self.mesh), settings(self.mesh).degree):
            return None
        return chosen(self.mesh), settings(self.mesh).degree


def _step_s(facts: dict[str, Any]) -> float:
    return facts["forward_s"] + facts["backward_s"] + facts["outside_s"]
