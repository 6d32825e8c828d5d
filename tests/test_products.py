"""Experts large enough for the CPU's other product, oneDNN's, where csrc/tensor_product.c takes it."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_repeatable
from moe_case import Case, tensors

# Rows of each expert: filled up (100 to 112), too few for oneDNN (31), just enough of them, which
# the up projection alone makes use of (33), none, and full already (64).
ROWS = (100, 31, 33, 0, 64)


def large(**options) -> Case:
    expert = torch.repeat_interleave(torch.arange(5, dtype=torch.int32), torch.tensor(ROWS))
    mixed = expert[torch.randperm(len(expert), generator=torch.Generator().manual_seed(1))]
    return Case(sum(ROWS), 112, 144, 5, 1, expert=mixed[:, None], **options)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_large_experts(transposed, bias):
    case = large(transposed=transposed, bias=bias)
    case.check()
    case.check(case.run_parts())


def test_large_experts_not_gated():
    large(activation="gelu").check()


def test_repeatable():
    case = large()
    assert_repeatable(lambda: tensors(case))
