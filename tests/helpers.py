"""What the tests share: twin inputs, computed tolerances, gradient comparison.

A twin is a low precision tensor and the float64 copy of exactly its values, so
that the difference of two results is the operator's own rounding and nothing
else. Tolerances come from epsilons and numbers of terms; none is a constant.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from lina.parallel.tokens import carveout

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
LOW = (torch.float32, torch.bfloat16, torch.float16)


def float_dtypes(device: str) -> tuple[torch.dtype, ...]:
    """Every dtype of logits, activations and weights that ``device`` takes."""
    return (*LOW, torch.float64) if device == "cpu" else LOW


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an operator computes in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def passes(schedule: str, transport: str) -> tuple[int, int] | None:
    """Several of schedule "lina", also over links that are so fast that by default one would do."""
    return (3, 3) if schedule == "lina" and transport != "p2p" else None


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def twin(
    values: Tensor, dtype: torch.dtype, device: str = "cpu", requires_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """``values`` rounded to ``dtype``, and the float64 copy of the rounded values; both leaves."""
    x = values.detach().to(device=device, dtype=dtype)
    ref = x.double().clone()
    return x.clone().requires_grad_(requires_grad), ref.requires_grad_(requires_grad)


def twin_inputs(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    scale: float = 1.0,
    requires_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Normal random values of standard deviation ``scale`` as a twin; the same on every device."""
    values = torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale
    return twin(values, dtype, device, requires_grad)


