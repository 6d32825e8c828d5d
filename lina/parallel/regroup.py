"""Another expert-parallel degree for a model in training: experts and optimizer state move.

The ranks stay as they are. With half of them in "ep" each holds twice the experts, and every
expert is held twice as often: the expert packing of Lina (Li et al. 2023, arXiv:2210.17223,
section 5). Differs: optimizer state moves with the weights, and it goes both ways.

The ranks that one copy of the experts was spread over hold all of them between them, so each rank
gets what it lacks from its own such group, every expert once, and nothing is averaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lina.parallel.experts import ExpertParameter
from lina.parallel.gradients.reduce import living
from lina.parallel.mesh import groups, mesh, new_group, timeout_of
from lina.parallel.settings import settings
from lina.parallel.slots import Layer, Slot, check_gradients, layers, move, per_row, ranks, share, slots

Move = tuple[list[nn.Parameter], list[ExpertParameter]]     # of one kind: here before, here now


def regroup(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None, ep: int) -> DeviceMesh:
    """Spread the experts of ``model`` over ``ep`` ranks from now on; returns the mesh for that.

    To be called between two steps, after ``zero_grad``. Weights and optimizer state move bit for
    bit: training goes on as it would have, up to the order in which sums over ranks are taken.
    Modules, Parameters and param_groups stay the same objects, and a wrapper by :func:`lina.ddp`
    goes on working. Only a plain block that was swapped, with a Parameter for each expert, has
    those in ``param_groups`` exchanged for the ones of the experts that are here now. Collective:
    every rank of the model's mesh calls it. Meshes are kept, so that going back makes no groups.

    One tensor moves at a time: beside the old one and the new one it needs memory for what is sent,
    at most the larger of the two. A plain block's weights are copied once more.

    Args:
        model: with experts that have a mesh (:class:`lina.MoE`, :func:`lina.swap`); the wrapper, if
            there is one.
        optimizer: of torch.optim, several, or None. What it keeps for a parameter must be plain
            tensors of the parameter's shape, or single values.
        ep: divides the number of ranks of the model's mesh and every layer's number of experts.

    Raises:
        ValueError: an argument outside its limits; ranks that disagree on ``ep`` or hold different
            parameters or optimizer state; a gradient that is not None; optimizer state of another
            kind; experts in DistributedDataParallel's buckets, as those of a wrapper made at ep = 1
            are. On every rank; nothing is changed then.
        RuntimeError: another rank failed or left; some experts have moved then, others have not.

    Source: Li et al. 2023, arXiv:2210.17223, section 5.
    """
    found = layers(model)
    if not found:
        raise ValueError("regroup: model has no experts with a mesh; give lina.MoE or lina.swap one")
    meshes = [layer.module.mesh for _, layer in found]
    parts: list[Slot] = []
    optimizers: list[Optimizer] = []
    facts: list[str] = []
    problem = ""
    try:
        optimizers = _optimizers(optimizer)
        _check_ep(ep, found)
        parts = slots(found)
        check_gradients(model, parts)
        facts = [_facts(slot, optimizers) for slot in parts]
    except ValueError as error:
        problem = str(error)
    _agree(ep, problem, facts, groups(meshes[0]).world)
    new = next((m for m in meshes if groups(m).ep.size() == ep), None) or _sibling(found, ep)
    moves: list[Move] = []
    for _, layer in found:
        if groups(layer.module.mesh).ep.size() == ep:
            continue
        here = [slot for slot in parts if slot.layer is layer]
        for slot in here:
            move(slot, new, optimizers)
            moves.append((slot.held(), [ExpertParameter(slot.name, p, groups(new)) for p in slot.held(new)]))
        if any(not slot.stacked for slot in here):
            _exchange_params(here, new, optimizers)
        layer.place(new, *share(layer.module.count, new))
    vars(settings(new)).update(vars(settings(meshes[0])))
    _tell_wrappers(moves)
    return new


def check_movable(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None) -> None:
    """ValueError for what :func:`regroup` would refuse on this rank: gradients, or an optimizer's state."""
    parts = slots(layers(model))
    check_gradients(model, parts)
    optimizers = _optimizers(optimizer)
    for slot in parts:
        _facts(slot, optimizers)


def _optimizers(given: Any) -> list[Optimizer]:
    found = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"regroup: optimizer is a {type(optimizer).__name__}, must be one of "
                             "torch.optim, a list of them, or None")
    return found


def _check_ep(ep: Any, found: list[tuple[str, Layer]]) -> None:
    everyone = found[0][1].module.mesh.mesh.flatten().sort().values
    world = len(everyone)
    if isinstance(ep, bool) or not isinstance(ep, int) or ep < 1 or world % ep:
        raise ValueError(f"regroup: ep is {ep}, must divide the {world} ranks of the model's mesh")
    for name, layer in found:
        if layer.module.count % ep:
            raise ValueError(f"regroup: ep is {ep}, must divide the {layer.module.count} experts of "
                             f"{name or 'the model'}")
        members = layer.module.mesh.mesh.flatten().sort().values
        if not torch.equal(members, everyone):
            raise ValueError(f"regroup: the mesh of {name} has ranks {members.tolist()}, that of "
                             f"{found[0][0]} {everyone.tolist()}; must be the same")


