"""Token-expert pairs in order of their expert. Contract: csrc/ops/sort.h.

T tokens, K experts for each, E experts, N = T*K pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_EXPERTS = MAX_TOP_K = 1024
MAX_PAIRS = 2**31 - 1


class Rows(NamedTuple):
    """Where each pair p = t*K + k lies once pairs are ordered by expert, then by p. All int32.

    Attributes:
        offset_E1: [E+1], rows of expert e are offset_E1[e] to offset_E1[e+1].
        row_pair_N: [N], the pair of each row; -1 from offset_E1[E] on.
        pair_row_TK: [T, K], the row of each pair; -1 where the id is not in [0, E).
    """

    offset_E1: Tensor
    row_pair_N: Tensor
    pair_row_TK: Tensor


def sort(expert_TK: Tensor, experts: int) -> Rows:
    """Orders token-expert pairs by expert: a stable counting sort without a host read.

    Args:
        expert_TK: [T, K] ids, int32 (int64 is converted). Ids outside [0, experts) mark absent pairs,
            which get no row. 1 <= K <= 1024, T*K < 2^31.
        experts: E, 1 to 1024.

    Raises:
        TypeError: ids of another dtype, or ``experts`` not an int.
        ValueError: an argument outside its limits.
    """
    check_ids("sort", expert_TK)
    if not isinstance(experts, (int, torch.SymInt)):
        raise TypeError(f"sort: experts is a {type(experts).__name__}, must be an int")
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"sort: experts={experts}, limit 1..{MAX_EXPERTS}")
    if expert_TK.dtype == torch.int64:
        expert_TK = expert_TK.clamp(-1, experts).int()  # ids beyond int32 must not wrap into range
    return Rows(*torch.ops.lina.sort(expert_TK, experts))


def check_ids(op: str, expert_TK: Tensor) -> None:
    """Raises what ``sort`` documents of its ids."""
    if not isinstance(expert_TK, Tensor):
        raise TypeError(f"{op}: expert_TK is a {type(expert_TK).__name__}, must be a Tensor")
    if expert_TK.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: expert_TK is of {expert_TK.dtype}, must be int32 or int64")
    if expert_TK.dim() != 2:
        raise ValueError(f"{op}: expert_TK has {expert_TK.dim()} dimensions, must have 2: tokens, choices")
    if not 1 <= expert_TK.shape[1] <= MAX_TOP_K:
        raise ValueError(f"{op}: expert_TK has {expert_TK.shape[1]} columns, limit 1..{MAX_TOP_K}")
    if expert_TK.shape[0] > MAX_PAIRS // expert_TK.shape[1]:
        raise ValueError(
            f"{op}: expert_TK has {expert_TK.shape[0]} * {expert_TK.shape[1]} pairs, limit {MAX_PAIRS}"
        )


@torch.library.register_fake("lina::sort")
def _fake_sort(expert, experts):
    T, K = expert.shape
    return expert.new_empty(experts + 1), expert.new_empty(T * K), expert.new_empty((T, K))
