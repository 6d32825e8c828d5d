"""gate as a citizen of torch: strides, compile, checkpoints, autocast, streams, graphs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lina import ops

import helpers
from gate_case import everything
from helpers import assert_within_rounding, twin_inputs


@pytest.mark.parametrize(
    "make",
    [
        helpers.strided,
        lambda x: x.detach().t().contiguous().t().requires_grad_(),
        lambda x: x.detach()[:, 5:45].requires_grad_(),
    ],
    ids=["step2", "columns", "slice"],
)
def test_strided_input(device, make):
    x = make(torch.randn(37, 50, generator=helpers.generator(2)).to(device).requires_grad_())
    flat = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    bias = torch.randn(x.shape[1], 2, generator=helpers.generator(3)).to(device)[:, 0]
    assert not x.is_contiguous() and not bias.is_contiguous()
    got, want = (ops.gate(y, 4, bias_E=b, stats=True) for y, b in ((x, bias), (flat, bias.contiguous())))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    cotangent = torch.randn(4, 37, generator=helpers.generator(4)).to(device).t()  # a strided dweight
    assert torch.equal(
        *(torch.autograd.grad(r.weight_TK, y, cotangent)[0] for r, y in ((got, x), (want, flat)))
    )


def test_opcheck(device):
    x = torch.randn(5, 12, device=device)
    bias = torch.randn(12, device=device)
    for args in (
        (x, None, 3, 0, False, 1.0, 1, 1, 2, False),
        (x.bfloat16(), bias, 3, 2, True, 2.5, 4, 2, 2, True),
    ):
        torch.library.opcheck(torch.ops.lina.gate_fwd.default, args, test_utils=helpers.OPCHECKS)
    expert = helpers.random_experts(5, 12, 3, device=device)
    for args in (
        (x, expert, torch.randn(5, 3, device=device), None, 0, True, 1.0),
        (x.bfloat16(), expert, None, torch.randn(13, device=device), 2, False, 2.0),
    ):
        torch.library.opcheck(torch.ops.lina.gate_bwd.default, args, test_utils=helpers.OPCHECKS)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stats", [False, True])
def test_compile_fullgraph(device, stats, dynamic):
    bias = torch.randn(24, device=device)

    def layer(x):
        got = ops.gate(x * 2, 4, score="sigmoid", bias_E=bias, groups=4, top_groups=2, stats=stats)
        loss = got.weight_TK.square().sum()
        return (loss + ops.balance_loss(got.load_2E, got.prob_E) + got.z if stats else loss), got.expert_TK

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (10, 17) if dynamic else (10,):
        x, _ = twin_inputs((T, 24), torch.float32, device, seed=T)
        (a, expert), (b, expert_b) = compiled(x), layer(x)
        assert torch.equal(expert, expert_b)
        assert_within_rounding(a, b.double(), terms=T)
        assert torch.equal(*(torch.autograd.grad(y, x)[0] for y in (a, b)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(device, use_reentrant):
    x, _ = twin_inputs((20, 16), torch.float32, device)

    def block(x):
        got = ops.gate(x, 4, stats=True)
        return got.weight_TK.square().sum() + got.prob_E.square().sum() + got.z

    (want,) = torch.autograd.grad(block(x), x)
    checkpoint(block, x, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, want)


def test_double_backward_raises(device):
    x, _ = twin_inputs((4, 8), torch.float32, device)
    helpers.assert_no_double_backward(ops.gate(x, 2).weight_TK, x)
    with pytest.raises(RuntimeError, match="lina: gate is differentiable once"):
        (grad,) = torch.autograd.grad(ops.gate(x, 2).weight_TK[:, 0].sum(), x, create_graph=True)
        grad.square().sum().backward()


def test_forward_mode_is_refused(device):
    helpers.assert_no_forward_mode(lambda x: ops.gate(x, 2).weight_TK, torch.randn(4, 8, device=device))


def test_autocast_leaves_logits_alone(device):
    x = torch.randn(6, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = ops.gate(x, 4)
    assert all(torch.equal(a, b) for a, b in zip(got[:2], ops.gate(x, 4)[:2], strict=True))


@pytest.mark.gpu
def test_side_stream():
    x, _ = twin_inputs((513, 64), torch.bfloat16, "cuda")
    want = everything(x)
    got = helpers.on_side_stream(lambda: everything(x))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_cuda_graph():
    x, _ = twin_inputs((513, 64), torch.bfloat16, "cuda")
    other, _ = twin_inputs((513, 64), torch.bfloat16, "cuda", seed=5)
    got = helpers.replayed(lambda: everything(x), [x], [other])
    assert all(torch.equal(a, b) for a, b in zip(got, everything(other), strict=True))
