"""A byte-level transformer with an MoE layer in every second block.

B sequences, S bytes, D width, H heads, d = D/H. RMSNorm before each part
(Zhang & Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021,
arXiv:2104.09864), SwiGLU (Shazeer 2020, arXiv:2002.05202).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import lina

from .options import Options

BYTES = 256


class Attention(nn.Module):
    turn_Sp: Tensor                 # p = d/2 complex numbers: how far each pair turns at each position

    def __init__(self, dim: int, heads: int, seq: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        d = dim // heads
        angle_Sp = torch.outer(torch.arange(seq).float(), 10000.0 ** (-torch.arange(0, d, 2) / d))
        self.register_buffer("turn_Sp", torch.polar(torch.ones_like(angle_Sp), angle_Sp), persistent=False)

    def rotate(self, x_BHSd: Tensor) -> Tensor:
        x_BHSp = torch.view_as_complex(x_BHSd.float().unflatten(-1, (-1, 2)))
        turned_BHSp = x_BHSp * self.turn_Sp[: x_BHSd.shape[2]]
        return torch.view_as_real(turned_BHSp).flatten(-2).to(x_BHSd.dtype)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y_BHSd = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y_BHSd.transpose(1, 2).reshape(B, S, D))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, o: Options, mixture: bool, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(o.dim), nn.RMSNorm(o.dim)
        self.attention = Attention(o.dim, o.heads, o.seq)
        self.ffn: nn.Module
        if mixture:
            self.ffn = lina.MoE(o.dim, o.ffn_dim, o.experts, o.top_k, balance_coef=o.balance_coef,
                                mesh=mesh)
        else:
            self.ffn = SwiGLU(o.dim, o.top_k * o.ffn_dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.norm1(x_BSD))
        return x_BSD + self.ffn(self.norm2(x_BSD))


class Transformer(nn.Module):
    """``model(byte_BS) -> logits [B, S, 256]`` for the byte after each; S <= o.seq."""

    def __init__(self, o: Options, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        torch.manual_seed(o.seed)
        self.embed = nn.Embedding(BYTES, o.dim)
        self.blocks = nn.ModuleList(Block(o, i % 2 == 1 and not o.dense, mesh) for i in range(o.layers))
        self.norm = nn.RMSNorm(o.dim)
        self.head = nn.Linear(o.dim, BYTES, bias=False)
        self._init(o)

    def forward(self, byte_BS: Tensor) -> Tensor:
        x_BSD = self.embed(byte_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))

    @torch.no_grad()
    def _init(self, o: Options) -> None:
        """Normal weights of unit gain; what ends a residual branch starts smaller."""
        residual = (2 * o.layers) ** -0.5
        self.embed.weight.normal_(std=0.5)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
                if name.endswith((".out", ".down")):
                    module.weight.mul_(residual)
            if isinstance(module, lina.nn.Experts):      # drawn by lina, the same on any layout
                module.w_down.mul_(residual)
        self.head.weight.mul_(0.25)


def parameter_counts(model: nn.Module, o: Options) -> tuple[int, int]:
    """Parameters of the whole model, and those one byte uses."""
    total = active = 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if isinstance(module, lina.nn.Experts):
                each = weight.numel() // module.local
                total, active = total + each * module.count, active + each * o.top_k
            else:
                total, active = total + weight.numel(), active + weight.numel()
    return total, active
