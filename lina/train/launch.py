"""Starts the ranks of `lina train`, or joins those that torchrun started."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import checkpoint, folders
from .options import OptionError, Options

TIMEOUT_S = 300
CONNECT_S = 10          # to the launcher's store, which is there before the ranks


class RankError(RuntimeError):
    """A rank failed; the text is one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C once the run had begun; the text says how to go on."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(o: Options) -> None:
    """Runs `o` to its end. Raises OptionError before a process starts, or where a rank does;
    RankError if a rank fails, after all have ended; Interrupted."""
    started = time.time()
    with folders.prepared(o):
        if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            _rank(o, local, int(os.environ.get("LOCAL_WORLD_SIZE", o.ranks or 1)), None, started)
            return
        try:
            _launch(o, started)
        except KeyboardInterrupt as error:
            raise Interrupted(_how_to_go_on(o)) from error


def _how_to_go_on(o: Options) -> str:
    folder = str(o.checkpoint)
    try:
        step = checkpoint.manifest(folder)["step"]      # this run's, or what it resumed: see folders.py
    except (OSError, ValueError):
        return "no checkpoint yet"
    words = ["--resume", folder, "--out", o.out]
    if folder != os.path.join(o.out, "checkpoint"):
        words += ["--checkpoint", folder]
    return f"go on from step {step} with: lina train {shlex.join(words)}"


def _launch(o: Options, started: float) -> None:
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)   # one error, ours
    # This process keeps the store, so that its port is chosen by the system and is never taken.
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context = mp.start_processes(_local_rank, (o, os.getpid(), store.port, started), nprocs=o.ranks or 1,
                                 join=False, daemon=True, start_method="spawn")
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        if error.exit_code == -signal.SIGINT or error.signal_name == "SIGINT":
            raise KeyboardInterrupt from error
        how = f"ended by {error.signal_name}" if error.signal_name else f"left with code {error.exit_code}"
        # What a rank's libraries do on their way out loses nothing: join() has let rank 0 finish.
        if not store.check([f"worked{error.error_index}", "told"]):
            raise RankError(f"rank {error.error_index}: {how}") from error
    except mp.ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        log = Path(o.out) / "error.txt"
        log.write_text(str(error), encoding="utf-8")
        kind = f"{OptionError.__module__}.{OptionError.__qualname__}: "
        if last.startswith(kind):
            raise OptionError(last.removeprefix(kind)) from error
        raise RankError(f"rank {error.error_index}: {last} (traceback in {log})") from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _local_rank(rank: int, o: Options, launcher: int, port: int, started: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends a rank silently; the launcher reports
    if os.getppid() != launcher:                    # killed before this process asked to be told of it
        os._exit(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=CONNECT_S))
    store.set_timeout(timedelta(seconds=TIMEOUT_S))
    _rank(o, rank, o.ranks or 1, store, started)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)         # what threads of torch are still there must not be torn down at random


def _rank(o: Options, local: int, local_world: int, store: dist.Store | None, started: float) -> None:
    """One rank: `local` of `local_world` on this machine; `store` is the launcher's, None under torchrun."""
    from . import loop

    device = torch.device(o.device, local) if o.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, cores() // local_world))
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    if store is not None:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")   # whatever the host's name resolves to
        options.update(store=store, rank=local, world_size=o.ranks)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S), **options)
    summarise = loop.run(o, device, started)
    if store is not None:       # the work is done: no other rank's end may now stop this one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        store.set(f"worked{local}", "")
    if summarise is not None:
        _tell(o, summarise())
        if store is not None:
            store.set("told", "")
    dist.barrier()              # nobody leaves before rank 0 has written all
    gc.collect()                # what holds on to the group goes before it
    dist.destroy_process_group()


def _tell(o: Options, summary: dict[str, Any]) -> None:
    from lina.tracefile import write_json

    from . import report
    print("\n".join(report.lines(summary, o)), flush=True)
    write_json(Path(o.out) / "summary.json", summary)
    if o.dense:
        write_json(Path(o.out) / "dense.json", report.as_baseline(summary, o))
    if o.json is not None:
        write_json(o.json, summary)
