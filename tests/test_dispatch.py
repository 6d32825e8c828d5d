"""dispatch_layout against its definition, exactly; csrc/ops/dispatch.h."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lina import ops, reference

import helpers

SAID = torch.tensor([3, 3, 2**40, -7])
SHAPES = [  # T, K, E, ep, me, forward, backward
    (0, 2, 4, 2, 0, 1, 0),  # empty
    (0, 2, 4, 2, 1, 3, 8),  # empty, two directions
    (1, 1, 1, 1, 0, 1, 0),  # smallest; nothing can travel
    (1, 1, 4, 2, 1, 8, 1),  # fewer tokens than chunks
    (5, 3, 6, 3, 2, 8, 7),  # chunks of one token and of none, within one warp
    (6, 2, 4, 2, 0, 2, 2),  # own and other rows apart; equal degrees need no second table
    (37, 8, 64, 8, 3, 5, 3),  # chunks begin in the middle of a warp
    (37, 2, 64, 64, 63, 4, 0),  # more ranks than a token has experts: K bounds the rows
    (257, 8, 16, 2, 0, 3, 1),  # several pairs of a token on one rank; a tile of one token more
    (4097, 8, 128, 8, 7, 1, 3),  # several tiles, the last one short; the middle splits one
    (6000, 3, 12, 4, 1, 8, 6),  # several tiles in each of several chunks
    (6000, 2, 12, 4, -1, 1, 0),  # no row stays
    (70, 40, 2048, 1024, 5, 4, 3),  # ep at its limit: fewer warps for each block
    (300, 1024, 2048, 96, 0, 3, 8),  # K at its limit; a number of ranks no power of two
    (70001, 2, 10, 5, 4, 4, 1),  # many tokens: larger blocks
]


def ids(T, K, E, low=0, high=None, device="cpu"):
    return torch.randint(
        low, E if high is None else high, (T, K), generator=helpers.generator(T + K + E), dtype=torch.int32
    ).to(device)


def assert_laid_out(expert, *numbers):
    got, want = ops.dispatch_layout(expert, SAID, *numbers), reference.dispatch_layout(expert, SAID, *numbers)
    for a, b, field in zip(got, want, got._fields, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), field


@pytest.mark.parametrize("T,K,E,ep,me,forward,backward", SHAPES)
def test_matches_reference(device, T, K, E, ep, me, forward, backward):
    E -= E % ep
    assert_laid_out(ids(T, K, E, device=device), E, ep, me, forward, backward)


@pytest.mark.parametrize("T,K,E,ep,me,forward,backward", SHAPES)
def test_absent_pairs_get_no_row(device, T, K, E, ep, me, forward, backward):
    E -= E % ep
    numbers = (E, ep, me, forward, backward)
    assert_laid_out(ids(T, K, E, -2, E + 2, device), *numbers)
    assert_laid_out(torch.full((T, K), -1, dtype=torch.int32, device=device), *numbers)
    far = torch.tensor([[-(2**31), 2**31 - 1, 0, E, E - 1]], dtype=torch.int32, device=device)
    assert_laid_out(far, *numbers)


@pytest.mark.parametrize("me", [0, 1, -1])
@pytest.mark.parametrize("expert", [0, 6])
def test_one_rank_takes_all(device, expert, me):
    assert_laid_out(torch.full((5000, 2), expert, dtype=torch.int32, device=device), 8, 2, me, 6, 3)


@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_random(T, K, ep, local, data):
    E = ep * local
    values = data.draw(st.lists(st.integers(-2, E + 1), min_size=T * K, max_size=T * K))
    numbers = data.draw(st.tuples(st.integers(-1, ep - 1), st.integers(1, 8), st.integers(0, 8)))
    assert_laid_out(torch.tensor(values, dtype=torch.int32).view(T, K), E, ep, *numbers)


def test_one_direction_by_hand():
    """Tokens 0 to 4 of rank 1 of 3, one expert a rank, in two chunks: 0 to 2, 3 and 4."""
    expert = torch.tensor([[0, 2], [1, 1], [2, 0], [2, 5], [1, 2]], dtype=torch.int32)
    got = ops.dispatch_layout(expert, SAID, 3, 3, 1, 4)
    assert got.token_R.tolist() == [0, 2, 0, 2, 3, 4, -1, -1, -1, -1]
    assert got.row_TR.tolist() == [[0, -1, 2], [-1, 7, -1], [1, -1, 3], [-1, -1, 4], [-1, 10, 5]]
    rest = [0] * 12
    assert got.header.tolist() == [
        [*SAID.tolist(), 2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, *rest],
        [*SAID.tolist(), 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, *rest],  # own tokens 0 to 2, 3 and 4
        [*SAID.tolist(), 2, 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, *rest],
    ]
    assert got.token_back_R.shape == (0,) and got.row_back_TR.shape == (0, 3)


@pytest.mark.parametrize("facts", [0, 16])
def test_numbers_said(device, facts):
    said = torch.arange(facts) - 2**62
    header = ops.dispatch_layout(ids(9, 2, 4, device=device), said, 4, 2, 0, 1).header.cpu()
    assert header.shape == (2, facts + 2 * ops.COLUMNS) and (header[:, :facts] == said).all()


def test_strided_input(device):
    expert, numbers = ids(50, 4, 9, -1, 10, device), (9, 3, 2, 4, 3)
    want = ops.dispatch_layout(expert, SAID, *numbers)
    wide, said = torch.zeros(50, 8, dtype=torch.int32, device=device), SAID.repeat_interleave(2)[::2]
    wide[:, ::2] = expert
    for same in (wide[:, ::2], expert.t().contiguous().t()):
        got = ops.dispatch_layout(same, said, *numbers)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bitwise_repeatable(device):
    expert = ids(9000, 8, 64, device=device)
    helpers.assert_repeatable(lambda: ops.dispatch_layout(expert, SAID, 64, 8, 3, 5, 3))


@pytest.mark.parametrize("numbers", [(6, 3, 2, 4, 3), (6, 3, -1, 1, 0), (6, 3, 0, 3, 3)])
def test_opcheck(device, numbers):
    torch.library.opcheck(torch.ops.lina.dispatch_layout.default,
                          (ids(7, 3, 6, device=device), SAID, *numbers), test_utils=helpers.OPCHECKS)


X = torch.zeros(4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    "args,text",
    [
        ((X.long(), SAID, 4, 2, 0, 1, 1), "expert is of int64"),
        ((X[0], SAID, 4, 2, 0, 1, 1), "expert has 1 dimensions"),
        ((X[:, :0], SAID, 4, 2, 0, 1, 1), r"expert.shape\[1\]=0, limit 1..1024"),
        ((torch.zeros(1, 1025).int(), SAID, 4, 2, 0, 1, 1), r"expert.shape\[1\]=1025"),
        ((X[:1].expand(2**30, 2), SAID, 4, 2, 0, 1, 1), r"T=1073741824 rows, T \* max\(K, ep\)"),
        ((X[:1].expand(2**21, 2), SAID, 1024, 1024, 0, 1, 1), "at most 2"),
        ((X, SAID.int(), 4, 2, 0, 1, 1), "said is of int32"),
        ((X, SAID[None], 4, 2, 0, 1, 1), "said has 2 dimensions"),
        ((X, torch.zeros(17).long(), 4, 2, 0, 1, 1), r"said.shape\[0\]=17, limit 0..16"),
        ((X, SAID, 0, 2, 0, 1, 1), "experts=0, limit 1"),
        ((X, SAID, 2**31, 2, 0, 1, 1), "experts=2147483648"),
        ((X, SAID, 5, 2, 0, 1, 1), "experts=5, must be a multiple of ep=2"),
        ((X, SAID, 4, 0, 0, 1, 1), "ep=0, limit 1..1024"),
        ((X, SAID, 1025, 1025, 0, 1, 1), "ep=1025"),
        ((X, SAID, 4, 2, 2, 1, 1), "me=2, limit -1..1"),
        ((X, SAID, 4, 2, -2, 1, 1), "me=-2"),
        ((X, SAID, 4, 2, 0, 0, 1), "forward=0, limit 1..8"),
        ((X, SAID, 4, 2, 0, 9, 1), "forward=9"),
        ((X, SAID, 4, 2, 0, 1, -1), "backward=-1, limit 0..8"),
        ((X, SAID, 4, 2, 0, 1, 9), "backward=9"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(args, text):
    with pytest.raises(RuntimeError, match="dispatch_layout: .*" + text):
        ops.dispatch_layout(*args)


@pytest.mark.gpu
def test_said_is_on_the_host():
    with pytest.raises(RuntimeError, match="dispatch_layout: said is not on the CPU"):
        ops.dispatch_layout(X.cuda(), SAID.cuda(), 4, 2, 0, 1)


@pytest.mark.gpu
def test_side_stream():
    expert = ids(9000, 8, 64, device="cuda")
    want = ops.dispatch_layout(expert, SAID, 64, 8, 3, 5, 3)
    got = helpers.on_side_stream(lambda: ops.dispatch_layout(expert, SAID, 64, 8, 3, 5, 3))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_cuda_graph():
    expert, other = ids(900, 8, 64, device="cuda"), ids(900, 8, 64, 20, 70, device="cuda")
    got = helpers.replayed(lambda: ops.dispatch_layout(expert, SAID, 64, 8, 3, 5, 3), [expert], [other])
    want = ops.dispatch_layout(other, SAID, 64, 8, 3, 5, 3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
