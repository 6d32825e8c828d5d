"""combine against the reference: bounds, absent pairs, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lina import ops, reference

from bounds import assert_bounded, exact
from helpers import (
    OPCHECKS,
    acc_dtype,
    assert_no_double_backward,
    assert_no_forward_mode,
    assert_repeatable,
    float_dtypes,
    generator,
    on_side_stream,
    random_experts,
    replayed,
    strided,
    twin_inputs,
)


def check(y, y_ref, weight, weight_ref, expert, E):
    """Result and gradients lie within their rounding of float64's."""
    rows, ref_rows = ops.sort(expert, E), reference.sort(expert.cpu(), E)
    out, truth = ops.combine(y, rows, weight), reference.combine(y_ref, ref_rows, weight_ref)
    acc = torch.finfo(acc_dtype(y.dtype)).eps
    K, D = expert.shape[1], y.shape[1]
    dout = torch.randn(out.shape, generator=generator(5)).bfloat16()
    leaves, ref_leaves = [y], [y_ref]
    if weight is not None:
        leaves, ref_leaves = [y, weight], [y_ref, weight_ref]
    got = torch.autograd.grad(out, leaves, dout.to(device=y.device, dtype=y.dtype))
    want = [torch.zeros_like(t) for t in ref_leaves]  # of no tokens, the reference depends on nothing
    if truth.numel():
        want = torch.autograd.grad(truth, ref_leaves, dout.double())

    present = (ref_rows.pair_row_TK >= 0).double()[..., None]
    wide = (
        y_ref.detach()[ref_rows.pair_row_TK.clamp(min=0).long()]
        if y.shape[0]
        else torch.zeros(0, K, D).double()
    )
    w = present if weight is None else present * weight_ref.detach()[..., None]
    bound = (exact(torch.where(present > 0, wide, 0)) * exact(w)).total(1, acc).stored(y.dtype)
    assert_bounded(out, bound, truth, "out")
    assert got[0].dtype == y.dtype
    assert_bounded(got[0], exact(want[0]).stored(y.dtype), want[0], "dy")
    if weight is not None:
        dots = (exact(dout.double()[:, None]) * exact(wide)).total(2, acc)
        dots.value[present[..., 0] == 0], dots.error[present[..., 0] == 0] = 0, 0
        assert_bounded(got[1], dots.rounded(acc), want[1], "dweight")


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize(
    "T, D, E, K",
    [
        (0, 8, 4, 2),  # empty
        (1, 1, 1, 1),  # the smallest
        (9, 7, 5, 5),  # K = E, an odd width
        (33, 264, 8, 3),  # wider than a piece of 256 values
        (2, 16, 40, 33),
    ],
)  # many rows a token
def test_matches_reference(device, T, D, E, K, weighted):
    for dtype in float_dtypes(device):
        y, y_ref = twin_inputs((T * K, D), dtype, device)
        weight, weight_ref = twin_inputs((T, K), acc_dtype(dtype), device, seed=1)
        y_ref, weight_ref = (t.detach().cpu().requires_grad_() for t in (y_ref, weight_ref))
        check(
            y,
            y_ref,
            weight if weighted else None,
            weight_ref if weighted else None,
            random_experts(T, E, K, device=device),
            E,
        )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_random_shapes_with_absent_pairs(T, D, E, K, seed):
    expert = torch.randint(-1, E, (T, K), generator=generator(seed), dtype=torch.int32)
    y, y_ref = twin_inputs((T * K, D), torch.bfloat16, seed=seed)
    weight, weight_ref = twin_inputs((T, K), torch.float32, seed=seed + 1)
    check(y, y_ref, weight, weight_ref, expert, E)


def test_absent_rows_do_not_leak(device):
    """NaN in rows without a pair reaches nothing; their gradient is 0."""
    expert = torch.tensor([[0, -1], [-1, -1], [1, 0]], dtype=torch.int32, device=device)
    for dtype in float_dtypes(device):
        y, _ = twin_inputs((6, 8), dtype, device)
        weight, _ = twin_inputs((3, 2), acc_dtype(dtype), device)
        with torch.no_grad():
            y[3:] = float("nan")
            weight[expert < 0] = float("nan")
        out = ops.combine(y, ops.sort(expert, 2), weight)
        dy, dweight = torch.autograd.grad(out.double().sum(), (y, weight))
        assert out.isfinite().all() and dy.isfinite().all() and dweight.isfinite().all()
        assert (out[1] == 0).all() and (dy[3:] == 0).all() and (dweight[expert < 0] == 0).all()


def inputs(device="cpu", dtype=torch.float32):
    expert = random_experts(9, 4, 2, device=device)
    y, weight = twin_inputs((18, 16), dtype, device)[0], twin_inputs((9, 2), torch.float32, device)[0]
    return y, ops.sort(expert, 4), weight


