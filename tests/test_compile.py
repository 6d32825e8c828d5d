"""The whole layer under torch.compile and torch.export. T tokens, D width."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lina

import toolchain
from helpers import assert_within_rounding, generator

D, F, E, K = 24, 40, 8, 3


def inductor_compiler() -> str | None:
    """Why inductor cannot compile for the CPU here, or None. It takes CXX, else g++."""
    command = toolchain.cxx_compiler()
    if command is None or shutil.which(shlex.split(command[0])[0]) is None:
        return "no C++ compiler, which torch's inductor needs"
    done = subprocess.run(
        [*command, "-fopenmp", "-E", "-x", "c++", "-"], input=b"#include <omp.h>\n", capture_output=True
    )
    return None if done.returncode == 0 else "the C++ compiler has no OpenMP, which torch's inductor needs"


@pytest.fixture
def inductor() -> None:
    why = inductor_compiler()
    if why:
        pytest.skip(why)


def made(**options) -> lina.MoE:
    torch.manual_seed(3)
    torch._dynamo.reset()
    return lina.MoE(D, F, E, K, **options)


def gradients(outputs: tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Each graph is used once: torch.compile may take its buffers for the gradients."""
    draw = generator(7)
    seeds = [torch.randn(o.shape, generator=draw).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, seeds)


def results(call, layer: lina.MoE, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, auxiliary loss and all gradients."""
    y = call(x)
    loss = lina.aux_loss(layer)
    outputs = (y, loss) if loss.requires_grad else (y,)
    return *outputs, *gradients(outputs, [x, *layer.parameters()])


@pytest.mark.slow
def test_inductor_for_any_number_of_tokens(inductor):
    """Dynamic T: none, one (which torch specialises), and two sizes of one graph."""
    layer = made(balance_coef=0.1, z_coef=0.01)
    compiled = torch.compile(layer, dynamic=True)
    for T in (64, 5, 0, 1):
        x = torch.randn(T, D, generator=generator(T)).requires_grad_()
        # Inductor's own float32 sums: over E experts, T tokens, D, F and K values.
        for got, want in zip(results(compiled, layer, x), results(layer, layer, x), strict=True):
            assert_within_rounding(got, want.double(), terms=D + F + E + K + T, name=f"{T=}")


@pytest.mark.slow
def test_inductor_under_autocast(inductor):
    layer = made()
    compiled = torch.compile(layer)
    x = torch.randn(33, D, generator=generator(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(x), layer(x)
    assert got.dtype == torch.bfloat16
    found, ref = (gradients((y,), [x, *layer.parameters()]) for y in (got, want))
    assert all(g.dtype == torch.float32 for g in found)
    eps = torch.finfo(torch.bfloat16).eps
    # The same operators on the same bf16 values, but torch may fuse the casts around them: a sum of two
    # bf16 gradients, of the router's and the experts' x, may be rounded once or twice.
    for g, r in zip((got, *found), (want, *ref), strict=True):
        assert ((g - r).abs() <= 2 * eps * r.abs().max()).all()


@pytest.mark.parametrize("fused", [False, True], ids=["aot_eager", "inductor"])
def test_checkpointed_layer_is_one_graph(fused, request):
    if fused:
        request.getfixturevalue("inductor")
    layer = made()
    block = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False),
        fullgraph=True,
        backend="inductor" if fused else "aot_eager",
    )
    x = torch.randn(33, D, generator=generator(1)).requires_grad_()
    for got, want in zip(results(block, layer, x), results(layer, layer, x), strict=True):
        assert_within_rounding(got, want.double(), terms=D + F + E + K + 33)


def test_export():
    """An evaluating layer as one graph of lina's operators, for any number of tokens."""
    layer = made(select_bias=True, score="sigmoid", shared_experts=1).eval()
    tokens = torch.export.Dim("T", min=2, max=1 << 20)
    program = torch.export.export(layer, (torch.randn(9, D),), dynamic_shapes=({0: tokens},))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"lina.gate_fwd.default", "lina.sort.default", "lina.experts_fwd.default"} <= called
    for T in (9, 2, 40):
        x = torch.randn(T, D, generator=generator(T))
        with torch.no_grad():
            assert torch.equal(program.module()(x), layer(x))
