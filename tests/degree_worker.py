"""What every rank does in test_spread.py: the transport that is used by default, and the passes."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from parallel_worker import spread_net, whole_net

import lina
from lina import _C, parallel
from lina.parallel.settings import chosen
from lina.parallel.transport import carriers, nccl


class Mesh(SimpleNamespace):
    """One that can be weakly referred to."""


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
    for transport, want in (("c10d", (4, 4)), ("p2p", (1, 1))):
        settings.transport = transport
        carriers.set_degree(net, mesh, None)
        assert settings.degree == want, transport


def auto(device) -> None:
    """What transport "auto" stands for; asked once for each mesh."""
    for kind, built, backends, want in (("cuda", True, "cpu:gloo,cuda:nccl", "nccl"),
                                        ("cuda", True, "cuda:gloo", "c10d"),
                                        ("cuda", False, "cuda:nccl", "c10d"),
                                        ("cpu", True, "cpu:gloo,cuda:nccl", "c10d")):
        mesh = Mesh(device_type=kind, get_group=lambda name: name)
        with mock.patch.object(dist, "get_backend_config", lambda group, said=backends: said), \
                mock.patch.object(_C, "CUDA", built):
            assert chosen(mesh) == want, (kind, built, backends)
        assert chosen(mesh) == want
    assert chosen(lina.mesh(ep=2)) == ("nccl" if device.type == "cuda" else "c10d")


def measured(device) -> None:
    """By the rates that a wrapped model's transport finds; NVLink's own is fast."""
    for rate, want in ((None, (1, 1)), (2e10, (4, 4)), (3e11, (1, 1))):
        mesh = lina.mesh(ep=2, transport="nccl")
        net = spread_net(whole_net("softmax", device), "softmax", mesh)
        found = nccl.NCCL._rate if rate is None else lambda self, rate=rate: rate
        with mock.patch.object(nccl.NCCL, "_rate", found):
            lina.ddp(net, mesh, schedule="lina")
        assert parallel.settings(mesh).degree == want, (rate, parallel.settings(mesh).degree)