def _facts(slot: Slot, optimizers: list[Optimizer]) -> str:
    """What all ranks, and all Parameters of the slot, must have in common."""
    found = []
    for p in slot.held():
        about: list[Any] = [slot.name, tuple(p.shape), p.dtype, p.requires_grad]
        for optimizer in optimizers:
            about.append([g for g, group in enumerate(optimizer.param_groups)
                          if any(q is p for q in group["params"])])
            about.append({key: _kind(slot.name, key, value, p)
                          for key, value in sorted(optimizer.state.get(p, {}).items())})
        found.append(repr(about))
    if len(set(found)) > 1:
        raise ValueError(f"regroup: the experts' {slot.name} differ in requires_grad, optimizer group or "
                         f"optimizer state: {' and '.join(sorted(set(found))[:2])}")
    return found[0]


def _kind(name: str, key: Any, value: Any, p: nn.Parameter) -> Any:
    """The dtype of state that has an entry for each weight; else the value."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) in (Tensor, nn.Parameter):
        if per_row(value, p):
            return value.dtype
        if value.numel() == 1:
            return value.dtype, value.tolist()
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise ValueError(f"regroup: optimizer state {key!r} of {name} is a {type(value).__name__}{shape}; must "
                     f"be a single value, or a plain tensor of the parameter's shape {tuple(p.shape)}")


def _agree(ep: Any, problem: str, facts: list[str], world: dist.ProcessGroup) -> None:
    """ValueError on all ranks if one has a problem, or if they differ."""
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    said: list[Any] = [None] * world.size()
    dist.all_gather_object(said, (repr(ep), problem, digest), group=world)
    eps = [text for text, _, _ in said]
    if len(set(eps)) > 1:
        raise ValueError(f"regroup: the ranks disagree on ep: {', '.join(eps)} by rank")
    whose = [rank for rank, (_, text, _) in enumerate(said) if text]
    if whose:
        raise ValueError(problem or f"{said[whose[0]][1]} (found by rank {whose[0]} of the mesh)")
    if len({digest for _, _, digest in said}) > 1:
        raise ValueError("regroup: the ranks' experts differ in names, shapes, dtypes or requires_grad, or "
                         "their optimizer state in kind, group or number of steps; "
                         f"here: {repr(facts)[:300]}")


def _exchange_params(here: list[Slot], new: DeviceMesh, optimizers: list[Optimizer]) -> None:
    """Put the Parameters of the experts that are here now where the former ones stood, expert by expert."""
    home = {id(p): slot for slot in here for p in slot.held()}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        first: dict[str, tuple[Slot, str]] = {}        # in this group, and the name of its first Parameter
        kept: list[tuple[Any, str]] = []
        place = 0
        for p, name in zip(group["params"], group.get("param_names", group["params"]), strict=True):
            slot = home.get(id(p))
            if slot is None:
                kept.append((p, name))
                continue
            place = place if first else len(kept)
            first.setdefault(slot.name, (slot, name))
        rows = zip(*(slot.held(new) for slot, _ in first.values()), strict=True)
        kept[place:place] = [(p, f"{str(name).removesuffix('0.' + slot.inner)}{e}.{slot.inner}")
                             for e, row in enumerate(rows)
                             for p, (slot, name) in zip(row, first.values(), strict=True)]
        group["params"][:] = [p for p, _ in kept]
        if "param_names" in group:
            group["param_names"][:] = [name for _, name in kept]


def _tell_wrappers(moves: list[Move]) -> None:
    """Experts now here are scaled and averaged as those before were, over their own groups."""
    for gone, come in moves:
        mark = vars(gone[0]).get("_ddp_ignored")
        for p in gone:
            vars(p).pop("_ddp_ignored", None)
        if mark is not None:
            for expert in come:
                vars(expert.param)["_ddp_ignored"] = mark
    for reducer in living():
        reducer.follow(moves)


def _sibling(found: list[tuple[str, Layer]], ep: int) -> DeviceMesh:
    """The mesh of the same ranks with another ep. Layers keep those they had: groups are made once."""
    known: dict[int, DeviceMesh] = vars(found[0][1].module).get("_lina_meshes", {})
    for _, layer in found:
        vars(layer.module)["_lina_meshes"] = known
        known.setdefault(groups(layer.module.mesh).ep.size(), layer.module.mesh)
    if ep not in known:
        old = found[0][1].module.mesh
        ranks_DE = ranks(old).reshape(-1, ep).sort(-1).values
        if ranks_DE.flatten().tolist() == list(range(dist.get_world_size())):
            known[ep] = mesh(ep, device_type=old.device_type)
        else:
            known[ep] = _mesh_of(ranks_DE, old)
    return known[ep]


def _mesh_of(ranks_DE: Tensor, like: DeviceMesh) -> DeviceMesh:
    """As :func:`lina.mesh`, of some ranks; the others take no part."""
    row, column = (ranks_DE == dist.get_rank()).nonzero()[0].tolist()
    timeout = timeout_of(groups(like).world)
    pair = [new_group(members.tolist(), timeout)
            for members in (ranks_DE[:, column], ranks_DE[row])]
    return DeviceMesh.from_group(pair, like.device_type, mesh=ranks_DE, mesh_dim_names=("dp", "ep"))
