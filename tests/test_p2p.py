"""Experts over peers' memory equal experts over c10d, on two GPUs; and errors that end in time."""

from __future__ import annotations

import random
import signal

import pytest
import torch
import torch.distributed as dist

from lina import _C
from lina.parallel.transport.peers import Peers

from ranks import launch, results

KINDS = ("random", "one", "none")
DISAGREEMENTS = ("D", "K", "number of experts", "dtype of x", "need of gradients")
SCENARIOS = [*(f"parity:{kind}" for kind in KINDS), "many_tokens", "ways", "priority", "degree", "layers",
             "graph",
             *(f"disagreement:{what}" for what in DISAGREEMENTS), "refusals",
             *(f"broken:{how}" for how in ("overflow", "mismatch", "absent"))]
WORLD = 2
GPU = [pytest.mark.multi, pytest.mark.gpu]
_done: dict[str, str] = {}


def needs_gpus() -> None:
    if torch.cuda.device_count() < WORLD:
        pytest.skip(f"needs {WORLD} GPUs, there are {torch.cuda.device_count()}")


@pytest.mark.parametrize("scenario", [pytest.param(s, marks=GPU) for s in [*SCENARIOS, "exit"]])
def test_ranks(scenario: str) -> None:
    """``exit``: every rank ended by itself, with code 0."""
    needs_gpus()
    if not _done:
        ended = launch("p2p_worker", SCENARIOS, WORLD, backend="nccl")
        _done.update(results(ended) or {"exit": "nothing ran"})
    found = _done.get(scenario, "" if scenario == "exit" else "not reached: an earlier scenario failed")
    assert not found, found


@pytest.mark.gpu
@pytest.mark.multi
def test_killed() -> None:
    """The peers of a rank that was killed have an error that names it, and live on to say so."""
    needs_gpus()
    *others, last = launch("p2p_worker", ["broken:kill"], WORLD, backend="nccl", timeout_s=5, limit_s=60)
    assert last.code == -signal.SIGKILL, last.err[-2000:]
    for end in others:
        assert "survived: " in end.out, f"{end.out[-2000:]}\n{end.err[-2000:]}"


def test_needs_several_ranks() -> None:
    """One rank has no peers; a build without CUDA has no kernels."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="has 1 ranks, limit 2"):
            Peers(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rank,ep,tokens,timeout_s", [(0, 9, 1, 1.0),          # more ranks than flags
                                                      (2, 2, 1, 1.0),          # no such rank
                                                      (0, 2, 1 << 24, 1.0),    # counts have 24 bits
                                                      (0, 2, 1, 0.0)])         # no time at all
def test_limits(rank: int, ep: int, tokens: int, timeout_s: float) -> None:
    if not _C.CUDA:
        with pytest.raises(RuntimeError, match="built without CUDA"):
            _C.peers_make(rank, ep, 0, 0, tokens, timeout_s, 0)
        return
    with pytest.raises(ValueError, match=r"p2p: (rank|tokens|timeout_s)"):
        _C.peers_make(rank, ep, 0, 0, tokens, timeout_s, 0)


def model_of_rank(rank: int, memory: list[dict], rounds: int, waits_in_collect: bool):
    """One rank as csrc/cuda/peers.h describes it; yields wherever another may come between."""
    ranks = range(len(memory))
    for n in range(1, rounds + 1):
        for d in ranks:
            memory[d]["out", rank] = n
            yield
        for d in ranks:
            memory[d]["out flag", rank] = n
            yield
        for s in ranks:
            while memory[rank]["out flag", s] != n:
                yield
        for s in ranks:                                   # the experts read rows where they arrived
            yield
            assert memory[rank]["out", s] == n, f"rank {rank} read {memory[rank]['out', s]}, not {n}"
        for d in ranks:
            memory[d]["back", rank] = n
            yield
        for d in ranks:
            memory[d]["back flag", rank] = n
            yield
        for s in ranks:
            while waits_in_collect and memory[rank]["back flag", s] != n:
                yield
        for s in ranks:
            yield
            assert memory[rank]["back", s] == n, f"rank {rank} summed {memory[rank]['back', s]}, not {n}"


def model_by_ranges(rank: int, memory: list[dict], rounds: int, waits_in_collect: bool):
    """The same where collect sums while it sends (csrc/cuda/peers_collect_bulk.cuh): rows in 3 ranges, of
    which this rank's tokens need some; senders and summers take turns as they like."""
    ranks, draw = range(len(memory)), random.Random(rank)

    def send(n: int):
        for c in range(3):
            for d in ranks:
                memory[d]["back", rank, c] = n
                yield
            for d in ranks:
                memory[d]["back flag", rank, c] = n
                yield

    def add(n: int):
        needed = [(s, c) for c in range(3) for s in ranks if draw.random() < 0.3]
        for s, c in needed:
            while memory[rank].get(("back flag", s, c)) != n:
                yield
            yield
            found = memory[rank]["back", s, c]
            assert found == n, f"rank {rank} summed {found}, not {n}"

    def watch(n: int):
        for s in ranks:
            while waits_in_collect and memory[rank].get(("back flag", s, 2)) != n:
                yield
        yield

    for n in range(1, rounds + 1):
        for d in ranks:
            memory[d]["out", rank] = n
            yield
        for d in ranks:
            memory[d]["out flag", rank] = n
            yield
        for s in ranks:
            while memory[rank]["out flag", s] != n:
                yield
        for s in ranks:
            yield
            assert memory[rank]["out", s] == n, f"rank {rank} read {memory[rank]['out', s]}, not {n}"
        warps = [send(n), add(n), watch(n)]
        while warps:
            one = draw.choice(warps)
            if next(one, "ended") == "ended":
                warps.remove(one)
            yield


def run_model(seed: int, world: int, waits_in_collect: bool = True, model=model_of_rank) -> None:
    draw = random.Random(seed)
    memory = [{(kind, s): 0 for kind in ("out", "out flag", "back", "back flag") for s in range(world)}
              for _ in range(world)]
    running = [model(r, memory, 4, waits_in_collect) for r in range(world)]
    for _ in range(100_000):
        if not running:
            return
        # one rank runs ahead for a while, as when another's kernel starts late
        chosen = draw.choice(running)
        for _ in range(draw.choice((1, 3, 40))):
            try:
                next(chosen)
            except StopIteration:
                running.remove(chosen)
                break
    raise AssertionError("the ranks wait for each other for ever")


@pytest.mark.parametrize("model", [model_of_rank, model_by_ranges])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_buffers_are_free_again(world: int, model) -> None:
    """The argument of csrc/cuda/peers.h, as a model: under random delays no round overwrites unread rows."""
    for seed in range(100):
        run_model(seed, world, model=model)


@pytest.mark.parametrize("model", [model_of_rank, model_by_ranges])
def test_model_sees_a_missing_wait(model) -> None:
    """The model is no mere tautology: without collect's wait it finds the error."""
    with pytest.raises(AssertionError, match=r"not [0-9]|for ever"):
        for seed in range(150):
            run_model(seed, 2, waits_in_collect=False, model=model)
