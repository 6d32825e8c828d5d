"""The experts of a model as :func:`lina.regroup` moves them: what there is, and the move of one part.

A slot is what every expert of a layer has one of: w_up, say, and what an optimizer keeps for it.
Its rows, one an expert, are one stacked Parameter or a Parameter each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lina import tracing
from lina.parallel.mesh import groups
from lina.parallel.tokens.dispatch import raw


class Layer(NamedTuple):
    """The experts of one layer.

    A module with ``count``, ``local`` and ``mesh`` needs to say nothing if its parameters are all
    stacked, [local, ...]; another, or one that notes more than these, has a method
    ``regroup_layer()`` that returns this.
    """

    module: Any                               # carries count, local and mesh
    slots: dict[str, list[nn.Parameter]]      # one stacked Parameter, or one for each of all experts
    place: Callable[[DeviceMesh, int, int], None]   # (mesh, first, local); the data are there by then


class Slot(NamedTuple):
    name: str                                 # in the model, for messages
    inner: str                                # in the layer
    params: list[nn.Parameter]
    layer: Layer

    @property
    def stacked(self) -> bool:
        return len(self.params) == 1

    def held(self, mesh: DeviceMesh | None = None) -> list[nn.Parameter]:
        """Those with this rank's experts, under ``mesh`` or now."""
        if self.stacked:
            return self.params
        first, local = share(self.layer.module.count, mesh or self.layer.module.mesh)
        return self.params[first:first + local]


def layers(model: nn.Module) -> list[tuple[str, Layer]]:
    """Name and layer of all experts with a mesh, one rank's too; in the model's order."""
    found: list[tuple[str, Layer]] = []
    covered: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in covered:
            continue
        if hasattr(module, "regroup_layer"):
            layer = module.regroup_layer()
            covered.update(map(id, module.modules()))
        elif isinstance(getattr(module, "mesh", None), DeviceMesh) and hasattr(module, "count"):
            layer = Layer(module, {n: [p] for n, p in module.named_parameters()}, _place(module))
        else:
            continue
        if isinstance(layer.module.mesh, DeviceMesh):
            found.append((name, layer))
    return found


def _place(module: Any) -> Callable[[DeviceMesh, int, int], None]:
    def place(mesh: DeviceMesh, first: int, local: int) -> None:
        module.mesh, module.local = mesh, local
        if hasattr(module, "first"):
            module.first = first
    return place


def slots(found: list[tuple[str, Layer]]) -> list[Slot]:
    """What moves, each Parameter once.

    Raises:
        ValueError: a Parameter that is sharded otherwise, or not stacked by experts.
    """
    result: list[Slot] = []
    seen: set[int] = set()
    for prefix, layer in found:
        local = layer.module.local
        for inner, params in layer.slots.items():
            slot = Slot(f"{prefix}.{inner}" if prefix else inner, inner, params, layer)
            if id(params[0]) in seen:
                continue
            seen.update(map(id, params))
            for p in slot.held():
                if hasattr(p, "placements"):
                    raise ValueError(f"regroup: {slot.name} is a DTensor; regroup before sharding the model")
                if slot.stacked and (p.dim() == 0 or p.shape[0] != local):
                    raise ValueError(f"regroup: {slot.name} has shape {tuple(p.shape)}, its first axis must "
                                     f"be the {local} experts that are here")
            result.append(slot)
    return result


def ranks(mesh: DeviceMesh) -> Tensor:
    """[dp, ep]: the rank in row d, column e holds the e-th part of the experts."""
    dim = (mesh.mesh_dim_names or ()).index("ep")
    return mesh.mesh.movedim(dim, -1).reshape(-1, mesh.mesh.shape[dim]).sort(-1).values


def share(count: int, mesh: DeviceMesh, rank: int | None = None) -> tuple[int, int]:
    """First and number of the experts that ``rank``, by default this one, holds."""
    ranks_DE = ranks(mesh)
    column = int((ranks_DE == (dist.get_rank() if rank is None else rank)).nonzero()[0, 1])
    local = count // ranks_DE.shape[1]
    return column * local, local


def per_row(value: Any, p: nn.Parameter) -> bool:
    """Whether optimizer state ``value`` of ``p`` has an entry for each weight, and so moves with it."""
    return isinstance(value, Tensor) and value.shape == p.shape


