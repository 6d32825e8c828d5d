"""torch's DistributedDataParallel for models whose experts are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import get_process_group_ranks as _ranks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook as at_once
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lina import tracing
from lina.parallel.auto import Auto, Options, agreed_cost
from lina.parallel.experts import ExpertParameter, check_same, expert_parameters, spread_meshes
from lina.parallel.gradients.hook import HookState, ordered_hook, over_meshes, user_settings
from lina.parallel.gradients.reduce import ExpertReducer
from lina.parallel.gradients.watched import ordered
from lina.parallel.mesh import groups
from lina.parallel.plan.decide import Plan
from lina.parallel.settings import common, set_degree
from lina.parallel.slots import layers
from lina.parallel.tokens.dispatch import eagerly
from lina.parallel.transport.carriers import agree_degree

SCHEDULES = ("plain", "lina", "auto")
_IGNORED = "_ddp_params_and_buffers_to_ignore"      # torch's name


class DataParallel(DistributedDataParallel):
    """What :func:`ddp` returns: a DistributedDataParallel that leaves experts to their replicas.

    Attributes:
        plan: what schedule "auto" has chosen; None before, and with other schedules. Another one once its
            steps have been measured.
    """

    _hook: tuple[Any, Any] | None = None       # also set by torch's constructor
    _auto: Auto | None = None
    plan: Plan | None = None
    gently: HookState | None = None            # the state of gradients that give way to all-to-alls

    def __init__(self, module: nn.Module, mesh: DeviceMesh, *, schedule: str = "plain",
                 degree: tuple[int, int] | None = None, hook: HookState | None = None, observe: int = 10,
                 optimizer: Any = None, regroup: bool = False, **options: Any) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"ddp: schedule is {schedule!r}, must be one of {', '.join(SCHEDULES)}")
        given = Options(degree, hook, observe, optimizer, regroup)
        if schedule != "auto" and given != Options(degree, hook):
            raise ValueError(f"ddp: observe, optimizer and regroup are for schedule 'auto', not {schedule!r}")
        if hook is not None and schedule == "plain":
            raise ValueError("ddp: hook is for schedules 'lina' and 'auto', not 'plain'")
        for name in ("process_group", "device_mesh"):
            if options.get(name) is not None:
                raise ValueError(f"ddp: {name} cannot be given; the groups are those of mesh")
        experts = expert_parameters(module)
        if experts and options.get("mixed_precision") is not None:
            raise ValueError("ddp: mixed_precision does not reach experts spread over ranks; "
                             "use torch.autocast")
        world = groups(mesh).world
        for name, _, other in experts:
            if sorted(_ranks(other.world)) != sorted(_ranks(world)):
                raise ValueError(f"ddp: {name} is spread over ranks {_ranks(other.world)}, "
                                 f"the mesh given has {_ranks(world)}")
        _check_dense(module, experts)
        holders, state, refused = [layer.module for _, layer in layers(module)], None, ""
        if schedule == "lina":
            state, refused = over_meshes(hook or HookState(), mesh, spread_meshes(holders))
        init_sync = options.get("init_sync", True)
        if init_sync:
            unused = {name: bool(options.get(name)) for name in ("find_unused_parameters", "static_graph")}
            check_same(experts, world, "ddp", **common(module, mesh, schedule, degree),
                       **user_settings(state), **unused, refused=refused)
        if refused:
            raise ValueError(refused)
        cost = agreed_cost(mesh, given) if schedule == "auto" else None
        ignored = {*getattr(module, _IGNORED, ()), *(e.name for e in experts)}
        former = vars(module).get(_IGNORED)
        self._set_params_and_buffers_to_ignore_for_model(module, ignored)
        try:
            super().__init__(module, process_group=world, **options)
        finally:          # torch's constructor keeps a copy; a later wrapper must not find this one's
            if former is None:
                delattr(module, _IGNORED)
            else:
                setattr(module, _IGNORED, former)
        self._holders = holders
        self.expert_reducer = ExpertReducer(
            experts, may_be_unused=self.find_unused_parameters or self.static_graph,
            static=self.static_graph)
        if init_sync:
            self.expert_reducer.broadcast()
        if cost is not None:
            self._auto = Auto(mesh, *cost, given, next(module.parameters()).device)
            self.register_comm_hook(self._auto.order, ordered)
            degree = (1, 1)                    # while it observes
        if schedule == "lina":
            degree = agree_degree("ddp", [*spread_meshes(holders), mesh][0], degree, world)
        set_degree(module, mesh, degree)
        if state is not None:
            state.queue(next(module.parameters()).device)      # by all ranks together, now
            self.gently = state
            sequence = self.expert_reducer.carry(state.queue, world)
            self.register_comm_hook((state, sequence), ordered_hook)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.expert_reducer.released:
            raise RuntimeError("ddp: the model's experts are no longer spread as they were when it was "
                               "wrapped (lina.unswap); wrap it anew")
        if tracing.active() and self._hook is None and not torch.compiler.is_compiling():
            self._trace_buckets()
        if self.gently is not None:
            eagerly(self._check_carrier)(self.gently)
        auto = self._auto
        if auto is not None:
            eagerly(auto.before)(self)
            self._auto = None if auto.done else auto
        try:
            output = super().forward(*args, **kwargs)
        finally:
            if auto is not None:
                eagerly(auto.after)()
        if self.expert_reducer.by_replicas and torch.is_grad_enabled():
            eagerly(self.expert_reducer.watch)(output, self.require_backward_grad_sync)
        return output

    def _check_carrier(self, gently: HookState) -> None:
        gently.check(spread_meshes(self._holders))

    def register_comm_hook(self, state: object, hook: Any) -> None:
        """As DistributedDataParallel's; the time from each bucket's hook to its result is traced."""
        self._check_comm_hook(hook)
        super().register_comm_hook((state, hook), _traced)
        self._hook = (state, hook)

    def _trace_buckets(self) -> None:
        """The reducer's own allreduce, as a hook; ranks that trace and ranks that don't go together."""
        try:
            self.register_comm_hook(self.process_group, at_once)
        except RuntimeError:                   # one of torch's built-in hooks is there: no spans
            self._hook = (None, None)

    def join_hook(self, **kwargs: Any) -> Any:
        """As DistributedDataParallel's, where no experts are spread over ranks."""
        if self.expert_reducer.by_replicas:
            raise RuntimeError("ddp: join() cannot stand in for the experts' all-to-all; let ranks "
                               "without data run the model on zero tokens instead")
        return super().join_hook(**kwargs)


