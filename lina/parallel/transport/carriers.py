"""The transports with exact counts, by name, and the one of a mesh."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakIdKeyDictionary

from lina.parallel.experts import together
from lina.parallel.mesh import groups
from lina.parallel.settings import chosen, meshes, settings
from lina.parallel.transport.base import Transport, failure
from lina.parallel.transport.c10d import C10d
from lina.parallel.transport.nccl import NCCL
from lina.parallel.transport.peers import in_use

makers: dict[str, Callable[[dist.ProcessGroup], Transport]] = {"c10d": C10d, "nccl": NCCL}
SLOW_DEGREE = (4, 4)             # of schedule "lina": what two models of experts were fastest in over 23 GB/s
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()         # mesh -> its transports by name


def transport(mesh: DeviceMesh) -> Transport:
    """What carries the tokens of ``mesh["ep"]``; made at first use, by all its ranks together.

    Raises:
        ValueError: the transport set for the mesh does not count on the host.
        RuntimeError: it cannot be made here.
    """
    name, group = chosen(mesh), groups(mesh).ep
    if name not in makers:
        raise ValueError(f"mesh: transport {name!r} exchanges no counts, must be one of {', '.join(makers)}")
    made = _made.setdefault(mesh, {})
    if name not in made or made[name].group is not group:      # other process groups have come since
        made[name] = makers[name](group)
    return made[name]


def set_degree(model: nn.Module, mesh: DeviceMesh, degree: tuple[int, int] | None) -> None:
    """Set ``degree`` for ``mesh`` and every mesh of ``model``; None: the default of schedule "lina".
    Collective."""
    for one in meshes(model, mesh):
        settings(one).degree = degree or _default_degree(one)


def _default_degree(mesh: DeviceMesh) -> tuple[int, int]:
    """One pass where links are fast, for there more cost more than they hide: over p2p, and over nccl if all
    ranks of ``mesh`` have measured that. c10d's are not measured."""
    name, (ep, _, world) = chosen(mesh), groups(mesh)
    fast = name == "p2p" or (name == "nccl" and (
        ep.size() == 1 or not any(together("mesh: nccl", world, lambda: transport(mesh).slow))))
    return (1, 1) if fast else SLOW_DEGREE


def check(label: str, group: dist.ProcessGroup) -> None:
    """RuntimeError if lina's own transports over ``group`` know by now that a rank has failed or left: a
    collective of torch's over it would wait for that rank."""
    used = [made.get("nccl") for made in list(_made.values())]
    try:
        for carrier in used:
            if isinstance(carrier, NCCL) and carrier.group is group:
                carrier.comm.check()
        for passes in in_use.get(group, {}).values():
            for peers in passes:
                if peers.lost():           # stopped for another reason: the ranks are there
                    peers.check()
    except RuntimeError as error:
        raise failure(label, group, error) from error
