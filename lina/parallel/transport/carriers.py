"""The transports with exact counts, by name, and the one of a mesh."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakIdKeyDictionary

from lina.parallel.mesh import groups
from lina.parallel.settings import chosen
from lina.parallel.transport.base import Transport, failure
from lina.parallel.transport.c10d import C10d
from lina.parallel.transport.nccl import NCCL
from lina.parallel.transport.peers import in_use

makers: dict[str, Callable[[dist.ProcessGroup], Transport]] = {"c10d": C10d, "nccl": NCCL}
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
