"""lina.swap on models of one's own: plain blocks, and stacked experts without transformers."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lina
from lina.swap.probe import agree

from swap_cases import (
    EXPERTS,
    WIDTH,
    Block,
    D,
    Gated,
    Model,
    Pair,
    Projections,
    Stacked,
    assert_agree,
    results,
    results_by,
    sequential,
)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("expert,options,text", [
    (Gated, dict(norm=True), "swiglu"),
    (Gated, dict(norm=False, k=1), "swiglu"),             # top-1, Switch
    (lambda: Gated(bias=True), dict(router="router", top_k="num_experts_per_tok"), "swiglu"),
    (Projections, dict(norm=True, logits=True), "geglu"),  # biases above only; returns logits too
    (Pair, dict(score="sigmoid", norm=True, k=EXPERTS), "relu"),   # K = E
    (lambda: Pair(lambda h: F.relu(h).square()), dict(score="sigmoid"), "relu2"),
    (sequential, dict(), "silu"),
])
def test_plain_block(expert, options, text):
    block, x = Block(expert, **options), torch.randn(3, 7, D)
    keys, state, buffers = list(block.state_dict()), dict(block.named_parameters()), vars(block).keys()
    want = results(block, x)
    assert lina.swap(block) is block and isinstance(block, Block)
    [entry] = lina.swap_report(block)
    assert entry.swapped and entry.kind == "Block" and text in entry.reason
    assert list(block.state_dict()) == keys
    assert_agree(results(block, x), want)
    assert all(p is state[name] for name, p in block.named_parameters())
    lina.unswap(block)
    assert type(block) is Block and vars(block).keys() == buffers
    assert all(torch.equal(a, b) for a, b in zip(results(block, x), want, strict=True))


class Other(nn.Module):
    """Called MoE, of no shape that lina knows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))


def hooked() -> Block:
    block = Block()
    block.experts[1].w2.register_forward_hook(lambda *_: None)
    return block


def replaced() -> Block:
    block = Block()
    block.forward = lambda x: x
    return block


def frozen_noise() -> Block:
    block = Block()
    block.experts[2].act = torch.tanh
    return block


class Normed(Stacked):
    has_post_expert_norm = True


@pytest.mark.parametrize("make,reason", [
    (Other, "unknown kind"),
    (lambda: Block(dropout=0.1), "training mode"),
    (lambda: Block(noise=0.1), "training mode"),
    (lambda: Block(extra=nn.Linear(D, D)), "extra.weight"),
    (lambda: Block(extra=nn.Tanh()), "not that of a softmax or sigmoid gate"),
    (lambda: Block(scale=1.0001), "not that of a softmax or sigmoid gate"),
    (lambda: Block(count=True), "changes buffers or attributes"),
    (lambda: Block(lambda: Gated(torch.tanh)), "none of lina's activations"),
    (lambda: Block(lambda: Gated(nn.GELU("tanh"))), "none of lina's activations"),
    (lambda: Block(lambda: nn.Linear(D, D)), "known names"),
    (lambda: Block(top_k="chosen"), "no integer attribute"),
    (frozen_noise, "none of lina's activations"),
    (hooked, "hooks"),
    (replaced, "replaced on the instance"),
    (lambda: Stacked(False, torch.float8_e4m3fn), "float8_e4m3fn"),
    (lambda: Normed(False), "norm"),
])
def test_left_alone_with_the_reason(make, reason):
    model = nn.Sequential(make())
    kind, before = type(model[0]), dict(vars(model[0]))
    lina.swap(model)
    assert type(model[0]) is kind and vars(model[0]) == before
    [entry] = lina.swap_report(model)
    assert (entry.name, entry.kind, entry.swapped) == ("0", kind.__name__, False) and reason in entry.reason
    assert entry.reason in str(lina.swap_report(model))


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts(transposed):
    model, x = Model(transposed), torch.randn(33, D)
    want = results(model, x)
    assert ["lina.swap would" in entry.reason for entry in lina.swap_report(model)] == [True, True]
    lina.swap(lina.swap(model))
    assert [entry.swapped for entry in lina.swap_report(model)] == [True, True]
    assert_agree(results(model, x), want)
    with torch.no_grad():
        model.stacked.down_proj.mul_(2)             # trained meanwhile
    trained = results(model, x)
    lina.unswap(model)
    assert type(model.stacked) is Stacked and lina.swap_report(model)[1].swapped is False
    assert_agree(results(model, x), trained)


