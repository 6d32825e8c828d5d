"""torch's fully_shard (FSDP2) for models whose experts are spread over ranks.

Dense parameters stay fully_shard's; their gradients may travel in lina's reduce-scatter
(gradients/reduce_scatter.py), those of experts are averaged over replicas by lina (gradients/reduce.py).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lina.parallel.experts import ExpertParameter, check_same, expert_parameters, spread_meshes
from lina.parallel.gradients.hook import HookState, over_meshes, user_settings
from lina.parallel.gradients.reduce import ExpertReducer
from lina.parallel.gradients.reduce_scatter import AtOnce, ReduceScatter
from lina.parallel.mesh import groups
from lina.parallel.settings import common, set_degree
from lina.parallel.slots import layers
from lina.parallel.tokens.dispatch import eagerly
from lina.parallel.transport.carriers import agree_degree

SCHEDULES = ("plain", "lina")
_HERE = "_lina_fsdp"          # the attribute of a model that keeps what a call set


class _Experts(ExpertReducer):
    """Leaves gradients alone in backward passes in which fully_shard does (set_requires_gradient_sync)."""

    def __init__(self, model: nn.Module, experts: list[ExpertParameter], state: HookState | None, *,
                 may_be_unused: bool) -> None:
        super().__init__(experts, may_be_unused=may_be_unused, static=False)
        self._model, self._state = weakref.ref(model), state
        self._holders = [layer.module for _, layer in layers(model)]

    @torch.no_grad()
    def reduce(self) -> None:
        model = self._model()
        if model is None or _reduces(model):
            super().reduce()

    def before(self, *unused: Any) -> None:
        if self.released:
            raise RuntimeError("fsdp: the model's experts are no longer spread as they were when lina.fsdp "
                               "was called (lina.unswap); call it anew")
        if self._state is not None:
            eagerly(self._check_carrier)(self._state)

    def _check_carrier(self, state: HookState) -> None:
        state.check(spread_meshes(self._holders))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            eagerly(self.watch)(output)


def fsdp(model: nn.Module, mesh: DeviceMesh, *, schedule: str = "plain",
         degree: tuple[int, int] | None = None, hook: HookState | None = None,
         find_unused_parameters: bool = False) -> nn.Module:
    """Prepare ``model``, which torch's ``fully_shard`` has sharded, so that every gradient is what it
    would be were all experts on every rank: the mean over all ranks of the mesh.

    Experts spread over ranks are no part of fully_shard; leave them out and shard the rest over all
    ranks of ``mesh``::

        experts = {e.param for e in lina.parallel.expert_parameters(model)}
        for block in model.blocks:
            fully_shard(block, ignored_params=experts)
        fully_shard(model, ignored_params=experts)
        lina.fsdp(model, mesh, schedule="lina")

    After backward experts are averaged over their replicas; at the call each replica takes the first
    one's weights. Losses, uneven tokens and skipped layers: as in :func:`ddp`. Calling it again replaces
    what the call before set.

    Args:
        mesh: from :func:`lina.mesh`, or any DeviceMesh with a dimension "ep".
        schedule: "plain": gradients are reduced as they become ready. "lina": in micro-ops that let
            all-to-alls pass (:class:`ReduceScatter`), and those of experts after them.
        degree: expert passes of the mesh's layers, forward and backward, as in :func:`ddp`.
        hook: with "lina": sizes of micro-ops, without compression; by default ``HookState(mesh)``.
        find_unused_parameters: a whole ep group may leave experts without gradients; ``.grad`` stays
            what it was where no replica has one.

    Returns:
        ``model``.

    Raises:
        ValueError: nothing is sharded by fully_shard, or experts are, or a dense parameter is not, or
            not over all ranks of ``mesh``; another option that cannot work; ranks that differ, as in
            :func:`ddp`. In forward: as there.
        RuntimeError: torch has no ``set_custom_reduce_scatter``, or a rank cannot make the transport. In
            backward: another rank failed or left.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"fsdp: schedule is {schedule!r}, must be one of {', '.join(SCHEDULES)}")
    sharded = _sharded(model)
    if hook is not None and schedule != "lina":
        raise ValueError(f"fsdp: hook is for schedule 'lina', not {schedule!r}")
    state, refused = (hook or HookState()) if schedule == "lina" else None, ""
    scatter = AtOnce() if state is None else ReduceScatter(state)
    world, experts = groups(mesh).world, expert_parameters(model)
    _check(model, experts, world)
    if state is not None:
        spread = spread_meshes([layer.module for _, layer in layers(model)])
        state, refused = over_meshes(state, mesh, spread)
    check_same(experts, world, "fsdp", **common(model, mesh, schedule, degree), **user_settings(state),
               find_unused_parameters=bool(find_unused_parameters), refused=refused)
    if refused:
        raise ValueError(refused)
    if state is not None:
        degree = agree_degree("fsdp", [*spread, mesh][0], degree, world)
    before = vars(model).pop(_HERE, None)
    if before is not None:
        before.remove()
    reducer = _Experts(model, experts, state, may_be_unused=find_unused_parameters)
    reducer.broadcast()
    set_degree(model, mesh, degree)
    if state is not None:
        state.queue(next(model.parameters()).device)         # by all ranks together, now
        reducer.queue = state.queue
    if state is not None or before is not None:
        for module in sharded:
            module.set_custom_reduce_scatter(scatter)
    vars(model)[_HERE] = _Hooks(model, reducer)
    return model


