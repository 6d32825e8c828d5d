"""Loss scaling whose decision to skip a step is common to all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for models whose ranks hold different gradients.

    Torch's looks for inf and NaN in this rank's gradients only. With experts spread over ranks one
    rank may overflow alone; it would skip its step and lower its scale while the others do neither,
    and what should be equal on all ranks would drift apart without a word. Here the finding of any
    rank is that of all, by one allreduce of one number in ``unscale_`` (which ``step`` calls), so
    every rank of ``group`` calls ``unscale_`` and ``step`` for the same optimizers in one order. A
    rank without gradients takes part like any other.

    Args:
        group: ranks that step together; by default the default process group, at each call, and
            this rank alone where there is none.  The others are torch's, as are all methods; with
            ``enabled=False``, the same on every rank, nothing is exchanged.
    """

    def __init__(self, device: str = "cuda", init_scale: float = 2.0**16, growth_factor: float = 2.0,
                 backoff_factor: float = 0.5, growth_interval: int = 2000, enabled: bool = True,
                 group: dist.ProcessGroup | None = None) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._group = group

    # Both unscale_ and _check_inf_per_device (before optimizers that unscale by themselves) store
    # what this returns.
    def _unscale_grads_(self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor,
                        found_inf: torch.Tensor, allow_fp16: bool) -> dict[torch.device, torch.Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        if not dist.is_initialized():
            return found
        anywhere = torch.stack([found_inf, *(f.to(found_inf.device) for f in found.values())]).amax()
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self._group)
        for device in list(found) or [found_inf.device]:
            found[device] = anywhere.to(device)
        return found
