"""A plain block of the documented shape (docs/swap.md), computing by lina.ops.

Its weights stay in their own Parameters, under their own names. The operators want them stacked,
so ``lina.swap`` moves a block's expert weights into one storage, of which the Parameters become
views: no copy is made at a forward, and gradients are views of the stacked gradient. Whoever
gives a Parameter other memory since (``fully_shard``, ``p.data = ...``) ends that for the block, as
does torch.compile for its own calls: each forward then writes a stacked copy of the layer's expert
weights, kept until its backward. ``.to``, ``.cuda``, copies and pickles are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lina import ops, parallel
from lina.swap.shell import STAMP, Shell, mark, run, unmark

KINDS = ("weight", "bias")


class Form(NamedTuple):
    router: str
    top_k: str                   # name of the attribute
    linears: tuple[str, ...]     # an expert's products, the last is the one down
    activation: str
    score: str
    renormalize: bool | None     # None: the attribute norm_topk_prob says
    logits: bool                 # returns (result, logits)


class LoopBlock(Shell):
    """A block whose loop over experts is lina.ops.moe."""

    experts: Any
    lina_joined: tuple[Tensor, ...]      # storages of w_up, w_down, b_up, b_down; () for none

    def lina_experts(self) -> Any:
        return self.experts

    def lina_ready(self) -> None:
        """Move the weights of the experts that are here into one storage for each argument."""
        joined = []
        with torch.no_grad():
            for rows in self._rows():
                plain = rows and all(type(p.data) is Tensor for p in rows)    # not DTensor, for one
                joined.append(torch.stack(rows) if plain else torch.empty(0))
                for p, view in zip(rows if plain else [], joined[-1], strict=True):
                    p.data = view
        self.lina_joined = tuple(joined)

    def lina_leave(self) -> None:
        parallel.release(self.experts.parameters())    # lina.regroup may have made them whole
        del self.lina_joined

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        form: Form = self.lina_form
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE, routing = route(self, form, x_TD)
        weights = stacked(parts(self.experts, form.linears), self.lina_joined)
        y_TD = run(self.experts, x_TD, routing.weight_TK, routing.expert_TK, activation=form.activation,
                   **weights)
        return (y_TD.view(x.shape), logits_TE) if form.logits else y_TD.view(x.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if not all(map(_views, self._rows(), self.lina_joined)):
            self.lina_ready()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lina_ready()

    def lina_spread(self, first: int) -> None:
        local = self.experts.local
        for e, linears in enumerate(parts(self.experts, self.lina_form.linears)):
            for p in _params(linears).values():
                p.grad = None
                if not first <= e < first + local:
                    p.data = p.new_empty(0)
        self._keep(self._whole(), first)

    def _whole(self) -> tuple[tuple[str, Any], ...]:
        """Names and modules of all experts, of which some may hold nothing here."""
        return getattr(self.experts, "whole", None) or tuple(self.experts._modules.items())

    def _keep(self, whole: tuple[tuple[str, Any], ...], first: int) -> None:
        """Make ``local`` of all experts, from ``first`` on, the children of the list."""
        experts = self.experts
        experts._modules.clear()
        if experts.local == experts.count:
            experts._modules.update(whole)
            return
        experts.whole = whole          # in a tuple: not registered as children
        # Numbered from 0 on every rank, as lina.ddp wants the same names everywhere.
        mine = whole[first:first + experts.local]
        experts._modules.update((str(i), child) for i, (_, child) in enumerate(mine))
        for linear in self._linears():      # marked, for they hold the Parameters
            mark(linear, experts.count, experts.local, experts.mesh)

    def regroup_layer(self) -> parallel.Layer:
        """What lina.regroup moves, and whom it tells."""
        rows = [_params({name: child._modules[name] for name in self.lina_form.linears})
                for _, child in self._whole()]
        return parallel.Layer(self.experts, {key: [row[key] for row in rows] for key in rows[0]},
                              self.lina_place)

    def lina_place(self, mesh: DeviceMesh, first: int, local: int) -> None:
        """``local`` experts, from ``first`` on, are here now."""
        whole = self._whole()
        if "whole" in vars(self.experts):
            for linear in self._linears():
                unmark(linear)
            del self.experts.whole
        self.experts.mesh, self.experts.local, self.lina_first = mesh, local, first
        self._keep(whole, first)
        self.lina_ready()

    def lina_gather(self, mesh: DeviceMesh) -> None:
        experts, names = self.experts, self.lina_form.linears
        for linear in self._linears():
            unmark(linear)
        mine = parts(experts, names)
        experts._modules.clear()
        experts._modules.update(experts.whole)
        del experts.whole
        for name in names:
            for kind in KINDS:
                rows = [getattr(linears[name], kind) for linears in mine]
                if rows[0] is None:
                    continue
                full = parallel.gather(torch.stack(rows), mesh)
                for linears, row in zip(parts(experts, names), full, strict=True):
                    p = getattr(linears[name], kind)
                    p.grad, p.data = None, p.data if p.numel() else row.clone()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        part = self.lina_part()
        if part.local == part.count:
            return state
        if not parallel.gathering():
            state[prefix + STAMP] = part.stamp()
            return state
        mine = _numbered(state, f"{prefix}experts.")
        held = {key: state.pop(key) for key in mine}
        for key, (e, rest) in mine.items():     # numbered from 0 on every rank
            rows = parallel.gather(held[key][None], self.experts.mesh)
            state.update((f"{prefix}experts.{r * part.local + e}.{rest}", row) for r, row in enumerate(rows))
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        part, said = self.lina_part(), state_dict.pop(prefix + STAMP, None)
        found = _numbered(state_dict, f"{prefix}experts.")
        whole = found and max(e for e, _ in found.values()) == part.count - 1
        if found and (said is not None or (part.local < part.count and not whole)):
            parallel.check_stamp(said, part, f"{prefix}experts")
        elif part.local < part.count:
            held = {key: state_dict.pop(key) for key in found}
            state_dict.update((f"{prefix}experts.{e - part.first}.{rest}", held[key])
                              for key, (e, rest) in found.items()
                              if part.first <= e < part.first + part.local)
        super()._load_from_state_dict(state_dict, prefix, *more)

    def _rows(self) -> list[list[Tensor]]:
        return _rows(parts(self.experts, self.lina_form.linears))

    def _linears(self) -> Iterator[Any]:
        for linears in parts(self.experts, self.lina_form.linears):
            yield from linears.values()


def parts(experts: Any, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each expert's nn.Linear by name."""
    return [{name: expert._modules[name] for name in names} for expert in experts.children()]