def ddp(model: nn.Module, mesh: DeviceMesh, *, schedule: str = "plain",
        degree: tuple[int, int] | None = None, hook: HookState | None = None, observe: int = 10,
        optimizer: Any = None, regroup: bool = False, **options: Any) -> DataParallel:
    """Wrap ``model`` so that every gradient is what DistributedDataParallel would give were all
    experts on every rank: the mean over all ranks of the mesh of each rank's gradient.

    Dense parameters are averaged by DistributedDataParallel over the whole mesh. Experts
    spread over several ranks stay out of its buckets: by the end of backward they are averaged over
    their replicas. At construction each replica takes the first one's weights. With a
    rank's loss a mean over its own tokens, the loss of a step is the mean of the ranks' losses; a
    rank without tokens contributes 0 (let its loss be ``output.sum() * 0``, not a mean of nothing).

    Every rank must use its output in its loss: backward is collective. Call ``backward``, not
    ``torch.autograd.grad``. A whole ep group may skip a layer if ``find_unused_parameters``
    or ``static_graph`` is set; one of its ranks alone may not.

    Args:
        mesh: from :func:`lina.mesh`, or any DeviceMesh with a dimension "ep".
        schedule: "plain": gradients are reduced as they become ready, beside the experts' all-to-alls.
            "lina": in micro-ops that let all-to-alls pass, dense ones (:func:`allreduce_hook`,
            which takes the place of a comm hook of your own) and those of replicated experts, from the third
            step on as they become ready, in one order on all ranks; before, and with
            ``find_unused_parameters`` or ``static_graph``, at the end of backward.
            "auto": plain for some steps, observed; then what is fastest by the cost model that `lina
            profile` has saved, the same on all ranks, here too in the place of a comm hook; then, measured
            too, what another transport promises; then the fastest of all. ``plan`` says what, and why.
        degree: expert passes of the mesh's layers, forward and backward, 1 to 8 each: rows travel while
            others are computed; over "p2p" as many each way. By default with "lina" (4, 4), but (1, 1) over
            "p2p", and over "nccl" where all ranks' links have 100 GB/s; with "plain" what the mesh has; with
            "auto" the plan's.
        hook: with "lina" and "auto": sizes of micro-ops, compression; by default ``HookState(mesh)``, with
            "auto" by the measured link.
        observe: with "auto": steps before the plan, counted as forward passes with gradients to reduce; and
            as many under it, from its second one on.
        optimizer, regroup: with "auto": the optimizer says how much state experts have, and ``regroup=True``
            lets the plan move experts and that state to another ep (:func:`lina.regroup`).
        options: DistributedDataParallel's; ``process_group`` and ``device_mesh`` come from the mesh.
            ``no_sync``, ``find_unused_parameters``, ``static_graph``, ``gradient_as_bucket_view``,
            comm hooks and autocast work as there; ``mixed_precision`` and ``join`` do not work with
            experts spread over ranks.

    Raises:
        ValueError: an option that cannot work, or ranks that differ in schedule, degree, transport,
            hook or the experts' names, shapes or dtypes; with "auto" a cost model that is missing, of
            another machine, or without the transport in use; on every rank. In forward: another
            transport than gradients were set up to give way to.
        RuntimeError: no parameter outside the experts takes a gradient; a rank cannot make the transport, on
            every rank. In forward: the model was given back its experts (:func:`lina.unswap`) since. In
            backward: another rank failed or left, within the group's timeout; with "lina", experts that from
            some step on run in several reentrant checkpoints, so that a gradient comes in parts.
    """
    return DataParallel(model, mesh, schedule=schedule, degree=degree, hook=hook, observe=observe,
                        optimizer=optimizer, regroup=regroup, **options)


def _traced(state: Any, bucket):  # torch reads these annotations and wants them absent or its own
    user_state, hook = state
    if not tracing.active():
        return hook(user_state, bucket)
    buffer = bucket.buffer()
    token = tracing.begin("allreduce", f"bucket {bucket.index()}", buffer.device, bytes=buffer.nbytes,
                          layer=tracing.owners(bucket.parameters()))

    def done(future: Any) -> Any:
        tracing.end(token)
        return future.value()

    return hook(user_state, bucket).then(done)


def _check_dense(module: nn.Module, experts: list[ExpertParameter]) -> None:
    """torch's own message for this would say that the wrapper is not needed."""
    spread = {id(e.param) for e in experts}
    if experts and not any(p.requires_grad for p in module.parameters() if id(p) not in spread):
        raise RuntimeError("ddp: every parameter outside the experts is frozen; leave one with "
                           "requires_grad, a router's weight say, for DistributedDataParallel to work on")
