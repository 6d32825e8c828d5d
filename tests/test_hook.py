"""Gradients that let all-to-alls pass, over gloo: exact, in order, ended by an error where a rank dies."""

from __future__ import annotations

import signal

import pytest

from ranks import Run, each_scenario, launch, results

SCENARIOS = [*(f"order:{ep}:{degree}" for ep in (2, 4) for degree in (1, 3)),
             *(f"alone:{which}" for which in ("plain", "view", "unused", "static")),
             "compressed:fp16", "compressed:bf16",
             *(f"differing:{name}" for name in ("compress", "link", "micro_op_s")), "uneven", "states"]
WORLD = 4
TIMEOUT_S = 6                 # the process group's, where a rank fails


@each_scenario(Run("hook_worker", SCENARIOS, WORLD))
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


@pytest.mark.multi
@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_rank_dies_in_backward(how: str) -> None:
    """With micro-ops queued: every other rank ends with an error, in time, and its queue refuses more."""
    ended = launch("hook_worker", [f"dying:{how}"], WORLD, timeout_s=TIMEOUT_S)
    said = results(ended)
    for rank, end in enumerate(ended):
        assert "three steps done" not in end.out, f"rank {rank} went on"
        took = end.at - end.time_of("failing")
        if rank == WORLD - 1:
            assert "queued 0" not in end.out and "queued " in end.out, end.out
            assert end.code == {"kill": -signal.SIGKILL, "raise": 1}[how], said
            continue
        # the timeout of an all-to-all, then of a micro-op, and time for a process to print and end
        assert took < 2 * TIMEOUT_S + 10, f"rank {rank} took {took:.1f} s"
        assert end.code == 1, f"rank {rank}: exit code {end.code}, want an exception\n{end.err[-2000:]}"
        assert "later: gradients: " in end.out, end.out
    assert "the exchange among ranks [2, 3] failed on rank 2" in said[f"dying:{how}"], said
