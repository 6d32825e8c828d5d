"""Tokens to the ranks of their experts and back by stores into peers' memory, inside one NVLink domain.

T tokens here, K experts for each, D width, ep ranks, C the most tokens that any rank may have, L experts
here. The result is that of ``dispatch``, ``ops.moe`` and ``collect``; but counts never leave the
devices: no host read, no padding sent, and a layer can be captured in a CUDA graph. What arrives is
[ep * C, D], by sending rank; rows that nobody sent have expert ids -1, for which nothing is computed.

Contract of the kernels, and why the buffers can be used again: csrc/cuda/peers.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lina import ops
from lina.parallel.tokens.dispatch import eagerly
from lina.parallel.tokens.round import DTYPES, Round
from lina.parallel.transport.peers import Peers


def moe(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor, w_down: Tensor, *, experts: int,
        peers: Peers, b_up: Tensor | None = None, b_down: Tensor | None = None, tokens: int | None = None,
        activation: str = "swiglu", interleaved: bool = False, alpha: float = 1.702,
        limit: float = 7.0) -> Tensor:
    """``out[t] = sum over k of weight[t, k] * expert_TK[t, k]``'s output, experts spread over ``peers``.

    Every rank of the group calls it, with any number of tokens. If gradients are wanted, every rank's
    output must enter a loss. One autograd node; differentiable once in x, weight_TK, weights and biases.
    Rows travel, and are rounded, as in :func:`dispatch` and :func:`collect`.

    Args:
        x_TD: [T, D] float32, bfloat16 or float16 on the peers' device; cast to the autocast dtype if on.
        weight_TK: [T, K] of a float dtype up to float32.  expert_TK: [T, K] int32, ids in [0, experts);
            others are absent pairs.
        w_up, w_down, b_up, b_down: this rank's experts / ep; they and the other options as in ``ops.moe``.
        experts: E, of all ranks.  tokens: the most that any rank has in calls like this one, equal on all
            ranks, instead of ``peers.tokens``: so decode's few cost less than prefill's many.

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
    _check(x_TD, weight_TK, expert_TK, (w_up, w_down, b_up, b_down), experts, peers)
    if activation not in ops.ACTIVATIONS:
        raise ValueError(f"p2p: activation is {activation!r}, must be one of {', '.join(ops.ACTIVATIONS)}")
    options = ops.ACTIVATIONS[activation], bool(interleaved), float(alpha), float(limit)
    call: Callable = eagerly(_moe)
    weights = w_up, w_down, b_up, b_down
    return call(x_TD, weight_TK.float(), expert_TK, weights, experts, peers, tokens, options)


def _moe(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, weights: tuple, experts: int, peers: Peers,
         tokens: int | None, options: tuple) -> Tensor:
    given = (x_TD, weight_TK, *weights)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    (T, D), K = x_TD.shape, weight_TK.shape[1]
    layer = peers.layer(T, D, K, experts, x_TD.dtype, grad, tokens)
    call = Round(peers, layer, T, D, K, experts, x_TD.dtype, grad)
    return _Moe.apply(x_TD, weight_TK, expert_TK, *weights, call, options, grad)


class _Moe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor, w_down: Tensor,
                b_up: Tensor | None, b_down: Tensor | None, call: Round, options: tuple,
                grad: bool) -> Tensor:
        R, ep = call.peers.ep * call.layer.C, call.peers.ep
        try:                   # from the first allocation on: peers must not wait for a rank without memory
            x_TD, weight_TK, expert_TK = x_TD.contiguous(), weight_TK.contiguous(), expert_TK.contiguous()
            slot_TR, count = expert_TK.new_empty(call.T, ep), expert_TK.new_empty(2, ep)
            weight_RK, expert_RK = weight_TK.new_empty(R, call.K), expert_TK.new_empty(R, call.K)
            x_RD = x_TD.new_empty(R, call.D) if grad else None
            call.dispatch("p2p dispatch", x_TD, expert_TK, weight_TK, slot_TR, count, x_RD, weight_RK,
                          expert_RK)
            rows = torch.ops.lina.sort(expert_RK, w_up.shape[0])
            here = call.peers.rows(call.layer, call.D, call.dtype) if x_RD is None else x_RD
            y_ND, h_NU = torch.ops.lina.experts_fwd(here, *rows[:2], w_up, b_up, w_down, b_down, call.K,
                                                    *options, grad)
            out_TD = call.collect("p2p collect", y_ND, rows[2], weight_RK, None, slot_TR, count, expert_TK,
                                  None)
        except BaseException:
            call.peers.stop()
            raise
        if grad:
            ctx.save_for_backward(expert_TK, slot_TR, count, weight_RK, x_RD, h_NU, *rows, w_up, w_down,
                                  b_down)
            ctx.call, ctx.options = call, options
        return out_TD

    @staticmethod
    @ops.once
    def backward(ctx: Any, saved: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        expert_TK, slot_TR, count, weight_RK, *more = saved
        call, need = ctx.call, ctx.needs_input_grad
        # x's and the weights' gradients are computed in any case: a peer may need its tokens'
        mask = 3 | sum(1 << bit for bit, i in ((2, 3), (3, 5), (4, 4), (5, 6)) if need[i])
        try:
            dout_TD = dout_TD.contiguous()
            call.dispatch("p2p dispatch backward", dout_TD, None, None, slot_TR, count, None, None, None)
            dout_RD = call.peers.rows(call.layer, call.D, call.dtype)
            dx_RD, dweight_RK, dw_up, db_up, dw_down, db_down = torch.ops.lina.experts_bwd(
                dout_RD, weight_RK, *more, *ctx.options, mask)
            dweight_TK = weight_RK.new_empty(call.T, call.K)
            dx_TD = call.collect("p2p collect backward", dx_RD, None, None, dweight_RK, slot_TR, count,
                                 expert_TK, dweight_TK)
        except BaseException:
            call.peers.stop()
            raise
        found = (dx_TD, dweight_TK, None, dw_up, dw_down, db_up, db_down, None, None, None)
        return tuple(g if n else None for g, n in zip(found, need, strict=True))


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
