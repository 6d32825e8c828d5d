"""lina.swap on Hugging Face transformers 5 models: random weights, against experts_implementation="eager"."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lina

transformers = pytest.importorskip("transformers", minversion="5.0")

# Nothing is a multiple of anything else, so that a wrong layout cannot fit: D 24, F 20, E 6, K 2.
SIZES = dict(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS = {
    "mixtral": ("Mixtral", dict(intermediate_size=20, num_local_experts=6)),
    "mixtral-gelu": ("Mixtral", dict(intermediate_size=20, num_local_experts=6, hidden_act="gelu")),
    "qwen3": ("Qwen3Moe", dict(moe_intermediate_size=20, num_experts=6, head_dim=6, norm_topk_prob=True)),
    "qwen3-no-norm": ("Qwen3Moe", dict(moe_intermediate_size=20, num_experts=6, head_dim=6)),
    "olmoe": ("Olmoe", dict(intermediate_size=20, num_experts=6)),
    "qwen2": ("Qwen2Moe", dict(moe_intermediate_size=20, shared_expert_intermediate_size=28, num_experts=6)),
    "gpt-oss": ("GptOss", dict(intermediate_size=20, num_local_experts=6, head_dim=6, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0))),
    "deepseek-v3": ("DeepseekV3", dict(moe_intermediate_size=20, n_routed_experts=6, n_group=2, topk_group=1,
                                       first_k_dense_replace=1, intermediate_size=32, q_lora_rank=8,
                                       kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
                                       num_key_value_heads=4, v_head_dim=6)),
}
# The three named in the README; the others share their experts' shape.
NAMED = ["mixtral", "qwen3", "olmoe"]
# Roundings to float32 between the embedding and the logits: two norms and a router for each of two
# layers, and the last norm. Each moves its result by half an epsilon; behind it follow products of
# unit scale, so no more than their sum arrives; 4 is the house's allowance for one.
FLOAT32_ROUNDINGS = 7


def build(which: str, dtype=torch.float64) -> nn.Module:
    name, options = MODELS[which]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():       # the library draws routers as zeros, and small
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1]**-0.5)
    return model.to(dtype).train()


def tokens() -> Tensor:
    return torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, **options) -> dict[str, Tensor]:
    """Loss, logits and the gradient of every parameter."""
    model.zero_grad()
    out = model(input_ids=tokens(), labels=tokens(), **options)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], roundings: float, eps: float) -> None:
    assert got.keys() == want.keys()
    for name, b in want.items():
        error = (got[name] - b).abs().max()
        assert error <= 4 * roundings * eps * b.abs().max(), f"{name}: {error} of {b.abs().max()}"


class Lifted(TorchFunctionMode):
    """Runs a model's float32 steps (norms, routers) in float64, leaving only the experts to differ."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def lift(x):
            return torch.float64 if x is torch.float32 else x

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(lift, args), **{key: lift(x) for key, x in (kwargs or {}).items()})


def count_calls(monkeypatch) -> list[int]:
    calls, moe = [], lina.ops.moe
    monkeypatch.setattr(lina.ops, "moe", lambda *a, **k: (calls.append(1), moe(*a, **k))[1])
    return calls


@pytest.mark.parametrize("which", MODELS)
def test_parity(which, monkeypatch):
    model = build(which)
    keys = list(model.state_dict())
    routed = model.config.to_dict().get("output_router_logits") is not None
    options = dict(output_router_logits=True) if routed else {}
    want = results(model, **options)
    with Lifted():
        want_lifted = results(model)
    lina.swap(model)
    report = lina.swap_report(model)
    layers = 1 if which == "deepseek-v3" else 2         # its first layer is dense
    assert len(report) == layers and all(entry.swapped and entry.kind.endswith("Experts") for entry in report)
    assert list(model.state_dict()) == keys
    calls = count_calls(monkeypatch)
    got = results(model, **options)
    assert len(calls) == layers
    assert_close(got, want, FLOAT32_ROUNDINGS, torch.finfo(torch.float32).eps)
    with Lifted():
        # float64 throughout; sums of up to F = 20 to V = 61 terms, some 20 products deep
        assert_close(results(model), want_lifted, 200, torch.finfo(torch.float64).eps)
    lina.unswap(model)
    assert not any(entry.swapped for entry in lina.swap_report(model))
    again = results(model, **options)
    assert all(torch.equal(again[name], want[name]) for name in want)


