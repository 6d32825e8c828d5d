"""One device for all tensors of a raw operator, where torch itself would not look."""

from __future__ import annotations

from torch import Tensor


def check_devices(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Raises a RuntimeError if a tensor lies elsewhere than ``first``. For the shape-only kernels: torch runs
    them as soon as one argument is on meta, and the others' results would be memory nobody wrote."""
    for name, t in others.items():
        if t is not None and t.device != first.device:
            raise RuntimeError(f"{op}: {name} lies on {t.device}, must lie on {first.device}")
