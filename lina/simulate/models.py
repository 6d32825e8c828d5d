"""Layer lists from published shapes: what a rank computes, sends and reduces in a step.

Times follow from a machine's rates: products at `flops`, weights and activations at `memory`
bytes a second. Routing is balanced; each expert gets the same number of rows.
"""

from __future__ import annotations

import dataclasses
import math

from lina.simulate import Experts, Layer, Line, Links

LAUNCH_S = 10e-6            # a product's, or a small kernel's, fixed cost


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one rank: products (flop/s) and memory (bytes/s) as reached, and its links."""

    flops: float
    memory: float
    links: Links


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model. attention: parameters of each attention matrix of a layer; experts 0: one a rank.

    dim D, ffn expert width F, gated: three matrices an expert, else two; shared: width of a shared
    expert; dense_layers: the first layers, with a dense FFN of width dense_ffn; score: width of all
    heads' scores (q k^T and times v, so 4 T S score flops, halved where causal); vocab V, tied:
    one matrix for embedding and head; act, grad: bytes of an activation and of a gradient.
    """

    name: str
    layers: int
    dim: int
    ffn: int
    top_k: int
    experts: int
    attention: tuple[int, ...]
    score: int
    vocab: int
    seq: int
    gated: bool = True
    tied: bool = False
    shared: int = 0
    dense_layers: int = 0
    dense_ffn: int = 0
    act: int = 2
    grad: int = 2
    cross_from: int | None = None       # layers from here on attend twice (decoder)
    causal_from: int = 0

    @property
    def expert_params(self) -> int:
        return (3 if self.gated else 2) * self.dim * self.ffn


def _square(count: int, dim: int) -> tuple[int, ...]:
    return (dim * dim,) * count


def _grouped(dim: int, heads: int, kv: int, width: int) -> tuple[int, ...]:
    return dim * heads * width, dim * kv * width, dim * kv * width, heads * width * dim


# Lina's models (arXiv:2210.17223): every FFN an MoE layer, top-2, one expert a GPU; vocabulary, sequence
# and 16-bit gradients are assumed. Transformer-XL has a fifth square matrix, for relative positions
# (arXiv:1901.02860).
MODELS = {shape.name: shape for shape in (
    Shape("gpt2", 12, 768, 3072, 2, 0, _square(4, 768), 768, 50257, 512, gated=False, tied=True),
    Shape("bert2gpt2", 24, 768, 3072, 2, 0, _square(4, 768), 768, 50257, 512, gated=False, tied=True,
          cross_from=12, causal_from=12),
    Shape("transformer-xl", 24, 1024, 4096, 2, 0, _square(5, 1024), 1024, 32000, 512, gated=False, tied=True),
    # Jiang et al., arXiv:2401.04088; Qwen3 report, arXiv:2505.09388; DeepSeek-V3, arXiv:2412.19437.
    Shape("mixtral-8x7b", 32, 4096, 14336, 2, 8, _grouped(4096, 32, 8, 128), 4096, 32000, 4096),
    Shape("qwen3-30b-a3b", 48, 2048, 768, 8, 128, _grouped(2048, 32, 4, 128), 4096, 151936, 4096),
    Shape("deepseek-v3", 61, 7168, 2048, 8, 256,
          (7168 * 1536, 1536 * 128 * 192, 7168 * 576, 512 * 128 * 256, 128 * 128 * 7168), 128 * 160, 129280,
          4096, shared=2048, dense_layers=3, dense_ffn=18432),
)}


def _line(alpha_s: float, gb_s: float) -> Line:
    return alpha_s, 1e-9 / gb_s


def _links(node: int, near: tuple[float, float], far: tuple[float, float]) -> Links:
    near_line, far_line = _line(*near), _line(*far)
    return Links(node, (near_line, far_line), (near_line, far_line), share=1 / 2.17)


