"""The mixture-of-experts layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lina.nn.experts import Experts
from lina.nn.router import Router
from lina.nn.shared import SharedExpert


class MoE(nn.Module):
    """1. route  2. sort pairs by expert  3. experts  4. weighted sum; y = moe(x), same shape.

    Args:
        dim, ffn_dim: model width D and one expert's inner width F.
        experts, top_k: number of experts E and how many each token uses; 1 <= top_k <= 32,
            top_k <= experts <= 1024.
        activation: "swiglu", "geglu", "swiglu_clamped" (gpt-oss), "gelu", "relu", "relu2", "silu".
        bias: biases in the experts.  interleaved: gate and up rows of w_up alternate.
        shared_experts: add a dense expert of width shared_experts * ffn_dim for every token.
        score: "softmax" (top-k of a softmax), "topk_softmax" or "sigmoid"; renormalize: make a
            token's weights sum to 1 before ``scale``; groups, top_groups, group_score:
            group-limited choice (DeepSeek-V2, V3). See :func:`lina.ops.gate`.
        select_bias, jitter, balance_coef, balance_form, z_coef, logits_dtype: see
            :class:`lina.nn.Router`; the losses are collected by :func:`lina.aux_loss`.
        mesh: spread the experts over its dimension "ep" (:func:`lina.mesh`); every rank of that
            group must then call the layer, with any number of tokens, zero included.

    Nothing is dropped, however uneven the routing. The state_dict (``router.weight``,
    ``experts.w_up``, ``experts.w_down``, ...) is that of ``lina.reference.MoE``.

    Raises:
        ValueError: a size outside its limits, or an input whose last axis is not ``dim``.
    """

    def __init__(self, dim: int, ffn_dim: int, experts: int, top_k: int, *,
                 activation: str = "swiglu", bias: bool = False, interleaved: bool = False,
                 alpha: float = 1.702, limit: float = 7.0, shared_experts: int = 0,
                 score: str = "softmax", renormalize: bool = True, scale: float = 1.0,
                 groups: int = 1, top_groups: int | None = None, group_score: str = "top2",
                 select_bias: bool = False, jitter: float = 0.0, balance_coef: float = 0.0,
                 balance_form: str = "switch", z_coef: float = 0.0,
                 logits_dtype: torch.dtype | None = None, mesh: DeviceMesh | None = None,
                 device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("ffn_dim", ffn_dim)):
            if value < 1:
                raise ValueError(f"MoE: {name} is {value}, must be at least 1")
        if shared_experts < 0:
            raise ValueError(f"MoE: shared_experts is {shared_experts}, must be at least 0")
        where: dict[str, Any] = dict(device=device, dtype=dtype)
        form: dict[str, Any] = dict(activation=activation, interleaved=interleaved, alpha=alpha, limit=limit)
        self.dim = dim
        self.router = Router(
            dim, experts, top_k, score=score, renormalize=renormalize, scale=scale, groups=groups,
            top_groups=top_groups, group_score=group_score, select_bias=select_bias, jitter=jitter,
            balance_coef=balance_coef, balance_form=balance_form, z_coef=z_coef,
            logits_dtype=logits_dtype, **where)
        self.experts = Experts(dim, ffn_dim, experts, bias=bias, mesh=mesh, **form, **where)
        self.shared = SharedExpert(dim, ffn_dim * shared_experts, **form, **where) if shared_experts else None

    def reset_parameters(self) -> None:
        """Draw all weights anew (normal, standard deviation 1 / sqrt(inputs)); biases to zero."""
        for part in (self.router, self.experts, self.shared):
            if part is not None:
                part.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] in float32, bfloat16, float16 or (CPU) float64; the result is shaped alike."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"MoE: x has shape {tuple(x.shape)}, its last axis must be dim={self.dim}")
        x_TD = x.reshape(-1, self.dim)
        routing = self.router(x_TD)
        y_TD = self.experts(x_TD, routing.weight_TK, routing.expert_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        # no view of it: FSDP's hooks on outputs refuse to follow views that others change in place
        return y_TD if x.dim() == 2 else torch.ops.aten._unsafe_view(y_TD, x.shape)
