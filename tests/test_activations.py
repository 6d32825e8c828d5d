"""gelu and silu of every value that 16 bits can hold, and their derivatives, against float64: the kernels
have exponentials, and a normal distribution, of their own."""

from __future__ import annotations

import math

import pytest
import torch

from lina import ops

# Relative, of the functions: csrc/cuda/experts_activate.cu, csrc/vector.h. An exponential's argument has an
# error of up to 2^-24 * 90 (where its result still is a normal float32) besides.
OWN = 2e-5
LEAST = 2.0**-119            # 90 times the smallest normal float32, below which these functions may give 0


def expected(activation, x):
    """The function, its derivative, and the sum of the derivative's absolute terms."""
    if activation == "silu":
        share = torch.sigmoid(x)
        slope = x * share * (1 - share)
    else:
        share = 0.5 * torch.special.erfc(-x / math.sqrt(2))
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        slope = torch.where(density > 0, x * density, 0)
    return x * share, share + slope, share + slope.abs()


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value(device, dtype, activation):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = torch.where(x.isfinite(), x, 0).view(-1, 8).to(device)
    one = torch.eye(8, dtype=dtype, device=device)[None]
    rows = ops.sort(torch.zeros(len(x), 1, dtype=torch.int32, device=device), 1)
    leaf = x.clone().requires_grad_()
    y = ops.experts(leaf, rows, one, one, activation=activation)
    y.backward(torch.ones_like(y))

    limits = torch.finfo(dtype)
    least = max(LEAST, limits.smallest_normal * limits.eps)
    value, slope, terms = expected(activation, x.double().cpu())
    for name, got, want, parts in (("value", y.detach(), value, value.abs()),
                                   ("derivative", leaf.grad, slope, terms)):
        allowed = limits.eps / 2 * want.abs() + OWN * parts + least
        wrong = ~((got.double().cpu() - want).abs() <= allowed)
        assert not wrong.any(), (name, x.cpu()[wrong][:5], got.cpu()[wrong][:5], want[wrong][:5])
