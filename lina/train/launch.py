"""Starts ranks on this machine, or joins those that torchrun started; with them, `lina train`."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import checkpoint, folders
from .options import OptionError, Options, torchrun

TIMEOUT_S = 300
CONNECT_S = 10          # to the launcher's store, which is there before the ranks


class RankError(RuntimeError):
    """A rank failed; the text is one line.

    Attributes:
        said: what the rank raised, one line, and ``traceback`` where; None if it raised nothing.
    """

    def __init__(self, text: str, said: str | None = None, traceback: str | None = None) -> None:
        super().__init__(text)
        self.said, self.traceback = said, traceback


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
        if torchrun():
            _rank(o, *local_place(o.ranks or 1), None, started)
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
    try:
        start(_local_rank, (o, started), o.ranks or 1)
    except RankError as error:
        if error.said is None or error.traceback is None:
            raise
        log = Path(o.out) / "error.txt"
        log.write_text(error.traceback, encoding="utf-8")
        kind = f"{OptionError.__module__}.{OptionError.__qualname__}: "
        if error.said.startswith(kind):
            raise OptionError(error.said.removeprefix(kind)) from error
        raise RankError(f"{error} (traceback in {log})") from error


def start(target: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Runs ``target(rank, pid, port, *arguments)`` in ``ranks`` new processes and waits for them all.

    `pid` is this process, `port` that of its store: what a rank gives to :func:`connect` first and
    to :func:`leave` last. A rank may end as badly as it likes once it has called :func:`worked` and
    another has put "told" into the store. No process is left when this returns or raises.

    Raises:
        RankError: a rank raised, or ended too early.
        KeyboardInterrupt: Ctrl-C, here or in a rank.
    """
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)   # one error, ours
    # This process keeps the store, so that its port is chosen by the system and is never taken.
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context = mp.start_processes(target, (os.getpid(), store.port, *arguments), nprocs=ranks,
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
        raise RankError(f"rank {error.error_index}: {last}", last, str(error)) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def connect(launcher: int, port: int) -> dist.Store:
    """The store of the process that :func:`start` was called in, for one of its ranks."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends a rank silently; the launcher reports
    if os.getppid() != launcher:                    # killed before this process asked to be told of it
        os._exit(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=CONNECT_S))
    store.set_timeout(timedelta(seconds=TIMEOUT_S))
    return store


def leave() -> NoReturn:
    """The end of a rank that :func:`start` started."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)         # what threads of torch are still there must not be torn down at random


def local_place(world: int) -> tuple[int, int]:
    """This rank's number on its machine and how many are there, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", world))


def join_group(kind: str, local: int, local_world: int, store: dist.Store | None) -> torch.device:
    """Makes the default process group: gloo and, if `kind` is "cuda", NCCL. Returns this rank's device.

    It is rank `local` of `local_world` on this machine, which are all if there is a `store`, from
    :func:`connect`; under torchrun there is none.
    """
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, cores() // local_world))
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    if store is not None:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")   # whatever the host's name resolves to
        options.update(store=store, rank=local, world_size=local_world)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S), **options)
    return device


def worked(rank: int, store: dist.Store | None) -> None:
    """The work of `rank` is done: no other rank's end may now stop this one."""
    if store is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        store.set(f"worked{rank}", "")


def leave_group() -> None:
    """Nobody leaves before every rank, so rank 0 with all it writes, has got here."""
    dist.barrier()
    gc.collect()                # what holds on to the group goes before it
    dist.destroy_process_group()


def _local_rank(rank: int, launcher: int, port: int, o: Options, started: float) -> None:
    _rank(o, rank, o.ranks or 1, connect(launcher, port), started)
    leave()


def _rank(o: Options, local: int, local_world: int, store: dist.Store | None, started: float) -> None:
    """One rank: `local` of `local_world` on this machine; `store` is the launcher's, None under torchrun."""
    from . import loop

    device = join_group(str(o.device), local, local_world, store)
    summarise = loop.run(o, device, started)
    worked(local, store)
    if summarise is not None:
        _tell(o, summarise())
        if store is not None:
            store.set("told", "")
    leave_group()


def _tell(o: Options, summary: dict[str, Any]) -> None:
    from lina.tracefile import write_json

    from . import report
    print("\n".join(report.lines(summary, o)), flush=True)
    write_json(Path(o.out) / "summary.json", summary)
    if o.dense:
        write_json(Path(o.out) / "dense.json", report.as_baseline(summary, o))
    if o.json is not None:
        write_json(o.json, summary)