def test_strided_repeatable_double(device):
    y, rows, weight = inputs(device)
    assert torch.equal(ops.combine(strided(y), rows, strided(weight)), ops.combine(y, rows, weight))
    assert_repeatable(lambda: [ops.combine(y, rows, weight)])
    assert_no_double_backward(ops.combine(y, rows, weight), y)
    assert_no_forward_mode(lambda y: ops.combine(y, rows, weight.detach()), y)


def everything(y, rows, weight, dout=None):
    """The result and both gradients."""
    out = ops.combine(y, rows, weight)
    dout = torch.linspace(-2, 2, out.numel(), device=y.device).view_as(out) if dout is None else dout
    return out, *torch.autograd.grad(out, (y, weight), dout.to(out.dtype))  # no copy if it is so already


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_backward_repeatable_and_strided(device):
    y, rows, weight = inputs(device, torch.bfloat16)
    assert_repeatable(lambda: everything(y, rows, weight))
    dout = torch.randn(9, 16, generator=generator(2)).to(device=device, dtype=torch.bfloat16)
    want = everything(y, rows, weight, dout)
    column = dout[:, :1].expand(9, 16)  # every stride of the last dimension is 0
    for same in (strided(dout), dout.t().contiguous().t()):
        assert_same(everything(y, rows, weight, same), want)
    assert_same(everything(y, rows, weight, column), everything(y, rows, weight, column.contiguous()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(device, reentrant):
    y, rows, weight = inputs(device)
    want = everything(y, rows, weight)
    dout = torch.linspace(-2, 2, want[0].numel(), device=device).view_as(want[0])
    out = checkpoint(lambda y, w: ops.combine(y, rows, w), y, weight, use_reentrant=reentrant)
    out.backward(dout)
    assert_same((out, y.grad, weight.grad), want)


def test_limits(device):
    """K at its limit, with repeats; no width at all: the router's gradient is a sum of nothing."""
    expert = torch.randint(-1, 4, (2, 1024), generator=generator(1), dtype=torch.int32).to(device)
    y, y_ref = (t.detach().to(d).requires_grad_() for t, d in
                zip(twin_inputs((2048, 3), torch.float32), (device, "cpu"), strict=True))
    weight, weight_ref = (t.detach().to(d).requires_grad_() for t, d in
                          zip(twin_inputs((2, 1024), torch.float32, seed=1), (device, "cpu"), strict=True))
    check(y, y_ref, weight, weight_ref, expert, 4)
    poison = torch.full((18,), float("nan"), device=device)  # what the allocator hands out next
    del poison
    y, rows, weight = inputs(device)
    out, dy, dweight = everything(y.detach()[:, :0].requires_grad_(), rows, weight)
    assert out.shape == (9, 0) and dy.shape == (18, 0) and torch.equal(dweight, torch.zeros_like(weight))


def test_gradcheck():
    y, weight = twin_inputs((6, 3), torch.float64)[0], twin_inputs((3, 2), torch.float64, seed=1)[0]
    rows = ops.sort(torch.tensor([[0, 1], [1, -1], [0, 0]], dtype=torch.int32), 2)
    assert torch.autograd.gradcheck(lambda y, w: ops.combine(y, rows, w), (y, weight))
    assert torch.autograd.gradcheck(lambda y: ops.combine(y, rows), (y,))


def test_opcheck_and_compile(device):
    y, rows, weight = inputs(device, torch.bfloat16)
    for w in (None, weight.detach()):
        torch.library.opcheck(
            torch.ops.lina.combine_fwd, (y.detach(), w, rows.pair_row_TK), test_utils=OPCHECKS
        )
        torch.library.opcheck(
            torch.ops.lina.combine_bwd,
            (
                torch.ones(9, 16, dtype=torch.bfloat16, device=device),
                y.detach(),
                w,
                rows.pair_row_TK,
                rows.row_pair_N,
            ),
            test_utils=OPCHECKS,
        )
    compiled = torch.compile(lambda y, w: ops.combine(y, rows, w), fullgraph=True, backend="aot_eager")
    got, want = compiled(y, weight), ops.combine(y, rows, weight)
    assert torch.equal(got, want)
    for g, r in zip(
        torch.autograd.grad(got.float().sum(), (y, weight)),
        torch.autograd.grad(want.float().sum(), (y, weight)),
        strict=True,
    ):
        assert torch.equal(g, r)


@pytest.mark.gpu
def test_side_stream():
    y, rows, weight = inputs("cuda", torch.bfloat16)
    want = ops.combine(y, rows, weight)
    (got,) = on_side_stream(lambda: [ops.combine(y, rows, weight)])
    assert torch.equal(got, want)
    assert_same(on_side_stream(lambda: everything(y, rows, weight)), everything(y, rows, weight))


@pytest.mark.gpu
def test_cuda_graph():
    y, rows, weight = inputs("cuda", torch.bfloat16)
    values = [torch.randn_like(t) for t in (y, weight)]
    other = ops.sort(random_experts(9, 4, 2, seed=3, device="cuda"), 4)
    dout = torch.randn(9, 16, device="cuda")
    got = replayed(lambda: everything(y, rows, weight, dout), [y, weight, *rows], [*values, *other])
    assert_same(got, everything(values[0].requires_grad_(), other, values[1].requires_grad_(), dout))


@pytest.mark.parametrize("field", ops.Rows._fields)
def test_rows_elsewhere(field):
    y, rows, weight = inputs()
    away = rows._replace(**{field: getattr(rows, field).to("meta")})
    with pytest.raises(ValueError, match=f"combine: rows.{field} lies on meta, must lie on cpu"):
        ops.combine(y, away, weight)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(y=1), TypeError, "combine: y_ND is a int"),
        (dict(y=torch.zeros(18, 16, dtype=torch.int32)), TypeError, "y_ND is of torch.int32"),
        (dict(y=torch.zeros(18)), ValueError, "y_ND has 1 dimensions"),
        (dict(y=torch.zeros(17, 16)), ValueError, "y_ND has 17 rows, the sorted pairs are 18"),
        (dict(weight=2.0), TypeError, "weight_TK is a float"),
        (dict(weight=torch.zeros(9, 3)), ValueError, r"weight_TK has shape \(9, 3\), must be \(9, 2\)"),
        (dict(weight=torch.zeros(9, 2).double()), TypeError, "weight_TK is of torch.float64"),
        (dict(weight=torch.zeros(9, 2, device="meta")), ValueError, "weight_TK lies on meta"),
    ],
)
def test_errors(change, error, text):
    y, rows, weight = inputs()
    args = {"y": y, "weight": weight, **change}
    with pytest.raises(error, match=text):
        ops.combine(args["y"], rows, args["weight"])


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "args, text",
    [
        ((torch.zeros(2, 4), None, index([0, 2])), r"pair_row\[1\] is 2, must be -1 to 1"),
        ((torch.zeros(2, 4), None, index([-2, 0])), r"pair_row\[0\] is -2"),
        ((torch.zeros(2, 4), None, index(0, 1)), "pair_row has 1 dimensions, must have 2"),
        ((torch.zeros(2, 4), None, index([0, 1]).long()), "pair_row is of int64, must be one of int32"),
        ((torch.zeros(2, 4), None, torch.zeros(1, 0, dtype=torch.int32)), r"\(K\) is 0, must be 1 to 1024"),
        (
            (torch.zeros(2, 4), None, torch.zeros(1, 1025, dtype=torch.int32)),
            r"\(K\) is 1025, must be 1 to 1024",
        ),
        ((torch.zeros(2, 4), torch.zeros(2, 2), index([0, 1])), r"weight.shape\[0\] is 2, must be 1"),
        ((torch.zeros(2, 4).bool(), None, index([0, 1])), "y is of another dtype, must be one of float32"),
        ((torch.zeros(3, 4), None, index([0, 1])), "y has 3 rows, must be at most the 2 pairs"),
        ((torch.zeros(2, 4), None, index([0]).expand(2**21, 1024)), "2147483648 elements, must be below 2"),
        ((torch.zeros(2, 4), None, index([0, 1]).to("meta")), "pair_row lies on meta, must lie on cpu"),
        ((torch.zeros(2, 4), torch.zeros(1, 2, device="meta"), index([0, 1])), "weight lies on meta"),
    ],
)
def test_raw_errors(args, text):
    with pytest.raises(RuntimeError, match=f"combine: .*{text}"):
        torch.ops.lina.combine_fwd(*args)


@pytest.mark.parametrize(
    "dout, row_pair, text",
    [
        (torch.zeros(2, 4), index(0, 1), r"dout.shape\[0\] is 2, must be 1"),
        (torch.zeros(1, 4).half(), index(0, 1), "dout is of float16, must be one of float32"),
        (torch.zeros(1, 4), index(0, 2), r"row_pair\[1\] is 2, must be -1 to 1"),
        (torch.zeros(1, 4), index(0), r"row_pair.shape\[0\] is 1, must be 2"),
        (torch.zeros(1, 4, device="meta"), index(0, 1), "dout lies on meta"),
        (torch.zeros(1, 4), index(0, 1).to("meta"), "row_pair lies on meta"),
    ],
)
def test_raw_backward_errors(dout, row_pair, text):
    with pytest.raises(RuntimeError, match=f"combine_bwd: {text}"):
        torch.ops.lina.combine_bwd(dout, torch.zeros(2, 4), None, index([0, 1]), row_pair)
