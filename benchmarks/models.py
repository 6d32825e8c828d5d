"""What bench_ep.py and bench_step.py compare lina with, and real sizes of GPT-like models with experts.

``plain_experts`` is the plain way to spread experts over ranks: pairs sorted by expert, one row for each
token-expert pair, c10d's all-to-all with counts that the host reads, torch's grouped product.
T tokens here, D width, F expert width, E experts, L of them here, K for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

import lina


class Exchanged(NamedTuple):
    """Rows that one layer sent to each rank, and got from each, one way."""

    send: list[int]
    recv: list[int]


def plain_experts(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor, w_down: Tensor,
                  experts: int, group: dist.ProcessGroup, activation: str = "swiglu", *,
                  select: bool = False, seen: list[Exchanged] | None = None) -> Tensor:
    """The sum of each token's experts, [T, D].

    select: rows by index_select, whose backward adds by atomics, and not by indexing, whose backward sorts.
    seen: told of the sizes exchanged.
    """
    take = _select if select else _index
    K, ep = expert_TK.shape[1], group.size()
    local = experts // ep
    pair_N = expert_TK.flatten()
    order_N = pair_N.argsort(stable=True)
    mine_E = torch.bincount(pair_N, minlength=experts)
    theirs_E = torch.empty_like(mine_E)
    dist.all_to_all_single(theirs_E, mine_E, group=group)
    theirs_RL = theirs_E.view(ep, local)
    send, recv = torch.stack([mine_E.view(ep, local).sum(1), theirs_RL.sum(1)]).tolist()
    if seen is not None:
        seen.append(Exchanged(send, recv))
    got = all_to_all_single_autograd(take(x_TD, order_N // K), recv, send, group)
    ids = torch.arange(local, device=x_TD.device).repeat(ep)
    ids = ids.repeat_interleave(theirs_E, output_size=sum(recv))
    by = ids.argsort(stable=True)
    ends = theirs_RL.sum(0).cumsum(0).int()
    h = _grouped(take(got, by), w_up, ends)
    if activation == "swiglu":
        a, b = h.chunk(2, -1)
        h = F.silu(a) * b
    else:
        h = F.gelu(h)
    y = _grouped(h, w_down, ends)
    y = torch.empty_like(y).index_copy(0, by, y)
    back = all_to_all_single_autograd(y, send, recv, group)
    back = torch.empty_like(back).index_copy(0, order_N, back).view(-1, K, x_TD.shape[1])
    return (back * weight_TK[..., None].to(back.dtype)).sum(1)


def _index(rows: Tensor, index: Tensor) -> Tensor:
    return rows[index]


def _select(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index)


def _grouped(rows: Tensor, weight_LUD: Tensor, ends: Tensor) -> Tensor:
    if rows.dtype == torch.bfloat16 or not rows.is_cuda:
        return torch._grouped_mm(rows, weight_LUD.transpose(1, 2), offs=ends)
    parts = rows.tensor_split(ends[:-1].long().cpu())       # in float32, which torch's product does not take
    return torch.cat([part @ w.T for part, w in zip(parts, weight_LUD, strict=True)])


def plain_route(logits_TE: Tensor, K: int) -> tuple[Tensor, Tensor]:
    value, expert = logits_TE.topk(K)
    return value.softmax(-1, dtype=torch.float32), expert


class PlainMoE(nn.Module):
    """The plain design over a lina.MoE's own parameters, under the same names."""

    def __init__(self, moe: lina.MoE, group: dist.ProcessGroup, select: bool) -> None:
        super().__init__()
        self.router, self.experts, self.group, self.select = moe.router, moe.experts, group, select
        self.seen: list[Exchanged] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x_TD, own = x.reshape(-1, x.shape[-1]), self.experts
        weight_TK, expert_TK = plain_route(F.linear(x_TD, self.router.weight), self.router.top_k)
        return plain_experts(x_TD, weight_TK, expert_TK, own.w_up, own.w_down, own.count, self.group,
                             own.options["activation"], select=self.select, seen=self.seen).view(x.shape)


class NoExperts(nn.Module):
    """A lina.MoE's router alone: what a step costs without experts and exchanges."""

    def __init__(self, moe: lina.MoE) -> None:
        super().__init__()
        self.router = moe.router

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router(x.reshape(-1, x.shape[-1]))
        return x * routing.weight_TK.sum(-1).view(*x.shape[:-1], 1).to(x.dtype)


