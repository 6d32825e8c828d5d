"""Gradient clipping by the norm over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lina.parallel.experts import expert_parameters
from lina.parallel.transport.carriers import check


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0,
                    error_if_nonfinite: bool = False) -> Tensor:
    """Scale all gradients so that their norm over all ranks is at most ``max_norm``; in place.

    As ``torch.nn.utils.clip_grad_norm_``, but takes the model: replicated parameters count once,
    experts spread over ranks are summed over those ranks. Call it after backward, outside
    ``no_sync``, on every rank; the result is the same on all of them.

    Args:
        max_norm: limit, in the gradients' units.  norm_type: p >= 1 of the p-norm, or inf.
        error_if_nonfinite: raise on every rank, before scaling, if the norm is inf or NaN.

    Returns:
        The norm before scaling: a scalar, float32 (float64 if every gradient is), on the
        gradients' device.

    Raises:
        ValueError: norm_type below 1.
        RuntimeError: a norm that is not finite, where that is asked for; or a rank is known to have failed.
    """
    p = float(norm_type)
    if not p >= 1:
        raise ValueError(f"clip_grad_norm_: norm_type is {norm_type}, must be at least 1, or inf")
    experts = expert_parameters(model)
    spread = {id(e.param) for e in experts}
    params = list(model.parameters())
    total = _norm((q for q in params if id(q) not in spread), p, params)
    by_group: dict[dist.ProcessGroup, list[nn.Parameter]] = {}
    for expert in experts:
        by_group.setdefault(expert.groups.ep, []).append(expert.param)
    for group in by_group:
        check("clip_grad_norm_", group)
    for group, members in by_group.items():
        part = _norm(members, p, params)
        # norms are gathered, not powers summed: nothing overflows, and inf is no special case
        parts = part.new_zeros(group.size())
        parts[group.rank()] = part
        dist.all_reduce(parts, group=group)
        total = torch.linalg.vector_norm(torch.cat([parts, total[None]]), p)
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(f"clip_grad_norm_: the {p:g}-norm of the gradients is {total.item()}, not finite")
    for some in ([q for q in params if hasattr(q, "full_tensor") == sharded] for sharded in (False, True)):
        torch.nn.utils.clip_grads_with_norm_(some, max_norm, total)
    return total


def _norm(some: Iterable[nn.Parameter], p: float, params: list[nn.Parameter]) -> Tensor:
    """The p-norm of some of ``params``' gradients, computed in float32 or float64."""
    wide = bool(params) and all(q.dtype == torch.float64 for q in params)
    acc = torch.float64 if wide else torch.float32
    device = params[0].device if params else torch.device("cpu")
    by_kind: dict[tuple[torch.device, torch.dtype, Any], list[Tensor]] = {}
    for q in some:
        if q.grad is not None:
            mesh = getattr(q.grad, "device_mesh", None)        # of a DTensor: torch mixes no two
            by_kind.setdefault((q.grad.device, q.grad.dtype, mesh), []).append(q.grad)
    norms: list[Tensor] = []
    for (_, dtype, mesh), grads in by_kind.items():
        kind = torch.promote_types(dtype, acc)
        if mesh is None:
            norms += [norm.to(device, acc) for norm in torch._foreach_norm(grads, p, dtype=kind)]
            continue
        # torch 2.15 knows no dtype here; one reduction over the mesh for all
        found: Any = torch.stack(torch._foreach_norm([g.to(kind) for g in grads], p))
        norms.append(torch.linalg.vector_norm(found, p).full_tensor().to(device, acc))
    if not norms:
        return torch.zeros((), dtype=acc, device=device)
    return torch.linalg.vector_norm(torch.stack(norms), p)