class _Hooks:
    """What a call leaves in the model, to be taken out by the next."""

    def __init__(self, model: nn.Module, reducer: _Experts) -> None:
        self._handles = [model.register_forward_pre_hook(reducer.before)]
        if reducer.by_replicas:
            self._handles.append(model.register_forward_hook(reducer.after))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _sharded(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was called on."""
    import torch.distributed.fsdp as torch_fsdp  # a second that `import lina` must not take

    kind: Any = getattr(torch_fsdp, "FSDPModule", None)
    if not hasattr(kind, "set_custom_reduce_scatter"):
        raise RuntimeError(f"fsdp: torch {torch.__version__} has no FSDPModule.set_custom_reduce_scatter; "
                           "lina needs torch 2.10 or newer")
    found = [module for module in model.modules() if isinstance(module, kind)]
    if not found:
        raise ValueError(f"fsdp: no module of {type(model).__name__} is sharded; call "
                         "torch.distributed.fsdp.fully_shard on it first")
    return found


def _reduces(model: nn.Module) -> bool:
    """Whether fully_shard's modules reduce their gradients; torch has a setter for it alone."""
    found = []
    for module in model.modules():
        state: Any = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None   # type: ignore
        kept = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        found += [getattr(group, "reduce_grads", True) for group in kept if group is not None]
    return any(found) or not found


def _check(model: nn.Module, experts: list[ExpertParameter], world: dist.ProcessGroup) -> None:
    """Gradients that nothing reduces, or that some ranks do not share, would let ranks drift apart."""
    from torch.distributed.tensor import DTensor

    ranks = dist.get_process_group_ranks(world)
    spread = {id(e.param): e for e in experts}
    for name, param in model.named_parameters():
        expert = spread.get(id(param))
        if expert is not None:
            over = dist.get_process_group_ranks(expert.groups.world)
            if sorted(over) != sorted(ranks):
                raise ValueError(f"fsdp: {name} is spread over ranks {over}, the mesh given has {ranks}")
            if isinstance(param, DTensor):
                raise ValueError(f"fsdp: {name} is one of the experts spread over ranks, and fully_shard has "
                                 "sharded it besides; name them in its ignored_params")
        elif isinstance(param, DTensor):
            over = sorted(param.device_mesh.mesh.flatten().tolist())
            if not set(ranks) <= set(over):
                raise ValueError(f"fsdp: {name} is sharded over ranks {over}, must be over all ranks of the "
                                 f"mesh given, {ranks}")
        elif param.requires_grad:
            raise ValueError(f"fsdp: {name} is sharded by no fully_shard: nothing would reduce its gradient")
