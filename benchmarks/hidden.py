"""Which share of the all-to-alls' time has compute beside it: by lina.trace, and by the kernels that ran."""

from __future__ import annotations

import torch
import torch.distributed as dist
from training import Trainer

import lina
from lina.tracefile import busy, length, subtract, union


def hidden_by_trace(trainer: Trainer) -> float | None:
    """Share of the all-to-alls' time with compute beside it, as lina.trace sees it; the mean over ranks."""
    with lina.trace(gather=False) as recorder:
        for _ in range(3):
            trainer.step()
    a2a, compute = busy(recorder.spans, "a2a"), busy(recorder.spans, "compute")
    return _share(length(a2a), length(subtract(a2a, compute)), trainer.device)


def hidden_by_kernels(trainer: Trainer) -> float | None:
    """The same of the kernels that ran: all-to-alls against all that are no communication."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            trainer.step()
        torch.cuda.synchronize()
    a2a, compute = [], []
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.name.startswith(("Mem", "gpu_")):
            continue
        span = event.time_range.start / 1e6, event.time_range.end / 1e6
        name = event.name.lower()
        if any(word in name for word in ("sendrecv", "alltoall", "peers_dispatch", "peers_collect")):
            a2a.append(span)
        elif "peers_reduce" not in name and not name.startswith("nccl"):
            compute.append(span)
    a2a = union(a2a)
    return _share(length(a2a), length(subtract(a2a, union(compute))), trainer.device)


def _share(total: float, exposed: float, device: torch.device) -> float | None:
    sums = torch.tensor([total, exposed], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    total, exposed = sums.tolist()
    return 1 - exposed / total if total else None
