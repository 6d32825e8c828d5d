"""For tests that run a kernel's text on the CPU: parts of a text, and others in their place."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

CSRC, HERE = Path(__file__).parents[1] / "csrc", Path(__file__).parent / "emulated"
needs_cxx = pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64",
                               reason="no g++ for x86-64")


def once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in the text"
    return text.replace(old, new)


def between(text: str, start: str, stop: str) -> str:
    first = text.index(start)
    return text[first:text.index(stop, first)]