@pytest.mark.parametrize("which", NAMED)
def test_save_load_generate(which, tmp_path):
    model = build(which, torch.float32).eval()
    ask = dict(max_new_tokens=8, do_sample=False)
    prompt = tokens()[:, :5]
    said = model.generate(prompt, **ask)
    model.save_pretrained(tmp_path / "original")
    lina.swap(model)
    assert torch.equal(model.generate(prompt, **ask), said)
    model.save_pretrained(tmp_path / "swapped")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("original", "swapped"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    loaded = type(model).from_pretrained(tmp_path / "swapped", attn_implementation="eager").eval()
    assert not any(entry.swapped for entry in lina.swap_report(loaded))
    assert torch.equal(lina.swap(loaded)(prompt).logits, model(prompt).logits)


def test_unknown_activation_is_left_alone():
    name, options = MODELS["mixtral"]
    MODELS["tanh"] = (name, dict(options, hidden_act="gelu_pytorch_tanh"))
    try:
        model = lina.swap(build("tanh"))
    finally:
        del MODELS["tanh"]
    report = lina.swap_report(model)
    assert [entry.name for entry in report] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert not any(entry.swapped for entry in report) and "hidden_act='gelu_pytorch_tanh'" in str(report)


def test_other_modules_are_named():
    if not hasattr(transformers, "JetMoeConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no JetMoe")
    model = transformers.JetMoeForCausalLM(transformers.JetMoeConfig(
        **{**SIZES, "num_hidden_layers": 1}, intermediate_size=20, num_local_experts=4, kv_channels=6))
    report = lina.swap_report(lina.swap(model))
    assert ("model.layers.0.mlp", "JetMoeMoE", False) in [entry[:3] for entry in report]
    assert not any(entry.swapped for entry in report)


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
def test_compile_checkpoint_autocast():
    model = build("qwen3")
    reference = results(model)
    lina.swap(model)
    want = results(model)
    model.gradient_checkpointing_enable()
    got = results(model)
    assert all(torch.equal(got[name], want[name]) for name in want)
    model.gradient_checkpointing_disable()

    block, x = model.model.layers[0].mlp, torch.randn(2, 5, 24, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    # the router's float32 softmax may be rounded otherwise when compiled
    assert_close({"": compiled(x).detach()}, {"": block(x).detach()}, 1, torch.finfo(torch.float32).eps)

    model.float()
    eager = lina.unswap(copy.deepcopy(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        errors = [(m(tokens()).logits.double() - reference["logits"]).norm() for m in (model, eager)]
        hidden = block(x.float())
    # as far from float64 as the original, give or take the luck of two roundings
    assert hidden.dtype == torch.float32 and errors[0] <= 2 * errors[1]


def _two_ranks(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = lina.mesh(ep=2)
    for which in ("mixtral", "gpt-oss"):
        model = build(which)
        whole, parameters = results(model), dict(model.named_parameters())
        weights = copy.deepcopy(model.state_dict())
        got = results(lina.swap(model, mesh))        # both ranks have the same tokens
        for name in [name for name in whole if ".experts." in name]:
            part = 2 * whole[name].narrow(0, 3 * rank, 3)     # each expert sees them twice
            assert parameters[name].shape == part.shape
            whole[name] = part
        assert_close(got, whole, FLOAT32_ROUNDINGS, torch.finfo(torch.float32).eps)
        lina.unswap(model)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert all(p is parameters[name] for name, p in model.named_parameters())
    dist.destroy_process_group()


@pytest.mark.multi
@pytest.mark.slow       # two processes import transformers
def test_two_ranks(tmp_path):
    """A whole model with experts spread over two ranks, and back."""
    mp.start_processes(_two_ranks, (str(tmp_path / "store"),), nprocs=2, start_method="spawn")
