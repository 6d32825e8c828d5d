"""The layer of microsoft/tutel (arXiv:2206.03382) over a lina.MoE's own parameters, for bench_step.py.

tutel gives every expert as many places on a rank as the fullest expert of all ranks needs
(capacity_factor=0: no token is dropped), pads to that, and exchanges parts of equal size. With a degree N
above 1 the places are split in N parts, whose exchanges run on a stream and NCCL communicator of tutel's own
beside the experts' products on other parts; on a CPU tutel does without that. The experts are batched
products over the padded rows, as in tutel's own FFN, without bias and with lina's activations.

Router logits are of the model's dtype and their softmax of float32, as in the other designs; tutel moves rows
in float32 in any case. Its auxiliary loss, which it always computes, is not used. The layer's only buffer,
the count of experts, stays on the host: on the device, reading it would make the host wait twice a layer.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lina


class Gate(nn.Module):
    """What tutel asks of a router: logits, and attributes."""

    capacity_factor = 0.0            # places by the fullest expert
    gate_noise = 0.0

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight).float()


class Experts(nn.Module):
    """This rank's experts over padded rows, [experts here, rows, D]; ``seen`` counts all calls' rows."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.w_up, self.w_down = own.w_up, own.w_down
        self.gated = own.options["activation"] == "swiglu"
        self.seen = 0

    def forward(self, x_LRD: Tensor, layer: Any) -> Tensor:
        self.seen += x_LRD.shape[0] * x_LRD.shape[1]
        h = x_LRD @ self.w_up.mT
        if self.gated:
            a, b = h.chunk(2, -1)
            h = F.silu(a) * b
        else:
            h = F.gelu(h)
        return h @ self.w_down.mT


def installed() -> Any:
    """tutel's layer; RuntimeError where it cannot be had."""
    try:
        from tutel.moe import moe_layer
    except ImportError as error:
        raise RuntimeError(f"tutel is not installed ({error}): see github.com/microsoft/tutel") from error
    return moe_layer


class TutelMoE(nn.Module):
    """tutel's layer over a lina.MoE's own parameters, under the same names.

    degree: its ``a2a_ffn_overlap_degree``, one for forward and backward. ``padding``: what the last forward
    pass sent, in parts of a row for each token-expert pair.
    """

    def __init__(self, moe: lina.MoE, group: dist.ProcessGroup, degree: tuple[int, int]) -> None:
        super().__init__()
        if degree[0] != degree[1]:
            raise ValueError(f"tutel has one degree for both passes, got {degree[0]} and {degree[1]}")
        if group.size() < dist.get_world_size():         # its backward exchanges are of all ranks in any case
            raise ValueError(f"tutel spreads the experts over all {dist.get_world_size()} ranks, "
                             f"not over {group.size()}")
        make = installed()
        self.router, self.experts, self.padding = moe.router, moe.experts, 0.0
        rows = Experts(moe.experts)
        layer = make(
            gate_type=dict(type="custom", module=lambda **_: Gate(moe.router)),
            experts=dict(type="custom", module=lambda **_: rows, num_experts_per_device=moe.experts.local),
            model_dim=moe.experts.dim, group=group, a2a_ffn_overlap_degree=degree[0])
        self.hidden = layer, rows            # in a tuple, so that no parameter gets a second name

    def forward(self, x: Tensor) -> Tensor:
        layer, rows = self.hidden
        rows.seen = 0
        out = layer(x)
        self.padding = rows.seen * x.shape[-1] / (x.numel() * self.router.top_k)
        return out
