"""Which parameters of a model are experts spread over ranks, and what all ranks must have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lina.parallel.mesh import Groups, groups


class ExpertParameter(NamedTuple):
    name: str                      # in model.named_parameters()
    param: nn.Parameter
    groups: Groups


def expert_parameters(model: nn.Module) -> list[ExpertParameter]:
    """The parameters of which each rank of an "ep" group of several ranks holds a part.

    They are those in every module with attributes ``count`` (all experts), ``local`` (those
    here) and ``mesh`` (a DeviceMesh with a dimension "ep", or None), such as
    :class:`lina.nn.Experts`. Experts that are whole on every rank are not among them: they
    are ordinary parameters. In the order of ``model.named_modules()``, each once.
    """
    found: dict[int, ExpertParameter] = {}
    for prefix, module, mesh in _spread(model):
        for name, param in module.named_parameters(prefix):
            found.setdefault(id(param), ExpertParameter(name, param, groups(mesh)))
    return list(found.values())


def check_same(experts: list[ExpertParameter], world: dist.ProcessGroup, op: str, **told: Any) -> None:
    """Ranks that built different experts, or run them differently, would wait for each other, or mix
    them up; as :func:`agree`. ``told``: what else they have in common, by name."""
    built = [(e.name, tuple(e.param.shape), e.param.dtype, e.param.requires_grad) for e in experts]
    device = experts[0].param.device if experts else torch.device("cpu")
    if not experts and dist.get_backend(world) == "nccl":
        device = torch.device("cuda")
    agree(op, {**told, "names, shapes, dtypes or requires_grad of experts": built}, world, device)


def agree(op: str, facts: dict[str, Any], group: dist.ProcessGroup, device: torch.device) -> None:
    """ValueError on every rank of ``group``, saying what differs, unless all give equal ``facts``.

    Collective, over tensors on ``device``; the names of ``facts`` are the same on every rank.
    """
    if group.size() == 1:
        return
    digests = [int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
               for value in facts.values()]
    extremes = torch.tensor([digests, [-d for d in digests]], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    high, low = extremes.tolist()
    for (name, value), most, least in zip(facts.items(), high, low, strict=True):
        if most == -least:
            continue
        said: list[Any] = [None] * group.size()
        dist.all_gather_object(said, repr(value), group=group)
        by_value: dict[str, list[int]] = {}
        for rank, text in zip(dist.get_process_group_ranks(group), said, strict=True):
            by_value.setdefault(text, []).append(rank)
        shown = "; ".join(f"{text[:200]} on ranks {ranks}" for text, ranks in by_value.items())
        raise ValueError(f"{op}: the ranks differ in {name}: {shown}")


def together(op: str, group: dist.ProcessGroup, call: Callable[[], Any]) -> list[Any]:
    """Every rank's ``call()``, by rank; where one raises, a RuntimeError on every rank. Collective."""
    found, wrong, cause = None, "", None
    try:
        found = call()
    except Exception as error:                 # whatever it is, those who wait must learn of it
        wrong, cause = f"{type(error).__name__}: {error}", error
    said: list[Any] = [None] * group.size()
    dist.all_gather_object(said, (found, wrong), group=group)
    for rank, (_, wrong) in zip(dist.get_process_group_ranks(group), said, strict=True):
        if wrong:
            raise RuntimeError(f"{op} failed on rank {rank}: {wrong}") from cause
    return [theirs for theirs, _ in said]


def spread_meshes(modules: list[Any]) -> list[DeviceMesh]:
    """What the experts that ``modules`` hold are spread over now, where they are."""
    found = (getattr(module, "mesh", None) for module in modules)
    return [m for m in found if isinstance(m, DeviceMesh) and groups(m).ep.size() > 1]


def _spread(model: nn.Module) -> Iterator[tuple[str, nn.Module, DeviceMesh]]:
    for name, module in model.named_modules():
        mesh = getattr(module, "mesh", None)
        if isinstance(mesh, DeviceMesh) and hasattr(module, "count") and hasattr(module, "local"):
            if groups(mesh).ep.size() > 1:
                yield name, module, mesh
