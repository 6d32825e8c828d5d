"""lina's own communicators over NCCL, on two GPUs: bytes, means, priority, failures."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lina import _C
from lina.parallel.transport import nccl

from ranks import Run, each_scenario, launch, results

SCENARIOS = ["exchange", "dropped", "reduction", "priority", "interleaved", "misuse"]


@each_scenario(Run("nccl_worker", SCENARIOS, 2, "nccl"))
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


@pytest.mark.gpu
@pytest.mark.multi
@pytest.mark.parametrize("how", ["die", "hang"])
def test_left_alone(how: str) -> None:
    """The survivor's streams are released within the timeout, and its next call says why."""
    from nccl_worker import WORLD_TIMEOUT_S

    ended = launch("nccl_worker", [f"left_alone:{how}"], 2, backend="nccl", timeout_s=WORLD_TIMEOUT_S)
    survivor = ended[0]
    assert survivor.code == 1, survivor
    assert survivor.time_of("released") - survivor.time_of("failing") < WORLD_TIMEOUT_S + 3
    assert "went on" not in survivor.out
    said = results(ended)[f"left_alone:{how}"]
    assert "the exchange among ranks [0, 1] failed on rank 0" in said and "hangs" in said, said


class Bytes:
    """A tensor, as far as the transport looks at one."""

    def __init__(self) -> None:
        self.used_on: list = []

    def record_stream(self, stream) -> None:
        self.used_on.append(stream)

    def data_ptr(self) -> int:
        return 1

    def numel(self) -> int:
        return 8


def test_memory_is_left_to_the_allocator(monkeypatch) -> None:
    """Whoever drops a tensor before, after or without a wait: the a2a stream, which uses it, is on record."""
    stream = SimpleNamespace(wait_stream=lambda other: None, record_event=lambda: None, cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    transport = object.__new__(nccl.NCCL)
    transport.device, transport.stream, transport._raised = torch.device("cpu"), stream, 0
    transport.comm = SimpleNamespace(all_to_all=lambda *args: None)
    monkeypatch.setattr(_C, "A2A_RAISE", 1, raising=False)
    monkeypatch.setattr(_C, "A2A_LOWER", 2, raising=False)
    out, inp = Bytes(), Bytes()
    pending = transport.start("test", out, inp, [8], [8])
    assert out.used_on == inp.used_on == [stream]
    gone = weakref.ref(out)
    del out
    assert gone() is None and pending is not None, "held until the wait besides"


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