def test_a_trial_leaves_no_trace():
    model = Model()
    rng, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    called = []
    model.block.gate.register_forward_hook(lambda *_: called.append(1))
    lina.swap(model.train())
    assert torch.equal(torch.get_rng_state(), rng) and not called and model.block.training
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    model(torch.randn(2, D))
    assert called == [1]                            # the router is still a module, with its hooks


def test_copies():
    model, x = lina.swap(Model()), torch.randn(5, D)
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            for expert in twin.block.experts:               # its own weights, and those it uses
                expert.w1.weight.zero_()
        assert not torch.equal(twin(x), want) and torch.equal(model(x), want)
        twin.load_state_dict(model.state_dict())
        assert type(lina.unswap(twin).stacked) is Stacked and agree(twin(x), want)
    assert all(entry.swapped for entry in lina.swap_report(model))


def test_plain_weights_share_one_storage(monkeypatch, tmp_path):
    """No copy at a forward; one where the memory was taken away since; never a stale weight."""
    block, x, seen = Block(lambda: Gated(bias=True), norm=True), torch.randn(7, D), []
    want = results(block, x)
    moe = lina.ops.moe

    def spy(x, weight, expert, w_up, w_down, **options):
        first, given = block.experts[0], (w_up, w_down, options["b_up"])
        held = first.w1.weight, first.w2.weight, first.w1.bias
        seen.append(tuple(a.data_ptr() == b.data_ptr() for a, b in zip(given, held, strict=True)))
        return moe(x, weight, expert, w_up, w_down, **options)

    lina.swap(block)
    monkeypatch.setattr(lina.ops, "moe", spy)
    assert_agree(results(block, x), want)
    block.float().double()                           # rounds, and moves every weight
    rounded = results(block, x)
    assert seen == [(True, True, True)] * 2
    block.experts[3].w1.weight.data = block.experts[3].w1.weight.data.clone()
    assert_agree(results(block, x), rounded)
    assert seen[-1] == (False, True, True)
    block.float().double()                           # joined again
    assert torch.equal(block(x), rounded[0]) and seen[-1] == (True, True, True)
    save = pytest.importorskip("safetensors.torch")
    save.save_file(block.state_dict(), tmp_path / "block.safetensors")
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
    block.load_state_dict(save.load_file(tmp_path / "block.safetensors"))
    assert torch.equal(block(x), rounded[0]) and seen[-1] == (True, True, True)
    out = block(x).sum()
    with torch.no_grad():
        block.experts[0].w2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        out.backward()


def test_lina_own_layer_is_named():
    model = nn.Sequential(lina.MoE(D, WIDTH, 4, 2))
    [entry] = lina.swap_report(lina.swap(model))
    assert (entry.swapped, entry.reason) == (False, "lina's own layer")
    assert str(lina.swap_report(nn.Linear(2, 2))) == "no MoE-like modules found"


def test_compile_checkpoint_autocast():
    model, x = lina.swap(Model()), torch.randn(9, D)
    want = results(model, x)
    torch._dynamo.reset()
    assert_agree(results_by(torch.compile(model, fullgraph=True, backend="aot_eager"), model, x), want)
    for reentrant in (False, True):
        call = functools.partial(checkpoint, model, use_reentrant=reentrant)
        assert_agree(results_by(call, model, x), want)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x.float())
    # bfloat16 products of unit scale, some 5 in a row, summed by at most 24 terms
    assert out.dtype == torch.float32 and (out - want[0]).norm() < 5 * 2**-8 * want[0].norm()


def test_import_is_light():
    code = "import sys, lina; assert not [m for m in sys.modules if m.startswith('transformers')]"
    subprocess.run([sys.executable, "-c", code], check=True)
