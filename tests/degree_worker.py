"""What every rank does in test_spread.py: the transport that is used by default, and the passes."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from parallel_worker import error_of, spread_net, whole_net
from torch.distributed.device_mesh import init_device_mesh

import lina
from lina import _C, parallel
from lina.parallel.settings import chosen, meshes
from lina.parallel.transport import carriers, nccl


class Mesh(SimpleNamespace):
    """One that can be weakly referred to."""


def defaults(device) -> None:
    """Several where one rank has found its links slow, on all ranks; else, and over peers' memory, one."""
    mesh, rank = lina.mesh(ep=2, transport="nccl"), dist.get_rank()
    alone, world = lina.mesh(ep=1, transport="nccl"), dist.group.WORLD
    for slow, want in (((), (1, 1)), ((2,), (4, 4)), (range(4), (4, 4))):
        made = SimpleNamespace(fast=rank not in slow)
        with mock.patch.object(carriers, "transport", lambda mesh, made=made: made):
            assert carriers.agree_degree("test", mesh, None, world) == want, slow
            assert carriers.agree_degree("test", mesh, (2, 3), world) == (2, 3)
    assert carriers.agree_degree("test", alone, None, world) == (1, 1), "nothing to measure"
    for transport, want in (("c10d", (4, 4)), ("p2p", (1, 1))):
        parallel.settings(mesh).transport = transport
        assert carriers.agree_degree("test", mesh, None, world) == want, transport


def told(device) -> None:
    """Ranks that were told different things hear of it where nothing else compares them."""
    odd = dist.get_rank() == 1
    mesh = lina.mesh(ep=2)
    net = spread_net(whole_net("softmax", device), "softmax", mesh)
    text = error_of(ValueError, lina.ddp, net, mesh, schedule="lina", degree=(3, 3) if odd else None,
                    init_sync=False)
    assert text.startswith("ddp: the ranks differ in degree: "), text
    assert "None on ranks [0, 2, 3]" in text and "(3, 3) on ranks [1]" in text, text

    def fails(mesh) -> None:
        if odd:
            raise RuntimeError("no NCCL")

    parallel.settings(mesh).transport = "nccl"
    with mock.patch.object(carriers, "transport", fails):
        text = error_of(RuntimeError, lina.ddp, net, mesh, schedule="lina")
    assert "measuring links failed on rank" in text, text


def others(device) -> None:
    """A module's mesh of another kind is left alone, and one that several modules have counts once."""
    mesh = lina.mesh(ep=2)
    net = spread_net(whole_net("softmax", device), "softmax", mesh)
    net.other = torch.nn.Linear(1, 1).to(device)
    net.other.mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    assert meshes(net, mesh) == [mesh]
    for schedule, want in (("plain", (1, 1)), ("lina", (4, 4))):
        lina.ddp(net, mesh, schedule=schedule, find_unused_parameters=True)
        assert parallel.settings(mesh).degree == want


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
