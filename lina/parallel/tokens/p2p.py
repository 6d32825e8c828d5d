"""Tokens to the ranks of their experts and back by stores into peers' memory, inside one NVLink domain.

T tokens here, K experts for each, D width, ep ranks, C the most tokens that any rank may have, L experts
here. The result is that of ``dispatch``, ``ops.moe`` and ``collect``; but counts never leave the
devices: no host read, no padding sent, and a layer can be captured in a CUDA graph. What arrives is
[ep * C, D], by sending rank; rows that nobody sent have expert ids -1, for which nothing is computed.

Contract of the kernels, and why the buffers can be used again: csrc/cuda/peers.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lina import ops
from lina.parallel.tokens.dispatch import eagerly
from lina.parallel.tokens.passes import add_up
from lina.parallel.tokens.round import DTYPES, Round, overlap
from lina.parallel.transport.peers import Overflow, Peers


def moe(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor, w_down: Tensor, *, experts: int,
        peers: Sequence[Peers], b_up: Tensor | None = None, b_down: Tensor | None = None,
        tokens: int | None = None, activation: str = "swiglu", interleaved: bool = False,
        alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """``out[t] = sum over k of weight[t, k] * expert_TK[t, k]``'s output, experts spread over ``peers``.

    Every rank of the group calls it, with any number of tokens. If gradients are wanted, every rank's
    output must enter a loss. One autograd node; differentiable once in x, weight_TK, weights and biases.
    Rows travel, and are rounded, as in :func:`dispatch` and :func:`collect`.

    Args:
        x_TD: [T, D] float32, bfloat16 or float16 on the peers' device; cast to the autocast dtype if on.
        weight_TK: [T, K] of a float dtype up to float32.  expert_TK: [T, K] int32, ids in [0, experts);
            others are absent pairs.
        w_up, w_down, b_up, b_down: this rank's experts / ep; they and the other options as in ``ops.moe``.
        experts: E, of all ranks.
        peers: one for each pass, equally many on all ranks. The tokens are cut in so many parts; while the
            experts compute one, the next is on its way, and the one before on its way back.
        tokens: the most that any rank has in calls like this one, equal on all ranks, instead of what
            ``peers`` have: so decode's few cost less than prefill's many.

    Returns:
        out_TD: [T, D] in x's dtype; 0 for tokens without an expert.

    Raises:
        ValueError: an argument outside its limits, before anything is sent; ranks that disagree, or a
            buffer above the cap, on every rank; more tokens than agreed (the others: RuntimeError),
            after which ``peers`` cannot go on: set ``tokens`` before.
        RuntimeError: a peer failed or left, within ``timeout_s``: at the first call (or ``peers.check``)
            after the device noticed; results since are NaN. Also for differentiating twice.
    """
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        x_TD, w_up, w_down = x_TD.to(dtype), w_up.to(dtype), w_down.to(dtype)
        b_up, b_down = (None if b is None else b.to(dtype) for b in (b_up, b_down))
    _check(x_TD, weight_TK, expert_TK, (w_up, w_down, b_up, b_down), experts, peers[0])
    if activation not in ops.ACTIVATIONS:
        raise ValueError(f"p2p: activation is {activation!r}, must be one of {', '.join(ops.ACTIVATIONS)}")
    options = ops.ACTIVATIONS[activation], bool(interleaved), float(alpha), float(limit)
    call: Callable = eagerly(_moe)
    weights = w_up, w_down, b_up, b_down
    return call(x_TD, weight_TK.float(), expert_TK, weights, experts, peers, tokens, options)


def _moe(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, weights: tuple, experts: int,
         peers: Sequence[Peers], tokens: int | None, options: tuple) -> Tensor:
    given = (x_TD, weight_TK, *weights)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    (T, D), K, passes = x_TD.shape, weight_TK.shape[1], len(peers)
    most = None if tokens is None else -(-tokens // passes)
    calls = []
    try:
        for j, one in enumerate(peers):
            part = T // passes + (j < T % passes)
            layer = one.layer(part, D, K, experts, x_TD.dtype, grad, most)
            calls.append(Round(one, layer, part, D, K, experts, x_TD.dtype, raises=grad and j == 0,
                               lowers=grad and j == passes - 1))
    except Overflow:
        _stop(peers, overflow=True)
        raise
    return _Moe.apply(x_TD, weight_TK, expert_TK, *weights, tuple(calls), options, grad,
                      *ops.ties(given, (*weights[:2], weights[3])))


def _stop(peers: Iterable[Peers], overflow: bool = False) -> None:
    for one in peers:
        one.stop(overflow)


class _Received(NamedTuple):
    """One pass's rows, as its experts take them; x is None where they stay in the buffer."""

    x_RD: Tensor | None
    weight_RK: Tensor
    expert_RK: Tensor


