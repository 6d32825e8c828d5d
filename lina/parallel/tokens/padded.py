"""Tokens to the ranks of their experts and back inside a CUDA graph, over any carrier of counted bytes.

A graph replays the sizes that it was captured with, while the numbers of rows change. So each rank sends
C rows to every rank, C the most tokens that any rank has: token t in row t, whether or not one of its
experts is there. Nothing is read by the host, the layer runs in one pass, and ep / (copies a token) times
as much travels as is needed: for decode's few tokens that costs little.

The ranks agree on C through their store while they capture, and never again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lina import ops
from lina.parallel.mesh import seconds_of
from lina.parallel.tokens.dispatch import Route, collect, send
from lina.parallel.tokens.header import check, facts
from lina.parallel.transport.base import Transport
from lina.parallel.transport.rounds import Rounds

_rounds: WeakIdKeyDictionary = WeakIdKeyDictionary()      # process group -> its rounds


def capturing(x_TD: Tensor) -> bool:
    """Whether what is launched for ``x_TD`` now goes into a CUDA graph."""
    return x_TD.is_cuda and torch.cuda.is_current_stream_capturing()


def moe(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor, w_down: Tensor, *, experts: int,
        carrier: Transport, **options: Any) -> Tensor:
    """As spread.moe, whose arguments have been checked; collective over ``carrier.group``.

    Raises:
        ValueError: ranks that disagree on D, K, dtypes, experts or need of gradients; on every rank.
        RuntimeError: a rank does not capture, or not the same layer, within the group's timeout.
    """
    group, T = carrier.group, x_TD.shape[0]
    given = (x_TD, weight_TK, w_up, w_down, options.get("b_up"), options.get("b_down"))
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in given]
    said = facts((1, 1), x_TD, weight_TK, experts, (needs[0], needs[1], any(needs[2:])))
    C = _agree(group, T, said)
    x_CD, weight_CK = (F.pad(t, (0, 0, 0, C - T)) for t in (x_TD, weight_TK))
    expert_CK = F.pad(expert_TK, (0, 0, 0, C - T), value=-1)
    route = _route(expert_CK, experts, carrier)
    x_RD, weight_RK, expert_RK = send(x_CD, weight_CK, expert_CK, experts, route)
    return collect(ops.moe(x_RD, weight_RK, expert_RK, w_up, w_down, **options), route)[:T]


def _agree(group: dist.ProcessGroup, T: int, said: tuple[int, ...]) -> int:
    """The most tokens of any rank; every rank's ``said`` is the same (header.py)."""
    if group not in _rounds:
        _rounds[group] = Rounds("capture", group, "captures", seconds_of(group))
    everyone = _rounds[group].gather("layers", [T, said])
    check([theirs for _, theirs in everyone])
    return max(1, *(tokens for tokens, _ in everyone))


@torch.no_grad()
def _route(expert_CK: Tensor, experts: int, carrier: Transport) -> Route:
    C, ep = expert_CK.shape[0], carrier.group.size()
    ranks_R, tokens_C = (torch.arange(n, dtype=torch.int32, device=expert_CK.device) for n in (ep, C))
    present_CK = (expert_CK >= 0) & (expert_CK < experts)
    rank_CK = torch.where(present_CK, expert_CK // (experts // ep), -1)
    hit_CR = (rank_CK[:, :, None] == ranks_R).any(1)
    row_CR = torch.where(hit_CR, ranks_R * C + tokens_C[:, None], -1)
    return Route(carrier.group, [C] * ep, [C] * ep, tokens_C.repeat(ep), row_CR, carrier)
