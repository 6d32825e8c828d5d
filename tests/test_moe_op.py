"""The one-node moe against the reference: every activation, layout and gradient, within computed bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lina import reference

from helpers import (
    assert_no_double_backward,
    assert_no_forward_mode,
    assert_repeatable,
    float_dtypes,
    generator,
    on_side_stream,
    replayed,
    strided,
)
from moe_case import NAMES, Case, ids, tensors

ALL = reference.ACTIVATIONS


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    "activation, interleaved", [(a, False) for a in ALL] + [(a, True) for a in reference.GATED]
)
def test_matches_reference(device, activation, interleaved, bias, transposed):
    # 19 tokens and widths 24 and 40: no multiple of a tile, but of 8, as torch's grouped product wants.
    for dtype in float_dtypes(device):
        Case(
            19,
            24,
            40,
            5,
            2,
            dtype,
            device,
            activation=activation,
            interleaved=interleaved,
            bias=bias,
            transposed=transposed,
        ).check()


@pytest.mark.parametrize(
    "T, D, F, E, K",
    [
        (0, 8, 8, 4, 2),  # empty: no row, zero gradients
        (1, 8, 8, 4, 1),  # one token, three experts without rows
        (5, 8, 16, 3, 3),  # K = E: every expert has every token
        (6, 1, 1, 2, 1),  # the smallest widths
        (33, 13, 7, 5, 2),  # odd widths: the general kernels
        (3, 600, 520, 2, 1),  # wider than a piece of 256 values, and no multiple of it
        (40, 8, 8, 64, 2),
    ],
)  # more experts than rows can fill
def test_shapes(device, T, D, F, E, K):
    for dtype in float_dtypes(device):
        Case(T, D, F, E, K, dtype, device).check()


@pytest.mark.parametrize(
    "expert",
    [
        ids(*[[2, 2]] * 9),  # one expert takes all, twice a token
        ids(*[[0, 3]] * 9),  # experts 1 and 2 are empty
        ids(*[[-1, 1], [0, -1], [-1, -1]] * 3),  # absent pairs, and tokens without any
        ids(*[[-1, 7], [4, 2**31 - 1]] * 4, [-1, -(2**31)]),  # nothing present: ids on both sides of [0, 4)
    ],
    ids=["one", "empty", "absent", "none"],
)
def test_uneven_experts(device, expert):
    for dtype in float_dtypes(device):
        case = Case(9, 16, 8, 4, 2, dtype, device, expert=expert)
        case.check()
        assert torch.equal(case.run(), Case(9, 16, 8, 4, 2, dtype, device, expert=expert.long()).run())


def test_strided_input(device):
    case = Case(7, 16, 8, 4, 2, torch.bfloat16, device)
    want = tensors(case)
    for name, t in list(case.low.items()):
        case.low[name] = strided(t)  # no dimension has stride 1
    for got, ref in zip(tensors(case), want, strict=True):
        assert torch.equal(got, ref)


@pytest.mark.parametrize(
    "frozen",
    [
        {"w_up"},
        {"w_down"},
        {"x"},
        {"weight"},
        {"b_up", "b_down"},
        set(NAMES) - {"w_down"},
        set(NAMES) - {"b_down"},
        set(NAMES) - {"weight"},
        set(NAMES) - {"b_up"},
    ],
    ids=lambda s: "+".join(sorted(s)),
)
def test_frozen(device, frozen):
    case = Case(11, 16, 8, 4, 2, torch.bfloat16, device)
    want = case.gradients(case.run())
    for name in frozen:
        case.low[name].requires_grad_(False)
    left = [n for n in NAMES if n not in frozen]
    got = torch.autograd.grad(case.run(), [case.low[n] for n in left], case.dout.to(device=device))
    for name, g in zip(left, got, strict=True):
        assert torch.equal(g, want[name]), name


def test_poison_does_not_leak(device):
    """Absent pairs' weights and rows, foreign experts' weights: NaN in none of them reaches a result."""
    expert = ids(*[[-1, 1], [0, -1]] * 8)
    for dtype in float_dtypes(device):
        case = Case(16, 16, 8, 4, 2, dtype, device, expert=expert)
        want = tensors(case)
        poison = torch.full((1 << 20,), float("nan"), device=device)  # what the allocator hands out next
        del poison
        with torch.no_grad():
            case.low["weight"][expert.to(device) < 0] = float("nan")
            for name in ("w_up", "w_down", "b_up", "b_down"):
                case.low[name][2:] = float("nan")
        for got, ref in zip(tensors(case), want, strict=True):
            assert torch.equal(got, ref)


def test_repeatable(device):
    for dtype in float_dtypes(device):
        case = Case(65, 32, 24, 4, 3, dtype, device)
        assert_repeatable(lambda case=case: tensors(case))


def test_no_grad_gives_the_same(device):
    case = Case(9, 16, 8, 4, 2, torch.float32, device)
    with torch.no_grad():
        got = case.run()
    assert not got.requires_grad and torch.equal(got, case.run())


def test_gradcheck():
    """The derivative itself, not the reference's: float64 finite differences."""
    for activation in ("swiglu", "geglu", "swiglu_clamped", "gelu", "silu"):
        case = Case(
            4, 3, 2, 3, 2, torch.float64, activation=activation, expert=ids([0, 1], [2, 0], [1, -1], [2, 1])
        )
        assert torch.autograd.gradcheck(
            lambda *v, case=case: case.run(**dict(zip(NAMES, v, strict=True))), [case.low[n] for n in NAMES]
        )


