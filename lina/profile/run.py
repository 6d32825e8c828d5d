"""One profile: what is measured, in which order, with what share of the time."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import lina
from lina.parallel import (
    CostModel,
    ExpertPass,
    ExpertShape,
    LayerTimes,
    Line,
    groups,
    layer_lines,
    machine_facts,
)
from lina.profile import compute, layers, links
from lina.profile.measure import Prepare, Ranks, sweep

# Shares of the time of one link, one kind of one shape's passes, products, copies, whole layers over
# one transport.
LINK, PASS, GEMM, COPY, LAYER = 4.0, 2.0, 1.0, 1.0, 4.0
PASSES = {"forward": "experts forward", "backward": "experts backward", "late": "weights' gradients"}
Measure = Callable[[float], str]        # in so many seconds; why not, or nothing


def profile(mesh: DeviceMesh | None = None, *, budget_s: float = 20.0, device: str | None = None,
            transports: Sequence[str] | None = None, sizes: Sequence[int] = links.SIZES,
            shapes: Sequence[ExpertShape] | None = None, top_k: int | None = None,
            progress: Callable[[str], None] | None = None) -> CostModel:
    """Measures this machine and fits t = alpha + n * beta to each operation.

    Collective: every rank calls it, with the same arguments, and gets the same model. Each time is
    the slowest rank's, the median of several; sizes go by 4, from small to large, as far as the time
    allows. The others' work on the machine is in the times. Without a process group only what
    one rank computes is measured. ``save`` keeps the result; :func:`lina.ddp` finds it.

    Args:
        mesh: from :func:`lina.mesh`: a2a is measured among its "ep" ranks, all of its groups at once,
            allreduce among all its ranks. Default: all ranks of the default process group for both.
        budget_s: seconds that it may take; the smallest sizes are measured whatever they cost.
        device: "cpu" or "cuda"; default: the mesh's or the process group's, else "cuda" if there is one.
        transports: names; default: all that are registered and available here.
        sizes: bytes that links are measured at.
        shapes: of the experts to measure passes of. Default: one of Qwen3-30B-A3B's layers over the ep
            ranks on CUDA, one of `lina train`'s on the CPU. The first one's D and dtype are those of
            the dense products. None (an empty list): links alone.
        top_k: experts a token K of whole layers, at most the first shape's over the ep ranks; default: 8 on
            CUDA, 2 on the CPU, or all there are.
        progress: called with one line before each measurement.

    Raises:
        ValueError: an argument outside its limits, or that is not the same on all ranks; on every rank.
        RuntimeError: another rank failed or left, within the group's timeout.

    Source: FSMoE, arXiv:2501.10714, section 4: online profiling. Differs: experts are measured as whole
    passes of a layer, by rows, forward and backward apart, and not as one product; and whole spread layers
    over each transport, for what they take besides, the first shape's.
    """
    start = time.perf_counter()
    ranks = _ranks(mesh, device)
    kind, ep = ranks.device.type, 1 if ranks.ep is None else ranks.ep.size()
    _check_same(ranks, [budget_s, kind, transports, sizes, shapes, top_k])
    wanted = _transports(transports)
    _check(budget_s, sizes)
    shapes = [compute.default_shape(kind, ep)] if shapes is None else list(shapes)
    top_k = _top_k(top_k, shapes[0].local * ep, kind) if shapes else 0
    found_links: dict[tuple[str, str], Line] = {}
    passes: dict[ExpertShape, dict[str, Line]] = {shape: {} for shape in shapes}
    single: dict[str, Line] = {}
    notes: list[str] = []

    times: dict[str, list[LayerTimes]] = {}

    tasks: list[tuple[float, str, Measure]] = []
    for key, measurer in links.registered().items():
        if key[1] in wanted and measurer.available(ranks):
            tasks.append((LINK, " ".join(key), _line(ranks, partial(measurer.prepare, ranks), sizes,
                                                     partial(found_links.__setitem__, key), measurer.each)))
        elif transports is not None and key[1] in wanted:
            notes.append(f"{key[0]} {key[1]}: not available here")
    for shape in shapes:
        for way, name in PASSES.items():
            tasks.append((PASS, name, _line(ranks, _on_experts(ranks, shape, way),
                                            compute.expert_rows(shape, kind),
                                            partial(passes[shape].__setitem__, way))))
    if shapes:
        tasks.append((GEMM, "gemm", _line(ranks, partial(compute.gemm, ranks, shapes[0]),
                                          compute.gemm_flops(shapes[0], kind),
                                          partial(single.__setitem__, "gemm"))))
        tasks.append((COPY, "copy", _line(ranks, partial(compute.copy, ranks), compute.COPIES[kind],
                                          partial(single.__setitem__, "copy"))))
        over = [t for op, t in links.registered() if op == "a2a" and layers.supported(t) and t in wanted
                and links.registered()[op, t].available(ranks)]
        whole = layers.mesh_of(ranks, mesh) if over else None
        for name in over:
            assert whole is not None
            tasks.append((LAYER, f"layer {name}",
                          _whole(ranks, whole, name, shapes[0], top_k, found_links, times)))

    while tasks:
        share = tasks[0][0] / sum(task[0] for task in tasks)
        _, name, measured = tasks.pop(0)
        if progress is not None:
            progress(name)
        spent = ranks.slowest([time.perf_counter() - start])[0]
        why = measured(share * (budget_s - spent))
        if why:
            notes.append(f"{name}: {why}")
    experts = tuple(ExpertPass(shape, **lines) for shape, lines in passes.items()
                    if len(lines) == len(PASSES))
    model = CostModel(
        machine_facts(), kind, 1 if ranks.world is None else ranks.world.size(), ep, found_links, experts,
        single.get("gemm"), single.get("copy"), shapes[0].dtype if shapes else "float32", _versions(),
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        time.perf_counter() - start, tuple(notes), top_k=top_k)
    return _rank0s(ranks, _with_layers(model, times))


def _line(ranks: Ranks, prepare: Prepare, ns: Sequence[int], keep: Callable[[Line], None],
          each: int = 1) -> Measure:
    """Measures and keeps one operation's line."""
    def measured(seconds: float) -> str:
        line, why = sweep(ranks, prepare, ns, seconds, each)
        if line is not None:
            keep(line)
        return why
    return measured


