"""SMs that the experts' products leave to exchanges beside them.

torch's grouped product starts one block on each SM and shares its tiles out among them beforehand. Where a
kernel that waits for other ranks holds one of the SMs, that block starts when another one has ended, and the
product takes up to twice its time; with so many blocks less it takes hardly longer than alone.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_get = getattr(torch._C, "_get_sm_carveout_experimental", None)
_set = getattr(torch._C, "_set_sm_carveout_experimental", None)


@contextmanager
def carveout(sms: int) -> Iterator[None]:
    """Products launched inside leave ``sms`` SMs free, or more where the user has said so; 0: as they are.

    torch calls its setting experimental; one without it leaves none free.
    """
    if sms == 0 or _get is None or _set is None:
        yield
        return
    _warned()
    before = _get()
    _set(max(sms, before or 0))
    try:
        yield
    finally:
        _set(before)


@functools.cache
def _warned() -> None:
    """The warning that torch gives with the first use: about its own setting, not about the user's doing.
    Within a call of torch's that calls Python, it comes as Python's, which can be left out."""
    if _get is None or _set is None or _get() is not None:
        return

    def set_once(value: float) -> float:
        _set(0)
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, device="cpu").apply_(set_once)
    _set(None)

