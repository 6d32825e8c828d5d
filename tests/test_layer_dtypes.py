"""lina.MoE in float16 and bfloat16: output and every gradient within derived bounds of float64.

The layer is checked in the two parts that its routing joins. The router's weights and choice are taken
from the layer's own forward, so that what follows has exact inputs: the experts' results lie within
``moe_bounds``. The gradient that reaches those weights is again the layer's own, and from it the router's
gradients follow.
"""

from __future__ import annotations

import pytest
import torch

import lina
from lina import reference

from bounds import Bounded, assert_bounded, exact, moe_bounds
from helpers import generator

T, D, F, E, K = 21, 24, 40, 8, 3
ACC = torch.finfo(torch.float32).eps
LAYERS = [
    dict(),
    dict(interleaved=True, bias=True),
    dict(activation="relu", bias=True),
    dict(activation="relu2"),
    dict(activation="silu", bias=True),
    dict(activation="swiglu_clamped", interleaved=True, bias=True),
]


def name(layer: dict) -> str:
    return "-".join(str(v) if k == "activation" else k for k, v in layer.items()) or "swiglu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=name)
def test_gradients(device, dtype, layer):
    torch.manual_seed(3)
    moe = lina.MoE(D, F, E, K, device=device, dtype=dtype, **layer)
    draw = generator(1)
    with torch.no_grad():
        for bias in (moe.experts.b_up, moe.experts.b_down):
            if bias is not None:
                bias.copy_(torch.randn(bias.shape, generator=draw))
    x = torch.randn(T, D, generator=draw).to(device=device, dtype=dtype).requires_grad_()
    dout = torch.randn(T, D, generator=draw).to(device=device, dtype=dtype)
    seen = {}

    def watch(_module, _inputs, routing):
        routing.weight_TK.retain_grad()
        seen["routing"] = routing

    moe.router.register_forward_hook(watch)
    out = moe(x)
    out.backward(dout)
    weight, expert = seen["routing"][:2]
    assert out.dtype == x.grad.dtype == dtype and weight.dtype == torch.float32
    low = {n: p.detach() for n, p in moe.named_parameters()}
    ref = {n: p.double().cpu().requires_grad_() for n, p in low.items()}
    rx, rw = (t.detach().double().cpu().requires_grad_() for t in (x, weight))
    names = ("w_up", "w_down", "b_up", "b_down")
    w_up, w_down, b_up, b_down = (ref.get(f"experts.{n}") for n in names)
    options = dict(activation=layer.get("activation", "swiglu"), interleaved=layer.get("interleaved", False))

    # The experts, from the router's own weights.
    truth = reference.moe(rx, rw, expert.cpu(), w_up, w_down, b_up=b_up, b_down=b_down, **options)
    leaves = {n: t for n, t in (("x", rx), ("weight", rw), *zip(names, (w_up, w_down, b_up, b_down),
                                                               strict=True)) if t is not None}
    want = dict(zip(leaves, torch.autograd.grad(truth, list(leaves.values()), dout.double().cpu()),
                    strict=True))
    detached = {n: t.detach() for n, t in leaves.items()}
    bound = moe_bounds(detached["x"], detached["weight"], expert.cpu().long(), detached["w_up"],
                       detached["w_down"], detached.get("b_up"), detached.get("b_down"),
                       dout.double().cpu(), dtype, **options)
    assert_bounded(out, bound["out"], truth, "out")
    assert_bounded(weight.grad, bound["dweight"], want["weight"], "dweight")
    for n in names:
        if n in leaves:
            got = moe.get_parameter(f"experts.{n}").grad
            assert got.dtype == dtype
            assert_bounded(got, bound[f"d{n}"], want[n], f"d{n}")

    # The router: logits are the layer's own product; the gate's gradient from the layer's own dweight.
    router = exact(ref["router.weight"].detach())
    tokens = exact(rx.detach())
    logits = torch.nn.functional.linear(x.detach(), low["router.weight"])
    assert_bounded(logits, tokens.mm(router.T, ACC).stored(dtype), rx @ ref["router.weight"].T, "logits")
    leaf = logits.double().cpu().requires_grad_()
    routing = reference.gate(leaf, K, renormalize=True)
    assert torch.equal(routing.expert_TK, expert.cpu())
    terms = E / 16 + K + 8                       # as in test_gate: lane sums, the weights' sum, exp
    error = 4 * terms * ACC * routing.weight_TK.detach()
    assert_bounded(weight, Bounded(routing.weight_TK.detach(), error), routing.weight_TK, "weight")
    (dlogits,) = torch.autograd.grad(routing.weight_TK, leaf, weight.grad.double().cpu())
    # A renormalised weight's gradient cancels: its rounding is that of the largest weight times cotangent.
    scale = weight.grad.double().cpu().abs().amax(1, keepdim=True) * routing.weight_TK.detach().amax()
    low_dlogits = Bounded(dlogits, 4 * terms * ACC * scale.expand_as(dlogits)).stored(dtype)
    assert_bounded(moe.router.weight.grad, low_dlogits.T.mm(tokens, ACC).stored(dtype),
                   dlogits.T @ rx, "router.weight")
    through = low_dlogits.mm(router, ACC).stored(dtype)
    assert_bounded(x.grad, (bound["dx"] + through).stored(dtype),
                   want["x"] + dlogits @ ref["router.weight"], "dx")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    """A float32 layer: a narrow result, float32 gradients, and those of the narrow layer."""
    torch.manual_seed(3)
    moe = lina.MoE(D, F, E, K, device=device)
    narrow = lina.MoE(D, F, E, K, device=device, dtype=dtype)
    narrow.load_state_dict(moe.state_dict())     # rounds, as autocast does
    x = torch.randn(T, D, generator=generator(2)).to(device).requires_grad_()
    with torch.autocast(device, dtype):
        out = moe(x)
    want = narrow(x.detach().to(dtype))
    assert out.dtype == dtype and torch.equal(out, want)
    for y, layer in ((out, moe), (want, narrow)):
        y.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
    for (n, p), q in zip(moe.named_parameters(), narrow.parameters(), strict=True):
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad.float()), n
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()
