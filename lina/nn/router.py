"""The router: logits, gate, and the losses and statistics that keep it balanced."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lina import ops


class Router(nn.Module):
    """Chooses each token's ``top_k`` of ``experts`` experts.

    Args (those not listed are :func:`lina.ops.gate`'s):
        dim: model width D.
        experts, top_k: E and K; 1 <= K <= 32, K <= E <= 1024.
        select_bias: keep a buffer ``select_bias`` [E] that is added to the scores for the
            choice only, moved by :func:`lina.update_bias` (DeepSeek-V3, arXiv:2412.19437,
            section 2.1.2).
        jitter: while training, multiply the router's input by noise from
            U(1 - jitter, 1 + jitter) (Switch Transformer, arXiv:2101.03961, section 2.2).
        balance_coef, balance_form: weight and form ("switch" or "gshard") of the
            load-balancing loss; z_coef: weight of the z-loss (arXiv:2202.08906, eq. 5),
            mean over tokens. Their sum is ``aux_loss`` after each training forward.
        dtype: of the parameters; logits_dtype: what the product is computed in, if not
            the input's dtype (torch.float32 also under autocast).

    Inside activation checkpointing use ``use_reentrant=False``; a checkpointed router that keeps
    statistics cannot be compiled with fullgraph=True, since it writes the attributes below.

    Raises:
        ValueError: an argument outside its limits, when the router is made.

    Attributes:
        aux_loss: scalar tensor of the last training forward, or None.
        load: int64 [E], choices since it was last zeroed, kept while training; or None.
    """

    aux_loss: Tensor | None
    load: Tensor | None
    select_bias: Tensor | None

    def __init__(self, dim: int, experts: int, top_k: int, *, score: str = "softmax",
                 renormalize: bool = True, scale: float = 1.0, groups: int = 1,
                 top_groups: int | None = None, group_score: str = "top2",
                 select_bias: bool = False, jitter: float = 0.0, balance_coef: float = 0.0,
                 balance_form: str = "switch", z_coef: float = 0.0,
                 logits_dtype: torch.dtype | None = None,
                 device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        ops.check_gate(experts, top_k, score, groups, top_groups, group_score)
        if not 0.0 <= jitter < 1.0:
            raise ValueError(f"Router: jitter is {jitter}, must be in [0, 1)")
        if balance_form not in ("switch", "gshard"):
            raise ValueError(f"Router: balance_form is {balance_form!r}, must be 'switch' or 'gshard'")
        self.dim, self.count, self.top_k = dim, experts, top_k
        self.gate_options: dict[str, Any] = dict(
            score=score, renormalize=renormalize, scale=scale, groups=groups,
            top_groups=top_groups, group_score=group_score)
        self.jitter, self.logits_dtype = jitter, logits_dtype
        self.balance_coef, self.balance_form, self.z_coef = balance_coef, balance_form, z_coef
        self.weight = nn.Parameter(torch.empty(experts, dim, device=device, dtype=dtype))
        bias = torch.zeros(experts, device=device, dtype=torch.float32) if select_bias else None
        self.register_buffer("select_bias", bias)
        self.aux_loss = self.load = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (normal, standard deviation 1 / sqrt(D)); the bias to zero."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)
        if self.select_bias is not None:
            nn.init.zeros_(self.select_bias)

    def forward(self, x_TD: Tensor) -> ops.Routing:
        """Weights [T, K] (float32; float64 for float64) and expert ids [T, K] (int32)."""
        if self.training and self.jitter > 0:
            x_TD = ops.jitter(x_TD, self.jitter)
        logits_TE = self._logits(x_TD)
        wants_stats = self.training and (
            self.select_bias is not None or self.balance_coef != 0 or self.z_coef != 0)
        routing = ops.gate(logits_TE, self.top_k, bias_E=self.select_bias, stats=wants_stats,
                           **self.gate_options)
        if wants_stats:
            self._keep(routing, max(x_TD.shape[0], 1))
        return routing

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self.logits_dtype is None:
            return F.linear(x_TD, self.weight)
        device = "cpu" if x_TD.is_meta else x_TD.device.type      # meta has no autocast to turn off
        with torch.autocast(device, enabled=False):
            return F.linear(x_TD.to(self.logits_dtype), self.weight.to(self.logits_dtype))

    def _keep(self, routing: ops.Routing, tokens: int) -> None:
        assert routing.load_2E is not None and routing.prob_E is not None and routing.z is not None
        loss = routing.prob_E.new_zeros(())
        if self.balance_coef:
            loss = loss + self.balance_coef * ops.balance_loss(
                routing.load_2E, routing.prob_E, self.balance_form)
        if self.z_coef:
            loss = loss + self.z_coef * (routing.z / tokens)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return      # recomputed for a backward pass: kept, it would keep that pass's tensors alive
        self.aux_loss = loss
        load_E = routing.load_2E[0].long()
        self.load = load_E if self.load is None else self.load + load_E

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        bias_E = self.select_bias
        super()._apply(fn, recurse)
        moved_E = self.select_bias
        if bias_E is not None and moved_E is not None and moved_E.dtype in (torch.bfloat16, torch.float16):
            self.select_bias = bias_E.to(moved_E.device)      # update_bias's small steps would round away
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle starts afresh: aux_loss belongs to a graph that stays here.
        return {**self.__dict__, "aux_loss": None, "load": None}

    def extra_repr(self) -> str:
        shown = [f"dim={self.dim}", f"experts={self.count}", f"top_k={self.top_k}"]
        shown += [f"{k}={v!r}" for k, v in self.gate_options.items()
                  if v not in (None, 1, 1.0) and (k, v) != ("group_score", "top2")]
        if self.select_bias is not None:
            shown.append("select_bias=True")
        shown += [f"{k}={getattr(self, k)}" for k in ("jitter", "balance_coef", "z_coef") if getattr(self, k)]
        return ", ".join(shown)


def aux_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary losses of every :class:`Router` in ``model``.

    Each belongs to its router's last training forward (of a router called twice, to the second
    call); add the sum to the task's loss, and backpropagate it with that step. An evaluation leaves
    it as it is. A scalar; 0 where no router has one.

    Raises:
        RuntimeError: a router's loss has no gradient although its weights want one, as happens
            inside reentrant activation checkpointing: use ``use_reentrant=False`` there.
    """
    total: Tensor | None = None
    for name, module in model.named_modules():
        if not isinstance(module, Router) or module.aux_loss is None:
            continue
        loss = module.aux_loss
        if (torch.is_grad_enabled() and module.training and module.weight.requires_grad
                and not loss.requires_grad):
            raise RuntimeError(
                f"aux_loss: the loss of router '{name}' carries no gradient; its forward ran without "
                "gradients (reentrant checkpointing: pass use_reentrant=False)")
        total = loss if total is None else total + loss.to(total.device)
    return torch.zeros(()) if total is None else total


@torch.no_grad()
def update_bias(model: nn.Module, rate: float = 1e-3, group: dist.ProcessGroup | None = None) -> None:
    """Move every router's ``select_bias`` by ``rate`` against its load, then zero the load.

    b_e += rate * sign(mean(load) - load_e), with the load since the last update summed over the
    ranks of ``group`` (default: all ranks, where torch.distributed is initialised; every rank
    must call). Call once a step, after the optimizer. DeepSeek-V3, arXiv:2412.19437, 2.1.2.

    Raises:
        ValueError, TypeError: see :func:`lina.ops.update_bias`.
    """
    for module in model.modules():
        if not isinstance(module, Router) or module.select_bias is None:
            continue
        load_E = module.load
        if load_E is None:
            load_E = torch.zeros(module.count, dtype=torch.int64, device=module.select_bias.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load_E, group=group)
        ops.update_bias(module.select_bias, load_E, rate)
        module.load = None
