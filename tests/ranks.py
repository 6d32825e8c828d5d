"""Runs functions of a test module in several processes, one rank each.

The parent calls ``launch``, which starts this file as a script; that imports torch once and forks
the ranks. A rank prints one JSON line per scenario, so that many checks share one start: a ``Run``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

import lina

HERE = Path(__file__).parent
# A quarter of the time that torch's watchdog leaves for traces before it ends a process; by default 15 s.
PROMPT = {"TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250", "TORCH_FR_WAIT_TIMEOUT_DUMP_MILSEC": "250",
          "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}


class Ended(NamedTuple):
    code: int | None          # None: still running at the limit, and killed then
    at: float                 # time.time()
    out: str
    err: str

    def time_of(self, event: str) -> float:
        """Of a line "``event`` at 12.3" that the rank printed."""
        found = [line.split()[-1] for line in self.out.splitlines() if line.startswith(f"{event} at ")]
        assert found, f"the rank did not get as far as {event!r}:\n{self.out[-2000:]}\n{self.err[-2000:]}"
        return float(found[0])


@dataclass
class Run:
    """A start of all ranks that serves every scenario, when the first of them is asked for."""

    module: str
    scenarios: Sequence[str]
    world: int
    backend: str = "gloo"
    limit_s: float | None = None

    @functools.cached_property
    def ended(self) -> list[Ended]:
        return launch(self.module, self.scenarios, self.world, backend=self.backend, limit_s=self.limit_s)

    def check(self, scenario: str) -> None:
        """Fails with what the ranks said; "exit": every rank ended by itself, with code 0."""
        default = "" if scenario == "exit" else "not reached: an earlier scenario failed"
        found = results(self.ended).get(scenario, default)
        assert not found, found


def each_scenario(runs: Run | dict[str, Run]) -> pytest.MarkDecorator:
    """Parametrizes a test by ``run`` and ``scenario``, with marks; a run's name begins the ids."""
    named = {"": runs} if isinstance(runs, Run) else runs
    return pytest.mark.parametrize("run,scenario", [
        pytest.param(run, scenario, id=f"{name}-{scenario}".lstrip("-"), marks=marks(run.backend))
        for name, run in named.items() for scenario in [*run.scenarios, "exit"]])


def marks(backend: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.multi, *([pytest.mark.gpu] * (backend == "nccl"))]


