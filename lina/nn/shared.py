"""The shared expert: one dense feed-forward network that every token passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lina import ops


class SharedExpert(nn.Module):
    """w_up [U, D], w_down [D, S]: activation(x w_up^T) w_down^T for every token.

    Run as a single expert with weight 1, so that the activation is fused and only x and the
    pre-activation are kept for the backward pass.
    """

    def __init__(self, dim: int, ffn_dim: int, *, activation: str = "swiglu",
                 interleaved: bool = False, alpha: float = 1.702, limit: float = 7.0,
                 device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.options: dict[str, Any] = dict(activation=activation, interleaved=interleaved,
                                            alpha=alpha, limit=limit)
        U = 2 * ffn_dim if activation in ops.GATED else ffn_dim
        self.w_up = nn.Parameter(torch.empty(U, dim, device=device, dtype=dtype))
        self.w_down = nn.Parameter(torch.empty(dim, ffn_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (normal, standard deviation 1 / sqrt(inputs))."""
        for weight in (self.w_up, self.w_down):
            nn.init.normal_(weight, std=weight.shape[-1]**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D], in the weights' dtype. Raises as :func:`lina.ops.moe`."""
        T = x_TD.shape[0]
        ones_T1 = x_TD.new_ones(T, 1, dtype=ops.sum_dtype(x_TD.dtype))
        zeros_T1 = x_TD.new_zeros(T, 1, dtype=torch.int32)
        return ops.moe(x_TD, ones_T1, zeros_T1, self.w_up[None], self.w_down[None], **self.options)

    def extra_repr(self) -> str:
        dim, ffn_dim = self.w_down.shape
        return f"dim={dim}, ffn_dim={ffn_dim}, activation={self.options['activation']}"
