"""Recognising plain modules that loop over a list of experts.

The documented shape (docs/swap.md): a block with a router ``gate`` or ``router`` (nn.Linear), a
list ``experts`` (nn.ModuleList) of equal feed-forward networks of two or three nn.Linear, and an
integer ``top_k``. No other parameters. Which activation and which gate it computes is found, and
that it computes nothing else is checked, by running its own code on small random input with random
weights, in evaluation and in training mode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lina import ops
from lina.swap.loop import Form, LoopBlock, parts, route, stacked
from lina.swap.probe import agree, line, quiet, random, traces
from lina.swap.shell import MARKS, Match, is_dtensor

ROUTERS = ("gate", "router")
TOP_K = ("top_k", "num_experts_per_tok", "topk", "k")
# Names of an expert's gate, up and down products; a pair has no gate.
LINEARS = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"), ("w1", "w2"), ("fc1", "fc2"),
           ("up_proj", "down_proj"), ("linear1", "linear2"))
WIDTH = 8    # of an expert, in the copy that is tried


def examine(block: Any) -> Match | str | None:
    """A match, the reason why not, or None where it is no such module."""
    experts = block._modules.get("experts")
    router = next((name for name in ROUTERS if isinstance(block._modules.get(name), nn.Linear)), None)
    if not isinstance(experts, nn.ModuleList) or len(experts) < 2 or router is None:
        return None
    names = next((names for names in (*LINEARS, _sequential(experts[0]))
                  if names and all(isinstance(experts[0]._modules.get(n), nn.Linear) for n in names)), None)
    if names is None:
        return f"its experts ({type(experts[0]).__name__}) are not feed-forward networks with known names"
    reason = _obstacle(block, router, experts, names)
    if reason is not None:
        return reason
    top_k = next(name for name in TOP_K if isinstance(getattr(block, name, None), int))
    found = _tried(block, router, top_k, names)
    if isinstance(found, str):
        return found
    gate = f"{found.score} gate, {found.activation}"
    return Match(LoopBlock, found, len(experts), f"loop over {type(experts[0]).__name__}, {gate}")


def _sequential(expert: Any) -> tuple[str, ...]:
    """Names of the two nn.Linear of an nn.Sequential."""
    if not isinstance(expert, nn.Sequential):
        return ()
    names = tuple(name for name, child in expert._modules.items() if isinstance(child, nn.Linear))
    return names if len(names) == 2 else ()


def _obstacle(block: Any, router: str, experts: Any, names: tuple[str, ...]) -> str | None:
    """Why the block is not of the documented shape, found without running it."""
    if not any(isinstance(getattr(block, name, None), int) for name in TOP_K):
        return f"it has no integer attribute {', '.join(TOP_K[:-1])} or {TOP_K[-1]}"
    if len(experts) > ops.MAX_EXPERTS:
        return f"it has {len(experts)} experts, lina takes at most {ops.MAX_EXPERTS}"
    if getattr(block, router).out_features != len(experts):
        return f"{router} has {getattr(block, router).out_features} outputs for {len(experts)} experts"
    if "forward" in vars(block):
        return "its forward is replaced on the instance (by a hook of another library?)"
    known = {id(p) for p in (*getattr(block, router).parameters(), *experts.parameters())}
    more = [name for name, p in block.named_parameters() if id(p) not in known]
    if more:
        return f"it has parameters beside router and experts: {', '.join(more)}"
    if any(True for _ in experts.buffers()):
        return "its experts have buffers"
    first = experts[0]
    for e, expert in enumerate(experts):
        if type(expert) is not type(first):
            return f"expert {e} is {type(expert).__name__}, expert 0 is {type(first).__name__}"
        for name in names:
            linear, like = expert._modules.get(name), first._modules[name]
            if type(linear) is not nn.Linear:
                return f"expert {e}'s {name} is {type(linear).__name__}, not nn.Linear"
            if _shapes(linear) != _shapes(like):
                return f"expert {e}'s {name} differs in shape or dtype from expert 0's"
        if len(list(expert.parameters())) != sum(len(_shapes(expert._modules[n])) for n in names):
            return f"expert {e} has parameters beside {', '.join(names)}"
    if len({linear.bias is None for linear in (first._modules[name] for name in names[:-1])}) > 1:
        return f"of {' and '.join(names[:-1])} only one has a bias"
    if any(is_dtensor(p) for p in block.parameters()):
        return "its parameters are DTensors: call lina.swap before sharding the model"
    if first._modules[names[0]].weight.dtype not in ops.FLOATS:
        return f"its weights are {first._modules[names[0]].weight.dtype}"
    for name, module in experts.named_modules():
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
                module._backward_pre_hooks)):
            return f"experts.{name} has hooks, which lina's computation would not call"
    taken = [name for name in MARKS if hasattr(experts, name)]
    return f"its experts list has attributes {taken} of its own" if taken else None


def _shapes(linear: Any) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, p.shape, p.dtype) for name, p in linear.named_parameters()]


def _tried(block: Any, router: str, top_k: str, names: tuple[str, ...]) -> Form | str:
    """The form that computes what the block computes; the reason where there is none."""
    with quiet() as generator:
        try:
            twin = _twin(block, names, generator)
        except Exception as error:  # its attributes are not ours: whatever refuses a copy is the reason
            return f"it cannot be copied for a trial: {line(error)}"
        D = getattr(twin, router).in_features
        x_TD = random((24, D), generator)
        activation = _activation(twin, names, x_TD)
        if activation is None:
            return "its experts compute none of lina's activations of their weights"
        tried = []
        for train in (False, True):
            twin.train(train)
            runs = []
            for x in (x_TD.view(2, 12, D), x_TD):
                before = traces(twin)
                try:
                    runs.append((x, twin.forward(x)))
                except Exception as error:
                    problem = line(error)
                if traces(twin) != before:
                    return "its forward changes buffers or attributes, which lina's would not"
            if not runs:
                return f"its forward could not be tried: {problem}"
            tried.append(runs)
        for form in _forms(block, router, top_k, names, activation):
            if all(_same(twin, form, x, want) for x, want in tried[0]):
                if all(_same(twin, form, x, want) for x, want in tried[1]):
                    return form
                return "it computes something else in training mode (dropout or noise)"
    return "its result is not that of a softmax or sigmoid gate over its experts"


def _forms(block: Any, router: str, top_k: str, names: tuple[str, ...],
           activation: str) -> Iterator[Form]:
    flag = [None] if isinstance(getattr(block, "norm_topk_prob", None), bool) else []
    for logits in (False, True):
        for score in ("softmax", "sigmoid"):
            for renormalize in (*flag, True, False):
                yield Form(router, top_k, names, activation, score, renormalize, logits)


def _twin(block: Any, names: tuple[str, ...], generator: torch.Generator) -> Any:
    """A copy in float64 on the CPU with random weights, no hooks, and experts of width 8.

    The width inside an expert is its own affair, so a narrow one shows the same function; a large
    layer is then tried in little time and memory.
    """
    inner = {id(p): 0 for expert in block.experts for name in names[:-1]
             for p in expert._modules[name].parameters()}
    inner.update({id(expert._modules[names[-1]].weight): 1 for expert in block.experts})
    memo: dict[int, Any] = {}
    for p in block.parameters():
        shape = list(p.shape)
        if id(p) in inner:
            shape[inner[id(p)]] = WIDTH
        memo[id(p)] = nn.Parameter(random(tuple(shape), generator) * shape[-1]**-0.5, requires_grad=False)
    twin = copy.deepcopy(block, memo)
    for expert in twin.experts:
        for name in names:
            linear = expert._modules[name]
            linear.out_features, linear.in_features = linear.weight.shape
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        for name, buffer in module._buffers.items():
            if buffer is not None:
                dtype = torch.float64 if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = buffer.to("cpu", dtype)
    return twin


def _activation(twin: Any, names: tuple[str, ...], x_TD: Tensor) -> str | None:
    """What every expert, on its own, computes."""
    one_T1, zero_T1 = x_TD.new_ones(len(x_TD), 1), torch.zeros(len(x_TD), 1, dtype=torch.int32)
    fitting = [a for a in ops.ACTIVATIONS if (a in ops.GATED) == (len(names) == 3)]
    twin.eval()
    for expert, linears in zip(twin.experts, parts(twin.experts, names), strict=True):
        try:
            want = expert(x_TD)
        except Exception:  # an expert called in another way than expert(x): not the documented shape
            return None
        fitting = [a for a in fitting if agree(
            ops.moe(x_TD, one_T1, zero_T1, activation=a, **stacked([linears])), want)]
    return fitting[0] if fitting else None


def _same(twin: Any, form: Form, x: Tensor, want: Any) -> bool:
    """The form's result equals `want`, to float32 rounding where the block's router uses float32."""
    x_TD = x.reshape(-1, x.shape[-1])
    logits_TE, routing = route(twin, form, x_TD)
    got_TD = torch.zeros_like(x_TD)
    for e, expert in enumerate(twin.experts):
        weight_T1 = (routing.weight_TK * (routing.expert_TK == e)).sum(-1, keepdim=True)
        if bool(weight_T1.any()):
            got_TD += weight_T1 * expert(x_TD)
    if form.logits:
        if not isinstance(want, tuple) or len(want) != 2 or not agree(logits_TE, want[1]):
            return False
        want = want[0]
    return agree(got_TD.view(x.shape), want, torch.finfo(torch.float32).eps / 100)
