"""lina.MoE on GPUs: another stream, a captured graph, a device that is not the current one."""

from __future__ import annotations

import copy

import pytest
import torch

import lina
from lina import ops

from helpers import generator, on_side_stream, random_experts, replayed

pytestmark = pytest.mark.gpu

D, F, E, K = 64, 64, 8, 2
LAYERS = [dict(), dict(bias=True, shared_experts=1, balance_coef=0.1)]


def made(device="cuda", **layer):
    torch.manual_seed(3)
    return lina.MoE(D, F, E, K, device="cpu", dtype=torch.bfloat16, **layer).to(device)


def inputs(seed, device="cuda", T=300):
    draw = generator(seed)
    x, dy = (torch.randn(T, D, generator=draw).to(device=device, dtype=torch.bfloat16) for _ in range(2))
    return x.requires_grad_(), dy


def everything(moe, x, dy):
    """Output, auxiliary loss and every gradient."""
    y, loss = moe(x), lina.aux_loss(moe)
    outputs, seeds = [y], [dy]
    if loss.requires_grad:
        outputs, seeds = [y, loss], [dy, torch.ones_like(loss)]
    return *outputs, *torch.autograd.grad(outputs, [x, *moe.parameters()], seeds)


def assert_same(got, want):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()), f"result {i}"


@pytest.mark.parametrize("layer", LAYERS, ids=["plain", "full"])
def test_side_stream(layer):
    moe, (x, dy) = made(**layer), inputs(1)
    want = everything(moe, x, dy)
    assert_same(on_side_stream(lambda: everything(moe, x, dy)), want)


@pytest.mark.parametrize("layer", LAYERS, ids=["plain", "full"])
def test_graph_of_forward_and_backward(layer):
    """Captured with one routing, replayed with another: nothing about it was read by the host."""
    moe, (x, dy), (other, dother) = made(**layer), inputs(1), inputs(2)
    twin = copy.deepcopy(moe)
    got = replayed(lambda: everything(moe, x, dy), [x, dy], [other, dother])
    assert_same(got, everything(twin, other, dother))


@pytest.fixture
def second() -> str:
    """A GPU that is not the current one."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two GPUs, there is {count}")
    assert torch.cuda.current_device() == 0
    return "cuda:1"


def test_layer_on_another_device(second):
    there, here = made(second, balance_coef=0.1), made("cuda:0", balance_coef=0.1)
    got = everything(there, *inputs(1, second))
    assert all(t.device == torch.device(second) for t in got)
    assert_same(got, everything(here, *inputs(1, "cuda:0")))
    assert torch.cuda.current_device() == 0


def test_operators_on_another_device(second):
    """Each as a node of its own, in float32: lina's general products."""

    def run(device):
        draw = generator(1)
        logits, x, w_up, w_down = (
            torch.randn(*size, generator=draw).to(device).requires_grad_()
            for size in ((50, E), (50, D), (E, 2 * F, D), (E, D, F)))
        routing = ops.gate(logits, K, stats=True)
        rows = ops.sort(random_experts(50, E, K, device=device), E)
        out = ops.combine(ops.experts(x, rows, w_up, w_down), rows, routing.weight_TK)
        leaves = (logits, x, w_up, w_down)
        return *rows, *routing, out, *torch.autograd.grad(out.square().sum() + routing.z, leaves)

    got = run(second)
    assert all(t.device == torch.device(second) for t in got)
    assert_same(got, run("cuda:0"))


def test_tensors_of_two_devices(second):
    moe, (x, _) = made("cuda:0"), inputs(1, second)
    with pytest.raises(RuntimeError, match="same device"):
        moe(x)                                   # torch's own product, the router's
    rows = ops.sort(random_experts(300, E, K, device="cuda:0"), E)
    with pytest.raises(ValueError, match=r"experts: w_up lies on cuda:0, must lie on cuda:1"):
        ops.experts(x, rows, moe.experts.w_up, moe.experts.w_down)
    with pytest.raises(RuntimeError, match=r"combine: pair_row lies on cuda:0, must lie on cuda:1"):
        torch.ops.lina.combine_fwd(torch.zeros(600, D, device=second), None, rows.pair_row_TK)
