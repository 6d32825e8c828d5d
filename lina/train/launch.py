"""Starts the ranks of `lina train`, or joins those that torchrun started."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .options import Options

TIMEOUT_S = 300


class RankError(RuntimeError):
    """A rank failed; the text is one line."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(o: Options) -> None:
    """Runs `o` to its end. Raises RankError if a rank fails, after all have ended."""
    started = time.time()
    Path(o.out).mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        _rank(o, local, int(os.environ.get("LOCAL_WORLD_SIZE", o.ranks or 1)), None, started)
        return
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)   # one error, ours
    # This process keeps the store, so that its port is chosen by the system and is never taken.
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context = mp.start_processes(_local_rank, (o, store.port, started), nprocs=o.ranks or 1, join=False,
                                 daemon=True, start_method="spawn")
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        if error.exit_code == -signal.SIGINT or error.signal_name == "SIGINT":
            raise KeyboardInterrupt from error
        how = f"ended by {error.signal_name}" if error.signal_name else f"left with code {error.exit_code}"
        raise RankError(f"rank {error.error_index}: {how}") from error
    except mp.ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        log = Path(o.out) / "error.txt"
        log.write_text(str(error), encoding="utf-8")
        raise RankError(f"rank {error.error_index}: {last} (traceback in {log})") from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _local_rank(rank: int, o: Options, port: int, started: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends a rank silently; the launcher reports
    _rank(o, rank, o.ranks or 1, (rank, port), started)


def _rank(o: Options, local: int, local_world: int, place: tuple[int, int] | None,
          started: float) -> None:
    """One rank: `local` of `local_world` on this machine; `place` is rank and port, None under torchrun."""
    from . import loop

    device = torch.device(o.device, local) if o.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, cores() // local_world))
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    if place is not None:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")   # whatever the host's name resolves to
        store = dist.TCPStore("127.0.0.1", place[1], None, False)
        options.update(store=store, rank=place[0], world_size=o.ranks)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S), **options)
    summary = loop.run(o, device, started)
    if summary is not None:
        _tell(o, summary)
    dist.destroy_process_group()


def _tell(o: Options, summary: dict[str, Any]) -> None:
    from lina.tracefile import write_json

    from . import report
    write_json(Path(o.out) / "summary.json", summary)
    if o.dense:
        write_json(Path(o.out) / "dense.json", report.as_baseline(summary, o))
    if o.json is not None:
        write_json(o.json, summary)
    print("\n".join(report.lines(summary, o)), flush=True)
