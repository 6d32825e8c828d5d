"""Nothing grows while token counts change: tensors, threads, open files, memory of host and GPU.

``LINA_MEMORY_STEPS=2000 pytest tests/test_memory.py`` makes 2,000 steps; by default, and at least, 300.
"""

from __future__ import annotations

import os

import pytest

from ranks import Run, each_scenario

STEPS = int(os.environ.get("LINA_MEMORY_STEPS", "300"))


def steady(backend: str, *transports: str) -> Run:
    scenarios = [f"steady:2:{transport}:{schedule}:{STEPS}" for transport in transports
                 for schedule in ("plain", "lina")]
    return Run("memory_worker", scenarios, 2, backend, limit_s=200 + len(scenarios) * STEPS / 2)


@pytest.mark.timeout(300 + 6 * STEPS)
@each_scenario({"cpu": steady("gloo", "c10d"), "gpu": steady("nccl", "c10d", "nccl", "p2p")})
def test_nothing_grows(run: Run, scenario: str) -> None:
    run.check(scenario)
    print(*(line for end in run.ended for line in end.out.splitlines() if "rss" in line), sep="\n")
