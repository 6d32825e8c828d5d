"""Who gets which token of a layer whose experts are spread over ranks. Contract: csrc/ops/dispatch.h.

T tokens, K experts for each, ep ranks, S rows that travel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_RANKS = 1024
MAX_DEGREE = 8
CHUNKS = MAX_DEGREE - 2                # the most there are
COLUMNS = 2 * CHUNKS                   # of one direction: rows, then pairs, by chunk


class Dispatch(NamedTuple):
    """Tables of both directions, and what is told of them; on the device of the ids.

    Attributes:
        token_R: [R] int32, the token of each row that travels, by chunk, rank, token; -1 from S on.
        row_TR: [T, ep] int32, the row of each token for each rank, -1: none; in this rank's own column
            S + t, where one of its experts takes token t.
        token_back_R, row_back_TR: the same of the backward's degree; empty if there is none or it is
            forward's.
        header: [ep, facts + 2 * COLUMNS] int64, a line for each rank: the facts; columns forward; columns
            backward. This rank's own line has no rows, and pairs by range of its own tokens.
    """

    token_R: Tensor
    row_TR: Tensor
    token_back_R: Tensor
    row_back_TR: Tensor
    header: Tensor


def dispatch_layout(expert_TK: Tensor, said: Tensor, experts: int, ep: int, me: int, forward: int,
                    backward: int = 0) -> Dispatch:
    """The tables by which tokens travel to their experts, without a host read.

    Args:
        expert_TK: [T, K] int32, global ids; ids outside [0, experts) are absent pairs.
        said: [facts] int64 on the CPU, up to 16 numbers that begin every line of the header.
        experts: a multiple of ``ep``; rank r holds the r-th part of them.
        ep, me: the number of ranks, up to 1024, and this one, whose own rows stay; -1: no row stays.
        forward, backward: degrees, 1 to 8; backward 0: none. T * K and T * ep are below 2^31.

    Raises:
        RuntimeError: an argument outside its limits, or of another dtype or device.
    """
    return Dispatch(*torch.ops.lina.dispatch_layout(expert_TK, said, experts, ep, me, forward, backward))


@torch.library.register_fake("lina::dispatch_layout")
def _fake(expert, said, experts, ep, me, forward, backward):
    T, K = expert.shape
    two = backward not in (0, forward)
    wide = T * min(K, ep - (me >= 0))
    return (expert.new_empty(wide), expert.new_empty((T, ep)),
            expert.new_empty(wide if two else 0), expert.new_empty((T if two else 0, ep)),
            expert.new_empty((ep, said.shape[0] + 2 * COLUMNS), dtype=torch.int64))
