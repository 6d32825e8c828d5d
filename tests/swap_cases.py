"""Modules of one's own that lina.swap knows, and what the tests of it compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lina.swap.probe import agree

D, WIDTH, EXPERTS = 16, 12, 6


class Gated(nn.Module):
    """An expert as in the first Mixtral code."""

    def __init__(self, act=F.silu, bias=False) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, WIDTH, bias=bias), nn.Linear(D, WIDTH, bias=bias)
        self.w2, self.act = nn.Linear(WIDTH, D, bias=bias), act

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, WIDTH), nn.Linear(D, WIDTH)
        self.down_proj, self.act_fn = nn.Linear(WIDTH, D, bias=False), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Pair(nn.Module):
    def __init__(self, act=F.relu) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D), act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(D, WIDTH), nn.SiLU(), nn.Linear(WIDTH, D))


class Block(nn.Module):
    """The documented shape, with the liberties that it leaves."""

    def __init__(self, expert=Gated, *, router="gate", top_k="top_k", k=2, score="softmax", norm=None,
                 logits=False, dropout=0.0, noise=0.0, extra=None, count=False, scale=1.0) -> None:
        super().__init__()
        setattr(self, router, nn.Linear(D, EXPERTS, bias=router == "router"))
        setattr(self, top_k, k)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        self.names, self.score, self.logits = (router, top_k), score, logits
        self.noise, self.count = noise, count
        self.dropout, self.scale = nn.Dropout(dropout), scale
        if norm is not None:
            self.norm_topk_prob = norm
        if extra is not None:
            self.extra = extra

    def forward(self, x: Tensor):
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = getattr(self, self.names[0])(x_TD)
        if self.training and self.noise:
            logits_TE = logits_TE + self.noise * torch.randn_like(logits_TE)
        score_TE = logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
        weight_TK, expert_TK = score_TE.topk(getattr(self, self.names[1]), dim=-1)
        if getattr(self, "norm_topk_prob", False):
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        out_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            token, k = torch.where(expert_TK == e)
            y = self.scale * expert(x_TD[token]) * weight_TK[token, k, None]
            out_TD = out_TD.index_add(0, token, y)
        if hasattr(self, "extra"):
            out_TD = out_TD + self.extra(x_TD)
        if self.count:
            self.tokens = len(x_TD)
        out = self.dropout(out_TD).view(x.shape)
        return (out, logits_TE) if self.logits else out


class Stacked(nn.Module):
    """Experts in Hugging Face's shape; transposed, interleaved and with biases as gpt-oss's."""

    def __init__(self, transposed: bool, dtype=torch.float64) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.transposed = EXPERTS, transposed, transposed
        # 2 * WIDTH != D != WIDTH, so that a wrong layout cannot fit by chance
        up, down = (EXPERTS, 2 * WIDTH, D), (EXPERTS, D, WIDTH)
        if transposed:
            up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
            self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, dtype=dtype))
            self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, D, dtype=dtype))
        self.gate_up_proj = nn.Parameter((torch.randn(up) / 4).to(dtype))
        self.down_proj = nn.Parameter((torch.randn(down) / 4).to(dtype))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, k = torch.where(top_k_index == e)
            up, down = self.gate_up_proj[e], self.down_proj[e]
            if self.transposed:
                h = hidden_states[token] @ up + self.gate_up_proj_bias[e]
                gate, linear = h[:, ::2].clamp(max=7.0), h[:, 1::2].clamp(-7.0, 7.0)
                y = ((linear + 1) * gate * torch.sigmoid(1.702 * gate)) @ down + self.down_proj_bias[e]
            else:
                gate, linear = (hidden_states[token] @ up.T).chunk(2, -1)
                y = (F.silu(gate) * linear) @ down.T
            out = out.index_add(0, token, y * top_k_weights[token, k, None])
        return out


class Model(nn.Module):
    """A plain block, and stacked experts behind a router of their own."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.block, self.router = Block(norm=True), nn.Linear(D, EXPERTS)
        self.stacked = Stacked(transposed, torch.get_default_dtype())

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD + self.block(x_TD)
        weight_TK, expert_TK = self.router(x_TD).softmax(-1).topk(2, dim=-1)
        return x_TD + self.stacked(x_TD, top_k_index=expert_TK, top_k_weights=weight_TK)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Result, gradient of the input and of every parameter."""
    return results_by(model, model, x)


def results_by(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The same, with ``call`` computing ``model``."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = call(x)
    parts = out if isinstance(out, tuple) else (out,)
    sum((part * torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view(part.shape)).sum()
        for part in parts).backward()
    return [*parts, x.grad, *(p.grad for p in model.parameters())]


def assert_agree(got: list[Tensor], want: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert agree(a, b), f"tensor {i}: {(a - b).abs().max()} of {b.abs().max()}"
