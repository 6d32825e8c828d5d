"""A model's workload from what its ranks observed: who does most, where gradients come, what experts hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lina.parallel.mesh import ep_size, groups
from lina.parallel.plan.observe import Call
from lina.parallel.plan.packing import State
from lina.parallel.plan.predict import LayerLoad, Workload, copies
from lina.parallel.slots import Layer, layers, slots

# What all ranks have in common.
_SAME = ("experts", "top_k", "dim", "ffn_dim", "local", "dtype", "activation", "expert_bytes",
         "expert_params")


def spread_layers(model: nn.Module) -> list[tuple[str, Layer]]:
    return [(name.removeprefix("module."), layer) for name, layer in layers(model)
            if ep_size(layer.module.mesh) > 1]


def step_s(facts: dict[str, Any]) -> float:
    """Seconds of a step, of an Observer's facts."""
    return facts["forward_s"] + facts["backward_s"] + facts["outside_s"]


def observed(model: Any, mesh: DeviceMesh, device: torch.device, steps: list[dict[str, Any]],
             notes: list[str]) -> tuple[Workload, str]:
    """What the ranks' ``steps``, Observers' facts, say of a wrapped model; and why nothing can be predicted
    of it, or nothing. What to know besides is added to ``notes``."""
    found, world = spread_layers(model), groups(mesh).world.size()
    load = Workload(world, ep_size(mesh), device.type, (), (sizes(model, []),), 0.0, 0.0, 0.0)
    if not steps:
        return load, "no step was seen whole: nothing is known"
    most = max(len(s["calls"]) for s in steps)
    calls = [[Call(**c) for c in s["calls"]] for s in steps if len(s["calls"]) == most]
    if len({c.ep for rank in calls for c in rank}) > 1:
        return load, "layers are spread over different numbers of ranks: left as they are"
    names = [name for name, _ in found] if len(found) == most else [f"layer {i}" for i in range(most)]
    loads = tuple(merged(name, list(ranks), notes) for name, *ranks in zip(names, *calls, strict=True))
    slowest, ep = max(steps, key=step_s), calls[0][0].ep if most else 1
    dense = [s["dense_s"] for s in steps]      # who waits for others has as long a step, and less of it
    return Workload(world, ep, device.type, loads, segments(model, found, most), slowest["forward_s"],
                    slowest["backward_s"], slowest["outside_s"], *bucket_bytes(model),
                    # with replicas the end of backward holds their reductions too
                    seen_dense_s=None if None in dense or not most or ep != world else
                    (max(s for s, _ in dense), max(s for _, s in dense))), ""


def merged(name: str, ranks: list[Call], notes: list[str]) -> LayerLoad:
    """The layer on the rank with most to do."""
    first = ranks[0]
    share = copies(first.experts, first.top_k, first.ep)
    pairs_a_row = first.top_k * (first.ep - 1) / first.ep / share if share else 1.0
    tokens = max(c.tokens for c in ranks)
    same: dict[str, Any] = {field: getattr(first, field) for field in _SAME}
    if any(c.sent < 0 for c in ranks):
        notes.append(f"{name}: its counts never leave the device; taken for evenly routed")
        even = LayerLoad(name, tokens=tokens, rows=0.0, own_pairs=0.0, remote_pairs=0.0, **same)
        return even.spread(first.ep)
    pairs = [(c.own_pairs, c.remote_pairs) if c.own_pairs >= 0 else
             (max(0.0, c.tokens * c.top_k - c.sent * pairs_a_row), c.received * pairs_a_row) for c in ranks]
    own, remote = max(pairs, key=sum)
    return LayerLoad(name, tokens=tokens, rows=max(max(c.sent, c.received) for c in ranks), own_pairs=own,
                     remote_pairs=remote, **same)


def sizes(model: nn.Module, found: list[tuple[str, Layer]]) -> tuple[int, ...]:
    return tuple(n for segment in segments(model, found, len(found)) for n in segment)


def segments(model: nn.Module, found: list[tuple[str, Layer]], count: int) -> tuple[tuple[int, ...], ...]:
    """Bytes of dense gradients before, between and after ``count`` spread layers, in the model's order."""
    owner = {id(p): i for i, (_, layer) in enumerate(found) for held in layer.slots.values() for p in held}
    made: list[list[int]] = [[] for _ in range(count + 1)]
    passed: set[int] = set()
    for p in model.parameters():
        if id(p) in owner:
            passed.add(owner[id(p)])
        elif p.requires_grad:
            made[min(len(passed), count)].append(p.nbytes)
    return tuple(map(tuple, made))


def bucket_bytes(wrapper: Any) -> tuple[int, int]:
    """Of all, and of the first, which is smaller unless the user has set the others' size."""
    most = int(wrapper.bucket_bytes_cap)
    usual = getattr(wrapper, "bucket_bytes_cap_default", True)
    return most, int(dist._DEFAULT_FIRST_BUCKET_BYTES) if usual else most


def state(found: list[tuple[str, Layer]], optimizer: Optimizer | None, room: int | None) -> State | None:
    """Adam's two moments, in the weights' dtype, where no optimizer says otherwise."""
    params = [p for _, layer in found for slot in slots([("", layer)]) for p in slot.held()]
    if not params:
        return None
    numel, weights = sum(p.numel() for p in params), sum(p.nbytes for p in params)
    moments = 2 * weights
    if optimizer is not None:
        moments = sum(v.nbytes for p in params for v in optimizer.state.get(p, {}).values()
                      if isinstance(v, torch.Tensor) and v.shape == p.shape)
    kept = 2 * weights + moments
    return State(weights / numel, kept / numel, (weights + moments) / numel,
                 None if room is None else float(room + kept))
