"""balance_loss, the z-loss, jitter and the bias update: values, gradients, limits, errors."""

from __future__ import annotations

import pytest
import torch

from lina import ops, reference

from helpers import assert_same_grads, assert_within_rounding, twin_inputs

FORMS = ("switch", "gshard")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("T,E,K", [(0, 4, 2), (1, 4, 4), (50, 16, 2), (90, 60, 6)])
def test_balance_loss_from_logits(device, form, score, T, E, K):
    x, ref = twin_inputs((T, E), torch.float32, device, scale=2.0)
    got, want = ops.gate(x, K, score=score, stats=True), reference.gate(ref, K, score=score, stats=True)
    loss, ref_loss = ops.balance_loss(*got[2:4], form), reference.balance_loss(*want[2:4], form)
    terms = 2 * E + T + K + 8  # sums over tokens and experts, and the scores
    assert_within_rounding(loss, ref_loss, terms)
    # d loss / d logit is p * (f - mean f) * E / T (switch), with f at most 1: the size before it cancels.
    size = (E if form == "switch" else K / E) / max(T, 1) * 4
    assert_same_grads((loss, x), (ref_loss, ref), terms, scales=[size])


@pytest.mark.parametrize("form,want", [("switch", 1.0), ("gshard", 1 / 64)])
def test_balanced_loads_give_the_documented_value(device, form, want):
    """Every expert first once, uniform probabilities: 1 and 1/E^2."""
    load = torch.ones(2, 8, dtype=torch.int32, device=device)
    loss = ops.balance_loss(load, torch.ones(8, device=device), form)
    assert abs(loss.item() - want) <= 8 * torch.finfo(torch.float32).eps


def test_everything_on_one_expert_gives_E(device):
    load = torch.tensor([[10, 0, 0, 0]] * 2, dtype=torch.int32, device=device)
    prob = torch.tensor([10.0, 0, 0, 0], device=device)
    assert ops.balance_loss(load, prob).item() == 4.0


def test_z_loss_by_hand(device):
    x = torch.tensor([[0.0, 0.0], [3.0, 3.0]], device=device, requires_grad=True)
    z = ops.gate(x, 1, stats=True).z
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    assert_within_rounding(z, (log2**2 + (3 + log2) ** 2).to(device), terms=6)
    (grad,) = torch.autograd.grad(z, x)  # 2 lse p, p = 1/2
    want = torch.stack([log2, 3 + log2])[:, None].expand(2, 2)
    assert_within_rounding(grad, want, terms=6)


def test_balance_loss_errors():
    load, prob = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(4)
    with pytest.raises(ValueError, match="balance_loss: form='mean', must be one of switch, gshard"):
        ops.balance_loss(load, prob, "mean")
    for bad in ((load[0], prob), (load[:, :3], prob), (load, prob[None])):
        with pytest.raises(ValueError, match="balance_loss: load_2E has shape"):
            ops.balance_loss(*bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_jitter(device, dtype):
    x = torch.full((4000,), 2.0, device=device, dtype=dtype, requires_grad=True)
    torch.manual_seed(3)
    y = ops.jitter(x, 0.25)
    assert y.dtype == dtype and y.min() >= 1.5 and y.max() <= 2.5
    # The mean of n uniforms of half width 0.5 has deviation 0.5 / sqrt(3 n); six, and a rounding.
    assert abs(y.double().mean().item() - 2) <= 6 * 0.5 / (3 * 4000) ** 0.5 + torch.finfo(dtype).eps
    assert y.min() < 1.55 and y.max() > 2.45
    torch.manual_seed(3)
    assert torch.equal(ops.jitter(x, 0.25), y)  # torch's generator, nothing else
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad * 2, y)
    assert ops.jitter(x, 0.0) is x
    for eps in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="jitter: eps="):
            ops.jitter(x, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_update_bias(device, dtype):
    bias = torch.zeros(4, device=device, dtype=dtype, requires_grad=True)
    load = torch.tensor([4, 2, 0, 2], dtype=torch.int32, device=device)  # mean 2
    assert ops.update_bias(bias, load, 0.5) is None
    assert bias.tolist() == [-0.5, 0.0, 0.5, 0.0] and bias.requires_grad
    ops.update_bias(bias, load.float(), 0.25)
    assert bias.tolist() == [-0.75, 0.0, 0.75, 0.0]


def test_update_bias_keeps_large_balanced_loads_still():
    """2^24 + 1 is not a float32: counts are compared exactly."""
    bias = torch.zeros(3)
    ops.update_bias(bias, torch.full((3,), 2**24 + 1, dtype=torch.int32), 1.0)
    assert bias.tolist() == [0.0, 0.0, 0.0]
    ops.update_bias(bias, torch.tensor([2**24 + 1, 2**24, 2**24 + 2]), 1.0)
    assert bias.tolist() == [0.0, 1.0, -1.0]


def test_update_bias_balances_a_skewed_router(device):
    """Some steps of the update even out what a constant skew would starve."""
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(2, -2, 8)
    x, bias = x.to(device), torch.zeros(8, device=device)

    def spread():
        load = ops.gate(x, 2, score="sigmoid", bias_E=bias, stats=True).load_2E[0]
        return load, (load.max() - load.min()).item()

    before = spread()[1]
    for _ in range(200):
        ops.update_bias(bias, spread()[0], 0.01)
    assert spread()[1] < before / 5


def test_update_bias_errors():
    bias, load = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"update_bias: bias_E is of torch\.int32"):
        ops.update_bias(load, load, 0.1)
    with pytest.raises(ValueError, match="update_bias: bias_E has shape"):
        ops.update_bias(bias, load[:3], 0.1)
    for rate in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="update_bias: rate="):
            ops.update_bias(bias, load, rate)


def test_compile_fullgraph(device):
    torch._dynamo.reset()

    def step(x, bias):
        got = ops.gate(ops.jitter(x, 0.1), 2, stats=True)
        ops.update_bias(bias, got.load_2E[0], 0.5)
        return got.load_2E, ops.balance_loss(got.load_2E, got.prob_E, "gshard")

    x, bias = torch.randn(30, 8, device=device), torch.zeros(8, device=device)
    load, loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, bias)
    assert torch.equal(bias, (load[0].double().mean() - load[0]).sign().float() / 2)
    assert loss.item() > 0
