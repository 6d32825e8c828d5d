"""When an operator needs an autograd node, and backward passes that cannot be differentiated themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def once(backward: Callable) -> Callable:
    """Makes ``backward(ctx, saved, *grads)`` the backward of an autograd.Function; a gradient of it raises.

    ``torch.autograd.function.once_differentiable`` looks at the incoming gradients alone: where these do not
    require grad it drops what depends on the saved tensors in silence. Here both count.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        saved = ctx.saved_tensors
        with torch.no_grad():
            out = backward(ctx, saved, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return out  # torch.compile refuses a second derivative itself
        sources = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
        found = [i for i, t in enumerate(out) if t is not None]
        if not sources or not found:
            return out
        refusing = iter(_Refuse.apply(type(ctx).__name__, len(found), *(out[i] for i in found), *sources))
        return tuple(next(refusing) if t is not None else None for t in out)

    return wrapper


def ties(inputs: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> list[Tensor]:
    """Empty tensors that depend on ``inputs``, for a Function to take and save that saves ``saved`` of its
    inputs alone: where none of these requires grad, ``once`` would see nothing to refuse."""
    if not torch.is_grad_enabled() or any(t is not None and t.requires_grad for t in saved):
        return []
    return [t[:0].clone() for t in inputs if t is not None and t.requires_grad]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see this call: for a backward pass, or to refuse forward-mode differentiation,
    whose tangents a raw operator would drop in silence."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Refuse(torch.autograd.Function):
    """Passes gradients on, tied to what they depend on."""

    @staticmethod
    def forward(ctx, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name.strip("_").removesuffix("Backward").lower()
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_grads: Tensor) -> None:
        raise RuntimeError(
            f"lina: {ctx.name} is differentiable once; a gradient of its gradient is not supported"
        )
