"""Gradients over peers' memory: the protocol as a model, and sums, pauses and errors on GPUs."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lina import _C
from lina.parallel.gradients import queue
from lina.parallel.transport.domain import SeveralHosts

from helpers import take_turns
from ranks import Run, each_scenario

HEADER = Path(__file__).parents[1] / "csrc" / "cuda" / "peers_reduce.h"
SCENARIOS = ["sums:False", "sums:True", "sequence:False", "sequence:True", "queue:True", "queue:False",
             "gives_way:False", "gives_way:True", "gives_up_waiting", "refusals",
             *(f"broken:{how}" for how in ("absent", "mismatch", "abort")), "graph"]
WORLD = max(2, min(4, torch.cuda.device_count()))        # more than two ranks take another path


@each_scenario(Run("reduce_worker", SCENARIOS, WORLD, "nccl"))
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


@pytest.mark.parametrize("rank,ep,blocks,tile_bytes,scatter,words",
                         [(0, 2, 0, 65536, False, "blocks=0"),             # nobody to do it
                          (0, 2, 65, 65536, False, "blocks=65"),           # more than there are flags for
                          (0, 2, 8, 65537, False, "tile_bytes=65537"),     # no power of two
                          (0, 2, 8, 2048, False, "tile_bytes=2048"),       # below the least
                          (0, 3, 8, 65536, False, "must scatter"),         # sums of pairs alone
                          (0, 9, 8, 65536, True, "9 ranks")])              # more than a domain
def test_limits(rank: int, ep: int, blocks: int, tile_bytes: int, scatter: bool, words: str) -> None:
    if not _C.CUDA:
        with pytest.raises(RuntimeError, match="built without CUDA"):
            _C.peers_reduce_make(rank, ep, blocks, tile_bytes, scatter, 1.0)
        return
    with pytest.raises(ValueError, match=f"p2p reduce: .*{words}"):
        _C.peers_reduce_make(rank, ep, blocks, tile_bytes, scatter, 1.0)


# ---- which reducer a queue takes ----

class Group(NamedTuple):
    ranks: int
    rate: bool
    error: Exception | None

    def size(self) -> int:
        return self.ranks


class Fake:
    """A reducer of either kind."""

    def __init__(self, group: Group, *model: object) -> None:
        self.group, self.closed = group, 0
        if not model and group.error is not None:        # over peers' memory
            raise group.error

    def fast(self) -> bool:
        return self.group.rate

    def close(self) -> None:
        self.closed += 1


class OverNCCL(Fake):
    pass


@pytest.mark.parametrize("fast,peers,size,error,kinds", [
    (False, False, 2, None, ["OverNCCL"]),
    (True, False, 2, None, ["OverNCCL", "Fake"]),
    (False, True, 2, None, ["Fake"]),
    (True, False, 16, None, ["OverNCCL"]),                        # more than one domain has
    (True, False, 2, SeveralHosts("two hosts"), ["OverNCCL"]),
    (True, False, 2, RuntimeError("no handle"), ["OverNCCL"]),    # says so, and works
    (True, True, 2, SeveralHosts("two hosts"), ["OverNCCL"]),
    (True, True, 2, RuntimeError("no handle"), None)])            # what p2p needs itself
def test_reducer_of_a_queue(monkeypatch, caplog, fast: bool, peers: bool, size: int, error: Exception | None,
                            kinds: list[str] | None) -> None:
    monkeypatch.setattr(queue, "PeerReducer", Fake)
    monkeypatch.setattr(queue, "Reducer", OverNCCL)
    group = Group(size, fast, error)
    if kinds is None:
        with pytest.raises(RuntimeError, match="no handle"):
            queue.DeviceQueue(group, (0.0, 1.0), 1.0, peers)
        return
    made = queue.DeviceQueue(group, (0.0, 1.0), 1.0, peers)
    assert type(made._reducer(group, torch.bfloat16)).__name__ == kinds[-1]
    assert type(made._reducer(group, torch.float64)).__name__ == "OverNCCL"
    found = list({id(r): r for r in made._reducers.values()}.values())
    assert sorted(type(r).__name__ for r in found) == sorted({*kinds, "OverNCCL"})
    assert ("gradients travel over NCCL: no handle" in caplog.text) == (type(error) is RuntimeError)
    made.close()
    assert all(r.closed == 1 for r in found)


# ---- the protocol of csrc/cuda/peers_reduce.h: one block of each rank, as a model ----

def header(name: str) -> str:
    found = re.search(rf"#define {name} +(.+?)(?: /\*.*)?\n", HEADER.read_text())
    assert found, f"{HEADER.name} does not define {name}"
    return found[1]


DEPTH = int(header("LINA_REDUCE_DEPTH"))
SLOTS = eval(header("LINA_REDUCE_SLOTS").replace("LINA_REDUCE_DEPTH", str(DEPTH)))
CALLS = (1, 5, 2, 0, 11, 1, 3)           # tiles a call: fewer than the depth, none, more than the ring


class Rank:
    """Rings and flags of one rank, by phase and source."""

    def __init__(self, world: int, slots: int) -> None:
        self.ring = {(phase, s): [0] * slots for phase in range(2) for s in range(world)}
        self.flag = {(phase, s): 0 for phase in range(2) for s in range(world)}


def model_of_rank(me: int, ranks: list[Rank], depth: int, slots: int, scatter: bool,
                  leaves: random.Random) -> Iterator[None]:
    """Tiles are numbered from 1 on; yields wherever another rank may come between. In a step the kernel
    sends and waits at once: sent first, as here, it knows least of its peers. Sometimes it leaves there, and
    does the step again."""
    others = [r for r in range(len(ranks)) if r != me]
    start = 0

    def flags(number: int, here: list[bool]) -> Iterator[None]:
        for r in others:
            if here[0]:
                ranks[r].flag[0, me] = number
            yield
            if scatter and here[1]:
                ranks[r].flag[1, me] = number - depth

    def put(phase: int, number: int) -> Iterator[None]:
        for r in others:
            ranks[r].ring[phase, me][number % slots] = -number       # half written
            yield
            ranks[r].ring[phase, me][number % slots] = number
            yield

    def take(phase: int, number: int) -> Iterator[None]:
        for _ in range(2):                                           # it takes a while to read
            for r in others:
                found = ranks[me].ring[phase, r][number % slots]
                assert found == number, f"rank {me} read tile {found} of {r}, not {number}"
                yield

    for tiles in CALLS:
        for step in range(tiles + (2 if scatter else 1) * depth):
            number, summed, taken = (start + 1 + step - lag for lag in (0, depth, 2 * depth))
            before, here = ([start < n <= start + tiles for n in (number - ago, summed - ago, taken)]
                            for ago in (1, 0))
            while True:
                if here[0]:
                    yield from put(0, number)
                if leaves.random() < 0.8:
                    break
                yield
                yield from flags(number - 1, before)
            for r in others:
                while here[1] and ranks[me].flag[0, r] < summed:
                    yield
                while scatter and here[2] and ranks[me].flag[1, r] < taken:
                    yield
            if here[1]:
                yield from take(0, summed)
                if scatter:
                    yield from put(1, summed)
            if scatter and here[2]:
                yield from take(1, taken)
            yield from flags(number, here)
        start += tiles


def run_model(seed: int, world: int, scatter: bool, depth: int = DEPTH, slots: int = SLOTS) -> None:
    ranks = [Rank(world, slots) for _ in range(world)]
    take_turns([model_of_rank(r, ranks, depth, slots, scatter, random.Random(world * seed + r))
                for r in range(world)], seed, (1, 5, 200))


@pytest.mark.parametrize("world,scatter", [(2, False), (2, True), (3, True)])
def test_slots_are_free_again(world: int, scatter: bool) -> None:
    """The proofs of peers_reduce.h: no slot is written before it was read, and nobody waits for ever."""
    for seed in range(40):
        run_model(seed, world, scatter)


@pytest.mark.parametrize("scatter", [False, True])
def test_model_sees_too_few_slots(scatter: bool) -> None:
    """The model is no mere tautology: a ring of 2 D slots is written too early, one of 2 D + 1 is not."""
    with pytest.raises(AssertionError, match="read tile"):
        for seed in range(40):
            run_model(seed, 2, scatter, slots=2 * DEPTH)
    for seed in range(40):
        run_model(seed, 2, scatter, slots=2 * DEPTH + 1)


def test_model_sees_waiting_in_a_circle() -> None:
    """A step that waited for tiles that peers flag at the end of the same step would never end."""
    with pytest.raises(AssertionError, match="for ever"):
        run_model(0, 2, False, depth=0, slots=4)
