"""The text: bytes to train on and bytes held out, the same on every rank.

Nothing is downloaded. Held out are whole files, chosen by a checksum of their
names so that the choice does not depend on the others; a single file gives its
last tenth. A file of the same content as one before it is left out, and so is
what the run itself writes.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .options import OptionError, Options, flag

HELD_OUT_OF = 16        # one file in so many
# Of the standard library: tests, tables, bundled tools and others' packages are not typical source.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data",
            "encodings", "turtledemo", "ensurepip", "distutils", "__phello__", "__pycache__", "lib-dynload",
            "_vendor"}


class Corpus(NamedTuple):
    """uint8 vectors and a checksum of both."""

    train: Tensor
    heldout: Tensor
    digest: int
    source: str


def load(o: Options) -> Corpus:
    """The text of `o.data`, or the standard library's. Raises OptionError if there is too little."""
    root = Path(o.data if o.data is not None else sysconfig.get_path("stdlib"))
    source = str(root) if o.data is not None else "the Python standard library"
    if root.is_file():
        text = _read(root)
        cut = len(text) - len(text) // 10
        train, heldout = text[:cut], text[cut:]
    elif root.is_dir():
        train, heldout = _folder(root, o.data is None, [] if o.data is None else _written(o, root))
    else:
        raise OptionError(f"--data: {root}, " + ("neither a file nor a folder" if root.exists() else
                                                 "no such file or folder"))
    least = o.seq + 1
    for name, part in (("training", train), ("held-out", heldout)):
        if len(part) < least:
            raise OptionError(f"--data: {source} gives {len(part)} bytes of {name} text, "
                              f"at least {least} needed")
    heldout = heldout[: 1024 * o.heldout_kib + 1]
    return Corpus(_bytes(train), _bytes(heldout), zlib.crc32(heldout, zlib.crc32(train)), source)


def _written(o: Options, root: Path) -> list[str]:
    """The folders below `root` that the run writes to or resumes from, relative to it."""
    checkpoint = os.path.realpath(o.checkpoint or os.path.join(o.out, "checkpoint"))
    below = []
    for name, path in (("out", o.out), ("checkpoint", checkpoint), ("checkpoint", f"{checkpoint}.old"),
                       ("resume", o.resume)):
        if path is None:
            continue
        relative = os.path.relpath(os.path.realpath(path), os.path.realpath(root))
        if relative == "." and name != "resume":
            raise OptionError(f"{flag(name)}: {path}, is the folder of --data; pass one of its own")
        if relative.split(os.sep)[0] != "..":
            below.append(Path(relative).as_posix() + "/")
    return below


def _folder(root: Path, stdlib: bool, written: list[str]) -> tuple[bytes, bytes]:
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    seen = set()
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py" if stdlib else "*"))
    for name in names:
        folders = name.split("/")
        if any(f.startswith(".") for f in folders) or (stdlib and not LEFT_OUT.isdisjoint(folders)):
            continue
        if name.startswith(tuple(written)):
            continue
        text = _read(root / name) if (root / name).is_file() else b""
        content = hashlib.sha256(text).digest()
        if not stdlib and (not text or content in seen):     # on both sides it would not be held out
            continue
        seen.add(content)
        if b"\0" not in text:                        # not a picture, not an archive
            parts[zlib.crc32(name.encode()) % HELD_OUT_OF == 0].append(text)
    if not parts[1] and len(parts[0]) > 1:           # few files: the last is held out
        parts[1].append(parts[0].pop())
    return b"\n".join(parts[0]), b"\n".join(parts[1])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OptionError(f"--data: {path}, cannot be read: {error.strerror}") from error


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batch(text: Tensor, o: Options, step: int, rank: int) -> Tensor:
    """This rank's share of step's sequences, [B/ranks, S+1] int64.

    A function of seed and step alone, so the step is the data's position; and
    of the whole batch, so the same sequences are seen on any number of ranks.
    """
    generator = torch.Generator().manual_seed(o.seed * 1_000_003 + step)
    start_B = torch.randint(len(text) - o.seq, (o.batch,), generator=generator)
    start_b = start_B.chunk(o.ranks or 1)[rank]
    return text[start_b[:, None] + torch.arange(o.seq + 1)].long()


def windows(text: Tensor, seq: int, ranks: int = 1) -> tuple[Tensor, Tensor]:
    """`text` as consecutive windows [W, S+1] int64 and which targets count, [W, S] bool.

    Each byte but the first is a target exactly once. W is a multiple of
    `ranks`: what is missing is padding that does not count.
    """
    targets = len(text) - 1
    count = -(-targets // (seq * ranks)) * ranks
    padded = torch.zeros(count * seq + 1, dtype=torch.int64)
    padded[: len(text)] = text
    return padded.unfold(0, seq + 1, seq), (torch.arange(count * seq) < targets).view(count, seq)


def unigram_bits(train: Tensor, heldout: Tensor) -> float:
    """Bits per held-out byte of the training bytes' frequencies (one added to each count)."""
    count = torch.bincount(train.int(), minlength=256).double() + 1
    bits = -(count / count.sum()).log2()
    return bits[heldout[1:].long()].mean().item()
