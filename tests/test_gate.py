"""gate against its definition in float64: values, gradients, statistics, repeatability."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lina import ops, reference

import helpers
from gate_case import OPTIONS, SHAPES, doubled, everything, name, prepared
from helpers import assert_same_grads, assert_within_rounding, float_dtypes, twin_inputs


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("T,E,K", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_matches_reference(device, dtype, T, E, K, options):
    if dtype not in float_dtypes(device):
        with pytest.raises(TypeError, match="float64"):
            ops.gate(torch.zeros(1, 2, device=device, dtype=dtype), 1)
        return
    x, ref = twin_inputs((T, E), dtype, device, seed=E, scale=2.0)
    options = prepared(options, E, K, device)
    got, want = ops.gate(x, K, **options), reference.gate(ref, K, **doubled(options))
    assert torch.equal(got.expert_TK, want.expert_TK)  # ties are defined
    assert got.expert_TK.dtype == torch.int32 and got.load_2E is got.prob_E is got.z is None
    assert got.weight_TK.dtype == helpers.acc_dtype(dtype)
    terms = E / 16 + K + 8  # lane sums of E, the K weights' sum, exp's argument and polynomial
    assert_within_rounding(got.weight_TK, want.weight_TK, terms)
    # A renormalised weight's gradient cancels: its rounding is that of weight times cotangent (at most 4).
    largest = 4 * want.weight_TK.abs().max() if T else 1.0
    assert_same_grads((got.weight_TK, x), (want.weight_TK, ref), terms, scales=[largest])


@pytest.mark.parametrize("options", [dict(), dict(score="topk_softmax"), OPTIONS[6]], ids=name)
@pytest.mark.parametrize("T,E,K", [*SHAPES[:3], *SHAPES[4:6], SHAPES[-1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics(device, dtype, T, E, K, options):
    x, ref = twin_inputs((T, E), dtype, device, seed=E, scale=2.0)
    options = prepared(options, E, K, device)
    got = ops.gate(x, K, stats=True, **options)
    want = reference.gate(ref, K, stats=True, **doubled(options))
    assert torch.equal(got.load_2E, want.load_2E) and got.load_2E.dtype == torch.int32
    assert got.load_2E.sum().item() == T * (K + 1)
    assert not got.expert_TK.requires_grad and not got.load_2E.requires_grad
    terms = E / 16 + K + 8
    assert_within_rounding(got.prob_E, want.prob_E, terms + T, name="prob")
    assert_within_rounding(got.z, want.z, terms + T, name="z")
    lse = ref.logsumexp(-1).abs().max() if T else 0.0
    largest = 4 * (want.weight_TK.abs().max() + 1 + 2 * lse) if T else 1.0
    for outputs in (lambda r: (r.weight_TK, r.prob_E, r.z), lambda r: (r.prob_E,), lambda r: (r.z,)):
        assert_same_grads((outputs(got), x), (outputs(want), ref), terms, scales=[largest])


def test_weights_are_accurate_where_they_are_small(device):
    """exp's relative error down to subnormal weights: the argument's rounding plus a few steps."""
    x, ref = twin_inputs((40, 32), torch.float32, device, scale=15.0, requires_grad=False)
    got, want = ops.gate(x, 32), reference.gate(ref, 32)
    distance = (ref.max(-1, keepdim=True).values - ref).gather(1, want.expert_TK.long())
    eps, step = torch.finfo(torch.float32).eps, 2.0**-149
    limit = want.weight_TK * eps * (distance / 2 + 4) + 2 * step
    assert distance.max() > 60
    assert ((got.weight_TK.double() - want.weight_TK).abs() <= limit).all()


@given(st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_random_shapes(data):
    """CPU: exact choice without a bias; with one, keys within rounding of the best."""
    E = data.draw(st.integers(1, 200), "E")
    K = data.draw(st.integers(1, min(E, 32)), "K")
    T = data.draw(st.integers(0, 90), "T")
    score = data.draw(st.sampled_from(reference.SCORES), "score")
    renorm, biased = data.draw(st.booleans(), "renorm"), data.draw(st.booleans(), "biased")
    dtype = data.draw(st.sampled_from(float_dtypes("cpu")), "dtype")
    x, ref = twin_inputs((T, E), dtype, seed=data.draw(st.integers(0, 9)), requires_grad=False)
    bias = torch.randn(E, generator=helpers.generator(1)) if biased else None
    got = ops.gate(x, K, score=score, renormalize=renorm, bias_E=bias, stats=True)
    want = reference.gate(
        ref, K, score=score, renormalize=renorm, bias_E=None if bias is None else bias.double()
    )
    chosen, best = got.expert_TK.long(), want.expert_TK.long()
    s = {"softmax": ref.softmax(-1), "sigmoid": ref.sigmoid(), "topk_softmax": ref}[score]
    if biased:
        key = s + bias.double()
        size = 1 + key.abs().max() if T else 1
        gap = (key.gather(1, chosen) - key.gather(1, best)).abs()
        assert (gap <= 8 * torch.finfo(torch.float32).eps * size).all()
        assert all(len(set(row)) == K for row in chosen.tolist())
    else:
        assert torch.equal(chosen, best)
    w = s.gather(1, chosen)
    w = w.softmax(-1) if score == "topk_softmax" else w
    w = w / (w.sum(-1, keepdim=True) + (1e-20 if score == "sigmoid" else 0)) if renorm else w
    assert_within_rounding(got.weight_TK, w, E / 16 + K + 8)
    assert torch.equal(got.load_2E[0].long(), torch.bincount(chosen.flatten(), minlength=E))
    assert torch.equal(got.load_2E[1].long(), torch.bincount(chosen[:, 0], minlength=E))


@pytest.mark.parametrize("score", reference.SCORES)
def test_bitwise_repeatable(device, score):
    x, _ = twin_inputs((1500, 72), torch.float32, device)
    helpers.assert_repeatable(lambda: everything(x, score=score))


def test_threads_do_not_change_a_bit():
    x, _ = twin_inputs((1500, 72), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything(x)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(alone, everything(x), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_gradcheck(options):
    x, _ = helpers.separated_logits(3, 8, torch.float64, spread=4.0)
    options = prepared(options, 8, 3, "cpu")

    def outputs(x):
        got = ops.gate(x, 3, stats=True, **options)
        return got.weight_TK, got.prob_E, got.z

    assert torch.autograd.gradcheck(outputs, x)
