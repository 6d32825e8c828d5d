"""Trying a module's code on small random input, leaving no trace in it or in torch's state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def quiet() -> Iterator[torch.Generator]:
    """No gradients, no autocast, CPU as default device; yields a generator of fixed seed.

    The global generator of the CPU is put back: the tried code may draw from it.
    """
    with (torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"),
          torch.random.fork_rng(devices=[])):
        yield torch.Generator(device="cpu").manual_seed(0)


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)


def agree(got: Tensor, want: object, eps: float = torch.finfo(torch.float64).eps) -> bool:
    """Equal shape, and equal to a thousand roundings of the largest element.

    Sums of some ten terms of either side differ by tens of roundings; another formula, by more
    than 1e-6 of the result.
    """
    if not isinstance(want, Tensor) or want.shape != got.shape or not want.isfinite().all():
        return False
    return bool((got - want.double()).abs().max() <= 1000 * eps * want.abs().max())


def line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def traces(module: nn.Module) -> list[object]:
    """What a forward may have left behind: attributes and buffers, in a form that can be compared."""
    left: list[object] = []
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, bool | int | float | str | tuple | None):
                left.append((name, value))
            elif not name.startswith("_"):
                left.append((name, id(value)))
        left.extend((name, buffer.tolist()) for name, buffer in part.named_buffers(recurse=False))
    return left
