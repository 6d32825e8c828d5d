"""Ranks that die, raise, hang, disagree, or carry NaN: every rank has a clear error, in time.

Over gloo on CPUs; with ``-m gpu`` over each transport on two GPUs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ranks import Ended, Run, each_scenario, launch, marks, results

TIMEOUT_S = {"gloo": 3, "nccl": 8}     # the process group's
HANG_S = {"gloo": 13, "nccl": 30}      # until a rank that hangs leaves: the others are gone long before
START_S = 60                           # starting torch and two good steps, on a loaded machine
TRANSPORTS = ("c10d", "nccl", "p2p")
WORLD = {"gloo": 4, "nccl": 2}         # gloo: (dp, ep) = (2, 2), the victim is rank 3: rank 2 shares its
                                       # tokens, 1 its experts, 0 neither


# ---- ranks that stop ----

STOPS = [("gloo", "c10d", *rest) for rest in (
    ("plain", "forward", "kill"), ("plain", "backward", "kill"), ("lina", "backward", "kill"),
    ("lina", "optimizer", "kill"), ("plain", "backward", "raise"), ("plain", "forward", "hang"),
    ("lina", "backward", "hang"))]
STOPS += [("nccl", transport, "lina", where, "kill") for transport in TRANSPORTS
          for where in ("forward", "backward", "optimizer")]
STOPS += [("nccl", "c10d", "plain", "backward", "kill"), ("nccl", "nccl", "lina", "backward", "hang")]


def stopped(backend: str, *scenario: str) -> list[Ended]:
    timeout_s = TIMEOUT_S[backend]
    return launch("faults_worker", [":".join(scenario)], WORLD[backend], backend=backend, timeout_s=timeout_s,
                  limit_s=START_S + HANG_S[backend] + 4 * timeout_s)


def scenario_of(backend: str, transport: str, schedule: str, where: str, how: str) -> tuple[str, ...]:
    return "failing", "2", transport, schedule, where, how, str(HANG_S[backend])


@pytest.fixture(scope="module")
def beside(request: pytest.FixtureRequest) -> Iterator[dict[tuple, Future]]:
    """The runs over gloo that hang, which is sleeping: they take place beside the others."""
    asked = [tuple(item.callspec.params.values()) for item in request.session.items
             if getattr(item, "originalname", "") == "test_survivors_report"]
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(stopped, case[0], *scenario_of(*case)) for case in asked
               if case[0] == "gloo" and case[-1] == "hang"}


@pytest.mark.parametrize("backend,transport,schedule,where,how",
                         [pytest.param(*s, marks=marks(s[0]), id="-".join(s)) for s in STOPS])
def test_survivors_report(beside: dict, backend: str, transport: str, schedule: str, where: str,
                          how: str) -> None:
    world, timeout_s = WORLD[backend], TIMEOUT_S[backend]
    case = backend, transport, schedule, where, how
    ended = beside[case].result() if case in beside else stopped(backend, *scenario_of(*case))
    scenario = ":".join(scenario_of(*case))
    said = results(ended).get(scenario, "")
    for rank, end in enumerate(ended):
        assert "four steps done" not in end.out, f"rank {rank} went on without rank {world - 1}"
        if rank == world - 1:
            assert end.code == {"kill": -signal.SIGKILL, "hang": 3, "raise": 1}[how], said
            continue
        took = end.at - end.time_of("failing")
        assert end.code is not None, f"rank {rank} hangs:\n{end.err[-2000:]}"
        # the exchange's timeout, on CUDA torch's own watchdog besides, and time for a process to end
        limit = (timeout_s if backend == "gloo" else 2 * timeout_s) + 10
        limit = min(limit, HANG_S[backend]) if how == "hang" else limit      # not because it left at last
        assert took < limit, f"rank {rank} ended {took:.1f} s after the fault, limit {limit} s"
        if backend == "gloo":
            assert end.code == 1, f"rank {rank}: exit code {end.code}, want an exception\n{end.err[-2000:]}"
            assert f"rank {rank}: Traceback" in said and "RuntimeError" in said, said
        else:      # an exception, or an abort by torch's watchdog, which says what it waited for
            assert end.code != 0, f"rank {rank} ended as if all were well:\n{end.out[-2000:]}"
            words = ("another rank has stopped, or hangs", "has stopped", "Watchdog caught", "NCCL error")
            assert any(word in said + end.err for word in words), f"{said}\n{end.err[-3000:]}"
    if backend == "gloo":      # who exchanges tokens with the victim names the exchange and the ranks
        assert "the exchange among ranks [2, 3] failed on rank 2" in said, said


# ---- ranks that disagree, buffers too small, NaN ----

BOTH = ("plain", "lina")
STAYS = {
    "gloo": [*(f"odd_one:2:c10d:{degree}" for degree in (1, 3)), "odd_model:2", "odd_model:4",
             *(f"nan:{ep}:c10d:{schedule}" for ep in (1, 2, 4) for schedule in BOTH)],
    "nccl": ["odd_one:2:c10d:3", "odd_one:2:nccl:3", "odd_one:2:p2p:1", "odd_model:2", "over_the_cap",
             *(f"nan:2:{transport}:{schedule}" for transport in TRANSPORTS for schedule in BOTH)],
}


@each_scenario({backend: Run("faults_worker", scenarios, WORLD[backend], backend)
                for backend, scenarios in STAYS.items()})
def test_ranks_stay(run: Run, scenario: str) -> None:
    """Errors and NaN after which every rank goes on."""
    run.check(scenario)
