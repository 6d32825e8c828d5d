"""sort against its definition, exactly; csrc/ops/sort.h."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lina import ops, reference

import helpers

SHAPES = [
    (0, 2, 4),  # empty
    (1, 1, 1),  # smallest
    (5, 3, 3),  # K = E
    (37, 8, 128),  # most experts without rows
    (4097, 8, 60),  # several chunks, the last one short
    (40, 1024, 7),  # K at its limit, ids repeat within a token
    (129, 32, 1024),
]  # E at its limit


def ids(T, K, E, low=0, high=None, device="cpu"):
    return torch.randint(
        low, E if high is None else high, (T, K), generator=helpers.generator(T + K + E), dtype=torch.int32
    ).to(device)


def assert_sorted(expert, E):
    got, want = ops.sort(expert, E), reference.sort(expert, E)
    for a, b, field in zip(got, want, got._fields, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, b), field


@pytest.mark.parametrize("T,K,E", SHAPES)
def test_matches_reference(device, T, K, E):
    assert_sorted(ids(T, K, E, device=device), E)


@pytest.mark.parametrize("T,K,E", SHAPES)
def test_absent_pairs_get_no_row(device, T, K, E):
    """Ids of -1, E and beyond: expert parallelism marks foreign experts so."""
    assert_sorted(ids(T, K, E, -2, E + 2, device), E)
    assert_sorted(torch.full((T, K), -1, dtype=torch.int32, device=device), E)
    far = torch.tensor([[-(2**31), 2**31 - 1, 0, E, E - 1]], dtype=torch.int32, device=device)
    assert_sorted(far, E)


@pytest.mark.parametrize("expert", [0, 6])
def test_one_expert_takes_all(device, expert):
    assert_sorted(torch.full((9000, 2), expert, dtype=torch.int32, device=device), 7)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random(T, K, E, data):
    values = data.draw(st.lists(st.integers(-2, E + 1), min_size=T * K, max_size=T * K))
    assert_sorted(torch.tensor(values, dtype=torch.int32).view(T, K), E)


def test_rows_invert_each_other(device):
    expert = ids(300, 6, 32, device=device)
    rows = ops.sort(expert, 32)
    pairs = torch.arange(1800, dtype=torch.int32, device=device)
    assert torch.equal(rows.row_pair_N[rows.pair_row_TK.flatten().long()], pairs)
    ordered = expert.flatten()[rows.row_pair_N.long()]
    assert (ordered.diff() >= 0).all()
    assert (rows.row_pair_N.diff()[ordered.diff() == 0] > 0).all()  # stable


def test_strided_and_int64_input(device):
    expert = ids(50, 4, 9, -1, 10, device)
    want = ops.sort(expert, 9)
    wide = torch.zeros(50, 8, dtype=torch.int32, device=device)
    wide[:, ::2] = expert
    for same in (wide[:, ::2], expert.t().contiguous().t(), expert.long()):
        assert all(torch.equal(a, b) for a, b in zip(ops.sort(same, 9), want, strict=True))
    huge = torch.tensor([[2**32, -(2**32), 2**33 + 1, 0]], device=device)  # must not wrap into range
    assert ops.sort(huge, 4).pair_row_TK.tolist() == [[-1, -1, -1, 0]]


def test_bitwise_repeatable(device):
    expert = ids(9000, 8, 64, device=device)
    helpers.assert_repeatable(lambda: ops.sort(expert, 64))


def test_opcheck(device):
    torch.library.opcheck(
        torch.ops.lina.sort.default, (ids(7, 3, 5, device=device), 5), test_utils=helpers.OPCHECKS
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda e: ops.sort(e, 9), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (12, 31) if dynamic else (12,):
        expert = ids(T, 4, 9, device=device)
        assert all(torch.equal(a, b) for a, b in zip(compiled(expert), ops.sort(expert, 9), strict=True))


X = torch.zeros(4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    "args,kind,text",
    [
        (([[0]], 4), TypeError, "expert_TK is a list"),
        ((X.float(), 4), TypeError, "expert_TK is of torch.float32"),
        ((X, 4.0), TypeError, "experts is a float"),
        ((X, 0), ValueError, "experts=0, limit 1..1024"),
        ((X, 1025), ValueError, "experts=1025, limit 1..1024"),
        ((X[0], 4), ValueError, "expert_TK has 1 dimensions"),
        ((X[:, :0], 4), ValueError, "expert_TK has 0 columns"),
        ((torch.zeros(1, 1025).int(), 4), ValueError, "expert_TK has 1025 columns"),
        ((torch.empty(2**30, 2, dtype=torch.int32, device="meta"), 4), ValueError, "limit 2147483647"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(args, kind, text):
    with pytest.raises(kind, match="^sort: .*" + text):
        ops.sort(*args)


@pytest.mark.parametrize(
    "args,text",
    [
        ((X.long(), 4), "expert is of int64"),
        ((X[0], 4), "dimensions"),
        ((X, 0), "experts=0"),
        ((X, 1025), "experts=1025"),
        ((X[:, :0], 4), "K=0"),
        ((torch.zeros(1, 1025).int(), 4), "K=1025"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_raw_operator_checks_for_itself(args, text):
    with pytest.raises(RuntimeError, match="sort: .*" + text):
        torch.ops.lina.sort(*args)


@pytest.mark.gpu
def test_side_stream():
    expert = ids(9000, 8, 64, device="cuda")
    want = ops.sort(expert, 64)
    assert all(
        torch.equal(a, b)
        for a, b in zip(helpers.on_side_stream(lambda: ops.sort(expert, 64)), want, strict=True)
    )


@pytest.mark.gpu
def test_cuda_graph():
    expert, other = ids(900, 8, 64, device="cuda"), ids(900, 8, 64, 20, 70, device="cuda")
    got = helpers.replayed(lambda: ops.sort(expert, 64), [expert], [other])
    assert all(torch.equal(a, b) for a, b in zip(got, ops.sort(other, 64), strict=True))
