"""Runs functions of a test module in several processes, one rank each.

The parent calls ``launch``, which starts this file as a script; that imports torch once and forks
the ranks. A rank prints one JSON line per scenario, so that many checks share one start.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import lina

HERE = Path(__file__).parent


class Ended(NamedTuple):
    code: int | None          # None: still running at the limit, and killed then
    at: float                 # time.time()
    out: str
    err: str


def launch(module: str, scenarios: list[str], world: int, *, backend: str = "gloo", timeout_s: float = 30,
           limit_s: float = 200) -> list[Ended]:
    """How each rank ended; ``timeout_s`` is the process group's, ``limit_s`` the parent's patience."""
    # ranks see each other over loopback, whatever the host is called
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    # and import the same lina as this process, installed or not
    folders = [str(HERE), str(Path(lina.__file__).parents[1]), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(folders)
    with tempfile.TemporaryDirectory() as folder:
        spec = json.dumps(dict(module=module, scenarios=scenarios, world=world, backend=backend,
                               timeout_s=timeout_s, folder=folder))
        starter = subprocess.Popen([sys.executable, __file__, spec], env=env, start_new_session=True,
                                   stderr=subprocess.PIPE, text=True)
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
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if spec["backend"] == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(spec["backend"], rank=rank, world_size=spec["world"],
                            store=dist.FileStore(f"{spec['folder']}/store", spec["world"]),
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
        if error:
            return False                 # the ranks are out of step: nothing after this would mean anything
        dist.barrier()
    dist.destroy_process_group()
    return True


if __name__ == "__main__":
    _start(json.loads(sys.argv[1]))
