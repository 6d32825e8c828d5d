"""What ranks agree on before memory is shared, how it ends, and what must fit a GPU at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from domain_case import LAYER, Fake, all_peers, domain_on, fake, peers_on

from lina.parallel.gradients import peer_reduce
from lina.parallel.gradients.peer_reduce import _fitting
from lina.parallel.transport import domain, peers

__all__ = ["fake"]                # a fixture


@pytest.mark.parametrize("step", ["make", "open"])     # no memory; a peer's cannot be mapped, its own can
def test_failed_growth_leaves_nothing(fake: Fake, step: str) -> None:
    """Every rank hears who failed; memory that was made is given back, and the next try works."""
    all_of = all_peers(fake)
    fake.refuse = {(step, 1)}
    for error in fake.ranks(lambda r: all_of[r].layer(5, **LAYER)):
        assert isinstance(error, RuntimeError) and f"rank 1: {step} refused" in str(error), error
    assert len(fake.made) == (1 if step == "make" else 2)
    assert all(memory.closed for memory in fake.made) and not domain._mapped
    fake.refuse = set()
    assert [found.C for found in fake.ranks(lambda r: all_of[r].layer(5, **LAYER))] == [128, 128]
    assert all(device == rank for _, rank, device in fake.devices), "on the layer's GPU, not the current one"


def test_tokens_are_read_at_each_call(fake: Fake) -> None:
    """More tokens in the settings: a new agreement and, once, larger buffers; nothing is asked otherwise."""
    all_of = all_peers(fake, tokens=200)

    def calls(T: int) -> list:
        return fake.ranks(lambda r: all_of[r].layer(T, **LAYER))

    assert [found.C for found in calls(5)] == [256, 256]
    rounds = dict(all_of[0]._domain._rounds._counts)
    assert [found.C for found in calls(256)] == [256, 256]
    assert all_of[0]._domain._rounds._counts == rounds, "a call like an earlier one asked the other ranks"
    first = list(fake.made)
    for one in all_of:
        one.tokens = 1000
    assert [found.C for found in calls(1000)] == [1024, 1024] and len(fake.made) == 4
    assert all(memory.closed for memory in first) and len(domain._mapped) == 2
    for one in all_of:
        one.tokens = 200
    assert [found.C for found in calls(5)] == [256, 256] and len(fake.made) == 4
    for error in calls(257):
        assert "on every rank" in str(error) and "tokens = N" in str(error), error
    assert all(memory.aborted for memory in fake.made[2:])        # told to the peers


def test_the_cap_is_read_at_each_agreement(fake: Fake) -> None:
    all_of = all_peers(fake, cap_bytes=1000)
    for error in fake.ranks(lambda r: all_of[r].layer(5, **LAYER)):
        assert "the cap is 1000" in str(error)
    for one in all_of:
        one.cap_bytes = None
    assert [found.C for found in fake.ranks(lambda r: all_of[r].layer(5, **LAYER))] == [128, 128]


def test_settings_reach_the_peers(fake: Fake) -> None:
    """A mesh's settings, as spread layers hand them over."""
    group = fake.group(0)
    (found,) = peers.peers_of(group, 1, device=torch.device("cuda", 0), tokens=8)
    assert peers.peers_of(group, 1, tokens=9, cap_bytes=10)[0] is found
    assert (found.tokens, found.cap_bytes, found.sms) == (9, 10, peers.share(fake.sms))
    several = peers.peers_of(group, 2, device=torch.device("cuda", 0), tokens=9, cap_bytes=11)
    assert found not in several and [(one.tokens, one.cap_bytes, one.sms) for one in several] == [
        (5, 5, 16)] * 2


def test_other_tokens_in_a_capture(fake: Fake) -> None:
    """Ranks cannot agree while they capture: an error, before anything is made or told."""
    all_of = all_peers(fake, tokens=5)
    fake.ranks(lambda r: all_of[r].layer(5, **LAYER))

    def captured(rank: int):
        fake.here.captures, all_of[rank].tokens = True, 500
        return all_of[rank].layer(5, **LAYER)

    for error in fake.ranks(captured):
        assert isinstance(error, RuntimeError) and "inside a graph capture" in str(error), error
    assert len(fake.made) == 2 and not any(memory.aborted for memory in fake.made)


@pytest.mark.parametrize("capturing", [(), (0,), (0, 1)])
def test_graphs_keep_buffers_on_all_ranks(fake: Fake, capturing: tuple) -> None:
    """A graph of one rank writes to the memory of all: it is kept by all, or by none."""
    all_of = all_peers(fake)
    def small(rank: int) -> None:
        all_of[rank].layer(5, **LAYER)
        fake.here.captures = rank in capturing
        all_of[rank].launch()

    assert fake.ranks(small) == [None, None]
    fake.ranks(lambda r: all_of[r].layer(5, **{**LAYER, "D": 999}))
    assert [memory.closed for memory in fake.made] == [not capturing] * 2 + [False] * 2
    assert fake.ranks(lambda r: all_of[r].close()) == [None, None]
    assert all(memory.closed for memory in fake.made) and not domain._mapped


def test_domains_are_told_apart(fake: Fake) -> None:
    """Tokens' and gradients' of one group, made in another order on each rank; and a second one of tokens."""
    def call(rank: int):
        group, found = fake.group(rank), {}
        for purpose in ("tokens", "gradients")[::1 - 2 * rank]:
            found[purpose] = domain_on(group, purpose)
        second = domain_on(group, "tokens")
        said = {purpose: found[purpose].gather("x", purpose) for purpose in ("tokens", "gradients")}
        return said, second.gather("x", "second")

    for said, second in fake.ranks(call):
        assert said == {purpose: [purpose] * 2 for purpose in said} and second == ["second"] * 2


