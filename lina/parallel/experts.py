"""Which parameters of a model are experts spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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


def _spread(model: nn.Module) -> Iterator[tuple[str, nn.Module, DeviceMesh]]:
    for name, module in model.named_modules():
        mesh = getattr(module, "mesh", None)
        if isinstance(mesh, DeviceMesh) and hasattr(module, "count") and hasattr(module, "local"):
            if groups(mesh).ep.size() > 1:
                yield name, module, mesh
