"""What a state_dict says of experts spread over ranks, and which of them a load takes.

Each rank's state_dict holds its own experts, in tensors of the same names and shapes on all
ranks. So that one rank's cannot pass for another's, a small tensor beside them says whose
they are; a whole checkpoint has none, and each rank takes its experts out of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lina.parallel.mesh import groups
from lina.parallel.transport.carriers import check


@dataclass(frozen=True)
class Part:
    """The ``local`` experts, from ``first`` on, of ``count``."""

    first: int
    local: int
    count: int

    def stamp(self) -> Tensor | None:
        """int64 [2], rank in "ep" and its size; None where all experts are here."""
        if self.local == self.count:
            return None
        return torch.tensor([self.first // self.local, self.count // self.local], device="cpu")


_gathering: ContextVar[bool] = ContextVar("gathering", default=False)


def gathered_state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` with all experts, as of a model that is not spread; on every rank.

    Collective: every rank of the model's mesh calls it. What rank 0 then saves can be loaded by
    ``load_state_dict`` into the same model on one rank, or spread over any number of ranks. The
    experts are copies on their own device: memory for all of them is needed there.
    """
    token = _gathering.set(True)
    try:
        return model.state_dict()
    finally:
        _gathering.reset(token)


def gathering() -> bool:
    """Whether :func:`gathered_state_dict` is at work."""
    return _gathering.get()


def gather(local: Tensor, mesh: DeviceMesh) -> Tensor:
    """All ranks' slices along the first axis, in the order of "ep"; collective over that group.
    RuntimeError if a rank of it is known to have failed."""
    group = groups(mesh).ep
    check("gathered_state_dict", group)
    parts = [local.new_empty(local.shape) for _ in range(group.size())]
    dist.all_gather(parts, local.detach().contiguous(), group=group)
    return torch.cat(parts)


def stamp_or_gather(state: dict[str, Any], prefix: str, names: Iterable[str], key: str, part: Part,
                    mesh: DeviceMesh | None) -> None:
    """Finish the entries of stacked experts in a ``state`` that is being made."""
    stamp = part.stamp()
    if stamp is None or mesh is None:
        return
    if not gathering():
        state[prefix + key] = stamp
        return
    for name in names:
        state[prefix + name] = gather(state[prefix + name], mesh)


def take_part(state: dict[str, Any], prefix: str, names: Iterable[str], key: str, part: Part,
              copy: bool) -> None:
    """Reduce stacked experts in a ``state`` that is being loaded to those of this rank.

    Args:
        copy: keep no more memory than that part needs, as is wanted where tensors are assigned.

    Raises:
        RuntimeError: they are another rank's, or it is unknown whose.
    """
    said = state.pop(prefix + key, None)
    for name in names:
        found = state.get(prefix + name)
        if not isinstance(found, Tensor) or found.dim() == 0:
            continue
        if len(found) == part.count:
            if part.local < part.count:
                mine = found.narrow(0, part.first, part.local)
                state[prefix + name] = mine.clone() if copy else mine
        elif said is not None or len(found) == part.local:
            check_stamp(said, part, prefix + name)


def check_stamp(said: Tensor | None, part: Part, name: str) -> None:
    """RuntimeError unless ``said`` is this rank's stamp."""
    own = part.stamp()
    if said is not None and own is not None and said.tolist() == own.tolist():
        return
    if said is None:
        whose = f"does not say which of the {part.count} experts it holds"
    else:
        whose = "holds the experts of rank {} of ep={:d}".format(*map(int, said.tolist()))
    here = "here are all" if own is None else "here is rank {} of ep={}".format(*own.tolist())
    raise RuntimeError(f"load_state_dict: {name} {whose}, {here}; let every rank save and load its own "
                       "state_dict, or save lina.gathered_state_dict(model) on one and load that on all")