def test_rounds_of_another_kind_are_not_mixed_up(fake: Fake) -> None:
    """A rank at another step is an error in time; and then there is no next round to get wrong."""
    all_of = [domain_on(fake.group(r), "tokens", 0.3) for r in range(2)]
    for error in fake.ranks(lambda r: all_of[r].gather(("facts", "end")[r], r)):
        assert "not all 2 ranks" in str(error), error
    for error in fake.ranks(lambda r: all_of[r].gather("facts", r)):
        assert "not all 2 ranks" in str(error), error


def test_memory_outlives_a_late_rank(fake: Fake, monkeypatch) -> None:
    """A rank that does not close may still write: this one's memory stays."""
    all_of = all_peers(fake, timeout_s=5)
    fake.ranks(lambda r: all_of[r].layer(5, **LAYER))
    monkeypatch.setattr(domain, "CLOSE_S", 0.1)
    assert fake.ranks(lambda r: all_of[r].close() if r == 0 else None) == [None, None]
    assert fake.made[0].closed != fake.made[1].closed and len(domain._mapped) == 2


@pytest.mark.parametrize("sms,blocks", [(132, 32),      # an H200
                                        (78, 21),       # 3/4 for tokens, by fours
                                        (128, 32)])     # exactly
def test_default_blocks_fit(sms: int, blocks: int) -> None:
    assert _fitting(None, [[sms, 0], [132, 0]]) == blocks
    assert blocks + peers.share(sms) <= sms


def test_explicit_blocks_must_fit() -> None:
    assert _fitting(64, [[132, 0]] * 2) == 64                     # no exchanges of tokens here
    assert _fitting(None, [[132, 120]] * 2) == 12
    for blocks in (24, None):
        with pytest.raises(ValueError, match="tokens hold 132 of the GPU's 132 SMs"):
            _fitting(blocks, [[132, 99], [132, 132]])


def test_exchanges_leave_room_for_reductions(fake: Fake) -> None:
    gradients = domain_on(fake.group(0), "gradients")
    gradients.sms = 40
    assert peers_on(fake.group(0)).sms == 92                 # 99 of 132 by themselves
    with pytest.raises(ValueError, match="hold 40 of the GPU's 132 SMs"):
        peers_on(fake.group(0), sms=93)
    assert peers_on(fake.group(1)).sms == 99                 # another GPU
    del gradients
    assert peers_on(fake.group(0), sms=132).sms == 132


def test_reducer_and_tokens_share_a_gpu(fake: Fake, monkeypatch) -> None:
    """The reducer that ranks agree on is the smallest that any has room for."""
    monkeypatch.setattr(peer_reduce, "Domain", lambda group, purpose, timeout_s: domain_on(group, purpose))
    monkeypatch.setattr(peer_reduce, "_C", SimpleNamespace(
        peers_reduce_make=lambda rank, ep, blocks, *more: fake.peers_make(rank, ep, blocks, 0),
        peers_check=lambda memory: None))
    monkeypatch.setattr(peer_reduce, "stream", lambda *which: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(peer_reduce.PeerReducer, "all_reduce", lambda *args, **options: None)
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)
    tokens = peers_on(fake.group(1), sms=120)
    reducers = fake.ranks(lambda r: peer_reduce.PeerReducer(fake.group(r)))
    assert [reducer._shape[0] for reducer in reducers] == [12, 12], reducers
    del tokens
    errors = fake.ranks(lambda r: peer_reduce.PeerReducer(fake.group(r), blocks=2 + r))
    text = [str(error) for error in errors]
    assert "disagree on blocks: [2, 3]" in text[0] and text[0] == text[1]
    assert fake.ranks(lambda r: reducers[r].close()) == [None, None] and not domain._mapped

    def all_reduce(self, *args, **options) -> None:
        if self._domain.rank == 1:
            raise RuntimeError("no kernel")

    monkeypatch.setattr(peer_reduce.PeerReducer, "all_reduce", all_reduce)
    for error in fake.ranks(lambda r: peer_reduce.PeerReducer(fake.group(r))):
        assert "the first sums failed: rank 1: no kernel" in str(error), error
    assert not domain._mapped


@pytest.mark.parametrize("ends", [True, False])
def test_exit_lets_work_end_first(fake: Fake, monkeypatch, ends: bool) -> None:
    """Dropped without close nothing is aborted but at the process's end, and there after a bounded wait."""
    all_of = all_peers(fake)
    fake.ranks(lambda r: (all_of[r].layer(5, **LAYER), all_of[r].launch())[1])
    all_of.clear()
    asked = []

    class Event:
        def query(self) -> bool:
            assert not any(memory.aborted for memory in fake.made), "aborted before it was waited for"
            asked.append(self)
            return ends and len(asked) > 5

    class Stream:
        def record_event(self) -> Event:
            return Event()

    for one in domain._mapped.values():
        assert one.stream is not None
        one.stream = Stream()
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: Stream())
    monkeypatch.setattr(domain, "DRAIN_S", 20.0 if ends else 0.2)
    domain._end()
    assert all(memory.aborted and not memory.closed for memory in fake.made) and len(asked) > 5


def test_exit_of_a_fork_leaves_the_parents_alone(fake: Fake, monkeypatch) -> None:
    all_of = all_peers(fake)
    fake.ranks(lambda r: all_of[r].layer(5, **LAYER))
    monkeypatch.setattr(domain.os, "getpid", lambda: -1)
    domain._end()
    assert not any(memory.aborted for memory in fake.made)
