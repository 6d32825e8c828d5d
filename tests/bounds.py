"""What rounding may do to the experts: each intermediate value with a bound on its error.

``moe_bounds`` follows the arithmetic that ``csrc/ops/experts.h`` and ``combine.h`` promise, in float64,
and carries beside every value the largest difference that rounding can cause: one epsilon of the stored
dtype wherever a tensor is stored in it, n epsilons of the dtype of sums for a sum of n terms, and what
earlier errors make of it. Where an activation has a kink (relu, the clamps) and the kink lies within a
value's error, the slope may be that of either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lina import reference

from helpers import acc_dtype

FUNCTION = 16  # epsilons that evaluating exp, erf and the formula around them may cost
CURVATURE = {"silu": 0.5, "gelu": 0.8, "relu": 0.0, "relu2": 2.0}  # largest |s''| away from kinks


@dataclass
class Bounded:
    """A float64 value and the most that a computed one may differ from it, element by element."""

    value: Tensor
    error: Tensor

    @property
    def most(self) -> Tensor:
        return self.value.abs() + self.error

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.value + other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        return Bounded(self.value * other.value, self.error * other.most + self.value.abs() * other.error)

    def __getitem__(self, index) -> Bounded:
        return Bounded(self.value[index], self.error[index])

    @property
    def T(self) -> Bounded:
        return Bounded(self.value.T, self.error.T)

    def rounded(self, eps: float) -> Bounded:
        return Bounded(self.value, self.error + eps * self.most)

    def stored(self, dtype: torch.dtype) -> Bounded:
        """Rounded to ``dtype``, below its normal numbers too."""
        info = torch.finfo(dtype)
        return Bounded(self.value, self.error + info.eps * self.most + info.smallest_normal * info.eps)

    def mm(self, other: Bounded, eps: float) -> Bounded:
        """A product whose sums round once a term."""
        gamma = (self.value.shape[1] + 1) * eps
        return Bounded(
            self.value @ other.value,
            self.error @ other.most + self.value.abs() @ other.error + gamma * (self.most @ other.most),
        )

    def total(self, dim: int, eps: float) -> Bounded:
        gamma = (self.value.shape[dim] + 1) * eps
        return Bounded(self.value.sum(dim), self.error.sum(dim) + gamma * self.most.sum(dim))


def either(a: Bounded, b: Bounded) -> Bounded:
    """Two ways to compute the same value."""
    return Bounded(a.value, torch.maximum(a.error, b.error))


def exact(value: Tensor) -> Bounded:
    return Bounded(value, torch.zeros_like(value))


def _shape(kind: str, g: Bounded, eps: float, alpha: float, limit: float) -> tuple[Bounded, Bounded]:
    """The function of the gate values and its slope."""
    x = g.value.detach().requires_grad_()
    if kind == "clamped":
        v = x.clamp(max=limit) * torch.sigmoid(alpha * x.clamp(max=limit))
        curvature, near = 0.5 * alpha, (x - limit).abs() <= g.error
        jump = 1.1  # most slope at the limit
    else:
        v = reference.activate(x, kind)
        curvature, near, jump = CURVATURE[kind], x.abs() <= g.error, 1.0 if kind == "relu" else 0.0
    (slope,) = torch.autograd.grad(v.sum(), x)
    near = near.double() * jump
    slope_error = (
        curvature * g.error + near + FUNCTION * eps * (slope.abs() + (1 + x.abs()) * (kind != "relu"))
    )
    value_error = g.error * (slope.abs() + curvature * g.error + near) + FUNCTION * eps * v.abs()
    if kind in ("silu", "gelu", "clamped"):
        value_error = value_error + FUNCTION * eps * eps  # exp saturates far below this
    return Bounded(v.detach(), value_error.detach()), Bounded(slope, slope_error.detach())


def _activation(name: str, interleaved: bool, h: Bounded, eps: float, alpha: float, limit: float):
    """a, and (da -> dh)."""
    if name not in reference.GATED:
        v, slope = _shape(name, h, eps, alpha, limit)
        return v, lambda da: slope * da
    U = h.value.shape[1]
    index = torch.arange(U).view(-1, 2).T if interleaved else torch.arange(U).view(2, -1)
    g, u = h[:, index[0]], h[:, index[1]]
    kind = {"swiglu": "silu", "geglu": "gelu", "swiglu_clamped": "clamped"}[name]
    v, slope = _shape(kind, g, eps, alpha, limit)
    up, inside = u, exact(torch.ones_like(u.value))
    if kind == "clamped":
        near = (u.value.abs() - limit).abs() <= u.error
        up = Bounded(u.value.clamp(-limit, limit) + 1, u.error).rounded(eps)
        inside = Bounded((u.value.abs() <= limit).double(), near.double())

    def backward(da: Bounded) -> Bounded:
        dg, du = slope * up * da, v * inside * da
        out = exact(torch.empty_like(h.value))
        for part, columns in zip((dg, du), index, strict=True):
            out.value[:, columns], out.error[:, columns] = (
                part.rounded(4 * eps).value,
                part.rounded(4 * eps).error,
            )
        return out

    return (v * up).rounded(2 * eps), backward


def moe_bounds(
    x: Tensor,
    weight: Tensor | None,
    expert: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    dout: Tensor,
    dtype: torch.dtype,
    *,
    activation: str,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> dict[str, Bounded]:
    """All results of ``moe`` for float64 inputs, and the errors of computing them in ``dtype``."""
    acc = torch.finfo(acc_dtype(dtype)).eps
    T, K = expert.shape
    x_, dout_ = exact(x), exact(dout)
    out = exact(torch.zeros(T, x.shape[1], dtype=torch.float64))
    result = {
        "dx": exact(torch.zeros_like(out.value)),
        "dweight": exact(torch.zeros(T, K, dtype=torch.float64)),
    }
    for name, w in (("dw_up", w_up), ("db_up", b_up), ("dw_down", w_down), ("db_down", b_down)):
        if w is not None:
            result[name] = exact(torch.zeros_like(w))

    def add_at(to: Bounded, t: Tensor, part: Bounded) -> None:
        to.value.index_add_(0, t, part.value)
        to.error.index_add_(0, t, part.rounded((K + 1) * acc).error)

    for e in range(w_up.shape[0]):
        t, k = (expert == e).nonzero(as_tuple=True)
        up, down = exact(w_up[e]), exact(w_down[e])
        h = x_[t].mm(up.T, acc).stored(dtype)
        if b_up is not None:
            h = (h + exact(b_up[e].expand_as(h.value))).stored(dtype)
        a, slope = _activation(activation, interleaved, h, acc, alpha, limit)
        y = a.stored(dtype).mm(down.T, acc).stored(dtype)
        if b_down is not None:
            y = (y + exact(b_down[e].expand_as(y.value))).stored(dtype)
        w = exact(weight[t, k][:, None] if weight is not None else torch.ones(len(t), 1, dtype=torch.float64))
        add_at(out, t, y * w)
        # The router's weight comes after the product with dout or, if combine is its own node, before.
        dy = (dout_[t] * w).stored(dtype)
        da = dout_[t].mm(down, acc).stored(dtype)
        dh = slope(either(da * w, dy.mm(down, acc).stored(dtype))).stored(dtype)
        dot = (da * a).total(1, acc).error + (
            dout_[t].mm(exact(b_down[e][:, None]), acc).error[:, 0] if b_down is not None else 0
        )
        by_row = (dout_[t] * y).total(1, acc)
        result["dweight"].value[t, k] = by_row.value
        result["dweight"].error[t, k] = torch.maximum(dot, by_row.error) + acc * by_row.most
        one, two = dout_[t].T.mm((a * w).stored(dtype), acc), dy.T.mm(a.stored(dtype), acc)
        result["dw_down"].value[e], result["dw_down"].error[e] = _pair(either(one, two).stored(dtype))
        result["dw_up"].value[e], result["dw_up"].error[e] = _pair(dh.T.mm(x_[t], acc).stored(dtype))
        if b_down is not None:
            result["db_down"].value[e], result["db_down"].error[e] = _pair(dy.total(0, acc).stored(dtype))
        if b_up is not None:
            result["db_up"].value[e], result["db_up"].error[e] = _pair(dh.total(0, acc).stored(dtype))
        add_at(result["dx"], t, dh.mm(up, acc).stored(dtype))
    return {"out": out.stored(dtype), **result, "dx": result["dx"].stored(dtype)}


def _pair(b: Bounded) -> tuple[Tensor, Tensor]:
    return b.value, b.error


def assert_bounded(got: Tensor, want: Bounded, truth: Tensor, name: str) -> None:
    """``got`` is within its bound of ``truth``, which float64 agrees with to its own rounding."""
    value, error, truth = want.value, want.error, truth.detach().double().cpu()
    scale = value.abs().max().clamp(min=1e-300) if value.numel() else torch.tensor(1.0)
    assert got.shape == truth.shape == value.shape, f"{name}: {tuple(got.shape)}, want {tuple(truth.shape)}"
    assert ((value - truth).abs() <= 1e-11 * scale).all(), f"{name}: the bound's own value is off"
    excess = (got.detach().double().cpu() - truth).abs() - error - 1e-13 * scale
    excess = torch.where(excess.isnan(), torch.inf, excess).flatten()
    if excess.numel() and excess.max() > 0:
        i = int(excess.argmax())
        raise AssertionError(
            f"{name}[{i}] of {excess.numel()}: got {got.flatten()[i].item():.9g}, want "
            f"{truth.flatten()[i].item():.9g}, limit {error.flatten()[i].item():.3g}"
        )
