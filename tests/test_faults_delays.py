"""Experts on one rank against experts on several, every rank late by 0 to 50 ms at every collective.

``LINA_DELAY_RUNS=200 pytest tests/test_faults_delays.py`` makes 200 runs of every transport and
schedule, shared out over the sizes of the expert group; by default there are a few of each.
"""

from __future__ import annotations

import os

import pytest

from ranks import launch, results

RUNS = int(os.environ.get("LINA_DELAY_RUNS", "0"))
KINDS = {                    # (sizes of the expert group, transports, schedules), ranks, backend
    "cpu": ((2, 4), ("c10d",), ("plain", "lina"), 4, "gloo"),
    "gpu": ((2,), ("c10d", "nccl", "p2p"), ("plain", "lina"), 2, "nccl"),
}
A_RUN_S = 5.0                # what one run may take: some 30 collectives, each late by 50 ms at most


@pytest.mark.multi
@pytest.mark.timeout(400 + 20 * RUNS)
@pytest.mark.parametrize("kind", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_delays(kind: str) -> None:
    sizes, transports, schedules, world, backend = KINDS[kind]
    each = -(-RUNS // len(sizes)) or 6
    scenarios = [f"delays:{ep}:{transport}:{schedule}:{each}" for ep in sizes for transport in transports
                 for schedule in schedules]
    found = results(launch("faults_worker", scenarios, world, backend=backend,
                           limit_s=200 + A_RUN_S * each * len(scenarios)))
    wrong = "\n".join(text for text in found.values() if text)
    assert not wrong, wrong
    assert list(found) == scenarios
