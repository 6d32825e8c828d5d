"""Every operator of lina in plain PyTorch: the definition of truth.

Written to be read and to be differentiated by autograd, not to be fast. The
contracts (formulas, sources, limits) are in ``csrc/ops/*.h``. Shape suffixes:
T tokens, E experts, K experts per token, D model width, F expert width,
U = 2F (gated activation) or F, N = T*K rows.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATED = ("swiglu", "geglu", "swiglu_clamped")
ACTIVATIONS = (*GATED, "gelu", "relu", "relu2", "silu")
SCORES = ("softmax", "topk_softmax", "sigmoid")


class Routing(NamedTuple):
    """What ``gate`` gives: the fields of ``lina.ops.Routing``."""

    weight_TK: Tensor
    expert_TK: Tensor
    load_2E: Tensor | None = None
    prob_E: Tensor | None = None
    z: Tensor | None = None


class Rows(NamedTuple):
    """What ``sort`` gives: the fields of ``lina.ops.Rows``."""

    offset_E1: Tensor
    row_pair_N: Tensor
    pair_row_TK: Tensor


def _ranked(key: Tensor) -> Tensor:
    """Indices by falling key along the last axis; NaN as -inf, ties by index."""
    key = torch.where(key.isnan(), -torch.inf, key)
    return torch.sort(key, dim=-1, descending=True, stable=True).indices


def gate(logits_TE: Tensor, top_k: int, *, score: str = "softmax",
         renormalize: bool = False, scale: float = 1.0,
         bias_E: Tensor | None = None, groups: int = 1,
         top_groups: int | None = None, group_score: str = "top2",
         stats: bool = False) -> Routing:
    """Contract: ``csrc/ops/gate.h``."""
    T, E = logits_TE.shape
    l_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    s_TE = {"softmax": lambda: l_TE.softmax(-1), "sigmoid": l_TE.sigmoid,
            "topk_softmax": lambda: l_TE}[score]()
    with torch.no_grad():
        key_TE = l_TE
        if bias_E is not None or groups > 1:
            key_TE = s_TE if bias_E is None else s_TE + bias_E
        if groups > 1:
            key_TGe = key_TE.view(T, groups, E // groups)
            best = torch.where(key_TGe.isnan(), -torch.inf, key_TGe)
            n = min(2 if group_score == "top2" else 1, E // groups)
            score_TG = best.sort(-1, descending=True).values[..., :n].sum(-1)
            keep_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(
                1, _ranked(score_TG)[:, :top_groups], True)
            key_TE = key_TGe.masked_fill(~keep_TG[..., None], -torch.inf).view(T, E)
        expert_TK = _ranked(key_TE)[:, :top_k]
    w_TK = s_TE.gather(1, expert_TK)
    if score == "topk_softmax":
        w_TK = w_TK.softmax(-1)
    if renormalize:
        w_TK = w_TK / (w_TK.sum(-1, keepdim=True) + (1e-20 if score == "sigmoid" else 0.0))
    w_TK = w_TK * scale
    routing = Routing(w_TK, expert_TK.int())
    if not stats:
        return routing
    load_2E = torch.stack([torch.bincount(expert_TK.flatten(), minlength=E),
                           torch.bincount(expert_TK[:, 0], minlength=E)]).int()
    p_TE = s_TE / s_TE.sum(-1, keepdim=True) if score == "sigmoid" else l_TE.softmax(-1)
    return routing._replace(load_2E=load_2E, prob_E=p_TE.sum(0),
                            z=l_TE.logsumexp(-1).square().sum())


def balance_loss(load_2E: Tensor, prob_E: Tensor, form: str = "switch") -> Tensor:
    """Load-balancing loss of one batch from the gate's statistics.

    ``switch``: E * sum_e f_e P_e, with f_e the share of all T*K choices and P_e
    the mean probability; 1 when balanced (Fedus et al. 2021, eq. 4-6).
    ``gshard``: mean_e (c_e/T) P_e, with c_e the first choices only; 1/E^2 when
    balanced (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1).
    An empty batch gives 0.
    """
    E = prob_E.numel()
    load_E = load_2E[0 if form == "switch" else 1].to(prob_E.dtype)
    tokens = load_2E[1].sum().clamp(min=1).to(prob_E.dtype)
    share_E = load_E / load_E.sum().clamp(min=1)
    product = (share_E * prob_E).sum() / tokens
    return product * E if form == "switch" else product / E


def sort(expert_TK: Tensor, experts: int) -> Rows:
    """Contract: ``csrc/ops/sort.h``."""
    pairs = expert_TK.flatten().long()
    present = (pairs >= 0) & (pairs < experts)
    key = torch.where(present, pairs, experts)
    order = torch.sort(key, stable=True).indices
    count = torch.bincount(key, minlength=experts + 1)[:experts]
    offset = F.pad(count.cumsum(0), (1, 0)).int()
    rows = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
    row_pair = torch.where(present[order], order, -1).int()
    return Rows(offset, row_pair, torch.where(present, rows, -1).int().view_as(expert_TK))


class Dispatch(NamedTuple):
    """What ``dispatch_layout`` gives: the fields of ``lina.ops.Dispatch``."""

    token_R: Tensor
    row_TR: Tensor
    token_back_R: Tensor
    row_back_TR: Tensor
    header: Tensor


def dispatch_layout(expert_TK: Tensor, said: Tensor, experts: int, ep: int, me: int, forward: int,
                    backward: int = 0) -> Dispatch:
    """Contract: ``csrc/ops/dispatch.h``."""
    (T, K), device = expert_TK.shape, expert_TK.device
    backward = 0 if backward == forward else backward
    rank_TK = torch.where((expert_TK >= 0) & (expert_TK < experts), expert_TK // (experts // ep), -1).long()
    pairs_TR = (rank_TK[:, :, None] == torch.arange(ep, device=device)).sum(1)
    t_T = torch.arange(T, device=device)
    tokens, rows, header = [], [], torch.zeros(ep, len(said) + 24, dtype=torch.int64, device=device)
    header[:, :len(said)] = said.to(device)
    for degree, columns in zip((forward, backward), header[:, len(said):].split(12, 1), strict=True):
        chunks, ranges, wanted = max(1, degree - 2), 1 if degree < 3 else 2, T if degree else 0
        token_R = expert_TK.new_full((wanted * min(K, ep - (me >= 0)),), -1)
        row_TR, S = expert_TK.new_full((wanted, ep), -1), 0
        for c in range(chunks if degree else 0):
            for r in range(ep):
                found = (pairs_TR[:, r] > 0) & (t_T * chunks // max(T, 1) == c)
                if r != me:
                    n = int(found.sum())
                    token_R[S:S + n] = t_T[found].int()
                    row_TR[found, r] = torch.arange(S, S + n, device=device, dtype=torch.int32)
                    columns[r, c], columns[r, 6 + c], S = n, pairs_TR[found, r].sum(), S + n
        if me >= 0 and degree:
            row_TR[:, me] = torch.where(pairs_TR[:, me] > 0, S + t_T, -1).int()
            for i in range(ranges):
                columns[me, 6 + i] = pairs_TR[t_T * ranges // max(T, 1) == i, me].sum()
        tokens.append(token_R)
        rows.append(row_TR)
    return Dispatch(tokens[0], rows[0], tokens[1], rows[1], header)


def activate(h: Tensor, activation: str, *, interleaved: bool = False,
             alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Contract: ``csrc/ops/experts.h``."""
    if activation == "gelu":
        return F.gelu(h)
    if activation == "relu":
        return F.relu(h)
    if activation == "relu2":
        return F.relu(h).square()
    if activation == "silu":
        return F.silu(h)
    g, u = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
    if activation == "swiglu":
        return F.silu(g) * u
    if activation == "geglu":
        return F.gelu(g) * u
    c = g.clamp(max=limit)
    return (u.clamp(-limit, limit) + 1) * c * torch.sigmoid(alpha * c)


