"""The transport over torch.distributed: any backend, gloo on CPUs; the one others are tested against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lina import tracing
from lina.parallel.transport.base import Pending, Transport, failure, gate, to_host


class C10d(Transport):
    """Asynchronous collectives of the group. Priority over gradients is kept by the host: the gate
    is raised from ``imminent`` to ``settled``, and over CUDA, where the host runs ahead, queues wait
    for the last all-to-all's event besides."""

    name = "c10d"

    def counts(self, label: str, mine: Tensor) -> Callable[[], Tensor]:
        theirs = torch.empty_like(mine)
        pending = _Exchange(label, self.group, theirs, mine, None, None)
        if not mine.is_cuda:
            def read() -> Tensor:
                pending.wait()
                return torch.stack([mine, theirs])
            return read
        pending.wait()
        return to_host(label, torch.stack([mine, theirs]), self.group)

    def start(self, label: str, out: Tensor, inp: Tensor, out_splits: list[int],
              in_splits: list[int]) -> Pending:
        return _Exchange(label, self.group, out, inp, out_splits, in_splits)

    def imminent(self) -> None:
        gate.change(1)

    def settled(self) -> None:
        gate.lower()


class _Exchange:
    """One all-to-all under way; holds its tensors until it has been waited for."""

    def __init__(self, label: str, group: dist.ProcessGroup, out: Tensor, inp: Tensor,
                 out_splits: list[int] | None, in_splits: list[int] | None) -> None:
        self.label, self.group = label, group
        self.token = tracing.begin("a2a", label, out.device, bytes=inp.nbytes)
        try:
            self.work: Any = dist.all_to_all_single(out, inp, out_splits, in_splits, group, async_op=True)
        except RuntimeError as error:
            raise failure(label, group, error) from error
        self.held: Any = (out, inp)

    def wait(self) -> None:
        with tracing.span("a2a", f"{self.label}: wait"):
            try:
                self.work.wait()
            except RuntimeError as error:
                raise failure(self.label, self.group, error) from error
        tracing.end(self.token)
        self.work = self.held = self.token = None
