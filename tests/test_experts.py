"""experts as a node of its own, and its raw operators: layouts, indices, errors, leaks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lina import ops, reference

from helpers import (
    OPCHECKS,
    assert_no_double_backward,
    assert_no_forward_mode,
    assert_repeatable,
    assert_within_rounding,
    float_dtypes,
    generator,
    on_side_stream,
    replayed,
    strided,
)
from moe_case import NAMES, Case, ids, tensors

OPTIONS = 0, False, 1.702, 7.0  # swiglu, gates first, alpha, limit


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_parts_match_reference(device, activation, weighted):
    # Absent pairs leave rows of y unspecified; expert 4 has no row; D is a multiple of 8, F is not.
    expert = ids([0, 1], [2, -1], [-1, -1], [3, 0], [1, 0], [2, 2], [3, 1])
    for dtype in float_dtypes(device):
        case = Case(7, 16, 12, 5, 2, dtype, device, activation=activation, expert=expert)
        case.check(case.run_parts(weighted=weighted), weighted)


@pytest.mark.parametrize("T", [0, 1, 50])
def test_parts_shapes(device, T):
    for dtype in float_dtypes(device):
        case = Case(T, 8, 16, 6, 3, dtype, device, transposed=True)
        case.check(case.run_parts())


def test_unspecified_rows_do_not_leak(device):
    """NaN gradients of rows that belong to no pair reach no result."""
    expert = ids([0, -1], [1, -1], [-1, 3], [-1, -1])
    for dtype in float_dtypes(device):
        case = Case(4, 8, 8, 4, 2, dtype, device, expert=expert)
        v, rows = case.low, ops.sort(case.expert, 4)
        y = ops.experts(v["x"], rows, v["w_up"], v["w_down"], b_up=v["b_up"], b_down=v["b_down"])
        dy = torch.randn(8, 8, generator=generator(3)).to(device=device, dtype=dtype)
        leaves = [v[n] for n in NAMES if n != "weight"]
        want = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        dy[3:] = float("nan")  # three pairs are present
        for got, ref in zip(torch.autograd.grad(y, leaves, dy), want, strict=True):
            assert torch.equal(got, ref)


def test_leftovers_do_not_leak(device):
    """NaN in the memory that rows without a pair get, as an earlier tensor may have left it: every dtype,
    so torch's grouped product and lina's own; three quarters of the pairs are absent."""
    expert = torch.full((64, 4), -1, dtype=torch.int32)
    expert[:, 0] = torch.arange(64) % 5                        # expert 5 has no row
    for dtype in float_dtypes(device):
        case = Case(64, 16, 32, 6, 4, dtype, device, expert=expert)
        for weighted in (False, True):
            if device == "cuda":
                torch.cuda.empty_cache()
            spoiled = [torch.full((1 << 18,), float("nan"), device=device) for _ in range(16)]
            del spoiled
            case.check(case.run_parts(weighted=weighted), weighted)


@pytest.mark.parametrize("chosen", [[[0, -1], [1, 3], [-1, 3]], [[-1, -1]] * 3], ids=["some", "none"])
def test_rows_of_present_pairs_alone(device, chosen):
    """The indices cut to the pairs that are there give what the whole ones give."""
    for dtype in float_dtypes(device):
        case = Case(3, 8, 8, 4, 2, dtype, device, expert=ids(*chosen))
        v, rows = {n: t.detach() for n, t in case.low.items()}, ops.sort(case.expert, 4)
        n = int(rows.offset_E1[-1])
        found = []
        for row_pair in (rows.row_pair_N, rows.row_pair_N[:n]):
            up, down, need = (v["w_up"], v["b_up"]), (v["w_down"], v["b_down"]), ops.moe_needs(*[True] * 6)
            y, h = torch.ops.lina.experts_fwd(
                v["x"], rows.offset_E1, row_pair, *up, *down, 2, *OPTIONS, True
            )
            grads = torch.ops.lina.experts_bwd(
                v["x"], v["weight"], v["x"], h, rows.offset_E1, row_pair, rows.pair_row_TK, up[0], *down,
                None, None, *OPTIONS, need,
            )[:6]  # fmt: skip
            found.append((y[:n], h[:n], *grads))
        assert y.shape[0] == n
        for got, want in zip(*found, strict=True):
            # products may be summed in another order: of 8 terms, or 2 rows; through 3 narrow values
            scale = want.abs().max().item() if want.numel() else 0.0
            assert_within_rounding(got, want, 3 * 8, scale=scale, inner=3)


def test_repeatable(device):
    case = Case(65, 24, 16, 4, 2, torch.bfloat16, device)
    assert_repeatable(lambda: tensors(case, case.run_parts()))


def node(case, rows=None, dy=None, **replaced):
    """experts alone: y and every gradient; dy is random unless given."""
    v = {**case.low, **replaced}
    rows = ops.sort(case.expert, v["w_up"].shape[0]) if rows is None else rows
    y = ops.experts(v["x"], rows, v["w_up"], v["w_down"], b_up=v["b_up"], b_down=v["b_down"], **case.options)
    dy = torch.linspace(-2, 2, y.numel(), device=y.device).view_as(y) if dy is None else dy
    return y, *torch.autograd.grad(y, [v[n] for n in NAMES if n != "weight"], dy.to(y.dtype))


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_strided(device):
    case = Case(7, 16, 8, 4, 2, torch.bfloat16, device)
    dy = torch.randn(14, 16, generator=generator(3)).to(device=device, dtype=torch.bfloat16)
    want = node(case, dy=dy)
    assert_same(node(case, dy=dy.t().contiguous().t(), x=strided(case.low["x"])), want)
    assert_same(node(case, dy=strided(dy)), want)
    column = dy[:, :1].expand(14, 16)  # the stride of the last dimension is 0
    assert_same(node(case, dy=column), node(case, dy=column.contiguous()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(device, reentrant):
    case = Case(9, 16, 8, 4, 2, torch.float32, device)
    v, rows, want = case.low, ops.sort(case.expert, 4), node(case)

    def run(x):
        return ops.experts(x, rows, v["w_up"], v["w_down"], b_up=v["b_up"], b_down=v["b_down"])

    y = checkpoint(run, v["x"], use_reentrant=reentrant)
    y.backward(torch.linspace(-2, 2, y.numel(), device=device).view_as(y))
    assert_same((y, *(v[n].grad for n in NAMES if n != "weight")), want)


def test_most_experts(device):
    """E at its limit, most without rows; in bf16 one more than torch's grouped product takes."""
    used = torch.tensor([0, 7, 512, 1022, 1023], device=device)
    idle = torch.ones(1024, dtype=torch.bool, device=device).index_fill(0, used, False)
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(9, 8, 8, 5, 2, dtype, device)
        x, weight, *small = (case.low[n] for n in NAMES)
        wide = [w.new_zeros(1024, *w.shape[1:]).index_copy(0, used, w) for w in small]
        rows = ops.sort(used[case.expert.long()].int(), 1024)
        y = ops.experts(x, rows, wide[0], wide[1], b_up=wide[2], b_down=wide[3])
        out = ops.combine(y, rows, weight)
        for g in torch.autograd.grad(out.float().sum(), wide, retain_graph=True):
            assert (g[idle] == 0).all() and (g[~idle] != 0).any()
        case.check(out)