def experts(x_TD: Tensor, rows: Rows, w_up: Tensor, w_down: Tensor, *,
            b_up: Tensor | None = None, b_down: Tensor | None = None,
            activation: str = "swiglu", interleaved: bool = False,
            alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Contract: ``csrc/ops/experts.h``; rows from offset[E] on are 0 here."""
    offset = rows.offset_E1.tolist()
    K = rows.pair_row_TK.shape[1]
    token_N = torch.div(rows.row_pair_N.long(), K, rounding_mode="floor").clamp(min=0)
    parts = []
    for e, (start, stop) in enumerate(itertools.pairwise(offset)):
        h = x_TD[token_N[start:stop]] @ w_up[e].T
        h = h if b_up is None else h + b_up[e]
        y = activate(h, activation, interleaved=interleaved, alpha=alpha, limit=limit) @ w_down[e].T
        parts.append(y if b_down is None else y + b_down[e])
    parts.append(x_TD.new_zeros(token_N.numel() - offset[-1], x_TD.shape[1]))
    return torch.cat(parts)


def combine(y_ND: Tensor, rows: Rows, weight_TK: Tensor | None = None) -> Tensor:
    """Contract: ``csrc/ops/combine.h``."""
    pair_row = rows.pair_row_TK.long()
    acc = y_ND.dtype if y_ND.dtype == torch.float64 else torch.float32
    y_ND1 = F.pad(y_ND.to(acc), (0, 0, 0, 1))       # a row of zeros for absent pairs, -1
    y_TKD = y_ND1[pair_row]
    if weight_TK is not None:
        y_TKD = y_TKD * weight_TK.masked_fill(pair_row < 0, 0.0)[..., None]
    return y_TKD.sum(1).to(y_ND.dtype)


def moe(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor,
        w_down: Tensor, **options) -> Tensor:
    """sort, experts, combine. Ids outside [0, E) add nothing."""
    rows = sort(expert_TK, w_up.shape[0])
    return combine(experts(x_TD, rows, w_up, w_down, **options), rows, weight_TK)


class MoE(nn.Module):
    """The plain layer with ``lina.MoE``'s parameters and state_dict keys."""

    def __init__(self, dim: int, ffn_dim: int, experts: int, top_k: int, *,
                 activation: str = "swiglu", bias: bool = False, shared_experts: int = 0,
                 score: str = "softmax", renormalize: bool = True, select_bias: bool = False,
                 **gate_options) -> None:
        super().__init__()
        U = 2 * ffn_dim if activation in GATED else ffn_dim
        self.top_k, self.activation = top_k, activation
        self.gate_options = dict(score=score, renormalize=renormalize, **gate_options)
        self.router: Any = nn.Module()
        self.router.weight = nn.Parameter(torch.randn(experts, dim) * dim**-0.5)
        if select_bias:
            self.router.register_buffer("select_bias", torch.zeros(experts))
        self.experts: Any = nn.Module()
        self.experts.w_up = nn.Parameter(torch.randn(experts, U, dim) * dim**-0.5)
        self.experts.w_down = nn.Parameter(torch.randn(experts, dim, ffn_dim) * ffn_dim**-0.5)
        for name, width in (("b_up", U), ("b_down", dim)):
            self.experts.register_parameter(name, nn.Parameter(torch.zeros(experts, width)) if bias else None)
        self.shared: Any = None
        if shared_experts:
            S, US = ffn_dim * shared_experts, U * shared_experts
            self.shared = nn.Module()
            self.shared.w_up = nn.Parameter(torch.randn(US, dim) * dim**-0.5)
            self.shared.w_down = nn.Parameter(torch.randn(dim, S) * S**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to the same shape."""
        x_TD = x.reshape(-1, x.shape[-1])
        routing = gate(x_TD @ self.router.weight.T, self.top_k,
                       bias_E=getattr(self.router, "select_bias", None), **self.gate_options)
        p = self.experts
        y_TD = moe(x_TD, routing.weight_TK, routing.expert_TK, p.w_up, p.w_down,
                   b_up=p.b_up, b_down=p.b_down, activation=self.activation)
        if self.shared is not None:
            y_TD = y_TD + activate(x_TD @ self.shared.w_up.T, self.activation) @ self.shared.w_down.T
        return y_TD.view_as(x)