@dataclass(frozen=True)
class Preset:
    """A model: every FFN is a layer of experts."""

    layers: int
    dim: int
    ffn_dim: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    sequence: int
    activation: str
    rotary: bool = False

    def cut(self, layers: int) -> Preset:
        """Fewer layers, and as much less of the vocabulary: the parts of a step keep their shares."""
        return replace(self, layers=layers, vocab=max(256, self.vocab * layers // self.layers // 128 * 128))


PRESETS = {
    # As Lina's Transformer-XL (arXiv:2210.17223; sizes: arXiv:1901.02860); attention without recurrence.
    "txl": Preset(24, 1024, 4096, 16, 2, 16, 16, 64, 32000, 512, "gelu"),
    # Qwen3-30B-A3B, arXiv:2505.09388; without the norms of queries and keys.
    "qwen3": Preset(48, 2048, 768, 128, 8, 32, 4, 128, 151936, 2048, "swiglu", True),
    "gpt2": Preset(12, 768, 3072, 16, 2, 12, 12, 64, 50257, 1024, "gelu"),
}
LAYERS = {"txl": 12, "qwen3": 8, "gpt2": 12}         # by default: a run of seconds in one GPU's memory
TINY = {
    "txl": Preset(2, 32, 48, 4, 2, 2, 2, 16, 256, 16, "gelu"),
    "qwen3": Preset(2, 32, 16, 8, 4, 4, 2, 8, 256, 16, "swiglu", True),
    "gpt2": Preset(2, 16, 32, 4, 2, 2, 2, 8, 256, 16, "gelu"),
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)). x: [sequences, length, D]."""

    def __init__(self, p: Preset, mesh: DeviceMesh, where: dict[str, Any]) -> None:
        super().__init__()
        self.p = p
        self.norms = nn.ModuleList(nn.LayerNorm(p.dim, bias=False, **where) for _ in range(2))
        width = (p.heads + 2 * p.kv_heads) * p.head_dim
        self.qkv = nn.Linear(p.dim, width, bias=False, **where)
        self.out = nn.Linear(p.heads * p.head_dim, p.dim, bias=False, **where)
        self.moe: nn.Module = lina.MoE(p.dim, p.ffn_dim, p.experts, p.top_k, activation=p.activation,
                                       score="topk_softmax", renormalize=False, mesh=mesh, **where)

    def attention(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        p, (B, S, _) = self.p, x.shape
        heads = self.qkv(x).view(B, S, -1, p.head_dim).transpose(1, 2)
        q, k, v = heads.split([p.heads, p.kv_heads, p.kv_heads], 1)
        if turn is not None:
            half = p.head_dim // 2
            q, k = (t * turn[0] + torch.cat([-t[..., half:], t[..., :half]], -1) * turn[1] for t in (q, k))
        done = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=p.kv_heads < p.heads)
        return self.out(done.transpose(1, 2).reshape(B, S, -1))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norms[0](x), turn)
        return x + self.moe(self.norms[1](x))


class GPT(nn.Module):
    """Mean cross entropy of the next token. ids and targets: int64 [sequences, length]."""

    def __init__(self, p: Preset, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        where: dict[str, Any] = dict(device=device, dtype=dtype)
        self.p = p
        self.embed = nn.Embedding(p.vocab, p.dim, **where)
        self.turn: tuple[Tensor, Tensor] | None = None
        self.place = None if p.rotary else nn.Parameter(torch.randn(p.sequence, p.dim, **where) * 0.02)
        self.blocks = nn.ModuleList(Block(p, mesh, where) for _ in range(p.layers))
        self.norm = nn.LayerNorm(p.dim, bias=False, **where)
        self.unembed = nn.Linear(p.dim, p.vocab, bias=False, **where)
        nn.init.normal_(self.unembed.weight, std=0.02)
        if p.rotary:
            rate = 1e-6 ** (torch.arange(0, p.head_dim, 2) / p.head_dim)
            angle = torch.outer(torch.arange(p.sequence), rate).repeat(1, 2)
            self.turn = angle.cos().to(**where), angle.sin().to(**where)    # no buffers: DDP would send them

    def body(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.place is not None:
            x = x + self.place
        for block in self.blocks:
            x = block(x, self.turn)
        return x

    def head(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.unembed(self.norm(x)).float().flatten(0, 1), targets.flatten())

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.head(self.body(ids), targets)
