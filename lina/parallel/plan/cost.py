"""What communication and computation cost on one machine, measured by :func:`lina.profile`.

Each operation takes t = alpha + n * beta seconds for n bytes, rows or floating-point operations.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lina.parallel.plan.lines import ExpertPass, ExpertShape, LayerLine, Line, read_layer_line, read_line
from lina.parallel.plan.machine import default_path, machine_facts, overwrite

KIND, FORMAT = "lina cost model", 4
GOOD_FIT = 0.99                 # r2 below it is worth a warning: FSMoE reports 0.9987 at the least


@dataclass(frozen=True)
class CostModel:
    """The measured lines of one machine, device and number of ranks.

    Attributes:
        machine: processor, cores, GPUs and NCCL's settings, as :func:`machine` finds them.
        device: "cpu" or "cuda".  world, ep: ranks, and those that a2a was measured among.
        links: by (operation, transport): "a2a" by bytes that leave a rank, "allreduce" by the
            buffer's bytes.
        experts: passes by shape.  gemm: one dense product, by floating-point operations.
        copy: within a device's memory, by bytes copied.
        layers: by transport: what a whole spread layer takes beside exchanges and experts, forward and
            backward.  top_k: experts a token of these layers; 0: none was measured.
        versions: of lina, torch and NCCL.  date: ISO 8601, UTC.  notes: what could not be measured.
    """

    machine: dict[str, Any]
    device: str
    world: int
    ep: int
    links: dict[tuple[str, str], Line]
    experts: tuple[ExpertPass, ...] = ()
    gemm: Line | None = None
    copy: Line | None = None
    dtype: str = "float32"          # of gemm
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    seconds: float = 0.0            # that measuring took
    notes: tuple[str, ...] = ()
    layers: dict[str, tuple[LayerLine, LayerLine]] = field(default_factory=dict)
    top_k: int = 0

    def line(self, operation: str, transport: str | None = None) -> Line:
        """The line of an operation: "a2a", "allreduce", "experts_fwd", "experts_bwd" (of the first
        shape), "gemm" or "copy".

        Args:
            transport: of the first two; by default the only one that was measured.

        Raises:
            ValueError: it was not measured, or by several transports and none is named.
        """
        found = {key: line for key, line in self.links.items() if key[0] == operation}
        if found:
            if transport is None and len(found) == 1:
                return next(iter(found.values()))
            if (operation, str(transport)) in found:
                return found[operation, str(transport)]
            raise ValueError(f"CostModel: {operation} was measured by {', '.join(t for _, t in found)}, "
                             f"transport is {transport!r}")
        other = {"gemm": self.gemm, "copy": self.copy}
        if self.experts:
            other |= {"experts_fwd": self.experts[0].forward, "experts_bwd": self.experts[0].backward}
        line = other.get(operation)
        if line is None:
            known = sorted({op for op, _ in self.links} | {op for op, line in other.items() if line})
            raise ValueError(f"CostModel: {operation!r} was not measured; there are {', '.join(known)}")
        return line

    def time(self, operation: str, n: float, transport: str | None = None) -> float:
        """Seconds that ``n`` bytes, rows or operations take. Arguments and errors as :meth:`line`'s;
        where several transports were measured and none is named, the fastest one's."""
        transports = [t for op, t in self.links if op == operation]
        if transport is None and transports:
            return min(self.links[operation, t].time(n) for t in transports)
        return self.line(operation, transport).time(n)

    def expert_pass(self, shape: ExpertShape) -> ExpertPass:
        """The pass of ``shape``: measured, or else scaled from a measured shape of the same dtype.

        Scaled: beta by a row's multiplications (dim * ffn_dim), alpha by the bytes of all weights
        (local * dim * ffn_dim). That is an estimate; its lines have no points.

        Raises:
            ValueError: no pass of that dtype was measured.
        """
        alike = [e for e in self.experts if e.shape.dtype == shape.dtype]
        for found in alike:
            if found.shape == shape:
                return found
        if not alike:
            have = ", ".join(sorted({e.shape.dtype for e in self.experts})) or "none"
            raise ValueError(f"CostModel: no expert pass in {shape.dtype} was measured; there are {have}")
        one = shape.dim * shape.ffn_dim
        near = min(alike, key=lambda e: abs(math.log(e.shape.dim * e.shape.ffn_dim / one)))
        row = one / (near.shape.dim * near.shape.ffn_dim)
        all_weights = row * shape.local / near.shape.local
        lines = [replace(line, alpha_s=line.alpha_s * all_weights, beta_s=line.beta_s * row, points=())
                 for line in near.lines]
        return ExpertPass(shape, *lines)

    def rows(self) -> list[tuple[str, str, str, Line]]:
        """(operation, transport or shape, unit, line) of everything that was measured."""
        found = [(op, transport, "bytes", line) for (op, transport), line in self.links.items()]
        for e in self.experts:
            where = f"{e.shape.local} x {e.shape.dim} x {e.shape.ffn_dim} {e.shape.dtype}"
            names = "experts_fwd", "experts_bwd", "experts_dw"
            found += [(name, where, "rows", line) for name, line in zip(names, e.lines, strict=True)]
        if self.gemm is not None:
            found.append(("gemm", self.dtype, "flops", self.gemm))
        if self.copy is not None:
            found.append(("copy", self.device, "bytes", self.copy))
        for transport, lines in self.layers.items():
            for name, line in zip(("layer_fwd", "layer_bwd"), lines, strict=True):
                each = [1e6 * s for _, s in line.passes]
                more = f" +{min(each):.0f}..{max(each):.0f} us a pass" if each else ""
                found.append((name, transport + more, "bytes", line))
        return found

    def describe(self) -> str:
        """A table of all lines, and a warning for each that fits badly and is what predictions follow."""
        layers = f"; layers of {self.top_k} experts a token" if self.layers else ""
        where = self.machine["gpus"][0] if self.device == "cuda" else self.machine["cpu"]
        out = [f"{self.world} rank{'s' * (self.world > 1)} on {self.device} ({where}), ep {self.ep}, "
               f"measured in {self.seconds:.1f} s{layers}",
               f"{'operation':<12}{'transport':<26}{'alpha us':>10}{'rate':>20}{'r2':>9}{'off':>7}"
               f"{'points':>8}"]
        rows = self.rows()
        out += [f"{op:<12}{how:<26}{1e6 * line.alpha_s:10.1f}{_rate(unit, line.beta_s):>20}"
                f"{line.r2:9.4f}{line.off:7.1%}{len(line.points):8d}" for op, how, unit, line in rows]
        out += [f"warning: {op} {how}: r2 = {line.r2:.3f} is below {GOOD_FIT}: its times are no straight "
                f"line here, or others use the machine; off by up to {line.off:.0%}"
                for op, how, _, line in rows if line.r2 < GOOD_FIT and not isinstance(line, LayerLine)]
        return "\n".join([*out, *(f"not measured: {note}" for note in self.notes)])

    # ---- files ----

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON-able values; :meth:`from_json` takes it back."""
        found = {name: getattr(self, name) for name in
                 ("machine", "device", "world", "ep", "dtype", "versions", "date", "seconds", "top_k")}
        return {"kind": KIND, "format": FORMAT, **found, "notes": list(self.notes),
                "links": [{"operation": op, "transport": t, **asdict(line)}
                          for (op, t), line in self.links.items()],
                "experts": [asdict(e) for e in self.experts],
                "gemm": self.gemm and asdict(self.gemm), "copy": self.copy and asdict(self.copy),
                "layers": [{"transport": t, "forward": asdict(forward), "backward": asdict(backward)}
                           for t, (forward, backward) in self.layers.items()]}

    @staticmethod
    def from_json(value: Any) -> CostModel:
        """Raises ValueError, one line, for anything but what :meth:`as_json` gives."""
        try:
            if value["kind"] != KIND or value["format"] != FORMAT:
                raise ValueError(f"kind {value['kind']!r}, format {value['format']!r}; here {KIND!r}, "
                                 f"{FORMAT}: run `lina profile` again")
            experts = tuple(ExpertPass(ExpertShape(**e["shape"]), *(read_line(e[part]) for part in
                                                                    ("forward", "backward", "late")))
                            for e in value["experts"])
            links = {(str(v["operation"]), str(v["transport"])): read_line(v) for v in value["links"]}
            layers = {str(v["transport"]): (read_layer_line(v["forward"]), read_layer_line(v["backward"]))
                      for v in value["layers"]}
            gemm, copy = (value[name] and read_line(value[name]) for name in ("gemm", "copy"))
            return CostModel(dict(value["machine"]), str(value["device"]), int(value["world"]),
                             int(value["ep"]), links, experts, gemm, copy, str(value["dtype"]),
                             dict(value["versions"]), str(value["date"]), float(value["seconds"]),
                             tuple(value["notes"]), layers, int(value["top_k"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a cost model written by lina ({type(error).__name__}: {error})") from error

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Writes it, at once or not at all; returns where. Default: :func:`default_path`'s, whose
        folder is made. OSError if that cannot be written."""
        if path is None:
            path = default_path(self.device, self.world)
            path.parent.mkdir(parents=True, exist_ok=True)
        overwrite(Path(path), json.dumps(self.as_json(), indent=1) + "\n")
        return Path(path)

    @staticmethod
    def load(path: str | os.PathLike[str] | None = None, *, device: str | None = None,
             world: int | None = None, foreign: bool = False) -> CostModel:
        """The model in a file, if it is one of this machine.

        Args:
            path: default: :func:`default_path`'s.
            device, world: what it has to be of; by default the default process group's, or one
                rank on whatever device the file is of where there is no group.
            foreign: take it whatever machine, device and ranks it is of.

        Raises:
            FileNotFoundError: none there.  OSError: it cannot be read.
            ValueError: no cost model, or one of another machine, device or number of ranks; the
                text says what differs.
        """
        if world is None:
            world = dist.get_world_size() if dist.is_initialized() else 1
        if device is None and dist.is_initialized():
            device = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
        found = Path(path) if path is not None else default_path(device or "cpu", world)
        try:
            text = found.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"CostModel: {found}: no such file; run `lina profile` or lina.profile()"
                                    ) from error
        try:
            model = CostModel.from_json(json.loads(text))
        except ValueError as error:
            raise ValueError(f"CostModel: {found}: {error}") from error
        here = {**machine_facts(), "device": device or model.device, "ranks": world}
        there = {**model.machine, "device": model.device, "ranks": model.world}
        for name in () if foreign else sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                raise ValueError(f"CostModel: {found} was measured elsewhere: {name} there "
                                 f"{there.get(name, 'unset')}, here {here.get(name, 'unset')}; "
                                 "run `lina profile` here")
        return model


def _rate(unit: str, beta_s: float) -> str:
    scale, name = {"bytes": (1e9, "GB/s"), "rows": (1e6, "Mrow/s"), "flops": (1e9, "GFLOP/s")}[unit]
    return f"{1 / (scale * beta_s):.3f} {name}" if beta_s > 0 else f"inf {name}"
