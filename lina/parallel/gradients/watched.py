"""The communication hook of schedule "auto": it tells an observer of backward, and gives way once told to."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook as at_once

from lina.parallel.gradients.hook import HookState, ordered_hook
from lina.parallel.gradients.sequence import Sequence
from lina.parallel.plan.observe import Observer


class Order:
    """The state of :func:`ordered`: how gradients travel. Kept by the reducer, so it keeps no model."""

    def __init__(self, group: dist.ProcessGroup, observer: Observer) -> None:
        self.group, self.observer = group, observer
        self.gently: HookState | None = None
        self.sequence: Sequence | None = None
        self.watched = True


def ordered(order: Order, bucket):  # torch reads annotations and wants them absent or its own
    """A communication hook: at once, as DistributedDataParallel without one, or giving way."""
    if order.watched:
        order.observer.in_backward()
    if order.gently is not None:
        return ordered_hook((order.gently, order.sequence), bucket)
    return at_once(order.group, bucket)