def _params(linears: dict[str, Any]) -> dict[str, Any]:
    """One expert's Parameters, by their names in it."""
    return {f"{name}.{kind}": getattr(linear, kind) for name, linear in linears.items() for kind in KINDS
            if getattr(linear, kind) is not None}


def _numbered(state: dict[str, Any], prefix: str) -> dict[str, tuple[int, str]]:
    """Number of expert and rest of the name of each entry ``{prefix}{number}.{rest}``."""
    split = {key: key[len(prefix):].partition(".") for key in state if key.startswith(prefix)}
    return {key: (int(e), rest) for key, (e, _, rest) in split.items() if e.isdecimal()}


def _rows(experts: list[dict[str, Any]]) -> list[list[Tensor]]:
    """The Parameters of w_up, w_down, b_up, b_down, in the order they are stacked in."""
    *ups, down = experts[0]
    found = [[getattr(linears[name], kind) for linears in experts for name in names]
             for kind in KINDS for names in (ups, [down])]
    return [[] if rows[0] is None else rows for rows in found]


def stacked(experts: list[dict[str, Any]], joined: tuple[Tensor, ...] = ()) -> dict[str, Any]:
    """w_up, w_down, b_up, b_down of ``experts``; without a copy where they are views of ``joined``."""
    result: dict[str, Tensor | None] = {}
    for i, (name, rows) in enumerate(zip(("w_up", "w_down", "b_up", "b_down"), _rows(experts), strict=True)):
        if not rows:
            result[name] = None
            continue
        joint = joined[i] if joined and _views(rows, joined[i]) else None
        whole = torch.stack(rows) if joint is None else _Joint.apply(joint, *rows)
        result[name] = whole.view(len(experts), -1, *rows[0].shape[1:])
    return result


def _views(rows: list[Tensor], joint: Tensor) -> bool:
    """Whether ``rows`` are, one after the other, the memory of ``joint``."""
    if not rows:
        return joint.numel() == 0
    if torch.compiler.is_compiling() or type(rows[0].data) is not Tensor or len(rows) != joint.shape[0]:
        return False
    if rows[0].dtype != joint.dtype or rows[0].shape != joint.shape[1:] or rows[0].device != joint.device:
        return False
    start, step = joint.data_ptr(), joint.stride(0) * joint.element_size()
    return all(p.data_ptr() == start + i * step for i, p in enumerate(rows))


class _Joint(torch.autograd.Function):
    """The storage that ``rows`` are views of, as a function of them."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor, *rows: Tensor) -> Tensor:
        ctx.rows, ctx.versions = rows, [row._version for row in rows]
        return joint.view_as(joint)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # joint counts its own changes, not those made through the Parameters
        if any(row._version != version for row, version in zip(ctx.rows, ctx.versions, strict=True)):
            raise RuntimeError("swap: an expert's weight was changed in place between forward and backward")
        return None, *grad.unbind()


def route(block: Any, form: Form, x_TD: Tensor) -> tuple[Tensor, ops.Routing]:
    """The router's logits, and what the gate makes of them."""
    logits_TE = getattr(block, form.router)(x_TD)
    renormalize = block.norm_topk_prob if form.renormalize is None else form.renormalize
    return logits_TE, ops.gate(logits_TE, getattr(block, form.top_k), score=form.score,
                               renormalize=bool(renormalize))
