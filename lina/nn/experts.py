"""The experts of one layer: weights, and the way from routed tokens to their sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lina import ops, parallel


class Experts(nn.Module):
    """``count`` feed-forward networks, all of them here or spread over ``mesh["ep"]``.

    Parameters (U = 2F for gated activations, else F; L = ``local`` experts):
        w_up [L, U, D]: gate rows then up rows, or alternating if ``interleaved``.
        w_down [L, D, F];  with ``bias`` also b_up [L, U] and b_down [L, D].

    With a mesh, the rank with coordinate r of dimension "ep" holds the experts from r * L to
    (r + 1) * L, as plain local parameters. Initial weights are drawn expert by expert, so that
    one seed gives one model whatever the number of ranks. The state_dict of a part also holds ``ep``
    (int64 [2]: r and the size of "ep"), so that no rank loads another's; one of all experts
    (:func:`lina.gathered_state_dict`'s, or a single rank's) has none, and each rank takes its own.

    Raises:
        ValueError: unknown activation, or ``count`` not divisible by the size of "ep".
    """

    def __init__(self, dim: int, ffn_dim: int, count: int, *, activation: str = "swiglu",
                 bias: bool = False, interleaved: bool = False, alpha: float = 1.702,
                 limit: float = 7.0, mesh: DeviceMesh | None = None,
                 device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if activation not in ops.ACTIVATIONS:
            raise ValueError(f"Experts: activation is {activation!r}, "
                             f"must be one of {', '.join(ops.ACTIVATIONS)}")
        if not limit >= 0:
            raise ValueError(f"Experts: limit is {limit}, must be at least 0")
        self.dim, self.ffn_dim, self.count, self.mesh = dim, ffn_dim, count, mesh
        self.local = count if mesh is None else parallel.local_count(count, mesh)
        self.first = 0 if mesh is None else parallel.ep_rank(mesh) * self.local
        self.options: dict[str, Any] = dict(activation=activation, interleaved=interleaved,
                                            alpha=alpha, limit=limit)
        U = 2 * ffn_dim if activation in ops.GATED else ffn_dim
        where = dict(device=device, dtype=dtype)
        self.w_up = nn.Parameter(torch.empty(self.local, U, dim, **where))
        self.w_down = nn.Parameter(torch.empty(self.local, dim, ffn_dim, **where))
        self.b_up = nn.Parameter(torch.empty(self.local, U, **where)) if bias else None
        self.b_down = nn.Parameter(torch.empty(self.local, dim, **where)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (normal, standard deviation 1 / sqrt(inputs)); biases to zero."""
        first = self.first
        for weight in (self.w_up, self.w_down):
            with torch.no_grad():
                spare = torch.empty_like(weight[0])
                for e in range(self.count):
                    mine = first <= e < first + self.local
                    nn.init.normal_(weight[e - first] if mine else spare, std=weight.shape[-1]**-0.5)
        for bias in (self.b_up, self.b_down):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """out [T, D] = sum over k of weight[t, k] * expert_TK[t, k]'s output for token t.

        x_TD [T, D] in the weights' dtype (any float dtype under autocast), weight_TK [T, K] float32
        (float64), expert_TK [T, K] int32. Raises as :func:`lina.ops.moe` and :func:`lina.parallel.moe`.
        """
        options = dict(self.options, b_up=self.b_up, b_down=self.b_down)
        if self.mesh is None or self.local == self.count:
            return ops.moe(x_TD, weight_TK, expert_TK, self.w_up, self.w_down, **options)
        return parallel.moe(x_TD, weight_TK, expert_TK, self.w_up, self.w_down, experts=self.count,
                            mesh=self.mesh, **options)

    @property
    def ep(self) -> Tensor | None:
        """Rank and size of "ep", as in the state_dict; None where all experts are here."""
        return parallel.Part(self.first, self.local, self.count).stamp()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        part = parallel.Part(self.first, self.local, self.count)
        names = [name for name, p in self._parameters.items() if p is not None]
        parallel.stamp_or_gather(destination, prefix, names, "ep", part, self.mesh)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *more: Any) -> None:
        part = parallel.Part(self.first, self.local, self.count)
        parallel.take_part(state_dict, prefix, self._parameters, "ep", part,
                           copy=local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)

    def extra_repr(self) -> str:
        shown = f"{self.count}, dim={self.dim}, ffn_dim={self.ffn_dim}"
        shown += f", activation={self.options['activation']}"
        if self.b_up is not None:
            shown += ", bias=True"
        if self.options["interleaved"]:
            shown += ", interleaved=True"
        return shown if self.local == self.count else f"{shown}, local={self.local}"