@pytest.mark.gpu
def test_side_stream():
    case = Case(300, 64, 64, 8, 2, torch.bfloat16, "cuda")
    assert_same(on_side_stream(lambda: node(case)), node(case))


@pytest.mark.gpu
def test_cuda_graph():
    case, other = (Case(300, 64, 64, 8, 2, torch.bfloat16, "cuda", seed=s) for s in (0, 1))
    rows, new = ops.sort(case.expert, 8), ops.sort(other.expert, 8)
    leaves = [n for n in NAMES if n != "weight"]
    dy = torch.randn(600, 64, generator=generator(4)).cuda()
    got = replayed(
        lambda: node(case, rows, dy),
        [*(case.low[n] for n in leaves), *rows],
        [*(other.low[n] for n in leaves), *new],
    )
    assert_same(got, node(other, new, dy))


def test_forward_mode_is_refused(device):
    case = Case(5, 8, 8, 4, 2, torch.float32, device)
    v = {n: t.detach() for n, t in case.low.items()}
    rows = ops.sort(case.expert, 4)
    assert_no_forward_mode(lambda x: ops.experts(x, rows, v["w_up"], v["w_down"]), v["x"])


def test_no_grad_and_autocast(device):
    case, low = Case(9, 16, 8, 4, 2, torch.float32, device), Case(9, 16, 8, 4, 2, torch.bfloat16, device)
    with torch.no_grad():
        assert torch.equal(case.run_parts(), case.run_parts())
        with torch.autocast(device, torch.bfloat16):
            got = case.run_parts(weighted=False)
        assert got.dtype == torch.bfloat16 and torch.equal(got, low.run_parts(weighted=False))