def _top_k(given: int | None, experts: int, device: str) -> int:
    if given is None:
        return min(compute.default_top_k(device), experts)
    if not 1 <= given <= experts:
        raise ValueError(f"profile: top_k is {given}, must be from 1 to the layer's {experts} experts")
    return given


def _whole(ranks: Ranks, mesh: DeviceMesh, transport: str, shape: ExpertShape, top_k: int,
           found_links: dict[tuple[str, str], Line], times: dict[str, list[LayerTimes]]) -> Measure:
    def measured(seconds: float) -> str:
        if ("a2a", transport) not in found_links:          # the reason is told with that
            return ""
        times[transport], why = layers.timed(ranks, mesh, transport, shape, top_k, seconds)
        return why
    return measured


def _with_layers(model: CostModel, times: dict[str, list[LayerTimes]]) -> CostModel:
    """What they take beside exchanges and experts, now that all of these have lines."""
    found, notes = {}, list(model.notes)
    for transport, each in times.items():
        try:
            if each:
                found[transport] = layer_lines(model, transport, each)
        except ValueError as error:
            notes.append(f"layer {transport}: {error}")
    return dataclasses.replace(model, layers=found, notes=tuple(notes))


def _ranks(mesh: DeviceMesh | None, device: str | None) -> Ranks:
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"profile: device is {device!r}, must be 'cpu' or 'cuda'")
    world = ep = None
    kind = device
    if mesh is not None:
        ep, _, world = groups(mesh)
        kind = device or mesh.device_type
        if kind != mesh.device_type:
            raise ValueError(f"profile: device is {device!r}, the mesh is on {mesh.device_type!r}")
    elif dist.is_initialized():
        world = ep = dist.group.WORLD
        kind = device or ("cuda" if "nccl" in dist.get_backend_config() else "cpu")
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("profile: device is 'cuda', but torch finds no GPU here (see `lina doctor`)")
    where = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    return Ranks(world, ep, where)


def _transports(given: Sequence[str] | None) -> list[str]:
    known = list(dict.fromkeys(transport for _, transport in links.registered()))
    for name in given or ():
        if name not in known:
            raise ValueError(f"profile: transports has {name!r}, must be of {', '.join(known)}")
    return known if given is None else list(given)


def _check(budget_s: float, sizes: Sequence[int]) -> None:
    if not 0 < budget_s < math.inf:
        raise ValueError(f"profile: budget_s is {budget_s}, must be above 0 and finite")
    if len(set(sizes)) < 2 or not all(isinstance(n, int) and n >= 1 for n in sizes):
        raise ValueError(f"profile: sizes is {sizes}, must be two or more different numbers of bytes")


def _check_same(ranks: Ranks, given: list) -> None:
    digest = float(int.from_bytes(hashlib.sha256(repr(given).encode()).digest()[:6], "big"))    # exact
    highest, lowest = ranks.slowest([digest, -digest])
    if highest != -lowest:
        raise ValueError(f"profile: the ranks' arguments differ; here: {repr(given)[:300]}")


def _on_experts(ranks: Ranks, shape: ExpertShape, way: str) -> Callable:
    """Weights are made on first use, and only once for all sizes."""
    made: list[compute.Experts] = []

    def prepare(rows: int) -> Callable[[], object]:
        if not made:
            made.append(compute.Experts(ranks, shape))
        return getattr(made[0], way)(rows)
    return prepare


def _versions() -> dict[str, str]:
    found = {"lina": lina.__version__, "torch": torch.__version__}
    if torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _rank0s(ranks: Ranks, model: CostModel) -> CostModel:
    """Rank 0's, on all ranks: the lines are the same already, the rest is what one rank noted."""
    if ranks.world is None or ranks.world.size() == 1:
        return model
    told = [model.as_json()]
    first = dist.get_global_rank(ranks.world, 0)
    dist.broadcast_object_list(told, src=first, group=ranks.world)
    return CostModel.from_json(told[0])
