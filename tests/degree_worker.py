"""What every rank does in test_spread.py: passes that schedule "lina" runs in by default."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from parallel_worker import spread_net, whole_net

import lina
from lina import parallel
from lina.parallel.transport import carriers, nccl


def defaults(device) -> None:
    """Several where one rank has found its links slow, on all ranks; else, and over peers' memory, one."""
    mesh, rank, net = lina.mesh(ep=2, transport="nccl"), dist.get_rank(), torch.nn.Linear(1, 1)
    settings = parallel.settings(mesh)
    for slow, want in (((), (1, 1)), ((2,), (4, 4)), (range(4), (4, 4))):
        made = SimpleNamespace(slow=rank in slow)
        with mock.patch.object(carriers, "transport", lambda mesh, made=made: made):
            carriers.set_degree(net, mesh, None)
            assert settings.degree == want, (slow, settings.degree)
            carriers.set_degree(net, mesh, (2, 3))
            assert settings.degree == (2, 3)
    for transport, want in (("c10d", (4, 4)), ("auto", (4, 4)), ("p2p", (1, 1))):
        settings.transport = transport
        carriers.set_degree(net, mesh, None)
        assert settings.degree == want, transport


def measured(device) -> None:
    """By the rates that a wrapped model's transport finds; NVLink's own is fast."""
    for rate, want in ((None, (1, 1)), (2e10, (4, 4)), (3e11, (1, 1))):
        mesh = lina.mesh(ep=2, transport="nccl")
        net = spread_net(whole_net("softmax", device), "softmax", mesh)
        found = nccl.NCCL._rate if rate is None else lambda self, rate=rate: rate
        with mock.patch.object(nccl.NCCL, "_rate", found):
            lina.ddp(net, mesh, schedule="lina")
        assert parallel.settings(mesh).degree == want, (rate, parallel.settings(mesh).degree)
