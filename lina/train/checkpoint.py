"""Checkpoints that a kill at any moment cannot damage.

A checkpoint is one shard a rank and a manifest naming them. Shards get names of
their own, are synced to disk, and only then is the manifest replaced; what the
last manifest named stays until the new one is in place, so there is always one
whole checkpoint once the first is written. Files with other names are never
touched. Ranks on several machines need the folder on a shared file system.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .options import KEPT, Options

MANIFEST = "manifest.json"
LOCK = ".lock"          # held by the run that writes here
FORMAT = 1
SHARD = re.compile(r"step-\d{8,}-[0-9a-f]{8}\.rank\d+\.pt")


def ours(name: str) -> bool:
    """Whether a file of this name is one that ``save`` or the run's lock made."""
    whole = name[1:].removesuffix(".partial") if name.startswith(".") and name.endswith(".partial") else name
    return name == LOCK or whole == MANIFEST or SHARD.fullmatch(whole) is not None


def manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest in `folder`. OSError without one, ValueError for one that is not ours."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{os.fspath(folder)}, no checkpoint there (no {MANIFEST})")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, this lina reads {FORMAT}")
        missing = {"step", "text_digest", "options", "shards"} - found.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        for shard in found["shards"]:
            if not (path.parent / shard).is_file():
                raise FileNotFoundError(f"{path}: shard {shard} is missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a checkpoint of lina train ({error})") from error
    return found


def save(o: Options, step: int, digest: int, state: dict[str, Any]) -> None:
    """Writes this rank's `state` after `step` steps. A collective: every rank calls it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    folder = Path(str(o.checkpoint))
    token = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(token)            # a name no other checkpoint has, even of this step
    shards = [f"step-{step:08d}-{token[0]}.rank{r}.pt" for r in range(world)]
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / shards[rank], lambda file: torch.save(state, file))
    dist.barrier()                               # every shard is on disk
    if rank == 0:
        saved = {"format": FORMAT, "step": step, "shards": shards, "text_digest": digest,
                 "options": {k: v for k, v in dataclasses.asdict(o).items() if k in KEPT}}
        replace(folder / MANIFEST, lambda file: file.write(json.dumps(saved, indent=1).encode()))
        for old in folder.iterdir():
            if ours(old.name) and old.name not in (*shards, MANIFEST, LOCK):
                old.unlink(missing_ok=True)
    dist.barrier()                               # nobody writes the next one before this one counts


def load(folder: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
    """Steps done and this rank's state. Whether they fit the run is checked before it starts."""
    found = manifest(folder)
    shard = Path(folder) / found["shards"][dist.get_rank()]
    return found["step"], torch.load(shard, map_location="cpu", weights_only=True)


def replace(path: Path, write: Any) -> None:
    """Calls `write(file)` on a partial file, syncs it and moves it to `path` in one step."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)                      # the name too is on disk
    finally:
        os.close(directory)


def rng_state(device: torch.device) -> dict[str, Any]:
    """torch's random state on this rank."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """The reverse of ``rng_state``."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
