"""A layer's experts spread over ranks: tokens out, expert passes, results back, overlapped.

Rows travel as in dispatch.py: one copy of a token to each rank that holds at least one of its
experts, and one row back, summed there; but rows of a rank's own experts stay where they are, and
the experts run in ``degree`` passes (layout.py), so that some rows are computed while others travel.
All chunks leave at once, in order; the results of a chunk start back when its pass is done.
Backward has a degree of its own.

Sums and roundings are those of dispatch, ops.moe and collect: a rank's share of a token is rounded
to the activations' dtype, the shares are added in rank order in float32 (float64) and rounded once.
Gradients of weights: each pass's is rounded to the weights' dtype and added in that dtype, so a
degree of r costs up to r - 1 roundings more. (Adding in float32 would hold 4 bytes a parameter of
bf16 weights besides the 2 of the pass's own.) Everything repeats bitwise.

Source: pipelining of micro-ops, Lina, arXiv:2210.17223, section 4; degrees of their own for forward and
backward, FSMoE, arXiv:2501.10714; gradients of weights behind the rows that travel back, Lancet,
arXiv:2404.19429. Differs: own rows go first and last, where the network is busy with rows that nothing
can hide.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lina import ops
from lina.parallel.mesh import groups, local_count
from lina.parallel.plan.observe import saw_layer
from lina.parallel.settings import chosen, settings
from lina.parallel.tokens import p2p, padded
from lina.parallel.tokens.dispatch import collect, dispatch, eagerly, pack, unpack
from lina.parallel.tokens.header import facts
from lina.parallel.tokens.layout import Layout, found_in
from lina.parallel.tokens.passes import Job, add_up, plan, run
from lina.parallel.transport.base import ahead
from lina.parallel.transport.carriers import transport
from lina.parallel.transport.peers import peers_of


def moe(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor, w_down: Tensor, *, experts: int,
        mesh: DeviceMesh, **options: Any) -> Tensor:
    """:func:`lina.ops.moe` where ``w_up``, ``w_down`` and biases are this rank's experts of ``experts``.

    Carried as :func:`settings` of ``mesh`` say. Any T will do on any rank of ``mesh["ep"]``, 0
    included; every rank of it calls, and if one rank's result enters a loss, every rank's must.
    Inside ``torch.no_grad`` nothing is kept.

    Args:
        x_TD: [T, D] tokens.  weight_TK: [T, K] the router's weights.  expert_TK: [T, K] int32 (int64
            is converted), global ids; ids outside [0, experts) add nothing, of either dtype.
        w_up [L, U, D], w_down [L, D, F] and ``options`` (b_up [L, U], b_down [L, D], activation ...):
            as ops.moe, L = experts / ep.

    Returns:
        out_TD: [T, D] in x's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError: as ops.moe, before anything is sent; and for ranks that disagree on
            D, K, dtypes, experts, need of gradients or degrees, then on every rank.
        RuntimeError: another rank failed or left, within the transport's timeout. Also for
            differentiating twice.

    Captured in a CUDA graph, over c10d or nccl, the layer runs in one pass and sends as many rows to
    every rank as any rank has tokens (padded.py). All ranks capture it, after running it once.
    """
    ep, local = groups(mesh).ep, local_count(experts, mesh)
    if ep.size() == 1:
        return ops.moe(x_TD, weight_TK, expert_TK, w_up, w_down, **options)
    if w_up.dim() == 3 and w_up.shape[0] != local:
        raise ValueError(f"moe: w_up has {w_up.shape[0]} experts, must have {local}: {experts} are spread "
                         f"over {ep.size()} ranks")
    seen = (x_TD, expert_TK, (w_up, w_down, options.get("b_up"), options.get("b_down")), experts,
            options.get("activation", "swiglu"))
    if torch.compiler.is_compiling():
        eagerly(saw_layer)(*seen)
        return _carried(x_TD, weight_TK, expert_TK, w_up, w_down, experts, mesh, options)
    span = saw_layer(*seen)
    if span is not None:
        weight_TK, x_TD = span.enters(weight_TK, x_TD)
    out_TD = _carried(x_TD, weight_TK, expert_TK, w_up, w_down, experts, mesh, options)
    if span is not None:
        span.ends(out_TD, weight_TK, x_TD)
    return out_TD


def _carried(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor, w_down: Tensor, experts: int,
             mesh: DeviceMesh, options: dict[str, Any]) -> Tensor:
    ep = groups(mesh).ep
    name, degree = chosen(mesh), settings(mesh).degree
    if expert_TK.dtype == torch.int64:
        expert_TK = expert_TK.clamp(-1, experts).int()      # ids beyond int32 must not wrap into range
    if name == "p2p":
        if degree[0] != degree[1]:
            raise ValueError(f"moe: degree is {degree}, over p2p backward runs in as many passes as forward")
        peers = peers_of(ep, degree[0], device=x_TD.device if x_TD.is_cuda else None,
                         tokens=settings(mesh).tokens, cap_bytes=settings(mesh).cap_bytes)
        return p2p.moe(x_TD, weight_TK, expert_TK, w_up, w_down, experts=experts, peers=peers, **options)
    x_TD, weight_TK, *weights, raw_options = ops.moe_arguments(
        "moe", x_TD, weight_TK, expert_TK, w_up, w_down, **options)
    in_graph: Any = eagerly(padded.capturing)
    made: Any = eagerly(transport)
    if in_graph(x_TD):
        w_up, options["b_up"], w_down, options["b_down"] = weights
        return padded.moe(x_TD, weight_TK, expert_TK, w_up, w_down, experts=experts,
                          carrier=made(mesh), **options)
    if name == "c10d" and degree == (1, 1):
        w_up, options["b_up"], w_down, options["b_down"] = weights
        trained = any(t is not None and t.requires_grad for t in weights)
        x_RD, weight_RK, expert_RK, route = dispatch(x_TD, weight_TK, expert_TK, experts, ep, trained=trained)
        return collect(ops.moe(x_RD, weight_RK, expert_RK, w_up, w_down, **options), route)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad
             for t in (x_TD, weight_TK, *weights)]
    job = Job(made(mesh), experts, degree, raw_options, needs)
    return eagerly(_spread)(x_TD, weight_TK, expert_TK, weights, job)


class _Pass(NamedTuple):
    """One part's inputs of the experts, as their backward wants them."""

    x: Tensor
    weight: Tensor
    expert: Tensor | None          # i32, others than [0, L) are absent; kept where backward sorts anew
    offset: Tensor
    row_pair: Tensor
    pair_row: Tensor
    h: Tensor


