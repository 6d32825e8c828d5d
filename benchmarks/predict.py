"""The step that lina.simulate predicts for a model of models.py, from what this machine's parts cost.

Links, passes over experts and what a layer takes around both are the lines of `lina profile` (the saved
ones, if they hold this model's experts, else measured now). The dense part and the optimizer are timed
here, each alone; the dense part behind some more of it, for after a rest a GPU is faster than in a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from models import GPT, NoExperts, Preset
from multi import Clock, attempt, say
from torch.distributed.device_mesh import DeviceMesh

import lina
from lina import parallel, simulate
from lina.parallel import CostModel, ExpertShape
from lina.parallel.plan.predict import late
from lina.simulate import models as published

WARM = 3                    # dense parts before the one that is timed


class Dense(NamedTuple):
    """Seconds forward and backward, routers included, experts and exchanges left out."""

    body: tuple[float, float]
    head: tuple[float, float]


def shape_of(p: Preset, mesh: DeviceMesh, dtype: torch.dtype) -> ExpertShape:
    local, kind = parallel.local_count(p.experts, mesh), str(dtype).removeprefix("torch.")
    return ExpertShape(p.dim, p.ffn_dim, local, kind, p.activation)


def cost_model(p: Preset, mesh: DeviceMesh, dtype: torch.dtype, *, save: bool, budget_s: float) -> CostModel:
    """Collective. ``save``: where lina finds it."""
    shape, loaded = shape_of(p, mesh, dtype), []

    def load() -> None:
        loaded.append(CostModel.load())
        if shape not in [e.shape for e in loaded[0].experts]:
            raise ValueError(f"the saved cost model has no {shape}")
        if loaded[0].top_k != p.top_k:
            raise ValueError(f"the saved cost model's layers are of {loaded[0].top_k} experts a token")

    why = attempt(load)
    if why is None:
        return loaded[0]
    say(f"profiling first ({why})")
    found = lina.profile(mesh, budget_s=budget_s, shapes=[shape], top_k=p.top_k)
    if save:
        found.save()
    say(found.describe())
    return found


def dense_part(p: Preset, mesh: DeviceMesh, clock: Clock, dtype: torch.dtype,
               batch: tuple[torch.Tensor, torch.Tensor]) -> Dense:
    model = GPT(p, mesh, clock.device, dtype)
    for block in model.blocks:
        block.moe = NoExperts(block.moe)
    held: dict[str, torch.Tensor] = {}

    def body() -> None:
        held["x"] = model.body(batch[0])

    def head() -> None:
        held["loss"] = model.head(held["x"], batch[1])

    def backward() -> None:
        held["loss"].backward()

    def clear() -> None:
        held.clear()
        model.zero_grad(set_to_none=True)

    def leaf() -> None:
        clear()
        held["x"] = torch.randn(*batch[0].shape, p.dim, device=clock.device, dtype=dtype, requires_grad=True)

    def warm() -> None:
        for _ in range(WARM):
            for stage in (body, head, backward, clear):
                stage()

    def warm_top() -> None:
        warm()
        leaf()

    _, *whole = (t.median for t in clock.stages([warm, body, head, backward], clear))
    _, *top = (t.median for t in clock.stages([warm_top, head, backward], clear))
    return Dense((whole[0], max(0.0, whole[2] - top[1])), (top[0], top[1]))


def _nbytes(module: torch.nn.Module) -> tuple[int, ...]:
    return tuple(q.nbytes for name, q in module.named_parameters() if ".experts." not in name)


def step_s(model: GPT, p: Preset, mesh: DeviceMesh, cost: CostModel, dense: Dense, optimizer_s: float,
           name: str, degree: tuple[int, int], tokens: int) -> float | None:
    """Seconds of a step of design ``name`` (bench_step.py's); None where its links were not measured."""
    groups = parallel.groups(mesh)
    world, ep = groups.world.size(), groups.ep.size()
    transport = "c10d" if name == "plain" else name
    reducer = "c10d" if transport == "c10d" else "nccl"
    a2a, reduce = cost.links.get(("a2a", transport)), cost.links.get(("allreduce", reducer))
    if a2a is None or reduce is None:
        return None
    weight = model.blocks[0].qkv.weight
    passes = cost.expert_pass(shape_of(p, mesh, weight.dtype))
    rows, wide = tokens * p.top_k, p.dim * weight.element_size()
    sent = tokens * published.copies(p.experts, p.top_k, ep)
    plain = name == "plain"
    degrees = (1, 1) if plain else degree
    around = (0.0, 0.0)
    if transport in cost.layers and ep > 1:
        forward, backward = cost.layers[transport]
        around = forward.rest(tokens * wide, degrees[0]), backward.rest(tokens * wide, degrees[1])
    experts = simulate.Experts(
        pass_s=((passes.forward.alpha_s, passes.forward.beta_s),
                (passes.backward.alpha_s, passes.backward.beta_s)),
        own_rows=rows / ep, remote_rows=rows - rows / ep,
        dispatch_bytes=(sent * (wide + 8 * p.top_k), sent * wide),
        return_bytes=(sent * wide, sent * (wide + 4 * p.top_k)),
        grad_bytes=sum(q.nbytes for q in model.blocks[0].moe.experts.parameters()), gate_s=around,
        late_s=late(passes, transport, max(degrees)))
    seconds = dense.body[0] / p.layers, dense.body[1] / p.layers
    first = (model.embed.weight.nbytes, *([] if model.place is None else [model.place.nbytes]))
    layers = [simulate.Layer("embedding", (0.0, 0.0), first)]
    layers += [simulate.Layer(f"layer {i}", seconds, _nbytes(block), experts)
               for i, block in enumerate(model.blocks)]
    layers.append(simulate.Layer("head", dense.head, (*_nbytes(model.norm), *_nbytes(model.unembed))))
    near, across = (a2a.alpha_s, a2a.beta_s), (reduce.alpha_s, reduce.beta_s)
    links = simulate.Links(world, (near, near), (across, across), share=1 / 2.17)
    return simulate.step(layers, world, ep, links, "plain" if plain else "lina", unit=256,
                         degrees=degrees, micro_op_s=0.5e-3, experts_last=plain,
                         optimizer_s=optimizer_s).step_s
