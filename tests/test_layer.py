"""lina.MoE and its parts: against reference.MoE, losses, load, copying, compiling. T tokens, D width."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lina
from lina import reference

from helpers import assert_within_rounding, grads, twin

LAYERS = [
    dict(),                                                             # softmax, top-k, renormalised
    dict(activation="gelu", bias=True),                                 # not gated
    dict(shared_experts=2, activation="geglu"),                         # an expert that every token passes
    dict(score="sigmoid", scale=2.5, groups=4, top_groups=2, select_bias=True),    # DeepSeek-V3
    dict(score="topk_softmax", activation="swiglu_clamped", bias=True),  # gpt-oss
]
D, F, E, K = 24, 40, 8, 3


def twins(layer: dict, dtype: torch.dtype = torch.float64, device: str = "cpu"):
    torch.manual_seed(3)
    got = lina.MoE(D, F, E, K, device=device, dtype=dtype, **layer)
    ref = reference.MoE(D, F, E, K, **layer).double().to(device)
    with torch.no_grad():
        for p in got.parameters():
            if p.dim() == 2 and p.shape[0] == E and p.shape[1] != D:  # biases start at 0, which hides them
                p.normal_()
        if layer.get("select_bias"):
            got.router.select_bias.copy_(torch.linspace(-0.2, 0.3, E))
    ref.load_state_dict(got.state_dict())
    return got, ref


@pytest.mark.parametrize("layer", LAYERS, ids=lambda o: ",".join(o) or "plain")
def test_matches_reference_with_every_gradient(layer, device):
    dtype = torch.float64 if device == "cpu" else torch.float32
    got, ref = twins(layer, dtype, device)
    x, ref_x = twin(torch.randn(5, 7, D, generator=torch.Generator().manual_seed(1)), dtype, device)
    y, ref_y = got(x), ref(ref_x)
    assert y.shape == x.shape and y.dtype == dtype
    # Float32: D-, F- and K-term sums follow one another; the choice itself is the same float32 product.
    terms = D + F + 2 * K
    assert_within_rounding(y, ref_y, terms=terms)
    names = [n for n, _ in ref.named_parameters()]
    assert sorted(names) == sorted(n for n, _ in got.named_parameters())
    params = dict(got.named_parameters())
    pairs = zip(["x", *names], grads(y, [x, *(params[n] for n in names)]),
                grads(ref_y, [ref_x, *(p for _, p in ref.named_parameters())]), strict=True)
    for name, g, want in pairs:
        assert g.abs().sum() > 0, name
        assert_within_rounding(g, want, terms=terms * 35, name=name)     # weights also sum over 35 tokens


def test_state_dict_is_the_references():
    got, ref = twins(dict(shared_experts=1, bias=True, select_bias=True))
    assert list(got.state_dict()) == list(ref.state_dict())
    ref.load_state_dict(got.state_dict(), strict=True)
    got.load_state_dict(ref.state_dict(), strict=True)


@pytest.mark.parametrize("shape", [(0, D), (1, D), (2, 0, D), (D,)], ids=str)
def test_any_leading_shape(shape):
    layer = lina.MoE(D, F, E, K)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert not y._is_view()                  # a change in place would drop what FSDP hooks to it
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_aux_loss_is_the_formula_and_has_a_gradient():
    balance, z = 0.3, 0.7
    layer = lina.MoE(D, F, E, K, balance_coef=balance, z_coef=z, dtype=torch.float64)
    x_TD = torch.randn(50, D, dtype=torch.float64)
    layer(x_TD)
    got = lina.aux_loss(layer)
    w = layer.router.weight.detach().clone().requires_grad_()
    logits = x_TD @ w.T
    p = logits.softmax(-1)
    share = torch.bincount(p.topk(K).indices.flatten(), minlength=E).double() / (50 * K)
    want = balance * E * (share * p.mean(0)).sum() + z * logits.logsumexp(-1).square().mean()
    assert_within_rounding(got, want, terms=50 + E)           # sums over tokens, then over experts
    grad, = torch.autograd.grad(got, layer.router.weight)
    ref_grad, = torch.autograd.grad(want, w)
    assert_within_rounding(grad, ref_grad, terms=50 + E)


def test_aux_loss_only_of_training_forwards():
    model = torch.nn.ModuleList([lina.MoE(D, F, E, K, balance_coef=1.0), lina.MoE(D, F, E, K)])
    assert lina.aux_loss(model) == 0
    x_TD = torch.randn(20, D)
    first = model[0]
    first(x_TD)
    kept = first.router.aux_loss
    assert lina.aux_loss(model) == kept > 0
    first.eval()(x_TD * 2)
    assert first.router.aux_loss is kept          # an evaluation leaves the last training loss alone


def test_checkpointing_keeps_gradients_and_reentrant_aux_loss_is_refused():
    layer = lina.MoE(D, F, E, K, balance_coef=0.5, dtype=torch.float64)
    x = torch.randn(30, D, dtype=torch.float64, requires_grad=True)

    def run(call):
        layer.zero_grad()
        (call(x).square().mean() + lina.aux_loss(layer)).backward()
        return [p.grad.clone() for p in layer.parameters()]

    plain = run(layer)
    layer.router.load = None
    again = run(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert layer.router.load.sum() == 30 * K      # the recomputation does not count a second time
    checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        lina.aux_loss(layer)


def test_checkpointed_block_is_freed_by_its_backward():
    """The recomputed loss, had the router kept it, would hold the recomputed activations."""
    layer = lina.MoE(D, F, E, K, balance_coef=0.5)
    alive = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            kept = x * 2
            alive.append(weakref.ref(kept))
            ctx.save_for_backward(kept)
            return kept.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    x = torch.randn(30, D, requires_grad=True)
    y = checkpoint(lambda x: layer(Watch.apply(x)), x, use_reentrant=False)
    (y.square().mean() + lina.aux_loss(layer)).backward()
    assert len(alive) == 2                        # forward, recomputation
    assert [ref() for ref in alive] == [None, None]


def test_the_bias_stays_float32_in_a_low_precision_model():
    layer = lina.MoE(D, F, E, K, select_bias=True)
    layer.router.select_bias.fill_(0.5)
    layer.to(torch.bfloat16)
    assert layer.router.weight.dtype == torch.bfloat16 and layer.router.select_bias.dtype == torch.float32
    layer(torch.randn(64, D, dtype=torch.bfloat16))
    lina.update_bias(layer, rate=1e-3)            # in bf16 this step would round away
    assert (layer.router.select_bias != 0.5).any()
    assert layer.double().router.select_bias.dtype == torch.float64


def test_runs_on_meta():
    layer = lina.MoE(D, F, E, K, device="meta", shared_experts=1)
    assert layer(torch.empty(5, D, device="meta")).shape == (5, D)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(5, D)).isfinite().all()


def test_forward_mode_is_refused():
    """A raw operator would drop the tangent and give a zero derivative."""
    layer = lina.MoE(D, F, E, K).eval().requires_grad_(False)
    x = torch.randn(5, D)
    with pytest.raises(RuntimeError, match=r"jvp|forward mode|forward AD"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))


def test_bias_moves_against_the_load():
    layer = lina.MoE(D, F, E, K, select_bias=True)
    layer(torch.randn(64, D))
    load_E = layer.router.load.clone()
    assert load_E.sum() == 64 * K
    lina.update_bias(layer, rate=0.01)
    want = 0.01 * (load_E.double().mean() - load_E).sign()
    assert torch.equal(layer.router.select_bias, want.float()) and layer.router.load is None
    before = layer.router.select_bias.clone()
    lina.update_bias(layer, rate=0.01)            # nothing routed since: nothing moves
    assert torch.equal(layer.router.select_bias, before)


def test_jitter_only_in_training_and_from_torchs_generator():
    layer = lina.MoE(D, F, E, K, jitter=0.3)
    x = torch.randn(40, D)
    torch.manual_seed(5)
    a = layer(x)
    torch.manual_seed(5)
    assert torch.equal(a, layer(x)) and not torch.equal(a, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_copies_and_pickles_after_a_forward():
    layer = lina.MoE(D, F, E, K, balance_coef=1.0, select_bias=True, shared_experts=1)
    x = torch.randn(9, D)
    y = layer(x)
    for twin_layer in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin_layer(x), y) and twin_layer.router.aux_loss is not layer.router.aux_loss


def test_one_seed_one_model_and_sane_scale():
    torch.manual_seed(0)
    a = lina.MoE(256, 512, E, 2)
    torch.manual_seed(0)
    b = lina.MoE(256, 512, E, 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert 0.1 < a(torch.randn(200, 256)).std() < 1.5     # unit inputs stay of order 1


@pytest.mark.parametrize("layer", [dict(balance_coef=0.1), LAYERS[3]], ids=["balance", "deepseek"])
def test_compiles_to_one_graph(layer):
    torch.manual_seed(3)
    got = lina.MoE(D, F, E, K, **layer)
    compiled = torch.compile(got, fullgraph=True, backend="aot_eager")
    x = torch.randn(33, D, requires_grad=True)
    y, want = compiled(x), got(x)
    assert torch.equal(y, want)
    g, ref = grads(y, [x, *got.parameters()]), grads(want, [x, *got.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(g, ref, strict=True))


def test_autocast_runs_in_bfloat16(device):
    got, ref = twins(dict(), torch.float32, device)
    x = torch.randn(31, D, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = got(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in got.parameters())
    # bf16 logits may choose other experts for near ties: compare where the float64 choice is clear.
    logits = x.double() @ ref.router.weight.T
    top = logits.sort(-1, descending=True).values
    clear = top[:, K - 1] - top[:, K] > 8 * torch.finfo(torch.bfloat16).eps * logits.abs().amax(-1)
    assert clear.sum() >= 10
    error = (y.double() - ref(x.double()))[clear].abs().max()
    # x, weights, h, a, y and the sum are rounded to bf16, logits too: 8 roundings on sums of size about 3.
    assert error <= 8 * torch.finfo(torch.bfloat16).eps * 3


def test_the_two_precisions_of_the_router():
    layer = lina.MoE(D, F, E, K, logits_dtype=torch.float32, dtype=torch.bfloat16)
    x = torch.randn(20, D, dtype=torch.bfloat16)
    got = layer.router(x)
    want = reference.gate(x.float() @ layer.router.weight.float().T, K, renormalize=True)
    assert torch.equal(got.expert_TK, want.expert_TK)
    assert_within_rounding(got.weight_TK, want.weight_TK.double(), terms=K + E)


def test_extra_repr_names_what_was_chosen():
    text = repr(lina.MoE(D, F, E, K, score="sigmoid", scale=2.5, groups=4, top_groups=2,
                         select_bias=True, balance_coef=0.01, bias=True))
    for part in ("dim=24", "experts=8", "top_k=3", "score='sigmoid'", "scale=2.5", "groups=4", "top_groups=2",
                 "select_bias=True", "balance_coef=0.01", "ffn_dim=40", "activation=swiglu", "bias=True"):
        assert part in text, part


@pytest.mark.parametrize("arguments, words", [
    (dict(dim=0), "dim is 0"),
    (dict(ffn_dim=0), "ffn_dim is 0"),
    (dict(experts=1025), "1025 experts, limit 1..1024"),
    (dict(top_k=9), "top_k=9, limit 1..8"),
    (dict(top_k=0), "top_k=0"),
    (dict(score="tanh"), "score='tanh'"),
    (dict(groups=3), "groups=3, must divide the 8 experts"),
    (dict(groups=4, top_groups=5), "top_groups=5, limit 1..groups=4"),
    (dict(limit=-1.0), "limit is -1.0"),
    (dict(shared_experts=-1), "shared_experts is -1"),
    (dict(activation="tanh"), "activation is 'tanh'"),
    (dict(jitter=1.0), "jitter is 1.0"),
    (dict(balance_form="other"), "balance_form is 'other'"),
])
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        lina.MoE(**{**dict(dim=D, ffn_dim=F, experts=E, top_k=K), **arguments})


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"x has shape \(3, 25\), its last axis must be dim=24"):
        lina.MoE(D, F, E, K)(torch.randn(3, 25))
