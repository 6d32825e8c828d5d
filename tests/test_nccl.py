"""lina's own communicators over NCCL, on two GPUs: bytes, means, priority, failures."""

from __future__ import annotations

import pytest
import torch

from lina import _C

from ranks import launch, results

SCENARIOS = ["exchange", "reduction", "priority", "interleaved", "misuse"]
_done: dict[str, str] = {}                # one start of both ranks serves all scenarios

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@pytest.mark.multi
@two_gpus
@pytest.mark.parametrize("scenario", [*SCENARIOS, "exit"])
def test_ranks(scenario: str) -> None:
    if not _done:
        _done.update({"exit": "", **results(launch("nccl_worker", SCENARIOS, 2, backend="nccl"))})
    found = _done.get(scenario, "not reached: an earlier scenario failed")
    assert not found, found


@pytest.mark.gpu
@pytest.mark.multi
@two_gpus
@pytest.mark.parametrize("how", ["die", "hang"])
def test_left_alone(how: str) -> None:
    """The survivor's streams are released within the timeout, and its next call says why."""
    from nccl_worker import WORLD_TIMEOUT_S

    ended = launch("nccl_worker", [f"left_alone:{how}"], 2, backend="nccl", timeout_s=WORLD_TIMEOUT_S,
                   limit_s=60 + 4 * WORLD_TIMEOUT_S)
    survivor = ended[0]
    assert survivor.code == 1, survivor
    times = {line.split()[0]: float(line.split()[-1]) for line in survivor.out.splitlines() if " at " in line}
    assert "went on" not in survivor.out and times["released"] - times["failing"] < WORLD_TIMEOUT_S + 3
    said = results(ended)[f"left_alone:{how}"]
    assert "the exchange among ranks [0, 1] failed on rank 0" in said and "hangs" in said, said


@pytest.mark.skipif(_C.CUDA, reason="lina is built with CUDA")
def test_built_without_cuda() -> None:
    for call in (lambda: _C.Communicator(bytes(128), 0, 1, 0, "x", 1.0), lambda: _C.set_priority(0, True, 0)):
        with pytest.raises(RuntimeError, match="built without CUDA"):
            call()
    assert "without CUDA" in _C.priority_off()


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has NCCL")
def test_no_nccl_here() -> None:
    with pytest.raises(RuntimeError, match=r"built without CUDA|no libnccl"):
        _C.nccl_id()


def test_max_connections(monkeypatch) -> None:
    """One hardware queue: a stream that waits would hold all others up, so nothing may wait."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert _C.priority_off() is not None