# GB/s that one rank sends. A NIC of 100 Gb/s, 12.5 GB/s, serves the four GPUs of Lina's nodes; the rate
# of products is the one at which a2a's take the share of the step that the paper reports. The H200
# figures were measured on two GPUs: NVLink, and through host memory, as over a 200 Gb/s NIC; so was
# `share`: an a2a beside an allreduce took 2.17 times as long.
PRESETS = {
    "a100-100g": Machine(25e12, 1.2e12, _links(4, (10e-6, 200), (30e-6, 12.5 / 4))),
    "h200-nvlink": Machine(500e12, 4.0e12, _links(8, (10e-6, 380), (30e-6, 23))),
    "h200-host": Machine(500e12, 4.0e12, _links(1, (20e-6, 23), (20e-6, 23))),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A shape laid out on ranks; `step` takes its parts. params: of one rank."""

    shape: Shape
    layers: tuple[Layer, ...]
    optimizer_s: float
    params: int


def spread(shape: Shape, ranks: int) -> int:
    """The largest ep that both `ranks` and the model's experts allow."""
    return math.gcd(ranks, shape.experts or ranks)


def copies(experts: int, top_k: int, ep: int) -> float:
    """Ranks other than its own that a token is sent to, on average, routed evenly: one copy a rank."""
    return (ep - 1) * (1 - math.comb(experts - experts // ep, top_k) / math.comb(experts, top_k))


def build(shape: Shape, ranks: int, ep: int, machine: Machine, *, tokens: int = 8192,
          copy_per_expert: bool = False) -> Model:
    """The layers of `shape` on each of `ranks` ranks, `tokens` tokens a rank.

    copy_per_expert: a token travels once for each of its experts (as Lina's baseline sends it), not
    once for each rank. Raises ValueError naming what does not divide.
    """
    experts = shape.experts or ranks
    if ep < 1 or ranks % ep or experts % ep:
        raise ValueError(f"simulate: ep={ep}, a divisor of ranks={ranks} and of {experts} experts")
    if shape.top_k > experts:
        raise ValueError(f"simulate: ranks={ranks}, at least {shape.top_k} experts for {shape.name}")
    if tokens < 1:
        raise ValueError(f"simulate: tokens={tokens}, at least 1")
    moe = _experts(shape, experts, ep, machine, tokens, copy_per_expert)
    grads = _gradients(shape)
    layers = [Layer("embedding", (0.0, 0.0), (shape.vocab * shape.dim * shape.grad,))]
    for i in range(shape.layers):
        seconds = _dense_flops(shape, i, tokens) / machine.flops
        layers.append(Layer(f"layer {i}", (seconds, 2 * seconds), grads[i],
                            None if i < shape.dense_layers else moe))
    head = 2 * tokens * shape.vocab * shape.dim / machine.flops
    layers.append(Layer("head", (head, 2 * head), () if shape.tied else layers[0].dense_grads))
    params = sum(sum(layer.dense_grads) for layer in layers) // shape.grad
    params += (shape.layers - shape.dense_layers) * experts // ep * shape.expert_params
    # Adam reads parameter, gradient and two moments, and writes all but the gradient: 28 bytes.
    return Model(shape, tuple(layers), 28 * params / machine.memory, params)


def _attention(shape: Shape, layer: int) -> tuple[int, ...]:
    twice = shape.cross_from is not None and layer >= shape.cross_from
    return shape.attention * (2 if twice else 1)


def _ffn(shape: Shape, layer: int, experts: int = 0) -> tuple[int, ...]:
    """The dense matrices beside attention: FFN, or router and shared expert."""
    if layer < shape.dense_layers:
        return (shape.dim * shape.dense_ffn,) * 3
    shared = (shape.dim * shape.shared,) * 3 if shape.shared else ()
    return ((shape.dim * experts,) if experts else ()) + shared


def _gradients(shape: Shape) -> list[tuple[int, ...]]:
    return [tuple(n * shape.grad for n in _attention(shape, i) + _ffn(shape, i, shape.experts))
            for i in range(shape.layers)]


def _dense_flops(shape: Shape, layer: int, tokens: int) -> float:
    attention = _attention(shape, layer)
    times = len(attention) // len(shape.attention)
    scores = 4.0 * tokens * shape.seq * shape.score * times
    if layer >= shape.causal_from:
        scores /= 2
    return 2 * tokens * sum(attention + _ffn(shape, layer)) + scores


def _experts(shape: Shape, experts: int, ep: int, machine: Machine, tokens: int, pairs: bool) -> Experts:
    rows = tokens * shape.top_k
    sent = rows * (ep - 1) / ep if pairs else tokens * copies(experts, shape.top_k, ep)
    nbytes = sent * shape.dim * shape.act
    params = experts // ep * shape.expert_params
    weights_s = params * shape.act / machine.memory
    row_s = 2 * shape.expert_params / machine.flops
    # Router, sort and combine: the router's product, and tokens read and written once each.
    gate_s = 2 * tokens * shape.dim * (experts / machine.flops + shape.act / machine.memory)
    return Experts(
        pass_s=((LAUNCH_S + weights_s, row_s), (2 * LAUNCH_S + 2 * weights_s, 2 * row_s)),
        own_rows=rows / ep, remote_rows=rows - rows / ep, dispatch_bytes=(nbytes, nbytes),
        return_bytes=(nbytes, nbytes), grad_bytes=params * shape.grad,
        gate_s=(LAUNCH_S + gate_s, LAUNCH_S + gate_s), late_s=(LAUNCH_S + weights_s, row_s))
