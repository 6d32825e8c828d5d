"""The folders a run writes to: made, probed and locked before a process starts.

A former run's checkpoint is moved to the folder's name plus ``.old``, so that a
second run with the same --out starts afresh and what it prints is its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .checkpoint import LOCK, MANIFEST, ours
from .options import OptionError, Options, flag


@contextlib.contextmanager
def prepared(o: Options) -> Iterator[None]:
    """Holds the checkpoint folder for this run. Raises OptionError, one line.

    Under torchrun rank 0 does it for all. The lock ends with the process, however that ends.
    """
    if os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ:
        yield
        return
    folder = Path(os.path.realpath(str(o.checkpoint)))      # a link to it stays one
    _writable("out", Path(o.out))
    if o.json is not None and not _special(o.json):
        _writable("json", Path(o.json).absolute().parent)
    with contextlib.ExitStack() as held:
        held.callback(os.close, _lock(folder))
        if (folder / MANIFEST).is_file() and not (o.resume and _same(folder, o.resume)):
            _move_aside(o, folder)
            held.callback(os.close, _lock(folder))      # the first lock went along, and is kept too
        yield


def _same(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _special(path: str) -> bool:
    """Whether it is a pipe or a device, to be written to as it is."""
    return os.path.exists(path) and not os.path.isfile(path)


def _writable(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(f"{flag(name)}: {folder}, cannot be written to: {error.strerror}") from error


def _lock(folder: Path) -> int:
    _writable("checkpoint", folder)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OptionError(f"--checkpoint: {folder}, another lina train is running on it; "
                          "pass another --out") from error
    except OSError:
        pass                            # a file system without locks: the run goes on without one
    return descriptor


def _move_aside(o: Options, folder: Path) -> None:
    old = Path(f"{folder}.old")
    if o.resume and _same(old, o.resume):
        raise OptionError(f"--resume: {o.resume}, is where the checkpoint in {folder} has to go; "
                          "pass another --out")
    for place in (folder, old):
        others = [p.name for p in place.iterdir() if not ours(p.name)] if place.is_dir() else []
        if others or (place.exists() and not place.is_dir()):
            raise OptionError(f"--checkpoint: {folder}, a former run's checkpoint is there, and cannot be "
                              f"moved to {old}: {place / others[0] if others else place} is not of lina "
                              "train; pass another --out")
    try:
        if old.is_dir():
            for path in old.iterdir():
                path.unlink()
            old.rmdir()
        os.rename(folder, old)
    except OSError as error:
        raise OptionError(f"--checkpoint: {folder}, a former run's checkpoint cannot be moved to {old}: "
                          f"{error.strerror}") from error
    print(f"a former run's checkpoint was moved to {old}", flush=True)
