"""Ranks as threads over a fake of lina._C and of torch.cuda, for test_domain.py.

What the fake knows of lina_peers is csrc/comm/peers.h: memory is made, opened by peers, closed, freed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lina.parallel.transport import domain, peers, rounds
from lina.parallel.transport.domain import Domain
from lina.parallel.transport.peers import Peers

LAYER = dict(D=16, K=2, E=4, dtype=torch.float32, grad=False)


class Memory:
    """One lina_peers."""

    def __init__(self, rank: int) -> None:
        self.rank, self.opened, self.closed, self.aborted = rank, False, False, False


class Group:
    group_name = "0"

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world = rank, world

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._world


class Numbers(dict):
    """A Counter in each rank, as its process would have."""

    def __init__(self, here: threading.local) -> None:
        self.here = here

    def __getitem__(self, key: tuple) -> int:
        return self.get((self.here.rank, key), 0)

    def __setitem__(self, key: tuple, value: int) -> None:
        super().__setitem__((self.here.rank, key), value)


class Fake:
    """lina._C and CUDA for a few threads; ``refuse`` names (function, rank) that fail."""

    CUDA, sms, world = True, 132, 2

    def __init__(self) -> None:
        self.here, self.refuse, self.made, self.devices = threading.local(), set(), [], []
        self.groups = [Group(rank, self.world) for rank in range(self.world)]
        store = dist.HashStore()
        self.store = lambda group: store

    def _may(self, name: str) -> None:
        self.devices.append((name, self.here.rank, self.here.device))
        if (name, self.here.rank) in self.refuse:
            raise RuntimeError(f"{name} refused")

    def peers_make(self, rank: int, ep: int, out: int, back: int, *more) -> Memory:
        self._may("make")
        self.made.append(Memory(rank))
        return self.made[-1]

    def peers_export(self, memory: Memory) -> bytes:
        return bytes([memory.rank])

    def peers_open(self, memory: Memory, ep: int, exports: bytes) -> None:
        assert exports == bytes(range(ep))
        self._may("open")
        memory.opened = True

    def peers_close(self, memory: Memory) -> None:
        self._may("close")
        memory.closed = True

    def peers_rows(self, memory: Memory) -> int:
        return 0

    def peers_lost(self, memory: Memory) -> bool:
        return False

    def peers_abort(self, memory: Memory) -> None:
        memory.aborted = True

    def peers_stop(self, memory: Memory, stream: int, overflow: bool) -> None:
        memory.aborted = overflow

    @contextmanager
    def device(self, device: torch.device):
        before, self.here.device = self.here.device, device.index
        yield
        self.here.device = before

    def stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=7)

    def group(self, rank: int) -> Group:
        return self.groups[rank]

    def ranks(self, call: Callable) -> list:
        """What each rank returned, or raised."""
        def run(rank: int):
            self.here.rank, self.here.device, self.here.captures = rank, 9, False
            try:
                return call(rank)
            except (RuntimeError, ValueError) as error:
                return error

        with ThreadPoolExecutor(self.world) as pool:
            return [job.result(30) for job in [pool.submit(run, r) for r in range(self.world)]]


@pytest.fixture
def fake(monkeypatch) -> Fake:
    made = Fake()
    for module in (domain, peers):
        monkeypatch.setattr(module, "_C", made)
    monkeypatch.setattr(rounds, "_get_process_group_store", made.store)
    monkeypatch.setattr(domain, "seconds_of", lambda group: 600.0)
    monkeypatch.setattr(domain, "_mapped", {})
    monkeypatch.setattr(rounds, "_numbers", Numbers(made.here))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(group.size())))
    monkeypatch.setattr(torch, "as_tensor", lambda memory, device: None)
    for name, value in dict(device=made.device, current_stream=made.stream,
                            is_current_stream_capturing=lambda: made.here.captures,
                            get_device_properties=lambda device: SimpleNamespace(
                                multi_processor_count=made.sms)).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def peers_on(group: Group, timeout_s: float = 5, **options) -> Peers:
    return Peers(group, device=torch.device("cuda", group.rank()), timeout_s=timeout_s, **options)


def all_peers(fake: Fake, **options) -> list[Peers]:
    return [peers_on(group, **options) for group in fake.groups]


def domain_on(group: Group, purpose: str, timeout_s: float = 5) -> Domain:
    return Domain(group, purpose, torch.device("cuda", group.rank()), timeout_s)
