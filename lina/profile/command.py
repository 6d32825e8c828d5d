"""`lina profile`: the options, the ranks, the table, the files and the picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

import lina
from lina.parallel import DTYPES, CostModel, ExpertShape, default_path
from lina.profile import compute, links
from lina.profile.run import profile
from lina.train import launch
from lina.train.options import OptionError, fill_ranks, torchrun

LEAST_S = 1.0           # that is left for measuring however long the ranks took to start


@dataclasses.dataclass
class Options:
    """The command's options; None means chosen from the machine."""

    ranks: int | None = None
    device: str | None = None
    ep: int | None = None
    transports: str | None = None
    dim: int | None = None
    ffn_dim: int | None = None
    experts: int | None = None
    top_k: int | None = None
    activation: str = "swiglu"
    dtype: str | None = None
    budget: float = 15.0
    out: str | None = None
    json: str | None = None
    png: str | None = None
    quiet: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One argument per field of :class:`Options`."""
    def add(name: str, text: str, **more: Any) -> None:
        parser.add_argument(name, help=text, **more)

    known = ", ".join(dict.fromkeys(t for _, t in links.registered()))
    add("--ranks", "processes to start (default: one a GPU, else 2); torchrun's count under torchrun",
        type=int, metavar="N")
    add("--device", "cpu or cuda (default: cuda where there is one)", choices=("cpu", "cuda"))
    add("--ep", "ranks that a2a is measured among (default: all)", type=int, metavar="N")
    add("--transports", f"names with commas, of {known} (default: all that are available)", metavar="NAMES")
    add("--dim", "model width D of the experts' passes and the products (default: 2048 on cuda, else 128)",
        type=int, metavar="N")
    add("--ffn-dim", "width F of one expert (default: 768 on cuda, else 192)", type=int, metavar="N")
    add("--experts", "experts over all ep ranks (default: 128 on cuda, else 8)", type=int, metavar="N")
    add("--top-k", "experts a token of whole layers (default: 8 on cuda, else 2)", type=int, metavar="N")
    add("--activation", "of the experts (default: swiglu)", choices=lina.ops.ACTIVATIONS, default="swiglu")
    add("--dtype", "of experts and products (default: bfloat16 on cuda, else float32)",
        choices=tuple(DTYPES))
    add("--budget", "seconds for it, the ranks' start included (default: 15)", type=float, default=15.0,
        metavar="S")
    add("--out", "where the model is kept (default: $LINA_PROFILE, or a file for this machine in the user's "
        "cache folder)", metavar="FILE")
    add("--json", "write the model there too", metavar="FILE")
    add("--png", "draw points and lines", metavar="FILE")
    parser.add_argument("--quiet", action="store_true", help="no line for each measurement")


def run(given: dict[str, Any]) -> None:
    """The command. Raises OptionError before a process starts, RankError, OSError, KeyboardInterrupt."""
    started = time.time()
    o = Options(**given)
    shape = _resolve(o)
    if torchrun():
        _rank(o, shape, *launch.local_place(o.ranks or 1), None, started)
        return
    try:
        launch.start(_local_rank, (o, shape, started), o.ranks or 1)
    except launch.RankError as error:
        if error.traceback is None:
            raise
        with tempfile.NamedTemporaryFile("w", prefix="lina-profile-", suffix=".txt", delete=False) as log:
            log.write(error.traceback)
        raise launch.RankError(f"{error} (traceback in {log.name})") from error


def _resolve(o: Options) -> ExpertShape:
    ranks = fill_ranks(o, o.ranks)
    o.ep = ranks if o.ep is None else o.ep
    if o.ep < 1 or ranks % o.ep:
        raise OptionError(f"--ep: {o.ep}, must divide --ranks = {ranks}")
    if not LEAST_S <= o.budget < float("inf"):
        raise OptionError(f"--budget: {o.budget}, at least {LEAST_S:g} and finite")
    known = {transport for _, transport in links.registered()}
    for name in o.transports.split(",") if o.transports is not None else ():
        if name not in known:
            raise OptionError(f"--transports: {name!r}, must be of {', '.join(sorted(known))}")
    _writable(o)
    return _shape(o)


def _shape(o: Options) -> ExpertShape:
    ep, usual = o.ep or 1, compute.default_shape(str(o.device), o.ep or 1)
    for name in ("dim", "ffn_dim", "experts"):
        value = getattr(o, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')}: {value}, at least 1")
    if o.experts is not None and o.experts % ep:
        raise OptionError(f"--experts: {o.experts}, a multiple of --ep = {ep}")
    if o.experts is not None and o.experts > 1024:
        raise OptionError(f"--experts: {o.experts}, at most 1024")
    local = o.experts // ep if o.experts else usual.local
    if o.top_k is not None and not 1 <= o.top_k <= local * ep:
        raise OptionError(f"--top-k: {o.top_k}, from 1 to --experts = {local * ep}")
    return ExpertShape(o.dim or usual.dim, o.ffn_dim or usual.ffn_dim, local, o.dtype or usual.dtype,
                       o.activation)


def _writable(o: Options) -> None:
    """OptionError now, rather than OSError once all is measured."""
    o.out = o.out or str(_default(o))
    for name in ("out", "json", "png"):
        path = getattr(o, name)
        if path is None:
            continue
        where = Path(os.path.realpath(path))
        if where.is_dir():
            raise OptionError(f"--{name}: {path}, is a folder")
        try:
            with tempfile.TemporaryFile(dir=where.parent):
                pass
        except OSError as error:
            raise OptionError(f"--{name}: {path}, cannot be written: {error.strerror}") from error


def _default(o: Options) -> Path:
    path = default_path(str(o.device), o.ranks or 1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out: {path}, its folder cannot be made: {error.strerror}; pass another, or set "
                          "LINA_PROFILE") from error
    return path


def _local_rank(rank: int, launcher: int, port: int, o: Options, shape: ExpertShape, started: float) -> None:
    _rank(o, shape, rank, o.ranks or 1, launch.connect(launcher, port), started)
    launch.leave()


def _rank(o: Options, shape: ExpertShape, local: int, local_world: int, store: dist.Store | None,
          started: float) -> None:
    launch.join_group(str(o.device), local, local_world, store)
    mesh = lina.mesh(ep=o.ep or 1, device_type=o.device)
    first = dist.get_rank() == 0
    likely = o.budget - (time.time() - started) - (1.5 if o.png else 0)     # matplotlib takes that long
    left = [likely]
    dist.broadcast_object_list(left, src=0)
    model = profile(mesh, budget_s=max(LEAST_S, left[0]), shapes=[shape], top_k=o.top_k,
                    transports=None if o.transports is None else o.transports.split(","),
                    progress=_progress if first and not o.quiet else None)
    launch.worked(local, store)
    if first:
        _tell(o, model)
        if store is not None:
            store.set("told", "")
    launch.leave_group()


def _progress(line: str) -> None:
    print(f"measuring {line} ...", flush=True)


def _tell(o: Options, model: CostModel) -> None:
    model.save(o.out)
    if o.json is not None:
        Path(o.json).write_text(json.dumps(model.as_json()) + "\n", encoding="utf-8")
    if o.png is not None:
        from lina.profile.picture import draw
        draw(model, o.png)
    print(f"{model.describe()}\nsaved       {o.out}", flush=True)
