"""How far experts should be spread: csrc/plan/packing.h for an observed step and a cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lina import _C
from lina.parallel.plan.cost import CostModel
from lina.parallel.plan.predict import Workload, links

STEPS = 1000           # that a move of experts should pay for itself in


@dataclass(frozen=True)
class State:
    """What packing needs to know of a rank. bytes a parameter of the experts.

    gradient: reduced.  kept: weights, gradients, optimizer state.  moved: weights, optimizer state.
    memory: free for experts, with those that are here; None: no limit.
    """

    gradient: float
    kept: float
    moved: float
    memory: float | None = None


def packing(load: Workload, cost: CostModel, transport: str, state: State) -> dict[str, Any] | str:
    """csrc/plan/packing.h for layers of one kind, on links of one level; else why not."""
    kinds = {(x.experts, x.top_k, x.dim, x.ffn_dim, x.dtype) for x in load.layers}
    if len(kinds) > 1:
        return "packing: not predicted for layers of several shapes"
    layer, n = load.layers[0], len(load.layers)
    a2a, reduce = links(cost, transport, "plain", ep=2, world=load.world)
    ring = 2 * (load.world - 1) / load.world
    near, over = (a2a.alpha_s, a2a.beta_s), (reduce.alpha_s, reduce.beta_s / ring)
    lines, out, back = layer.expert_pass(cost), layer.out_bytes(), layer.back_bytes()
    ways = [(out[i], back[i], (0.0, line.beta_s), line.alpha_s / layer.local)
            for i, line in enumerate((lines.forward, lines.backward))]
    memory: dict[str, Any] = {} if state.memory is None else {"memory_bytes": state.memory}
    try:
        return _C.packing(
            world=load.world, node=load.world, layers=n, experts=layer.experts, top_k=layer.top_k,
            tokens=max(x.tokens for x in load.layers), a2a_near=near, a2a_far=near, reduce_near=over,
            reduce_far=over, forward=ways[0], backward=ways[1], expert_params=layer.expert_params,
            gradient_bytes=state.gradient, state_bytes=state.kept, move_bytes=state.moved,
            slack_s=load.dense_s[1] / n, ep_now=load.ep, steps=STEPS, **memory)
    except ValueError as error:
        return f"packing: {error}"


def packing_reason(packs: dict[str, Any], now: int) -> str:
    """One line of what :func:`packing` found; ``now``: the ep in use."""
    rows = {row["ep"]: row for row in packs["rows"]}
    best, here = rows[packs["ep"]], rows[now]
    return (f"packing, were tokens routed evenly: ep {best['ep']} is best, its layers take "
            f"{1e3 * best['step_s']:.2f} ms a step; ep {now} takes {1e3 * here['step_s']:.2f}")
