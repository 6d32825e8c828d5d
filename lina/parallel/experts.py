"""Which parameters of a model are experts spread over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

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


def check_same(experts: list[ExpertParameter], world: dist.ProcessGroup) -> None:
    """Ranks that built different experts would wait for each other, or mix them up."""
    text = repr([(e.name, tuple(e.param.shape), e.param.dtype, e.param.requires_grad) for e in experts])
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    device = experts[0].param.device if experts else torch.device("cpu")
    if not experts and dist.get_backend(world) == "nccl":
        device = torch.device("cuda")
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=world)
    if extremes[0].item() != -extremes[1].item():
        raise ValueError("ddp: the ranks' experts differ in names, shapes, dtypes or requires_grad; "
                         f"here: {text[:300]}")


def _spread(model: nn.Module) -> Iterator[tuple[str, nn.Module, DeviceMesh]]:
    for name, module in model.named_modules():
        mesh = getattr(module, "mesh", None)
        if isinstance(mesh, DeviceMesh) and hasattr(module, "count") and hasattr(module, "local"):
            if groups(mesh).ep.size() > 1:
                yield name, module, mesh
