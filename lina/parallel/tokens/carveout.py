"""SMs that the experts' products leave to exchanges beside them.

torch's grouped product starts one block on each SM and shares its tiles out among them beforehand. Where a
kernel that waits for other ranks holds one of the SMs, that block starts when another one has ended, and the
product takes up to twice its time; with so many blocks less it takes hardly longer than alone.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_get: Any = getattr(torch._C, "_get_sm_carveout_experimental", None)
_set: Any = getattr(torch._C, "_set_sm_carveout_experimental", None)
_lock = threading.Lock()             # the setting is the process's
_asked: list[int] = []               # by those inside
_outside: int | None = None          # the setting before the first of them


@contextmanager
def carveout(sms: int) -> Iterator[None]:
    """Products launched inside leave ``sms`` SMs free, or more where the user or another thread has said so.

    0: as they are. torch calls its setting experimental; one without it leaves none free.
    """
    if sms == 0 or _get is None or _set is None:
        yield
        return
    _change(_asked.append, sms)
    try:
        yield
    finally:
        _change(_asked.remove, sms)


def _change(how: Callable[[int], object], sms: int) -> None:
    global _outside
    with _lock:
        if not _asked:
            _warn_now()
            _outside = _get()
        how(sms)
        _set(max(_outside or 0, *_asked) if _asked else _outside)


@functools.cache
def _warn_now() -> None:
    """The warning that torch gives with the first use: about its own setting, not about the user's doing.
    Within a call of torch's that calls Python, it comes as Python's, which can be left out."""
    if _get() is not None:
        return

    def set_once(value: float) -> float:
        _set(0)
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, device="cpu").apply_(set_once)
    _set(None)