@torch.no_grad()
def move(slot: Slot, new: DeviceMesh, optimizers: list[Optimizer]) -> None:
    """Give the slot's Parameters, and their state, the experts of ``new``; a tensor at a time."""
    gone, come = slot.held(), slot.held(new)
    like, stay = gone[0], {id(p) for p in gone}
    for optimizer in optimizers:
        state = optimizer.state
        for key in sorted(state.get(like, ())):
            value = state[like][key]
            if per_row(value, like):
                rows = _moved(slot, [state[p].pop(key) for p in gone], new)
                for p, row in zip(come, rows, strict=True):
                    state[p][key] = row
            else:                        # the same for all
                for p in come:
                    if id(p) not in stay:
                        state[p][key] = value.clone() if isinstance(value, Tensor) else value
        for p in gone:
            if all(p is not q for q in come):
                state.pop(p, None)
    trained = like.requires_grad
    data = _moved(slot, [p.data for p in gone], new)
    for p in gone:
        renew(p, p.data.new_empty(0))
    for p, value in zip(come, data, strict=True):
        renew(p, value)
        p.requires_grad_(trained)


def _moved(slot: Slot, rows: list[Tensor], new: DeviceMesh) -> list[Tensor]:
    count, old, device = slot.layer.module.count, slot.layer.module.mesh, slot.held()[0].device
    if slot.stacked:
        return [_exchange(rows[0].to(device), count, old, new).to(rows[0].device)]
    home = rows[0].device
    return [row.clone() for row in _exchange(torch.stack(rows).to(device), count, old, new).to(home)]


def _exchange(rows: Tensor, count: int, old: DeviceMesh, new: DeviceMesh) -> Tensor:
    """This rank's rows under ``new``, from all rows of its group under ``old``."""
    group = groups(old).ep
    peers = dist.get_process_group_ranks(group)
    first, local = share(count, old)
    want, wanted = share(count, new)
    shares = [share(count, new, peer) for peer in peers]

    def common(a: int, n: int, b: int, m: int) -> tuple[int, int]:
        """Start and length of what [a, a + n) and [b, b + m) share."""
        start = max(a, b)
        return start, max(min(a + n, b + m) - start, 0)

    out = [common(first, local, *share) for share in shares]
    parts = [rows.narrow(0, start - first if n else 0, n) for start, n in out]
    result = rows.new_empty(wanted, *rows.shape[1:])
    if len(peers) == 1:
        return result.copy_(parts[0])
    send = torch.cat(parts)
    width = rows[0].numel() * rows.element_size()
    received = [common(i * local, local, want, wanted)[1] * width for i in range(len(peers))]
    travels = send.nbytes - out[group.rank()][1] * width
    with tracing.span("a2a", "regroup", device=rows.device, bytes=travels):
        try:
            dist.all_to_all_single(raw(result), raw(send), received, [n * width for _, n in out],
                                   group=group)
        except RuntimeError as error:
            raise RuntimeError(f"regroup: the exchange among ranks {peers} failed on rank {dist.get_rank()}; "
                               "another rank has stopped, or hangs. Some experts have moved, others have "
                               f"not, so go on from a checkpoint: {error}") from error
    return result


def renew(p: nn.Parameter, data: Tensor) -> None:
    """Other data, of another shape. A graph of an earlier step that is still alive keeps the node
    that gradients arrive at, which knows the old shape; a change of dtype makes autograd drop it.
    """
    other = torch.float16 if p.dtype != torch.float16 else torch.float32
    p.data = torch.empty(0, dtype=other, device=p.device)
    p.data = data


def check_gradients(model: nn.Module, parts: list[Slot]) -> None:
    names = {id(p): slot.name for slot in parts for p in slot.params}
    for slot in parts:
        if any(p.grad is not None for p in slot.params):
            raise ValueError(f"regroup: {slot.name} has a gradient; call regroup after "
                             "optimizer.zero_grad(set_to_none=True)")
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            for p in module._module_parameters:
                if id(p) in names:
                    raise ValueError(f"regroup: {names[id(p)]} is in the buckets of DistributedDataParallel, "
                                     "which cannot give it up; regroup the bare model, then call lina.ddp")