def test_gradcheck():
    case = Case(4, 3, 2, 3, 2, torch.float64, expert=ids([0, 1], [2, 0], [1, -1], [2, 1]))

    def run(*values):
        case.low = dict(zip(NAMES, values, strict=True))
        return case.run_parts()

    assert torch.autograd.gradcheck(run, [case.low[n] for n in NAMES])


def test_double_backward_raises(device):
    case = Case(5, 8, 8, 4, 2, torch.float32, device)
    assert_no_double_backward(case.run_parts(), case.low["x"])
    (grad,) = torch.autograd.grad(case.run_parts(weighted=False).sum(), case.low["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="lina: experts is differentiable once"):
        grad.sum().backward()


def test_compile_fullgraph(device):
    case = Case(12, 16, 8, 4, 2, torch.bfloat16, device)
    want = tensors(case, case.run_parts())
    torch._dynamo.reset()
    compiled = torch.compile(lambda: case.run_parts(), fullgraph=True, backend="aot_eager")
    for got, ref in zip(tensors(case, compiled()), want, strict=True):
        assert torch.equal(got, ref)


def raw(case):
    """Detached inputs, sorted rows and saved h."""
    v = {n: t.detach() for n, t in case.low.items()}
    rows = ops.sort(case.expert, v["w_up"].shape[0])
    _, h = torch.ops.lina.experts_fwd(*forward_args({**v, "b_up": None, "b_down": None}, rows))
    return v, rows, h


def forward_args(v, rows):
    """Of the raw operator, with its result's h."""
    return (v["x"], rows.offset_E1, rows.row_pair_N, v["w_up"], v["b_up"], v["w_down"], v["b_down"],
            rows.pair_row_TK.shape[1], *OPTIONS, True)


def backward_args(dy, v, rows, h):
    """Of its backward: all six gradients."""
    return dy, v["weight"], v["x"], h, *rows, v["w_up"], v["w_down"], v["b_down"], None, None, *OPTIONS, 63


@pytest.mark.parametrize("dtype, transposed", [(torch.float32, True), (torch.bfloat16, False)])
def test_opcheck(device, dtype, transposed):
    case = Case(6, 16, 8, 4, 2, dtype, device, transposed=transposed)
    v, rows, h = raw(case)
    torch.library.opcheck(torch.ops.lina.experts_fwd, forward_args(v, rows), test_utils=OPCHECKS)
    dy = case.dout.to(device=device, dtype=dtype)
    torch.library.opcheck(torch.ops.lina.experts_bwd, backward_args(dy, v, rows, h), test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [70, 0])
def test_backward_in_two_calls(device, dtype, T):
    """First what travels, then the weights' gradients from what that has kept: the bits of one call."""
    for transposed in (False, True):
        case = Case(T, 16, 8, 4, 2, dtype, device, transposed=transposed)
        v, rows, h = raw(case)
        args = backward_args(case.dout.to(device=device, dtype=dtype), v, rows, h)[:-1]
        one = torch.ops.lina.experts_bwd(*args, 63)
        first = torch.ops.lina.experts_bwd(*args, 1 | 2 | 64)
        later = torch.ops.lina.experts_bwd(*args[:10], *first[6:], *args[12:], 63 - 1 - 2)
        assert first[6].shape == (len(rows.row_pair_N), 16) and first[7].shape == (len(rows.row_pair_N), 8)
        assert [t.numel() for t in (*first[2:6], *later[:2], *later[6:])] == [0] * 8
        for want, got in zip(one[:6], (*first[:2], *later[2:6]), strict=True):
            assert torch.equal(want, got)


def test_fake_layouts(device):
    """The fake's shapes, dtypes and strides are the operator's, for every need and layout."""
    from torch._subclasses import FakeTensorMode

    for transposed in (False, True):
        v, rows, h = raw(Case(6, 16, 8, 4, 2, torch.float32, device, transposed=transposed))
        gapped = torch.zeros(4, 16, 32, device=device)[..., :16]  # dense rows, with gaps between them
        for w_up in (v["w_up"], gapped, gapped[..., ::2].repeat_interleave(2, -1).permute(0, 2, 1)):
            for need in (0, 1, 63, 0b000100, 0b101010, 0b1000011, 127):
                args = (v["x"], v["weight"], v["x"], h, *rows, w_up, v["w_down"], *[None] * 3, *OPTIONS, need)
                real = torch.ops.lina.experts_bwd(*args)
                with FakeTensorMode() as mode:
                    fake = torch.ops.lina.experts_bwd(
                        *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
                    )
                for r, f in zip(real, fake, strict=True):
                    assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
