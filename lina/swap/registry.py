"""lina.swap, lina.unswap, lina.swap_report: find the MoE modules of a model and act on them."""

from __future__ import annotations

import re
from typing import NamedTuple, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lina import parallel
from lina.swap import hf, plain
from lina.swap.report import Entry, Report
from lina.swap.shell import Match, Shell, put_on, take_off

Model = TypeVar("Model", bound=nn.Module)

FAMILIES = (hf.examine, plain.examine)
UNKNOWN = ("unknown kind of module: neither stacked experts as Hugging Face's nor a gate with a "
           "list of experts (docs/swap.md)")


class _Found(NamedTuple):
    name: str
    module: nn.Module
    verdict: Match | str | None     # None: it has lina's computation already
    known: bool                     # of a kind that lina knows, whether swapped or not


def swap(model: Model, mesh: DeviceMesh | None = None) -> Model:
    """Give every known MoE module of ``model`` lina's computation, in place; returns ``model``.

    Modules keep their place, Parameters, hooks and names: ``state_dict``, ``save_pretrained`` and
    optimizers made before stay as they were. Known are the experts modules of Hugging Face
    transformers 5 (Mixtral, Qwen3-MoE, OLMoE and those built alike), whose routers stay, and plain
    blocks of a documented shape; see ``docs/swap.md`` and :func:`swap_report`. A module that is not
    known is left alone. Modules that are swapped already stay as they are.

    Args:
        mesh: spread the experts over its dimension "ep" (:func:`lina.mesh`). Each rank then keeps
            count / ep experts as plain local Parameters, so the ``state_dict`` holds those only
            (``docs/ranks.md``); gradients there are dropped, and an optimizer is to be made
            afterwards. All ranks of the mesh call it with the same model.

    Raises:
        ValueError: a mesh without dimension "ep"; a number of experts that "ep" does not divide; a
            mesh for a model that DistributedDataParallel wraps already; a model swapped before with
            another mesh. Nothing is changed then.
    """
    if mesh is not None and "ep" not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"swap: mesh has dimensions {mesh.mesh_dim_names}, needs one named 'ep'")
    ep = 1 if mesh is None else parallel.ep_size(mesh)
    found = _walk("", model, set())
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    for name, module, verdict, _ in found:
        if isinstance(verdict, Match) and mesh is not None and wrapped:
            raise ValueError("swap: model is wrapped in DistributedDataParallel, which would go on averaging "
                             "experts that differ; swap the bare model, then wrap it by lina.ddp")
        if isinstance(module, Shell) and module.lina_experts().mesh != mesh and mesh is not None:
            raise ValueError(f"swap: {name or 'the model'} was swapped before with another mesh or none; "
                             "call lina.unswap(model) first")
        if isinstance(verdict, Match) and verdict.experts % ep:
            raise ValueError(f"swap: {name or 'the model'} has {verdict.experts} experts, not divisible by "
                             f"the mesh's ep={ep}")
    for _, module, verdict, _ in found:
        if isinstance(verdict, Match):
            put_on(module, verdict, mesh)
    return model


def unswap(model: Model) -> Model:
    """Undo :func:`swap`, in place; returns ``model``. The Parameters, as trained since, are kept.

    Experts spread over a mesh are gathered, so that every rank has them all again: a collective,
    to be called by all ranks. Their gradients are dropped.

    Raises:
        ValueError: a swapped module whose class was changed again since (by torch's ``fully_shard``
            or ``parametrize``); nothing is changed then.
    """
    shells = [(name, module) for name, module in model.named_modules() if isinstance(module, Shell)]
    for name, module in shells:
        if "lina_original" not in vars(type(module)):
            raise ValueError(f"unswap: the class of {name or 'the model'} was changed after lina.swap, "
                             f"to {type(module).__name__}; undo that first")
    for _, module in shells:
        take_off(module)
    return model


def swap_report(model: nn.Module) -> Report:
    """Each MoE-like module of ``model``: name, class, swapped or not, and why; prints as a table.

    Before :func:`swap` it says what would be swapped.
    """
    report = Report()
    for name, module, verdict, _ in _walk("", model, set()):
        if isinstance(module, Shell):
            spread = module.lina_experts()
            where = f", {spread.local} of {spread.count} here" if spread.local != spread.count else ""
            report.append(Entry(name, module.lina_original.__name__, True, module.lina_text + where))
        elif isinstance(verdict, Match):
            report.append(Entry(name, type(module).__name__, False, f"lina.swap would: {verdict.text}"))
        else:
            report.append(Entry(name, type(module).__name__, False, verdict or "lina's own layer"))
    return report


def _walk(name: str, module: nn.Module, seen: set[int]) -> list[_Found]:
    if id(module) in seen:
        return []
    seen.add(id(module))
    if isinstance(module, Shell) or type(module).__module__.startswith("lina.nn"):
        return [_Found(name, module, None, True)]
    for examine in FAMILIES:
        verdict = examine(module)
        if verdict is not None:
            return [_Found(name, module, verdict, True)]
    inner = [found for key, child in module.named_children()
             for found in _walk(f"{name}.{key}" if name else key, child, seen)]
    # The outermost of unknown modules is named, unless it holds one that is known.
    if not any(found.known for found in inner) and _looks_moe(module):
        return [_Found(name, module, UNKNOWN, False)]
    return inner


def _looks_moe(module: nn.Module) -> bool:
    """Whether a person would call it an MoE layer: by class name, or by stacked or listed experts."""
    stacked = [p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3]
    if len(stacked) > 1 and len(set(stacked)) == 1 and stacked[0] > 1:
        return True
    kind = type(module).__name__
    if "expert" in kind.lower() and stacked:
        return True
    experts = module._modules.get("experts")
    if isinstance(experts, nn.ModuleList) and len(experts) > 1:
        return True
    named = re.search(r"(moe|mixtureofexperts)(block|layer|feedforward)?$|sparsemoe", kind, re.IGNORECASE)
    return named is not None and any(True for _ in module.parameters())
