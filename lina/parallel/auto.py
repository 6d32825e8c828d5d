"""``lina.ddp(..., schedule="auto")``: steps in the plain order, observed, then a plan.

    1. when the model is wrapped, rank 0's cost model goes to all ranks;
    2. ``observe`` steps run in the plain order, one pass a layer (plan/observe.py);
    3. before the next one all ranks' observations meet; rank 0 decides (plan/decide.py), all ranks take that;
    4. transport and degrees hold from that step on, and so does the order of gradients; on CUDA one step
       later, when every kernel has run once: one that is launched for the first time while gradients
       wait on the device may stop the host.

Source: Lina, arXiv:2210.17223, section 5, packs experts after ten steps of observation. Differs: degrees
and order of gradients are chosen too, by a cost model, FSMoE, arXiv:2501.10714, section 4.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook as at_once
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lina.parallel.experts import together
from lina.parallel.gradients.hook import HookState, allreduce_hook, user_settings
from lina.parallel.mesh import ep_size, groups
from lina.parallel.plan.cost import CostModel
from lina.parallel.plan.decide import Plan, State, copies, decide, unchanged
from lina.parallel.plan.observe import Call, Observer
from lina.parallel.plan.predict import LayerLoad, Workload, links
from lina.parallel.regroup import regroup
from lina.parallel.settings import TRANSPORTS, Settings, chosen, meshes, settings
from lina.parallel.slots import Layer, check_gradients, layers, slots

# What all ranks have in common.
_SAME = ("experts", "top_k", "dim", "ffn_dim", "local", "dtype", "activation", "expert_bytes",
         "expert_params")
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
        self.watched = True


def ordered(order: Order, bucket):  # torch reads annotations and wants them absent or its own
    """A communication hook: at once, as DistributedDataParallel without one, or :func:`allreduce_hook`."""
    if order.watched:
        order.observer.in_backward()
    if order.gently is not None:
        return allreduce_hook(order.gently, bucket)
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
    """Watches a wrapped model, decides once, and lets go."""

    def __init__(self, mesh: DeviceMesh, cost: CostModel, transports: tuple[str, ...], options: Options,
                 device: torch.device) -> None:
        self.mesh, self.cost, self.transports, self.options = mesh, cost, transports, options
        self.device = device
        self.observer = Observer(device)
        self.order = Order(groups(mesh).world, self.observer)
        self.steps = 0
        self.plan: Plan | None = None
        self.done = False

    def before(self, wrapper: Any) -> None:
        """Forward of ``wrapper`` comes."""
        if not (torch.is_grad_enabled() and wrapper.require_backward_grad_sync):
            self.observer.other_work()
        elif self.plan is not None:
            self._gently(wrapper)              # every kernel has run
        elif self.steps == self.options.observe:
            self._decide(wrapper)
        else:
            self.steps += 1
            self.observer.begin()

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
        options, found = self.options, _spread(wrapper)
        steps = [s["step"] for s in said if s["step"] is not None]
        world, ep = groups(self.mesh).world.size(), ep_size(self.mesh)
        load = Workload(world, ep, self.device.type, (), (_sizes(wrapper, []),), 0.0, 0.0, 0.0)
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
        merged = tuple(_merged(name, list(ranks), notes) for name, *ranks in zip(names, *calls, strict=True))
        slowest = max(steps, key=lambda s: s["forward_s"] + s["backward_s"] + s["outside_s"])
        load = Workload(world, calls[0][0].ep if most else 1, self.device.type, merged,
                        _segments(wrapper, found, most), slowest["forward_s"], slowest["backward_s"],
                        slowest["outside_s"], *_bucket_bytes(wrapper))
        refused = next((s["refused"] for s in said if s["refused"]), "")
        if refused:
            notes.append(f"experts stay: {refused}")
        rooms = [s["room"] for s in said if s["room"] is not None]
        try:
            return decide(load, self.cost, transports=self.transports, degree=options.degree,
                          micro_op_s=options.hook.micro_op_s if options.hook else None,
                          state=_state(found, options.optimizer, min(rooms, default=None)),
                          may_move=options.regroup and not refused, notes=tuple(notes))
        except ValueError as error:
            return unchanged(load, chosen(self.mesh), degree, f"nothing can be predicted: {error}", *notes)

    def _apply(self, wrapper: Any, plan: Plan) -> None:
        _log.info("%s", plan)
        if plan.ep != plan.load.ep:
            self.mesh = regroup(wrapper, self.options.optimizer, plan.ep)
        for mesh in meshes(wrapper, self.mesh):
            settings(mesh).transport, settings(mesh).degree = plan.transport, plan.degree
        self.options.optimizer = None
        if plan.schedule == "plain":
            self.done = True
        elif self.device.type != "cuda":
            self._gently(wrapper)

    def _gently(self, wrapper: Any) -> None:
        """From this step on gradients let all-to-alls pass."""
        assert self.plan is not None           # _decide
        hook = self.options.hook or HookState(micro_op_s=self.plan.micro_op_s, link=self.plan.link)
        state = hook.over(self.mesh)
        state.queue(self.device)               # by all ranks together
        self.order.gently = state
        wrapper.expert_reducer.queue, wrapper.gently = state.queue, state
        self.done = True


def _spread(model: nn.Module) -> list[tuple[str, Layer]]:
    return [(name.removeprefix("module."), layer) for name, layer in layers(model)
            if ep_size(layer.module.mesh) > 1]


def _merged(name: str, ranks: list[Call], notes: list[str]) -> LayerLoad:
    """The layer on the rank with most to do."""
    first = ranks[0]
    share = copies(first.experts, first.top_k, first.ep)
    pairs_a_row = first.top_k * (first.ep - 1) / first.ep / share if share else 1.0
    tokens = max(c.tokens for c in ranks)
    same: dict[str, Any] = {field: getattr(first, field) for field in _SAME}
    if any(c.sent < 0 for c in ranks):
        notes.append(f"{name}: its counts never leave the device; taken for evenly routed")
        even = LayerLoad(name, tokens=tokens, rows=0.0, own_pairs=0.0, remote_pairs=0.0, **same)
        return even.spread(first.ep)
    pairs = [(c.own_pairs, c.remote_pairs) if c.own_pairs >= 0 else
             (max(0.0, c.tokens * c.top_k - c.sent * pairs_a_row), c.received * pairs_a_row) for c in ranks]
    own, remote = max(pairs, key=sum)
    return LayerLoad(name, tokens=tokens, rows=max(max(c.sent, c.received) for c in ranks), own_pairs=own,
                     remote_pairs=remote, **same)


def _sizes(model: nn.Module, found: list[tuple[str, Layer]]) -> tuple[int, ...]:
    return tuple(n for segment in _segments(model, found, len(found)) for n in segment)


def _segments(model: nn.Module, found: list[tuple[str, Layer]], count: int) -> tuple[tuple[int, ...], ...]:
    """Bytes of dense gradients before, between and after ``count`` spread layers, in the model's order."""
    owner = {id(p): i for i, (_, layer) in enumerate(found) for held in layer.slots.values() for p in held}
    made: list[list[int]] = [[] for _ in range(count + 1)]
    passed: set[int] = set()
    for p in model.parameters():
        if id(p) in owner:
            passed.add(owner[id(p)])
        elif p.requires_grad:
            made[min(len(passed), count)].append(p.nbytes)
    return tuple(map(tuple, made))


def _bucket_bytes(wrapper: Any) -> tuple[int, int]:
    """Of all, and of the first, which is smaller unless the user has set the others' size."""
    most = int(wrapper.bucket_bytes_cap)
    usual = getattr(wrapper, "bucket_bytes_cap_default", True)
    return most, int(dist._DEFAULT_FIRST_BUCKET_BYTES) if usual else most


def _state(found: list[tuple[str, Layer]], optimizer: Optimizer | None, room: int | None) -> State | None:
    """Adam's two moments, in the weights' dtype, where no optimizer says otherwise."""
    params = [p for _, layer in found for slot in slots([("", layer)]) for p in slot.held()]
    if not params:
        return None
    numel, weights = sum(p.numel() for p in params), sum(p.nbytes for p in params)
    moments = 2 * weights
    if optimizer is not None:
        moments = sum(v.nbytes for p in params for v in optimizer.state.get(p, {}).values()
                      if isinstance(v, torch.Tensor) and v.shape == p.shape)
    kept = 2 * weights + moments
    return State(weights / numel, kept / numel, (weights + moments) / numel,
                 None if room is None else float(room + kept))
