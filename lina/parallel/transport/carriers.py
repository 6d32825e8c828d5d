"""The transports with exact counts, by name, and the one of a mesh."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakIdKeyDictionary

from lina.parallel.experts import agree, together
from lina.parallel.mesh import groups
from lina.parallel.settings import Settings, chosen
from lina.parallel.transport.base import Transport, failure
from lina.parallel.transport.c10d import C10d
from lina.parallel.transport.nccl import NCCL
from lina.parallel.transport.peers import in_use

makers: dict[str, Callable[[dist.ProcessGroup], Transport]] = {"c10d": C10d, "nccl": NCCL}
# Of schedule "lina" over slow links: over 23 GB/s fastest of a Transformer-XL-like model by a tenth, and 1 %
# behind 2 passes of a Qwen3-like one (benchmarks/results).
SLOW_DEGREE = (4, 4)
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


def agree_degree(op: str, mesh: DeviceMesh, degree: tuple[int, int] | None,
                 world: dist.ProcessGroup) -> tuple[int, int]:
    """The passes of schedule "lina" of layers over ``mesh``: ``degree``, or what suits its links, the same on
    all ranks of ``world``; collective. One pass over p2p, and over nccl where no rank has found its links
    slow, for there more cost more than they hide; c10d's are not measured.

    Raises:
        ValueError: a degree outside its limits; ranks that were told different things, on every rank.
        RuntimeError: the transport cannot be made on one of them; on every rank.
    """
    name, size = chosen(mesh), groups(mesh).ep.size()
    degree = degree and Settings(degree=degree).degree     # within its limits
    agree(op, {"degree": degree, "transport": name, "ep": size}, world, torch.device(mesh.device_type))
    if degree is not None:
        return degree
    fast = name == "p2p" or (name == "nccl" and (size == 1 or all(
        together(f"{op}: measuring links", world, lambda: transport(mesh).fast))))
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