def test_compile_fullgraph(device):
    case = Case(12, 16, 8, 4, 2, torch.bfloat16, device)
    want = tensors(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: case.run(), fullgraph=True, backend="aot_eager")
    for got, ref in zip(tensors(case, compiled()), want, strict=True):
        assert torch.equal(got, ref)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    """Float32 parameters: results of narrow operands, gradients in the parameters' dtype."""
    case, low = Case(9, 16, 8, 4, 2, torch.float32, device), Case(9, 16, 8, 4, 2, dtype, device)
    with torch.autocast(device, dtype):
        out = case.run()
    want = low.run(weight=case.low["weight"])
    assert out.dtype == dtype and torch.equal(out, want)
    dout = case.dout.to(device=device, dtype=dtype)
    got = torch.autograd.grad(out, list(case.low.values()), dout)
    leaves = [case.low[n] if n == "weight" else low.low[n] for n in case.low]
    for name, g, ref in zip(case.low, got, torch.autograd.grad(want, leaves, dout), strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, ref.float()), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(device, reentrant):
    case = Case(9, 16, 8, 4, 2, torch.float32, device)
    out = checkpoint(lambda x: case.run(x=x), case.low["x"], use_reentrant=reentrant)
    out.backward(case.dout.to(device=device, dtype=out.dtype))
    for name, want in case.gradients(case.run()).items():
        assert torch.equal(case.low[name].grad, want), name


def test_double_backward_raises(device):
    case = Case(5, 8, 8, 4, 2, torch.float32, device)
    assert_no_double_backward(case.run(), case.low["x"])
    # The incoming gradient is a constant: the gradient still depends on x through what was saved.
    (grad,) = torch.autograd.grad(case.run().sum(), case.low["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="lina: moe is differentiable once"):
        grad.sum().backward()


def test_forward_mode_is_refused(device):
    case = Case(5, 8, 8, 4, 2, torch.float32, device)
    case.low = {n: t.detach() for n, t in case.low.items()}
    for name in ("x", "weight", "w_up"):
        assert_no_forward_mode(lambda t, name=name: case.run(**{name: t}), case.low[name])


def test_narrow_router_weights(device):
    """bf16 router weights are widened exactly; their gradient comes back in bf16."""
    case = Case(5, 8, 8, 4, 2, torch.bfloat16, device)
    narrow = case.low["weight"].detach().bfloat16().requires_grad_()
    out = case.run(weight=narrow)
    assert torch.equal(out, case.run(weight=narrow.detach().float()))
    (grad,) = torch.autograd.grad(out.float().sum(), narrow)
    assert grad.dtype == torch.bfloat16


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 40),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(ALL),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_random_shapes(T, D, F, E, K, activation, bias, transposed, dtype, seed):
    expert = torch.randint(-1, E, (T, K), generator=generator(seed), dtype=torch.int32)  # repeats are allowed
    Case(
        T,
        D,
        F,
        E,
        K,
        dtype,
        activation=activation,
        bias=bias,
        transposed=transposed,
        expert=expert,
        interleaved=bool(seed & 1),
        seed=seed,
    ).check()


@pytest.mark.gpu
def test_side_stream():
    case = Case(300, 64, 64, 8, 2, torch.bfloat16, "cuda")
    want = tensors(case)
    for got, ref in zip(on_side_stream(lambda: tensors(case)), want, strict=True):
        assert torch.equal(got, ref)


@pytest.mark.gpu
def test_cuda_graph():
    case, other = (Case(300, 64, 64, 8, 2, torch.bfloat16, "cuda", seed=s) for s in (0, 1))
    with torch.no_grad():
        inputs, values = ([*(t.detach() for t in c.low.values()), c.expert] for c in (case, other))
    case.low = {n: t.detach().requires_grad_() for n, t in case.low.items()}  # share memory with `inputs`
    case.dout = other.dout = case.dout.cuda()
    got = replayed(lambda: tensors(case), inputs, values)
    for g, ref in zip(got, tensors(other), strict=True):
        assert torch.equal(g, ref)
