"""Every check of `lina train`'s options that is possible before a process starts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from . import checkpoint, data
from .options import FIXED, KEPT, OptionError, Options, at_least, fill, flag, passes


def resolve(given: dict[str, Any]) -> Options:
    """The run that `given` asks for: checked, with every None that matters filled in.

    Reads the machine (GPUs, torchrun's variables), the data folder and the
    checkpoint, and starts nothing. Raises OptionError.
    """
    found: dict[str, Any] = {}
    if given.get("resume") is not None:
        try:
            found = checkpoint.manifest(given["resume"])
        except (OSError, ValueError) as error:
            raise OptionError(f"--resume: {error}") from error
    saved = found.get("options", {})
    options = Options(**{**{k: saved[k] for k in KEPT if k in saved}, **given})
    explicit = Options(**given)
    fill(options, explicit)
    for name in FIXED:
        value = getattr(options, name)
        if name in saved and value != saved[name]:
            raise OptionError(f"{flag(name)}: {value}, but the checkpoint in {given['resume']} was written "
                              f"with {saved[name]}; it resumes on the same layout only")
    _check(options)
    options.save_every = options.save_every or max(1, math.ceil(options.steps / 4))
    options.checkpoint = options.checkpoint or os.path.join(options.out, "checkpoint")
    digest = data.load(options).digest
    if found and found["text_digest"] != digest:
        raise OptionError(f"--resume: {options.resume} was trained on another text than "
                          f"{options.data or 'this Python standard library'}; pass the same --data")
    last = options.stop or options.steps
    if found and found["step"] >= last:
        raise OptionError(f"{'--stop' if options.stop else '--steps'}: {last}, but the checkpoint in "
                          f"{options.resume} has done {found['step']} already")
    return options


def _check_schedule(o: Options) -> None:
    passes(o)
    if o.transport not in ("auto", "c10d") and o.device != "cuda":
        raise OptionError(f"--transport: {o.transport}, needs --device cuda")
    if o.schedule == "auto" and os.environ.get("RANK", "0") == "0":
        import lina

        try:
            lina.parallel.CostModel.load(device=o.device, world=o.ranks)
        except (OSError, ValueError) as error:
            raise OptionError(f"--schedule: auto, {error}") from error


def _check(o: Options) -> None:
    ranks, ep = o.ranks or 1, o.ep or 1
    for name, limit in (("dim", 2), ("heads", 1), ("layers", 1 if o.dense else 2), ("top_k", 1),
                        ("ffn_dim", 1), ("seq", 8), ("batch", 1), ("steps", 1), ("ep", 1), ("seed", 0),
                        ("heldout_kib", 1), ("sample", 0), ("balance_coef", 0)):
        at_least(o, name, limit)
    for name in ("lr", "clip"):
        if not 0 < getattr(o, name) < math.inf:
            raise OptionError(f"{flag(name)}: {getattr(o, name)}, above 0 and finite")
    for name, limit in (("experts", 1024), ("top_k", min(32, o.experts)), ("seed", 2**31 - 1)):
        if getattr(o, name) > limit:
            raise OptionError(f"{flag(name)}: {getattr(o, name)}, at most {limit}"
                              + (f" (--experts {o.experts})" if name == "top_k" else ""))
    for name, value, by, divisor in (
            ("dim", o.dim, "2 x --heads", 2 * o.heads), ("ranks", ranks, "--ep", ep),
            ("experts", o.experts, "--ep", ep), ("batch", o.batch, "--ranks", ranks)):
        if value % divisor:
            raise OptionError(f"{flag(name)}: {value}, a multiple of {by} = {divisor}")
    if o.precision == "fp16" and o.device == "cpu":
        raise OptionError("--precision: fp16, needs --device cuda (bf16 and float32 run on the CPU)")
    _check_schedule(o)
    for name in ("stop", "save_every"):
        value = getattr(o, name)
        if value is not None and not 1 <= value <= o.steps:
            raise OptionError(f"{flag(name)}: {value}, from 1 to --steps = {o.steps}")
    for name in ("out", "checkpoint"):
        path = getattr(o, name)
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise OptionError(f"{flag(name)}: {path}, exists and is not a folder")
    if o.json is not None:
        if Path(o.json).is_dir():
            raise OptionError(f"--json: {o.json}, is a folder")
        folder = Path(o.json).absolute().parent
        if not folder.is_dir() and os.path.realpath(folder) != os.path.realpath(o.out):    # --out is made
            raise OptionError(f"--json: {o.json}, its folder does not exist")
