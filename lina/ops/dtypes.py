"""The dtypes that operators take and the dtype they sum in."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and of the router's weights: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(op: str, name: str, t: Tensor) -> None:
    """Raises a TypeError unless ``t`` is a tensor of a dtype that ``op`` takes on its device."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}, must be a Tensor")
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is of {t.dtype}, must be float32, bfloat16, float16 or float64")
    if t.dtype == torch.float64 and t.device.type == "cuda":
        raise TypeError(f"{op}: {name} is of float64 on {t.device}; float64 is for the CPU only")
