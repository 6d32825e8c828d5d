"""Errors of the raw experts operators: text, and no reference left behind."""

from __future__ import annotations

import pytest
import torch
from test_experts import OPTIONS, backward_args, forward_args, raw

from lina import ops

from moe_case import Case


def uses(t):
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata)


def assert_refused(op, names, good, change, text):
    """The error, and no reference left behind; a function in ``change`` is applied to the good argument."""
    good = dict(zip(names, good, strict=True))
    args = {**good, **{n: v(good[n]) if callable(v) else v for n, v in change.items()}}.values()
    held = [t for t in args if isinstance(t, torch.Tensor)]
    before = [uses(t) for t in held]
    with pytest.raises(RuntimeError, match=text):
        op(*args)
    assert [uses(t) for t in held] == before


FWD = (
    "x",
    "offset",
    "row_pair",
    "w_up",
    "b_up",
    "w_down",
    "b_down",
    "k",
    "activation",
    "interleaved",
    "alpha",
    "limit",
    "save",
)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(x=torch.zeros(6)), "experts: x has 1 dimensions, must have 2"),
        (dict(x=torch.zeros(6, 16, dtype=torch.int64)), "experts: x is of int64"),
        (dict(w_up=torch.zeros(4, 16, 16).half()), "experts: w_up is of float16, must be one of float32"),
        (dict(w_up=torch.zeros(4, 15, 16)), r"experts: w_up.shape\[1\] is 15, must be 16"),
        (dict(w_down=torch.zeros(4, 16, 0)), "F = 0, must be at least 1"),
        (dict(w_down=torch.zeros(3, 16, 8)), r"w_down.shape\[0\] is 3, must be 4"),
        (dict(w_up=torch.zeros(0, 16, 16)), r"w_up.shape\[0\] \(experts\) is 0, must be 1 to 1024"),
        (dict(b_up=torch.zeros(4, 8)), r"b_up.shape\[1\] is 8, must be 16"),
        (dict(b_down=torch.zeros(4)), "b_down has 1 dimensions, must have 2"),
        (dict(offset=torch.zeros(4, dtype=torch.int32)), r"offset.shape\[0\] is 4, must be 5"),
        (
            dict(offset=torch.tensor([0, 9, 3, 3, 12], dtype=torch.int32)),
            r"offset\[2\] is 3, must rise from 0",
        ),
        (
            dict(offset=torch.tensor([0, 1, 2, 3, 13], dtype=torch.int32)),
            r"offset\[4\] is 13, must rise from 0 to at most",
        ),
        (dict(offset=torch.tensor([1, 1, 2, 3, 4], dtype=torch.int32)), r"offset\[0\] is 1"),
        (dict(row_pair=torch.full((12,), 12, dtype=torch.int32)), r"row_pair\[0\] is 12, must be 0 to 11"),
        (dict(row_pair=torch.full((12,), -1, dtype=torch.int32)), r"row_pair\[0\] is -1"),
        (dict(row_pair=torch.zeros(13, dtype=torch.int32)), r"row_pair.shape\[0\] is 13, must be at most"),
        (dict(row_pair=torch.zeros(12)), "row_pair is of float32, must be one of int32"),
        (dict(k=0), "k is 0 with 6 tokens"),
        (dict(k=2**40), "k is 1099511627776 with 6 tokens, must be 1 to 1024 and their product below 2"),
        (dict(activation=7), "activation is 7, must be 0 to 6"),
        (dict(x=torch.zeros(1, 16).expand(2**21, 16), k=1024), "k is 1024 with 2097152 tokens"),
        (dict(k=1025), "k is 1025 with 6 tokens, must be 1 to 1024"),
        (dict(x=torch.zeros(6, 0)), "widths D = 0, F = 8, must be at least 1"),
        (dict(w_up=torch.zeros(1, 1, 1).expand(1025, 16, 16)), r"\(experts\) is 1025, must be 1 to 1024"),
        *((dict.fromkeys([n], lambda t: t.to("meta")), f"experts: {n} lies on meta, must lie on cpu")
          for n in ("offset", "row_pair", "w_up", "b_up", "w_down", "b_down")),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else None,
)
def test_forward_errors(change, text):
    """Each error names operator, argument, value and limit, and leaves no reference behind."""
    v, rows, _ = raw(Case(6, 16, 8, 4, 2))
    assert_refused(torch.ops.lina.experts_fwd, FWD, forward_args(v, rows), change, text)


