"""Gradients of experts that are averaged during backward, in one order on all ranks."""

from __future__ import annotations

import pytest
import torch
from torch.futures import Future

from lina.parallel.gradients.sequence import Sequence

from ranks import Run, each_scenario, launch

SCENARIOS = ["started:deepseek", "small", "routes:2", "routes:1", "accumulated", "narrow", "raised", "twice",
             "pair", "frozen"]
RUNS = {"gloo": Run("sequence_worker", SCENARIOS, 4),
        "nccl": Run("sequence_worker", [f"started:softmax:{t}" for t in ("c10d", "nccl", "p2p")], 2, "nccl")}
WORLD = 4
TIMEOUT_S = 4                 # the process group's, where a rank fails


@each_scenario(RUNS)
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


@pytest.mark.multi
def test_a_rank_leaves() -> None:
    """With experts' gradients on their way: all others end with an error, in time."""
    ended = launch("sequence_worker", ["dying"], WORLD, timeout_s=TIMEOUT_S)
    for rank, end in enumerate(ended):
        assert "a whole step" not in end.out, f"rank {rank} went on"
        # the timeout of an all-to-all, then of a gradient, and time for a process to print and end
        assert end.at - end.time_of("failing") < 2 * TIMEOUT_S + 10, f"rank {rank}"
        assert end.code == (7 if rank == WORLD - 1 else 1), f"rank {rank}: {end.code}\n{end.err[-2000:]}"
    assert "gone 2" in ended[-1].out, ended[-1].out


class Given:
    """A queue that is done at once."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def submit(self, flat, label, *, average=True, group=None, into=None) -> Future:
        self.labels.append(label)
        done = Future() if into is None else into
        done.set_result(flat)
        return done


@pytest.mark.parametrize("come,end,rest", [
    ("abcd", "abcd", ""),             # in turn
    ("dcba", "abcd", ""),             # all but the first are held
    ("bd", "", "bd"),                 # the first is missing: nothing goes before the end
    ("xacy", "a", "cxy"),             # unknown ones after all others, as they came
    ("abcdx", "abcd", "x"),
    ("", "", ""),
])  # fmt: skip
def test_order(come: str, end: str, rest: str) -> None:
    sequence, queue = Sequence(None), Given()          # type: ignore[arg-type]
    sequence._order = list("abcd")
    for backward in range(2):                          # the second after one that raised
        sequence.begin(backward)
        futures = {key: sequence.submit(key, queue, torch.ones(1), key) for key in come}
        assert "".join(queue.labels) == end
        assert {key for key, future in futures.items() if future.done()} == set(end)
        queue.labels.clear()
    sequence.finish()
    assert "".join(queue.labels) == rest and all(future.done() for future in futures.values())
    sequence.end()
    sequence.begin(2, absent="ac")
    for key in "db":
        sequence.submit(key, queue, torch.ones(1), key)
    assert "".join(queue.labels) == rest + "bd"


@pytest.mark.parametrize("known", ["ab", "a ", " b"])       # who has learned an order: one of them, both
def test_two_models(known: str) -> None:
    """In one backward pass the later one's gradients follow all of the earlier one's."""
    first, second, queue = Sequence(None), Sequence(None), Given()      # type: ignore[arg-type]
    for sequence, key in zip((first, second), known, strict=True):
        sequence._order = [key * 2, key] if key != " " else None
    for sequence in (first, second):
        sequence.begin(5)
    keys = {first: ("a", "aa"), second: ("b", "bb")}
    for sequence in (second, first):
        for key in keys[sequence]:
            sequence.submit(key, queue, torch.ones(1), key)
    assert all(label in ("a", "aa") for label in queue.labels)
    for sequence in (first, second):
        sequence.finish()
        queue.submit(torch.ones(1), f"small {keys[sequence][0]}")
        sequence.end()
    assert [label[-1] for label in queue.labels] == list("aaabbb"), queue.labels
    assert queue.labels[2] == "small a" and queue.labels[5] == "small b"
