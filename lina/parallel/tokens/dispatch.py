"""Tokens to the ranks of their experts and back, over torch.distributed.

T tokens here, R rows received, S rows sent, K experts per token, D width. A token
travels once to each rank that holds at least one of its experts (S <= T * ep), with
its K weights and ids. The sum over a rank's experts travels back, one row per (token,
rank), rounded to the activation's dtype; ``collect`` adds those in rank order, in
float32 (float64 for float64), and rounds once. Backward runs by the same tables.

Two collectives forward (counts, then rows, weights and ids packed together), one
for each of ``collect`` and the two backward passes; over NCCL one host read of counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lina import ops, tracing
from lina.parallel.plan.observe import saw_rows
from lina.parallel.tokens.header import FIRST, check, facts, said
from lina.parallel.transport.base import Transport, failure, gate, to_host

# NCCL copies rows byte by byte to and from addresses that are no multiple of this: a third of the rate.
ALIGN = 16


@dataclass(frozen=True)
class Route:
    """Where each row came from and went; what ``collect`` and the backward passes need."""

    group: dist.ProcessGroup
    sent: list[int]                # rows to each rank of the group
    received: list[int]            # rows from each
    token_S: Tensor                # i32: the token of each sent row
    row_TR: Tensor                 # i32: the sent row of each token for each rank; -1 if none
    carrier: Transport | None = None   # what the bytes travel by; None: torch.distributed


def dispatch(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: int,
             group: dist.ProcessGroup, *, trained: bool = False
             ) -> tuple[Tensor, Tensor, Tensor, Route | None]:
    """Send each token once to every rank that holds one of its experts.

    Rank r of ``group`` holds experts [r * L, (r + 1) * L), L = experts / ep. Any T will do on
    any rank, 0 included; ids outside [0, experts) are absent pairs. Every rank of the group
    calls it; if one rank's result enters a loss, every rank's must, or backward waits for ever.
    (It is enough that the layer's output is used: it depends on every token received.)

    Args:
        x_TD: [T, D] float32, bfloat16, float16 or float64; cast to the autocast dtype if on.
        weight_TK: [T, K] float32 or float64.  expert_TK: [T, K] int32, global ids.
        trained: what is made of the rows needs gradients of its own, of the experts' weights say; ranks
            must agree on that, for it decides whether ``collect`` has a backward pass.

    Returns:
        x_RD [R, D], weight_RK [R, K] and expert_RK [R, K] (int32, ids in [0, L), -1 for
        experts elsewhere) of the rows received, by sending rank, then by its tokens' order;
        and the route, for :func:`collect`. With one rank: the inputs, and None.

    Raises:
        ValueError: an argument outside its limits, before anything is sent; or ranks that
            disagree on D, K, dtypes, the number of experts or whether gradients are wanted, or
            of which another runs a layer in several passes: then on every rank.
        RuntimeError: another rank failed or left, within the group's timeout. Also for
            differentiating twice.
    """
    ep = group.size()
    if ep == 1:
        return x_TD, weight_TK, expert_TK, None
    device = x_TD.device.type
    if torch.is_autocast_enabled(device) and x_TD.dtype != torch.float64:
        x_TD = x_TD.to(torch.get_autocast_dtype(device))
    _check(x_TD, weight_TK, expert_TK, experts, ep)
    return eagerly(_dispatch)(x_TD, weight_TK, expert_TK, experts, group, trained)


def _dispatch(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: int,
              group: dist.ProcessGroup, trained: bool) -> tuple[Tensor, Tensor, Tensor, Route]:
    grad = torch.is_grad_enabled()
    needs = grad and x_TD.requires_grad, grad and weight_TK.requires_grad, grad and trained
    route = _plan(expert_TK, experts, facts((1, 1), x_TD, weight_TK, experts, needs), group)
    return *send(x_TD, weight_TK, expert_TK, experts, route), route


def send(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: int,
         route: Route) -> tuple[Tensor, Tensor, Tensor]:
    """The rows received by a ``route`` that is known: x_RD, weight_RK and expert_RK of :func:`dispatch`."""
    return _Dispatch.apply(x_TD, weight_TK, expert_TK, experts, route)


def collect(y_RD: Tensor, route: Route | None) -> Tensor:
    """Send each row back to its token's rank: out [T, D], the sum of a token's rows.

    ``y_RD`` holds a row for each row of ``dispatch``'s ``x_RD``, of any width and dtype; the
    result has its dtype. A token that went nowhere gets 0. Every rank of the group calls it.

    Raises:
        ValueError: y has another number of rows than were received.
        RuntimeError: as :func:`dispatch`.
    """
    if route is None:
        return y_RD
    if y_RD.dim() != 2 or y_RD.shape[0] != sum(route.received):
        raise ValueError(f"collect: y has shape {tuple(y_RD.shape)}, must be [{sum(route.received)}, D]: "
                         "one row for each row received")
    return eagerly(_Collect.apply)(y_RD, route)


def eagerly(call: Callable) -> Callable:
    """``call`` outside compiled graphs. Made at each call: torch.compiler.disable imports all of
    dynamo, seconds that ``import lina`` must not take."""
    return torch.compiler.disable(call) if "torch._dynamo" in sys.modules else call


def _check(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: int, ep: int) -> None:
    if x_TD.dim() != 2 or x_TD.dtype not in ops.FLOATS:
        raise ValueError(f"dispatch: x is {x_TD.dtype} of shape {tuple(x_TD.shape)}, "
                         "must be [T, D] of a float dtype")
    if weight_TK.dim() != 2 or weight_TK.shape[0] != x_TD.shape[0] or weight_TK.dtype not in ops.FLOATS:
        raise ValueError(f"dispatch: weight is {weight_TK.dtype} of shape {tuple(weight_TK.shape)}, "
                         f"must be [{x_TD.shape[0]}, K] of a float dtype")
    if expert_TK.shape != weight_TK.shape or expert_TK.dtype != torch.int32:
        raise ValueError(f"dispatch: expert is {expert_TK.dtype} of shape {tuple(expert_TK.shape)}, "
                         f"must be int32 of weight's shape {tuple(weight_TK.shape)}")
    if experts < 1 or experts % ep:
        raise ValueError(f"dispatch: experts is {experts}, must be a multiple of the group's {ep} ranks")


@torch.no_grad()
def _plan(expert_TK: Tensor, experts: int, numbers: tuple[int, ...], group: dist.ProcessGroup) -> Route:
    """Who sends what to whom; ``numbers``: what all ranks must agree on (header.py)."""
    found = ops.dispatch_layout(expert_TK, said(numbers), experts, group.size(), -1, 1)
    mine = found.header
    theirs = torch.empty_like(mine)
    with tracing.span("a2a", "dispatch counts", bytes=mine.nbytes):
        _all_to_all("dispatch", theirs, mine, None, None, group)
    both = torch.cat([theirs[:, :FIRST + 1], mine[:, FIRST:FIRST + 1]], 1)
    lines = to_host("dispatch", both, group)().tolist()
    check(lines)
    received, sent = ([line[FIRST + i] for line in lines] for i in range(2))
    saw_rows(sent, received, group.rank())
    return Route(group, sent, received, found.token_R[:sum(sent)], found.row_TR)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: int,
                route: Route) -> tuple[Tensor, Tensor, Tensor]:
        ctx.route, ctx.dtypes = route, (x_TD.dtype, weight_TK.dtype)
        ctx.widths, ctx.experts = (x_TD.shape[1], weight_TK.shape[1]), experts
        ctx.save_for_backward(expert_TK)
        packed_TB = pack(x_TD, weight_TK, expert_TK)
        packed_RB = _exchange("dispatch", packed_TB.index_select(0, route.token_S), route, out=True)
        x_RD, weight_RK, expert_RK = unpack(packed_RB, (*ctx.widths, expert_TK.shape[1]),
                                             (*ctx.dtypes, torch.int32))
        local = experts // route.group.size()
        expert_RK -= route.group.rank() * local
        expert_RK.masked_fill_((expert_RK < 0) | (expert_RK >= local), -1)
        ctx.mark_non_differentiable(expert_RK)
        return x_RD, weight_RK, expert_RK

    @staticmethod
    @ops.once
    def backward(ctx: Any, saved: Any, dx_RD: Tensor, dweight_RK: Tensor,
                 dexpert_RK: None) -> tuple[Tensor | None, ...]:
        route = ctx.route
        packed_SB = _exchange("dispatch backward", pack(dx_RD, dweight_RK), route, out=False)
        dx_SD, dweight_SK = unpack(packed_SB, ctx.widths, ctx.dtypes)
        dx_TD = torch.ops.lina.combine_fwd(dx_SD, None, route.row_TR)
        return dx_TD, router_gradient(dweight_SK, saved[0], route.row_TR, ctx.experts), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return torch.ops.lina.combine_fwd(_exchange("collect", y_RD, route, out=False), None, route.row_TR)

    @staticmethod
    @ops.once
    def backward(ctx: Any, saved: Any, dout_TD: Tensor) -> tuple[Tensor, None]:
        dout_SD = dout_TD.index_select(0, ctx.route.token_S)
        return _exchange("collect backward", dout_SD, ctx.route, out=True), None


def router_gradient(dweight_SK: Tensor, expert_TK: Tensor, row_TR: Tensor, experts: int) -> Tensor:
    """[T, K]: each pair's from the row of the rank that holds its expert, where it was computed; 0 for
    absent pairs."""
    if not len(dweight_SK):
        return dweight_SK.new_zeros(expert_TK.shape)
    ep = row_TR.shape[1]
    present_TK = (expert_TK >= 0) & (expert_TK < experts)
    rank_TK = torch.div(expert_TK, experts // ep, rounding_mode="floor").clamp(0, ep - 1).long()
    row_TK = row_TR.gather(1, rank_TK).clamp(min=0).long()
    return dweight_SK.gather(0, row_TK).masked_fill_(~present_TK, 0)


def _exchange(name: str, rows: Tensor, route: Route, *, out: bool) -> Tensor:
    """Rows [S, W] out to the experts' ranks, [R, W]; or back, [R, W] to [S, W]. As bytes,
    so that every dtype travels over every backend."""
    send, receive = (route.sent, route.received) if out else (route.received, route.sent)
    result = rows.new_empty(sum(receive), rows.shape[1])
    width = rows.shape[1] * rows.element_size()
    splits = [n * width for n in receive], [n * width for n in send]
    if route.carrier is not None:
        route.carrier.start(name, raw(result), raw(rows), *splits).wait()
        return result
    with tracing.span("a2a", name, bytes=rows.nbytes):
        _all_to_all(name, raw(result), raw(rows), *splits, route.group)
    return result


def raw(rows: Tensor) -> Tensor:
    """The same memory as bytes of one dimension."""
    return rows.contiguous().view(-1).view(torch.uint8)


def _all_to_all(name: str, out: Tensor, inp: Tensor, out_splits: list[int] | None,
                in_splits: list[int] | None, group: dist.ProcessGroup) -> None:
    try:
        with gate:
            dist.all_to_all_single(out, inp, out_splits, in_splits, group=group)
    except RuntimeError as error:
        raise failure(name, group, error) from error


def pack(*parts: Tensor) -> Tensor:
    """Rows side by side, in the widest integers that fit all parts' rows, each with zeros up to whole units
    of ALIGN bytes."""
    def words(part: Tensor) -> Tensor:
        rows = part.contiguous()
        if rows.storage_offset() * rows.element_size() % size:      # a view from the middle of a word on
            rows = rows.clone()
        return rows.view(-1).view(dtype)

    widths = [part.shape[1] * part.element_size() for part in parts]
    size, dtype = (4, torch.int32) if all(w % 4 == 0 for w in widths) else (1, torch.uint8)
    columns = [words(part).view(part.shape[0], w // size) for part, w in zip(parts, widths, strict=True)]
    if sum(widths) % ALIGN:
        columns.append(columns[0].new_zeros(len(parts[0]), -sum(widths) % ALIGN // size))
    return torch.cat(columns, 1)


def unpack(packed: Tensor, widths: tuple[int, ...], dtypes: tuple[torch.dtype, ...], *,
           views: bool = False) -> list[Tensor]:
    """The parts of ``pack``, each in memory of its own; ``views``: strided ones where their elements are no
    wider than those they were packed in."""
    def read(part: Tensor, dtype: torch.dtype) -> Tensor:
        in_place = views and dtype.itemsize <= part.element_size()
        return (part if in_place else part.clone(memory_format=torch.contiguous_format)).view(dtype)

    columns = [w * dtype.itemsize // packed.element_size() for w, dtype in zip(widths, dtypes, strict=True)]
    parts = packed.split([*columns, packed.shape[1] - sum(columns)], 1)      # the last is what was filled up
    return [read(part, dtype) if w else packed.new_empty(len(packed), 0, dtype=dtype)
            for part, w, dtype in zip(parts, widths, dtypes, strict=False)]