BWD = (
    "dy",
    "weight",
    "x",
    "h",
    "offset",
    "row_pair",
    "pair_row",
    "w_up",
    "w_down",
    "b_down",
    "dh",
    "a",
    "activation",
    "interleaved",
    "alpha",
    "limit",
    "need",
)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(dy=torch.zeros(12, 16)), r"experts_bwd: dy.shape\[0\] is 12, must be 6"),
        (dict(weight=None), r"dy.shape\[0\] is 6, must be 12"),
        (dict(weight=None, dy=torch.zeros(12, 16)), "need asks for dweight, but weight is None"),
        (dict(weight=torch.zeros(6, 2).half()), "weight is of float16, must be one of float32"),
        (dict(h=torch.zeros(0, 16)), r"h.shape\[0\] is 0, must be 12"),
        (dict(pair_row=torch.full((6, 2), 12, dtype=torch.int32)), r"pair_row\[0\] is 12, must be -1 to 11"),
        (dict(pair_row=torch.zeros(5, 2, dtype=torch.int32)), r"pair_row.shape\[0\] is 5, must be 6"),
        (dict(b_down=torch.zeros(4, 8)), r"b_down.shape\[1\] is 8, must be 16"),
        (dict(need=128), "need is 128, must be 0 to 127"),
        (dict(dh=torch.zeros(12, 16)), "one of dh and a is None, both or neither must be"),
        (dict(dh=torch.zeros(12, 8), a=torch.zeros(12, 8)), r"dh.shape\[1\] is 8, must be 16"),
        (dict(dh=torch.zeros(12, 16), a=torch.zeros(11, 8)), r"a.shape\[0\] is 11, must be 12"),
        (dict(dh=torch.zeros(12, 16), a=torch.zeros(12, 8)), "need is 63, must be without 2 and 64"),
        *((dict.fromkeys([n], lambda t: t.to("meta")), f"experts_bwd: {n} lies on meta, must lie on cpu")
          for n in ("dy", "weight", "h", "pair_row", "w_down", "b_down")),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else None,
)
def test_backward_errors(change, text):
    v, rows, h = raw(Case(6, 16, 8, 4, 2))
    good = backward_args(torch.zeros(6, 16), v, rows, h)
    assert_refused(torch.ops.lina.experts_bwd, BWD, good, change, text)


def test_rows_of_another_sort():
    case = Case(6, 16, 8, 4, 2)
    v = case.low
    with pytest.raises(ValueError, match="rows were sorted for 5 experts, w_up has 4"):
        ops.experts(v["x"], ops.sort(case.expert, 5), v["w_up"], v["w_down"])
    with pytest.raises(ValueError, match="rows are of 5 tokens, x_TD has 6"):
        ops.experts(v["x"], ops.sort(case.expert[:5], 4), v["w_up"], v["w_down"])


@pytest.mark.parametrize("field", ops.Rows._fields)
def test_rows_elsewhere(field):
    case = Case(6, 16, 8, 4, 2)
    v, rows = case.low, ops.sort(case.expert, 4)
    away = rows._replace(**{field: getattr(rows, field).to("meta")})
    with pytest.raises(ValueError, match=f"experts: rows.{field} lies on meta, must lie on cpu"):
        ops.experts(v["x"], away, v["w_up"], v["w_down"])


@pytest.mark.gpu
def test_float64_is_for_the_cpu():
    case = Case(6, 16, 8, 4, 2, device="cuda")
    v = {n: t.detach().double() for n, t in case.low.items()}
    rows = ops.sort(case.expert, 4)
    y = torch.zeros(12, 16, dtype=torch.float64, device="cuda")
    for op, call in (
        ("experts", lambda: ops.experts(v["x"], rows, v["w_up"], v["w_down"])),
        ("moe", lambda: ops.moe(v["x"], v["weight"], case.expert, v["w_up"], v["w_down"])),
        ("combine", lambda: ops.combine(y, rows)),
    ):
        with pytest.raises(TypeError, match=f"{op}: .* is of float64 on cuda:0; float64 is for the CPU only"):
            call()
    options = (2, *OPTIONS, False)
    with pytest.raises(RuntimeError, match="experts: x is of float64, which only the CPU takes"):
        torch.ops.lina.experts_fwd(v["x"], *rows[:2], v["w_up"], None, v["w_down"], None, *options)
    with pytest.raises(RuntimeError, match="combine: y is of float64, which only the CPU takes"):
        torch.ops.lina.combine_fwd(y, None, rows.pair_row_TK)
