"""What `lina train` can be told, and what the machine says where it is told nothing."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
from typing import Any

PRECISIONS = ("float32", "bf16", "fp16")
SCHEDULES = ("plain", "lina", "auto")
TRANSPORTS = ("auto", "c10d", "nccl", "p2p")


class OptionError(ValueError):
    """One line naming an option, its value and its limit."""


@dataclasses.dataclass
class Options:
    """A run. Fields are the command's options; None means chosen from the machine."""

    dim: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    ffn_dim: int = 192
    seq: int = 128
    batch: int = 16
    steps: int = 900
    lr: float = 2e-3
    balance_coef: float = 0.01
    clip: float = 1.0
    seed: int = 0
    precision: str | None = None
    dense: bool = False
    ranks: int | None = None
    ep: int | None = None
    schedule: str = "plain"
    transport: str = "auto"
    degree: str | None = None
    device: str | None = None
    data: str | None = None
    heldout_kib: int = 192
    sample: int = 240
    out: str = "lina-run"
    checkpoint: str | None = None
    save_every: int | None = None
    resume: str | None = None
    stop: int | None = None
    json: str | None = None
    quiet: bool = False


HELP = {
    "dim": "model width D", "layers": "blocks; every second one has an MoE layer",
    "heads": "attention heads; divides --dim", "experts": "experts E of an MoE layer",
    "top_k": "experts K that each byte goes to", "ffn_dim": "width F of one expert; dense blocks have K*F",
    "seq": "bytes of one sequence", "batch": "sequences of one step, over all ranks",
    "steps": "optimizer steps", "lr": "peak learning rate", "clip": "largest gradient norm",
    "balance_coef": "weight of the load-balancing loss", "seed": "of weights and batches",
    "precision": "float32, bf16 or fp16 (default: bf16 on cuda, else float32)",
    "dense": "the baseline: dense FFNs of the same active size instead of experts",
    "ranks": "processes to start (default: one a GPU, else 2); torchrun's count under torchrun",
    "ep": "ranks that share the experts (default: as many as possible)",
    "schedule": "gradients beside all-to-alls (plain), after them (lina), or as planned (auto)",
    "transport": "what carries tokens between ranks: c10d, or on cuda nccl or p2p (default: auto, "
                 "nccl on cuda)",
    "degree": "passes of the experts forward and backward, 1 to 8 (default: 1,1; lina: by the link; "
              "auto: planned)",
    "device": "cpu or cuda (default: cuda where there is one)",
    "data": "a text file or a folder of them (default: the Python standard library's sources)",
    "heldout_kib": "most KiB of held-out text to score", "sample": "bytes of text to generate at the end",
    "out": "folder for pictures, trace and metrics",
    "checkpoint": "folder for checkpoints (default: OUT/checkpoint)",
    "save_every": "steps between checkpoints (default: a quarter of --steps)",
    "resume": "checkpoint folder to continue from, with its options",
    "stop": "end after this step of the schedule, as if it were the last",
    "json": "write the summary as one JSON object", "quiet": "no progress bar",
}
# What a checkpoint fixes: another value would not continue the same run.
FIXED = ("dim", "layers", "heads", "experts", "top_k", "ffn_dim", "seq", "batch", "balance_coef", "clip",
         "seed", "precision", "dense", "ranks", "ep", "device", "data", "heldout_kib")
KEPT = (*FIXED, "steps", "lr", "schedule", "transport", "degree")


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One argument per field. Only what is given lands in the namespace."""
    kinds = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(Options):
        text = HELP[field.name]
        if field.default is not None and field.default is not False:
            text += f" (default: {field.default})"
        if field.type == "bool":
            parser.add_argument(flag(field.name), action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        choices = {"precision": PRECISIONS, "device": ("cpu", "cuda"), "schedule": SCHEDULES,
                   "transport": TRANSPORTS}.get(field.name)
        kind = kinds[str(field.type).split(" ")[0]]
        shown = {"int": "N", "float": "X", "str": "PATH" if field.name != "degree" else "F,B"}[kind.__name__]
        parser.add_argument(flag(field.name), type=kind, choices=choices, metavar=None if choices else shown,
                            default=argparse.SUPPRESS, help=text)


def command(o: Options) -> str:
    """The command line that gives `o`'s result on this machine, from the options that shape it."""
    plain = Options(dense=o.dense)
    fill(plain, plain)
    words = ["lina", "train", *["--dense"] * o.dense]
    for name in (*KEPT, "stop"):
        value = getattr(o, name)
        if name != "dense" and value != getattr(plain, name) and value is not None:
            words += [flag(name), shlex.quote(str(value))]
    return " ".join(words)


def torchrun() -> bool:
    """Whether this process is a rank that torchrun, or something like it, started."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def fill_ranks(o: Any, asked: int | None) -> int:
    """``o.device`` and ``o.ranks``, checked, from the machine (GPUs, torchrun's variables) where they are
    None; ``asked``: the ranks that the command line names. Returns the ranks; raises OptionError."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    o.device = o.device or ("cuda" if gpus else "cpu")
    if o.device == "cuda" and not gpus:
        raise OptionError("--device: cuda, but torch finds no GPU here (see `lina doctor`)")
    if torchrun():
        world = int(os.environ["WORLD_SIZE"])
        if asked not in (None, world):
            raise OptionError(f"--ranks: {asked}, but torchrun started {world}")
        o.ranks = world
    elif o.ranks is None:
        o.ranks = gpus if o.device == "cuda" else 2
    at_least(o, "ranks", 1)
    if o.device == "cuda" and not torchrun() and o.ranks > gpus:
        raise OptionError(f"--ranks: {o.ranks}, at most one for each of the {gpus} GPUs")
    return o.ranks


def fill(o: Options, asked: Options) -> None:
    """Device, ranks, precision and ep, from the machine where not given."""
    ranks = fill_ranks(o, asked.ranks)
    o.precision = o.precision or ("bf16" if o.device == "cuda" else "float32")
    at_least(o, "experts", 1)
    if o.dense:
        o.ep = 1
    elif o.ep is None:
        o.ep = math.gcd(ranks, o.experts)


def at_least(o: Any, name: str, limit: float) -> None:
    if not getattr(o, name) >= limit:                # NaN fails too
        raise OptionError(f"{flag(name)}: {getattr(o, name)}, at least {limit}")


def passes(o: Options) -> tuple[int, int] | None:
    """``o.degree`` as two numbers; None where it is not given."""
    if o.degree is None:
        return None
    forward, _, backward = o.degree.partition(",")
    if not all(n.isdecimal() and 1 <= int(n) <= 8 for n in (forward, backward)):
        raise OptionError(f"--degree: {o.degree}, two numbers from 1 to 8, as in 3,3")
    return int(forward), int(backward)