def _spread(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, weights: list[Tensor | None],
            job: Job) -> Tensor:
    if ops.needs_grad(x_TD, weight_TK, *weights):
        return _Spread.apply(x_TD, weight_TK, *weights, expert_TK, job,
                             *ops.ties((x_TD, weight_TK, *weights), (weights[0], *weights[2:])))
    return _forward(x_TD, weight_TK, expert_TK, weights, job, False)[0]


def _joined(own: Tensor, arrived: Tensor | None) -> Tensor:
    if arrived is None:
        return own
    return torch.cat([own, arrived]) if len(own) else arrived


def _forward(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, weights: list[Tensor | None], job: Job,
             save: bool) -> tuple[Tensor, list[Layout], list[_Pass]]:
    me, ep = job.ranks
    T, D = x_TD.shape
    K, local = expert_TK.shape[1], job.experts // ep
    w_up, b_up, w_down, b_down = weights
    assert w_up is not None
    x_TD, weight_TK = x_TD.contiguous(), weight_TK.contiguous()
    needs = job.needs[0], job.needs[1], any(job.needs[2:])
    passes: list[_Pass] = []
    with ahead(job.transport):
        known = plan(expert_TK, facts(job.degree, x_TD, weight_TK, job.experts, needs), job, save)
        packed_TB = pack(x_TD, weight_TK, expert_TK)        # while counts travel
        lays = known()
        lay, S = lays[0], lays[0].S
        y_SD = x_TD.new_empty(S + T, D)                      # rows that come back, then own ones

        def compute(i: int, got: Tensor | None) -> Tensor | None:
            own, n = lay.own(lay.parts[i]), lay.pairs[i]
            x, weight, expert = x_TD[own], weight_TK[own], expert_TK[own]
            if got is not None:
                x_R, weight_R, expert_R = unpack(got, (D, K, K), (x.dtype, weight.dtype, torch.int32))
                x, weight, expert = (_joined(*both) for both in
                                     ((x, x_R), (weight, weight_R), (expert, expert_R)))
            expert = expert - me * local                     # to sort, ids outside [0, local) are absent
            rows = ops.sort(expert, local)
            y_ND, h_NU = torch.ops.lina.experts_fwd(
                x, rows.offset_E1, rows.row_pair_N[:n], w_up, b_up, w_down, b_down, K, *job.options, save)
            if save:
                ids = expert if job.degree[0] != job.degree[1] else None
                passes.append(_Pass(x, weight, ids, rows.offset_E1, rows.row_pair_N[:n], rows.pair_row_TK,
                                    h_NU))
            out = torch.ops.lina.combine_fwd(y_ND, weight, rows.pair_row_TK)
            size = own.stop - own.start
            y_SD[S + own.start:S + own.stop] = out[:size]
            return None if got is None else out[size:]

        run(job, lay, ("dispatch", "collect"), packed_TB, packed_TB.shape[1], y_SD, compute)
        return torch.ops.lina.combine_fwd(y_SD, None, lay.row_TR), lays, passes


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, w_up: Tensor, b_up: Tensor | None,
                w_down: Tensor, b_down: Tensor | None, expert_TK: Tensor, job: Job,
                *ties: Tensor) -> Tensor:
        out_TD, lays, passes = _forward(x_TD, weight_TK, expert_TK, [w_up, b_up, w_down, b_down], job, True)
        last = lays[-1]
        kept = [t for p in passes for t in p]
        ctx.save_for_backward(w_up, w_down, b_down, last.token_S, last.row_TR, *kept, *ties)
        nothing = x_TD.new_empty(0)          # tensors are saved above, where checkpoints see them
        ctx.job, ctx.lays = job, [replace(lay, token_S=nothing, row_TR=nothing) for lay in lays]
        return out_TD

    @staticmethod
    @ops.once
    def backward(ctx: Any, saved: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        width = len(_Pass._fields)
        parts = len(ctx.lays[0].parts)
        passes = [_Pass(*saved[i:i + width]) for i in range(5, 5 + parts * width, width)]
        lays = [ctx.lays[0], replace(ctx.lays[-1], token_S=saved[3], row_TR=saved[4])]
        gradients = _backward(dout_TD.contiguous(), saved[:3], lays, passes, ctx.job, ctx.needs_input_grad)
        return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def _backward(dout_TD: Tensor, saved: Any, lays: list[Layout], passes: list[_Pass], job: Job,
              need: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of x, weight, w_up, b_up, w_down, b_down, as far as needed."""
    w_up, w_down, b_down = saved
    lay, (T, D), K = lays[1], dout_TD.shape, passes[0].weight.shape[1]
    S, dtypes = lay.S, (dout_TD.dtype, passes[0].weight.dtype)
    returned = [(i, width) for i, width in enumerate((D, K)) if need[i]]     # of dx, dweight: what is needed
    mask = ops.moe_needs(*need[:6])
    # what travels back is computed first, what stays while it travels
    travels, stays = ops.moe_needs(need[0], need[1], *[False] * 4), ops.moe_needs(False, False, *need[2:6])
    kept: dict[int, tuple[Tensor | None, ...]] = {}
    total: list[Tensor | None] = [None] * 4
    with ahead(job.transport):
        # rows that come back, then own ones: dx [S + T, D], dweight [S + T, K]
        rows = [dout_TD.new_empty(S + T, width, dtype=dtypes[i]) for i, width in returned]
        if lays[0].parts != lay.parts:
            passes = _regrouped(lays[0], lay, passes, job)
        packed = [pack(*(r.new_empty(0, r.shape[1]) for r in rows))] if rows else []
        back = packed[0].new_empty(S, packed[0].shape[1]) if rows else None

        def compute(i: int, got: Tensor | None) -> Tensor | None:
            p, own = passes[i], lay.own(lay.parts[i])
            dout = dout_TD[own] if got is None else _joined(dout_TD[own], got)
            given = (dout, p.weight, p.x, p.h, p.offset, p.row_pair, p.pair_row, w_up, w_down, b_down)
            later = got is not None and travels and stays
            dx, dweight, *dw, dh, a = torch.ops.lina.experts_bwd(
                *given, None, None, *job.options, travels | ops.NEED_KEPT if later else mask)
            if later:
                kept[i] = *given, dh, a
            else:
                add_up(total, dw, need[2:6])
            size = own.stop - own.start
            parts = [(dx, dweight)[j] for j, _ in returned]
            for whole, part in zip(rows, parts, strict=True):
                whole[S + own.start:S + own.stop] = part[:size]
            return pack(*(part[size:] for part in parts)) if got is not None and parts else None

        def after(i: int) -> None:
            if i in kept:
                dw = torch.ops.lina.experts_bwd(*kept.pop(i), *job.options, stays)[2:6]
                add_up(total, dw, need[2:6])

        run(job, lay, ("collect backward", "dispatch backward"), dout_TD, D, back, compute, after)
        if back is not None:
            arrived = unpack(back, tuple(w for _, w in returned), tuple(dtypes[i] for i, _ in returned),
                             views=True)
            for whole, part in zip(rows, arrived, strict=True):
                whole[:S] = part
    found: list[Tensor | None] = [None, None]
    for (i, _), whole in zip(returned, rows, strict=True):      # a rank's dweight is 0 where it has no expert
        found[i] = torch.ops.lina.combine_fwd(whole, None, lay.row_TR)
    return [*found, *total]


def _regrouped(forward: Layout, backward: Layout, passes: list[_Pass], job: Job) -> list[_Pass]:
    """The backward's passes from the forward's rows and pre-activations; those that are equal as they are.

    While it runs, a second copy of what is regrouped is in memory.
    """
    local = job.experts // job.ranks[1]
    x, weight, expert = (torch.cat([getattr(p, name) for p in passes]) for name in ("x", "weight", "expert"))
    first, firsts = 0, []
    for p in passes:
        firsts.append(torch.where(p.pair_row < 0, -1, p.pair_row + first))
        first += len(p.h)
    row_TK, h = torch.cat(firsts), torch.cat([p.h for p in passes])      # of each pair, its row in h
    kept = dict(zip(forward.parts, passes, strict=True))
    made = []
    for part, index, pairs in zip(backward.parts, found_in(forward, backward), backward.pairs, strict=True):
        if part in kept:
            made.append(kept[part])
            continue
        index = index.to(x.device, non_blocking=True)
        rows = ops.sort(expert[index], local)
        row_pair = rows.row_pair_N[:pairs]
        from_h = row_TK[index].view(-1)[row_pair.long()]
        made.append(_Pass(x[index], weight[index], None, rows.offset_E1, row_pair, rows.pair_row_TK,
                          h[from_h]))
    return made
