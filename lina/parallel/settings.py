"""How the layers spread over a mesh run: what carries their tokens, and in how many passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakIdKeyDictionary

from lina import _C, ops

TRANSPORTS = ("auto", "c10d", "nccl", "p2p")
MAX_DEGREE = ops.MAX_DEGREE
UNIT = 256        # bytes of which every cut of gradients is a multiple: whole elements, whole cache lines


@dataclass
class Settings:
    """Of one mesh; the same on every rank, and changed between steps only.

    Attributes:
        transport: "auto" ("nccl" on GPUs whose process group is NCCL's, else "c10d"), "c10d", "nccl" or
            "p2p". Once gradients give way to one (schedule "lina", or a plan's), the model refuses to run
            over another.
        degree: expert passes of a layer forward and backward, 1 to 8 each (tokens/spread.py says which);
            with "p2p" as many backward as forward.
        tokens, cap_bytes: "p2p" alone: the most tokens that any rank will have, None: as many as it has
            in the first call; and the limit on a rank's receive buffer, None: its GPU's memory.
    """

    transport: str = "auto"
    degree: tuple[int, int] = (1, 1)
    tokens: int | None = None
    cap_bytes: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transport" and value not in TRANSPORTS:
            raise ValueError(f"mesh: transport is {value!r}, must be one of {', '.join(TRANSPORTS)}")
        if name == "degree":
            value = tuple(value)
            if len(value) != 2 or not all(isinstance(r, int) and 1 <= r <= MAX_DEGREE for r in value):
                raise ValueError(f"mesh: degree is {value}, must be two numbers from 1 to {MAX_DEGREE}: "
                                 "forward, backward")
        if name in ("tokens", "cap_bytes") and value is not None and value < 1:
            raise ValueError(f"mesh: {name} is {value}, must be at least 1, or None")
        super().__setattr__(name, value)


# By identity: equal meshes may be of different process groups.
_settings: WeakIdKeyDictionary = WeakIdKeyDictionary()


def settings(mesh: DeviceMesh) -> Settings:
    """The settings of ``mesh``, to read or change."""
    if mesh not in _settings:
        _settings[mesh] = Settings()
    return _settings[mesh]


_auto: WeakIdKeyDictionary = WeakIdKeyDictionary()         # mesh -> what "auto" stands for


def chosen(mesh: DeviceMesh) -> str:
    """The transport that is asked for by name, or that "auto" stands for here."""
    name = settings(mesh).transport
    if name != "auto":
        return name
    if mesh not in _auto:
        ours = mesh.device_type == "cuda" and _C.CUDA
        served = ours and "cuda:nccl" in dist.get_backend_config(mesh.get_group("ep"))
        _auto[mesh] = "nccl" if served else "c10d"
    return _auto[mesh]


def meshes(model: nn.Module, *more: DeviceMesh) -> list[DeviceMesh]:
    """``more``, and those of a model's modules that experts can be spread over, each once."""
    found = (getattr(module, "mesh", None) for module in model.modules())
    spread = [m for m in found if isinstance(m, DeviceMesh) and "ep" in (m.mesh_dim_names or ())]
    return list({id(m): m for m in (*more, *spread)}.values())


def set_degree(model: nn.Module, mesh: DeviceMesh, degree: tuple[int, int] | None) -> None:
    """For ``mesh`` and every mesh of ``model``; None leaves them as they are."""
    if degree is not None:
        for one in meshes(model, mesh):
            settings(one).degree = degree


def common(model: nn.Module, mesh: DeviceMesh, schedule: str, degree: Any) -> dict[str, Any]:
    """What ranks that wrap ``model`` must have in common, by name. Not cap_bytes: the least of all counts."""
    found = meshes(model, mesh)
    degrees = [degree or ("default" if schedule == "lina" else settings(m).degree) for m in found]
    each: dict[str, list] = {
        "degree": [tuple(d) if isinstance(d, list) else d for d in degrees],
        "transport": [chosen(m) for m in found], "tokens": [settings(m).tokens for m in found]}
    return {"schedule": schedule, **{name: values[0] if len(set(map(repr, values))) == 1 else values
                                     for name, values in each.items()}}
