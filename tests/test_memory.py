"""Nothing grows while token counts change: tensors, threads, open files, memory of host and GPU.

``LINA_MEMORY_STEPS=2000 pytest tests/test_memory.py`` makes 2,000 steps; by default, and at least, 300.
"""

from __future__ import annotations

import os

import pytest
import torch

from ranks import launch, results

STEPS = int(os.environ.get("LINA_MEMORY_STEPS", "300"))
RUNS = {"cpu": ("gloo", ["c10d:plain", "c10d:lina"]),
        "gpu": ("nccl", [f"{transport}:{schedule}" for transport in ("c10d", "nccl", "p2p")
                         for schedule in ("plain", "lina")])}
CASES = [pytest.param(kind, how, id=f"{kind}-{how}",
                      marks=[pytest.mark.multi, *([pytest.mark.gpu] * (kind == "gpu"))])
         for kind, (_, hows) in RUNS.items() for how in [*hows, "exit"]]
_done: dict[str, dict[str, str]] = {}     # one start of both ranks serves all


@pytest.mark.timeout(300 + 6 * STEPS)
@pytest.mark.parametrize("kind,how", CASES)
def test_nothing_grows(kind: str, how: str) -> None:
    """``exit``: both ranks ended by themselves, with code 0."""
    backend, hows = RUNS[kind]
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there are {torch.cuda.device_count()}")
    if kind not in _done:
        ended = launch("memory_worker", [f"steady:2:{one}:{STEPS}" for one in hows], 2, backend=backend,
                       limit_s=200 + len(hows) * STEPS / 2)
        _done[kind] = results(ended)
        print(*(line for end in ended for line in end.out.splitlines() if "rss" in line), sep="\n")
    name = how if how == "exit" else f"steady:2:{how}:{STEPS}"
    found = _done[kind].get(name, "" if how == "exit" else "not reached: an earlier one failed")
    assert not found, found