class _Moe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor, w_down: Tensor,
                b_up: Tensor | None, b_down: Tensor | None, calls: tuple[Round, ...], options: tuple,
                grad: bool, *ties: Tensor) -> Tensor:
        ep, at = calls[0].peers.ep, _slices(calls)
        try:                   # from the first allocation on: peers must not wait for a rank without memory
            x_TD, weight_TK, expert_TK = x_TD.contiguous(), weight_TK.contiguous(), expert_TK.contiguous()
            slot_TR, count_P2R = expert_TK.new_empty(len(x_TD), ep), expert_TK.new_empty(len(calls), 2, ep)
            got = [_Received(x_TD.new_empty(ep * c.layer.C, c.D) if grad else None,
                             weight_TK.new_empty(ep * c.layer.C, c.K),
                             expert_TK.new_empty(ep * c.layer.C, c.K)) for c in calls]
            out_TD, results = torch.empty_like(x_TD), []

            def leave(j: int) -> None:
                calls[j].dispatch("p2p dispatch", x_TD[at[j]], expert_TK[at[j]], weight_TK[at[j]],
                                  slot_TR[at[j]], count_P2R[j], *got[j])

            def compute(j: int) -> None:
                here = got[j].x_RD
                if here is None:
                    here = calls[j].peers.rows(calls[j].layer, calls[j].D, calls[j].dtype)
                rows = torch.ops.lina.sort(got[j].expert_RK, w_up.shape[0])
                results.append((*torch.ops.lina.experts_fwd(here, *rows[:2], w_up, b_up, w_down, b_down,
                                                            calls[j].K, *options, grad), *rows))

            def back(j: int) -> None:
                y_ND, _, _, _, pair_row = results[j]
                calls[j].collect("p2p collect", y_ND, pair_row, got[j].weight_RK, None, slot_TR[at[j]],
                                 count_P2R[j], expert_TK[at[j]], out_TD[at[j]], None)

            overlap(len(calls), leave, compute, back, x_TD.device, calls[0].peers.sms)
        except BaseException:
            _stop(call.peers for call in calls)
            raise
        if grad:
            kept = [t for g, r in zip(got, results, strict=True) for t in (g.weight_RK, g.x_RD, *r[1:])]
            ctx.save_for_backward(expert_TK, slot_TR, count_P2R, w_up, w_down, b_down, *kept, *ties)
            ctx.calls, ctx.options = calls, options
        return out_TD

    @staticmethod
    @ops.once
    def backward(ctx: Any, saved: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        expert_TK, slot_TR, count_P2R, *weights = saved[:6]
        calls, need, at = ctx.calls, ctx.needs_input_grad, _slices(ctx.calls)
        kept = [saved[6 + 6 * j:12 + 6 * j] for j in range(len(calls))]       # weight, x, h, rows
        # x's and the weights' gradients are computed in any case: a peer may need its tokens'
        wanted = need[3], need[5], need[4], need[6]         # in the operator's order
        mask = ops.moe_needs(True, True, *wanted)
        try:
            dout_TD, results = dout_TD.contiguous(), []
            dx_TD, dweight_TK = torch.empty_like(dout_TD), kept[0][0].new_empty(expert_TK.shape)
            total: list[Tensor | None] = [None] * 4

            def leave(j: int) -> None:
                calls[j].dispatch("p2p dispatch backward", dout_TD[at[j]], None, None, slot_TR[at[j]],
                                  count_P2R[j], None, None, None)

            def compute(j: int) -> None:
                dout_RD = calls[j].peers.rows(calls[j].layer, calls[j].D, calls[j].dtype)
                dx_RD, dweight_RK, *parts = torch.ops.lina.experts_bwd(
                    dout_RD, *kept[j], *weights, None, None, *ctx.options, mask)[:6]
                results.append((dx_RD, dweight_RK))
                add_up(total, parts, wanted)

            def back(j: int) -> None:
                calls[j].collect("p2p collect backward", results[j][0], None, None, results[j][1],
                                 slot_TR[at[j]], count_P2R[j], expert_TK[at[j]], dx_TD[at[j]],
                                 dweight_TK[at[j]])

            overlap(len(calls), leave, compute, back, dout_TD.device, calls[0].peers.sms)
        except BaseException:
            _stop(call.peers for call in calls)
            raise
        dw_up, db_up, dw_down, db_down = total
        found = dx_TD, dweight_TK, None, dw_up, dw_down, db_up, db_down
        return (*(g if n else None for g, n in zip(found, need, strict=False)),
                *[None] * (len(need) - len(found)))


def _slices(calls: Sequence[Round]) -> list[slice]:
    """The tokens of each pass."""
    ends = list(accumulate(call.T for call in calls))
    return [slice(end - call.T, end) for end, call in zip(ends, calls, strict=True)]


def _check(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, weights: tuple, experts: int,
           peers: Peers) -> None:
    w_up, w_down = weights[:2]
    if x_TD.dim() != 2 or x_TD.dtype not in DTYPES or x_TD.device != peers.device:
        raise ValueError(f"p2p: x is {x_TD.dtype} of shape {tuple(x_TD.shape)} on {x_TD.device}, must be "
                         f"[T, D] of float32, bfloat16 or float16 on {peers.device}")
    T, D = x_TD.shape
    if (weight_TK.dim() != 2 or weight_TK.shape[0] != T or weight_TK.dtype not in DTYPES
            or weight_TK.device != peers.device or not 1 <= weight_TK.shape[1] <= 1024):
        raise ValueError(f"p2p: weight is {weight_TK.dtype} of shape {tuple(weight_TK.shape)}, must be "
                         f"[{T}, K] of a float dtype up to float32 on {peers.device}, K at most 1024")
    if expert_TK.dtype != torch.int32:
        raise ValueError(f"p2p: expert is {expert_TK.dtype}, must be int32")
    if expert_TK.shape != weight_TK.shape or expert_TK.device != peers.device:
        raise ValueError(f"p2p: expert is of shape {tuple(expert_TK.shape)} on {expert_TK.device}, must be "
                         f"of weight's shape {tuple(weight_TK.shape)} on {peers.device}")
    if experts < 1 or experts % peers.ep or w_up.shape[0] * peers.ep != experts:
        raise ValueError(f"p2p: experts is {experts}, must be {peers.ep} ranks times the {w_up.shape[0]} "
                         "of w_up")
    if D < 1 or w_up.shape[-1] != D or w_down.shape[1] != D:
        raise ValueError(f"p2p: x has width {D}, w_up {w_up.shape[-1]}, w_down {w_down.shape[1]}")
    for name, w in zip(("w_up", "w_down", "b_up", "b_down"), weights, strict=True):
        if w is not None and (w.dtype != x_TD.dtype or w.device != x_TD.device):
            raise ValueError(f"p2p: {name} is {w.dtype} on {w.device}, must be as x: {x_TD.dtype} on "
                             f"{x_TD.device}")
