"""Experts over peers' memory equal experts over c10d, on two GPUs; and errors that end in time."""

from __future__ import annotations

import contextlib
import signal
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lina import _C
from lina.parallel.gradients.peer_reduce import PeerReducer
from lina.parallel.tokens import round as rounds
from lina.parallel.tokens.p2p import moe
from lina.parallel.transport.peers import Peers

from helpers import Carveout, take_turns
from ranks import Run, each_scenario, launch

KINDS = ("random", "one", "none")
DISAGREEMENTS = ("D", "K", "number of experts", "dtype of x", "need of gradients")
SCENARIOS = [*(f"parity:{kind}" for kind in KINDS), "many_tokens", "large", "priority", "degree", "layers",
             "growth", "graph",
             *(f"disagreement:{what}" for what in DISAGREEMENTS), "refusals",
             *(f"broken:{how}" for how in ("overflow", "mismatch", "absent", "late"))]


@each_scenario({"gpu-peers2": Run("p2p_worker", SCENARIOS, 2, "nccl"),
                "rounds4": Run("rounds_worker", ["passes"], 4)})
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


@pytest.mark.gpu
@pytest.mark.multi
def test_killed() -> None:
    """The peers of a rank that was killed have an error that names it, and live on to say so."""
    *others, last = launch("p2p_worker", ["broken:kill"], 2, backend="nccl", timeout_s=5)
    assert last.code == -signal.SIGKILL, last.err[-2000:]
    for end in others:
        assert "survived: " in end.out, f"{end.out[-2000:]}\n{end.err[-2000:]}"


@pytest.mark.parametrize("made", [Peers, PeerReducer])
def test_needs_several_ranks(alone: None, made: type) -> None:
    """One rank has no peers."""
    with pytest.raises(ValueError, match="has 1 ranks, limit 2"):
        made(dist.group.WORLD)


@pytest.mark.parametrize("rank,ep,tokens,timeout_s", [(0, 9, 1, 1.0),          # more ranks than flags
                                                      (2, 2, 1, 1.0),          # no such rank
                                                      (0, 2, 1 << 24, 1.0),    # counts have 24 bits
                                                      (0, 2, 1, 0.0)])         # no time at all
def test_limits(rank: int, ep: int, tokens: int, timeout_s: float) -> None:
    if not _C.CUDA:
        with pytest.raises(RuntimeError, match="built without CUDA"):
            _C.peers_make(rank, ep, 0, 0, tokens, timeout_s, 0, False, None)
        return
    with pytest.raises(ValueError, match=r"p2p: (rank|tokens|timeout_s)"):
        _C.peers_make(rank, ep, 0, 0, tokens, timeout_s, 0, False, None)


def test_ids_of_another_dtype() -> None:
    """One line that says so, before anything is sent; parallel.moe converts them."""
    x, weight, w_up, w_down = (torch.zeros(s) for s in ((3, 4), (3, 2), (2, 6, 4), (2, 4, 3)))
    peers = SimpleNamespace(device=x.device, ep=2)
    with pytest.raises(ValueError, match=r"p2p: expert is torch\.int64, must be int32"):
        moe(x, weight, torch.zeros(3, 2, dtype=torch.int64), w_up, w_down, experts=4, peers=[peers])


class Stream:
    """Notes what waits for what; an event is the number of what was on its stream before."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        return self.log[-1]

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@pytest.mark.parametrize("fails", [False, True])
def test_exchanges_beside_experts(fails: bool, monkeypatch) -> None:
    """Each exchange waits for what was launched before it, experts for their rows, the end for all of it,
    after an error too."""
    log: list[str] = []
    here = [Stream("main", log)]
    side = Stream("side", log)

    @contextlib.contextmanager
    def on(stream: Stream):
        here.append(stream)
        yield
        here.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(rounds, "stream", lambda device, name: side)

    def compute(j: int) -> None:
        log.append(f"{here[-1].name}: compute {j}")
        assert setting.value == 3, "the exchange beside it has no SMs"
        if fails:
            raise MemoryError

    setting = Carveout()
    with setting, pytest.raises(MemoryError) if fails else contextlib.nullcontext():
        rounds.overlap(2, lambda j: log.append(f"{here[-1].name}: leave {j}"), compute,
                       lambda j: log.append(f"{here[-1].name}: back {j}"), torch.device("cuda"), 3)
    before = ["side waits for main", "side: leave 0", "side waits for main", "side: leave 1",
              "main waits for side: leave 0", "main: compute 0"]
    after = ["side waits for main", "side: back 0", "main waits for side: leave 1", "main: compute 1",
             "side waits for main", "side: back 1"]
    assert setting.value is None
    assert log == before + ([] if fails else after) + ["main waits for side"]


def model_of_rank(rank: int, memory: list[dict], rounds: int, waits_in_collect: bool):
    """One rank as csrc/cuda/peers.h describes it; yields wherever another may come between."""
    ranks = range(len(memory))

    def send(n: int, what: str):
        for part in (what, f"{what} flag"):
            for d in ranks:
                memory[d][part, rank] = n
                yield

    def wait(n: int, what: str):
        for s in ranks:
            while memory[rank][f"{what} flag", s] != n:
                yield

    def read(n: int, what: str):
        for s in ranks:
            yield
            found = memory[rank][what, s]
            assert found == n, f"rank {rank} read {found} of {s}'s {what}, not {n}"

    for n in range(1, rounds + 1):
        yield from send(n, "out")
        yield from wait(n, "out")
        yield from read(n, "out")                         # the experts read rows where they arrived
        yield from send(n, "back")
        if waits_in_collect:
            yield from wait(n, "back")
        yield from read(n, "back")


def run_model(seed: int, world: int, waits_in_collect: bool = True) -> None:
    memory: list[dict] = [defaultdict(int) for _ in range(world)]
    take_turns([model_of_rank(r, memory, 4, waits_in_collect) for r in range(world)], seed)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_buffers_are_free_again(world: int) -> None:
    """The argument of csrc/cuda/peers.h, as a model: under random delays no round overwrites unread rows."""
    for seed in range(100):
        run_model(seed, world)


def test_model_sees_a_missing_wait() -> None:
    """The model is no mere tautology: without collect's wait it finds the error."""
    with pytest.raises(AssertionError, match=r"not [0-9]|for ever"):
        for seed in range(150):
            run_model(seed, 2, waits_in_collect=False)
