"""A rank that dies, raises or hangs: every other rank ends with a clear error, in time."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from parallel_worker import batch, loss_of, spread_net, whole_net

import lina

from ranks import launch, results

WORLD, VICTIM = 4, 3          # (dp, ep) = (2, 2): rank 2 shares the victim's tokens, 1 its experts, 0 neither
TIMEOUT_S = 6                 # the process group's
START_S = 60                  # starting torch and two good steps, on a loaded machine


def fail(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(TIMEOUT_S + 4)
        os._exit(3)
    raise ValueError("this rank's own mistake")


def faulty_training(device: torch.device, where: str, how: str, schedule: str) -> None:
    """Two good steps; in the third the victim fails between the exchanges of the first layer."""
    mesh = lina.mesh(ep=2)
    net = spread_net(whole_net("softmax", device), "softmax", mesh)
    wrapped = lina.ddp(net, mesh, schedule=schedule)
    for step in range(3):
        if step == 2 and dist.get_rank() == VICTIM:
            if where == "forward":
                net.moe1.router.register_forward_hook(lambda *_: fail(how))
            else:
                net.moe1.experts.register_forward_hook(
                    lambda module, args, y: y.register_hook(lambda _: fail(how)) and None)
        if step == 2:
            print(f"failing at {time.time()}", flush=True)
        loss_of(wrapped, *batch(dist.get_rank(), step, next(net.parameters()), tokens=5)).backward()
    print("three steps done", flush=True)


@pytest.mark.multi
@pytest.mark.parametrize("schedule,where,how", [
    ("plain", "forward", "kill"), ("plain", "backward", "kill"), ("plain", "backward", "raise"),
    ("plain", "forward", "hang"), ("lina", "forward", "kill"), ("lina", "backward", "hang")])
def test_survivors_report(schedule: str, where: str, how: str) -> None:
    scenario = f"faulty_training:{where}:{how}:{schedule}"
    ended = launch("test_faults", [scenario], WORLD, timeout_s=TIMEOUT_S, limit_s=START_S + 4 * TIMEOUT_S)
    said = results(ended)
    for rank, end in enumerate(ended):
        assert "three steps done" not in end.out, f"rank {rank} went on without rank {VICTIM}"
        failing = [float(line.split()[-1]) for line in end.out.splitlines() if line.startswith("failing at")]
        if rank == VICTIM:
            assert end.code == {"kill": -signal.SIGKILL, "hang": 3, "raise": 1}[how], said
            continue
        assert failing, f"rank {rank} did not reach the third step:\n{end.err[-2000:]}"
        took = end.at - failing[0]
        # the timeout, and time for a process to print and end
        assert took < TIMEOUT_S + 10, f"rank {rank} ended {took:.1f} s after the fault, limit {TIMEOUT_S} s"
        assert end.code == 1, f"rank {rank}: exit code {end.code}, want an exception\n{end.err[-2000:]}"
        assert "RuntimeError" in said[scenario] and f"rank {rank}: Traceback" in said[scenario], said
    # the rank that exchanges tokens with the victim names the exchange and the ranks
    assert "the exchange among ranks [2, 3] failed on rank 2" in said[scenario], said[scenario]