def separated_logits(
    T: int, E: int, dtype: torch.dtype, device: str = "cpu", *, seed: int = 0, spread: float = 8.0
) -> tuple[Tensor, Tensor]:
    """Twin [T,E] whose rows are shuffles of E even steps over ``spread``.

    Neighbours are at least one storage step apart (bf16 and fp16 are stepped by
    multiples of 1/64, exact below 4 and 32), so that float32 and float64 must
    choose the same experts even where the keys are scores plus a bias.
    """
    step = spread / max(E, 1)
    if dtype in (torch.bfloat16, torch.float16):
        step = max(round(step * 64), 1) / 64
    order = torch.rand(T, E, generator=generator(seed)).argsort(-1)
    return twin((order.double() - E // 2) * step, dtype, device)


def random_experts(T: int, E: int, K: int, *, seed: int = 0, device: str = "cpu") -> Tensor:
    """int32 [T,K]: K distinct experts for each token."""
    choice = torch.rand(T, E, generator=generator(seed)).argsort(-1)[:, :K]
    return choice.int().contiguous().to(device)


def strided(x: Tensor) -> Tensor:
    """A leaf with the values of ``x`` whose last dimension has stride 2."""
    wide = x.detach().new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    view = wide[..., ::2]
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


def assert_within_rounding(
    got: Tensor,
    ref: Tensor,
    terms: float,
    *,
    scale: Tensor | float | None = None,
    inner: float = 0,
    name: str = "result",
) -> None:
    """One rounding of the result, plus ``terms`` roundings of its scale.

    Result: one epsilon of ``got``'s dtype times the element. Arithmetic: 4 *
    ``terms`` epsilons of the dtype computed in (float32; float64 for float64)
    times ``scale``, by default the largest finite element. Values that were
    stored in ``got``'s dtype on the way (an expert's activations) add ``inner``
    roundings of that dtype to the scale. NaN and infinities must be equal.
    """
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(ref.shape)}"
    if ref.numel() == 0:
        return
    got64, want = got.detach().double().cpu().flatten(), ref.detach().double().cpu().flatten()
    finite = want.isfinite()
    odd = ~finite & ~((got64 == want) | (got64.isnan() & want.isnan()))
    odd |= finite & ~got64.isfinite()
    assert not odd.any(), _worst(name, got64, want, odd.double(), "NaN or infinity differs")
    zero = want.new_zeros(())
    size = torch.where(finite, want.abs(), zero)
    if scale is None:
        scale = size.max()
    elif isinstance(scale, Tensor):
        scale = scale.detach().double().cpu().expand(ref.shape).flatten()
    eps, acc = torch.finfo(got.dtype).eps, torch.finfo(acc_dtype(got.dtype)).eps
    subnormal = torch.finfo(got.dtype).smallest_normal * eps  # what is smaller rounds to steps of this
    limit = eps * size + (4 * terms * acc + inner * eps) * scale + subnormal
    error = torch.where(finite, (got64 - want).abs(), zero)
    if (error > limit).any():
        raise AssertionError(_worst(name, got64, want, error - limit, f"limit {limit.max():.3g} at most"))


def _worst(name: str, got: Tensor, want: Tensor, excess: Tensor, why: str) -> str:
    i = int(excess.argmax())
    return f"{name}[{i}] of {got.numel()}: got {got[i]:.9g}, want {want[i]:.9g}; {why}"


def grads(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Gradients of <outputs, random cotangents> with respect to ``inputs``.

    Cotangents are rounded to bf16, so that every dtype and device gets the same.
    An input that the outputs do not depend on gets zeros. The graph is kept.
    """
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    draw = generator(seed)
    seeds = [
        torch.randn(o.shape, generator=draw).bfloat16().to(device=o.device, dtype=o.dtype) for o in outputs
    ]
    found = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True, retain_graph=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True))


def assert_same_grads(
    got: Sequence,
    ref: Sequence,
    terms: float,
    *,
    inner: float = 0,
    scales: Sequence | None = None,
    names: Sequence[str] | None = None,
    seed: int = 1,
) -> None:
    """``got`` and ``ref`` are (output or tuple of outputs, input, input, ..).

    The same random cotangents go into both; each input's gradient must have its
    input's dtype and shape and agree within rounding (``scales``, ``names``: by input).
    """
    inputs, ref_inputs = got[1:], ref[1:]
    pairs = zip(inputs, grads(got[0], inputs, seed), grads(ref[0], ref_inputs, seed), strict=True)
    for i, (x, g, want) in enumerate(pairs):
        name = f"gradient of {names[i] if names else f'input {i}'}"
        assert g.dtype == x.dtype and g.shape == x.shape, f"{name}: {g.dtype} {tuple(g.shape)}"
        assert_within_rounding(
            g, want, terms, inner=inner, name=name, scale=None if scales is None else scales[i]
        )


def assert_repeatable(call: Callable[[], Sequence[Tensor]], times: int = 3) -> None:
    """Every call gives the same bits."""
    first = call()
    for _ in range(times):
        for a, b in zip(first, call(), strict=True):
            assert a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.uint8) if x.dim() else x.detach().reshape(1).view(torch.uint8)


def assert_no_double_backward(output: Tensor, x: Tensor) -> None:
    """A gradient of a gradient is refused with a clear error, never silently wrong."""
    (grad,) = torch.autograd.grad(output.double().square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(grad.sum(), x)
    except RuntimeError as error:
        text = str(error)
        assert "lina" in text or "once_differentiable" in text, f"unclear error: {text}"
    else:
        raise AssertionError("a double backward did not raise")


def assert_no_forward_mode(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A forward-mode derivative is refused: a raw operator would drop the tangent and give zero."""
    x = x.detach()
    try:
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    except RuntimeError as error:
        text = str(error)
        assert any(word in text for word in ("jvp", "forward mode", "forward AD")), f"unclear error: {text}"
    else:
        raise AssertionError("forward-mode differentiation did not raise")


def on_side_stream(call: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """CUDA: runs ``call`` on a new stream that first sleeps: a kernel on a wrong stream is too early."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def replayed(
    call: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], values: Sequence[Tensor]
) -> Sequence[Tensor]:
    """CUDA: captures ``call`` into a graph over ``inputs``, then replays it after copying ``values`` in."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # loads kernels before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    with torch.no_grad():
        for x, v in zip(inputs, values, strict=True):
            x.copy_(v)
    graph.replay()
    torch.cuda.synchronize()
    return result


def take_turns(ranks: list[Iterator], seed: int, ahead: Sequence[int] = (1, 3, 40)) -> None:
    """Runs models of ranks, which are generators, to their ends.

    One at a time, chosen by chance, runs ``ahead`` steps, as when another's kernel starts late.
    """
    draw = random.Random(seed)
    for _ in range(100_000):
        if not ranks:
            return
        chosen = draw.choice(ranks)
        for _ in range(draw.choice(ahead)):
            try:
                next(chosen)
            except StopIteration:
                ranks.remove(chosen)
                break
    raise AssertionError("the ranks wait for each other for ever")


class Carveout:
    """In the place of torch's setting, which it sets too where torch has it; use it ``with``."""

    def __init__(self) -> None:
        self.value: int | None = None
        self._torchs = getattr(torch._C, "_set_sm_carveout_experimental", None)

    def set(self, value: int | None) -> None:
        self.value = value
        if self._torchs is not None:
            self._torchs(value)

    def __enter__(self) -> Carveout:
        self._patch = mock.patch.multiple(carveout, _get=lambda: self.value, _set=self.set)
        self._patch.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._patch.stop()
        self.set(None)
