"""Who holds which experts: lina's mesh, and the groups of any mesh with a dimension "ep"."""

from __future__ import annotations

import atexit
import dataclasses
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lina.parallel.settings import Settings, settings


class Groups(NamedTuple):
    """The process groups of one mesh, as this rank sees them."""

    ep: dist.ProcessGroup          # holds one copy of every expert, spread over its ranks
    replicas: dist.ProcessGroup    # holds the same experts as this rank
    world: dist.ProcessGroup       # all ranks of the mesh: they hold the same dense parameters


def mesh(ep: int, *, device_type: str | None = None, transport: str = "auto",
         tokens: int | None = None, cap_bytes: int | None = None) -> DeviceMesh:
    """A DeviceMesh ("dp", "ep") of shape (world / ep, ep) over the default process group.

    Experts are spread over ``ep`` ranks and replicated world / ep times: rank r has coordinates
    (r // ep, r % ep). Collective: every rank of the default group calls it, after
    ``init_process_group`` (and, for CUDA, after ``torch.cuda.set_device``). The groups take the
    default group's timeout; ``init_device_mesh`` would give them torch's default of 10 to 30
    minutes, in which a dead peer goes unnoticed.

    Args:
        ep: number of ranks one copy of the experts is spread over.
        device_type: "cuda" or "cpu"; by default what the default group's backend serves.
        transport: what carries the tokens of layers spread over the mesh: "c10d" (torch.distributed),
            "nccl" (communicators of lina's own), "p2p" (stores to the memory of GPUs nearby), or "auto":
            "nccl" on GPUs whose process group is NCCL's, else "c10d". May be changed later:
            ``lina.parallel.settings(mesh)``.
        tokens, cap_bytes: "p2p" alone: the most tokens any rank will have, by default those of a layer's
            first call; the limit on a rank's receive buffer.

    Raises:
        RuntimeError: there is no default process group.
        ValueError: ``ep`` does not divide the number of ranks, or another argument is outside its limits;
            on every rank.
    """
    if not dist.is_initialized():
        raise RuntimeError("mesh: no process group; call torch.distributed.init_process_group first")
    world, everyone = dist.get_world_size(), _world()
    if ep < 1 or world % ep:
        raise ValueError(f"mesh: ep is {ep}, must divide the {world} ranks of the default process group")
    chosen = Settings(transport, tokens=tokens, cap_bytes=cap_bytes)
    if device_type is None:
        device_type = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    ranks_DE = torch.arange(world).view(world // ep, ep)
    timeout = timeout_of(everyone)
    groups = [dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)[0]
              for ranks in (ranks_DE.T, ranks_DE)]
    made = DeviceMesh.from_group(groups, device_type, mesh=ranks_DE, mesh_dim_names=("dp", "ep"))
    for field in dataclasses.fields(chosen):
        setattr(settings(made), field.name, getattr(chosen, field.name))
    return made


# By id: an equal mesh made before has groups of its own, and may be alive on some ranks only.
_cache: dict[int, Groups] = {}


def groups(mesh: DeviceMesh) -> Groups:
    """The groups of ``mesh``: its dimension "ep", all its other dimensions together, and both.

    Any DeviceMesh will do; pass the slice whose ranks hold the same model, such as
    ``mesh["dp_replicate", "dp_shard", "ep"]`` of one that also has pipeline stages. Where more
    than one other dimension exists, the first call is collective over the mesh.

    Raises:
        ValueError: no dimension "ep", or this rank is not in the mesh.
    """
    found = _cache.get(id(mesh))
    if found is not None and found.world.size() == mesh.size() and _alive(found.world):
        return found
    names = mesh.mesh_dim_names or ()
    if "ep" not in names:
        raise ValueError(f'mesh: dimensions are {names}, one must be named "ep"')
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"mesh: rank {dist.get_rank()} is not part of {mesh}")
    ep = mesh.get_group("ep")
    dim = names.index("ep")
    others = [name for name in names if name != "ep"]
    if len(others) == 1:
        replicas = mesh.get_group(others[0])
    else:
        replicas = _group(mesh.mesh.select(dim, coordinate[dim]), ep)
    found = _cache[id(mesh)] = Groups(ep, replicas, _group(mesh.mesh, ep))
    weakref.finalize(mesh, _cache.pop, id(mesh), None)
    return found


def _group(ranks: Tensor, like: dist.ProcessGroup) -> dist.ProcessGroup:
    members = sorted(ranks.flatten().tolist())
    if len(members) == dist.get_world_size():
        return _world()
    if members == sorted(dist.get_process_group_ranks(like)):
        return like
    return new_group(members, timeout_of(like))


_asked: Counter[tuple[int, ...]] = Counter()


def new_group(ranks: Sequence[int], timeout: timedelta | None) -> dist.ProcessGroup:
    """A group of ``ranks``, sorted; collective over them alone.

    Raises:
        ValueError: the ranks, on all of them, would give it different names, and so wait for each other in
            vain. Up to torch 2.14 the name of a group of some counts the groups that a rank is in; from 2.15
            on every name counts those that it has made.
    """
    members, some = tuple(ranks), len(ranks) < dist.get_world_size()
    name = c10d._hash_ranks_to_str(list(members)) if some else str(c10d._world.group_count)
    _asked[members] += 1
    store = dist.PrefixStore(f"lina/groups/{members}/{_asked[members]}", c10d._get_default_store())
    store.set(str(dist.get_rank()), name)
    keys = [str(rank) for rank in members]
    store.wait(keys, timeout or timedelta(seconds=600))
    if len({bytes(store.get(key)) for key in keys}) > 1:
        raise ValueError(f"mesh: torch {torch.__version__} cannot make a group of ranks {list(members)}, "
                         "which are in different numbers of groups: make groups that only some of them are "
                         "in after lina's mesh and the first backward pass")
    return dist.new_group(list(members), timeout=timeout, use_local_synchronization=some)


def _alive(group: dist.ProcessGroup) -> bool:
    """False for a group of a default group that has since been destroyed."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None           # initialised
    return group


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", None)


def seconds_of(group: dist.ProcessGroup) -> float:
    """Seconds that the ranks of ``group`` wait for each other; torch's own for NCCL where none are set."""
    found = timeout_of(group)
    return 600.0 if found is None else found.total_seconds()


def ep_size(mesh: DeviceMesh) -> int:
    """Number of ranks that one copy of the experts is spread over."""
    return groups(mesh).ep.size()


def ep_rank(mesh: DeviceMesh) -> int:
    """This rank's place among them: it holds experts [ep_rank * local, (ep_rank + 1) * local)."""
    return groups(mesh).ep.rank()


def local_count(experts: int, mesh: DeviceMesh) -> int:
    """Experts that each rank of ``mesh["ep"]`` holds.

    Raises:
        ValueError: the ranks cannot share ``experts`` evenly; on every rank.
    """
    ep = ep_size(mesh)
    if experts < 1 or experts % ep:
        raise ValueError(f"experts is {experts}, must be a multiple of ep, "
                         f"the {ep} ranks they are spread over")
    return experts // ep


def shard(weight_E: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's experts of a tensor [E, ...] that holds all of them: [E / ep, ...], a view."""
    local = local_count(weight_E.shape[0], mesh)
    return weight_E.narrow(0, ep_rank(mesh) * local, local)


@atexit.register
def _let_threads_finish() -> None:
    """A thread of gloo's may be about to release the tensors of the last collective, for which it
    needs the interpreter; once that is going down, the process would abort instead."""
    if len(_cache):
        time.sleep(0.02)