def needs_gpus(count: int) -> None:
    """Skips. Where there is no GPU at all conftest.py has skipped or failed the test before."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {'two' if count == 2 else count} GPUs, there are {torch.cuda.device_count()}")


def environment(**more: str) -> dict[str, str]:
    """For processes that find each other over loopback, whatever the host is called, and import the
    same lina as this one, installed or not."""
    folders = [str(HERE), str(Path(lina.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(folders), **more}


def _free_port() -> int:
    """Below those that the system gives to connections: nothing else takes it before rank 0 listens."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def torchrun(command: list[str], **more: str) -> list[tuple[str, str]]:
    """What two ranks wrote that were started as torchrun does, without the seconds that it takes itself."""
    port = str(_free_port())
    env = environment(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **more)
    ranks = [subprocess.Popen(command, env={**env, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]
    late = threading.Timer(120, lambda: [rank.kill() for rank in ranks])
    late.start()
    said = [rank.communicate() for rank in ranks]
    late.cancel()
    texts = "\n".join(text[-3000:] for two in said for text in two)
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    return said


def spawned(run: subprocess.Popen) -> list[int]:
    """The ranks that a command of lina's has started: its children, but for Python's resource tracker."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return [int(p) for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def launch(module: str, scenarios: Sequence[str], world: int, *, backend: str = "gloo",
           timeout_s: float = 30, limit_s: float | None = None) -> list[Ended]:
    """How each rank ended; ``timeout_s`` is the process group's, ``limit_s`` the parent's patience: by
    default time for a start, on a loaded machine, and for several timeouts. Skips without GPUs enough."""
    if backend == "nccl":
        needs_gpus(world)
    limit_s = 80 + 4 * timeout_s if limit_s is None else limit_s
    with tempfile.TemporaryDirectory() as folder:
        spec = json.dumps(dict(module=module, scenarios=scenarios, world=world, backend=backend,
                               timeout_s=timeout_s, folder=folder))
        env = environment(NCCL_SOCKET_IFNAME="lo", **PROMPT)
        starter = subprocess.Popen([sys.executable, __file__, spec], env=env, text=True,
                                   start_new_session=True, stderr=subprocess.PIPE)
        said = ""
        try:
            _, said = starter.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(starter.pid, signal.SIGKILL)
            starter.communicate()
        ended = []
        for rank in range(world):
            texts = [path.read_text() if path.exists() else said
                     for path in (Path(folder, f"{kind}{rank}") for kind in ("out", "err"))]
            end = Path(folder, f"end{rank}")
            code, at = json.loads(end.read_text()) if end.exists() else (None, time.time())
            ended.append(Ended(code, at, *texts))
    return ended


def results(ended: list[Ended]) -> dict[str, str]:
    """Scenario -> "" if every rank passed it, else what the ranks said."""
    found: dict[str, str] = {}
    for rank, end in enumerate(ended):
        for line in end.out.splitlines():
            if line.startswith("{"):
                said = json.loads(line)
                error = f"rank {rank}: {said['error']}\n" if said["error"] else ""
                found[said["scenario"]] = found.get(said["scenario"], "") + error
        if end.code != 0:
            found["exit"] = found.get("exit", "") + f"rank {rank}: exit code {end.code}\n{end.err[-2000:]}\n"
    return found


def _start(spec: dict) -> None:
    """Forks the ranks and notes how each ends."""
    if spec["backend"] == "gloo":        # CUDA must not be touched before a fork
        importlib.import_module(spec["module"])
        importlib.import_module("torch._dynamo")      # seconds, and DistributedDataParallel takes it anyway
    ranks = {}
    for rank in range(spec["world"]):
        pid = os.fork()
        if pid == 0:
            _rank(spec, rank)
        ranks[pid] = rank
    while ranks:
        pid, status = os.wait()
        Path(spec["folder"], f"end{ranks.pop(pid)}").write_text(
            json.dumps([os.waitstatus_to_exitcode(status), time.time()]))


def _rank(spec: dict, rank: int) -> None:
    for kind, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{spec['folder']}/{kind}{rank}", os.O_WRONLY | os.O_CREAT), fd)
    code = 1
    try:
        if _scenarios(spec, rank):
            code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _scenarios(spec: dict, rank: int) -> bool:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if spec["backend"] == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store, failed = dist.FileStore(f"{spec['folder']}/store", spec["world"]), False
    dist.init_process_group(spec["backend"], rank=rank, world_size=spec["world"], store=store,
                            timeout=timedelta(seconds=spec["timeout_s"]))
    module = importlib.import_module(spec["module"])
    for name in spec["scenarios"]:
        function, *args = name.split(":")
        torch.manual_seed(0)
        error = ""
        try:
            getattr(module, function)(device, *args)
        except Exception:
            error = traceback.format_exc()
        print(json.dumps(dict(scenario=name, error=error)), flush=True)
        failed = failed or bool(error)
        if error and (name == spec["scenarios"][-1] or
                      not _all_fail(f"{name}: {error.splitlines()[-1]}", store, spec["world"])):
            return False         # nothing follows, or the ranks are out of step and it would mean nothing
        dist.barrier()
    dist.destroy_process_group()
    return not failed


def _all_fail(how: str, store: dist.Store, world: int) -> bool:
    """Whether all ranks ended a scenario with this error, within some seconds."""
    deadline = time.monotonic() + 3
    store.add(how, 1)
    while store.add(how, 0) < world:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


if __name__ == "__main__":
    _start(json.loads(sys.argv[1]))
