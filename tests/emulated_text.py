"""For tests that run a kernel's text on the CPU: parts of a text, others in their place, and the runs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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


def run(program: Path, first: int, count: int, fault: str) -> str:
    done = subprocess.run([str(program), str(first), str(count), fault], capture_output=True, text=True,
                          timeout=280)
    return done.stdout.strip() or f"it ended with {done.returncode}"


def assert_holds(program: Path, count: int, fault: str) -> None:
    """In ``count`` runs, or LINA_EMULATED times as many."""
    count *= int(os.environ.get("LINA_EMULATED", "1"))
    assert run(program, 1, count, fault) == f"{count} runs, fault {fault}: ok"


def assert_seen(mistakes: Iterable[str], seen_after: dict[str, str], folder: Path,
                built: Callable[[Path, str], Path]) -> None:
    """Each of ``mistakes`` in the text is found, by runs without a fault or with that of ``seen_after``."""
    def look(named: tuple[int, str]) -> str:
        i, mistake = named
        return run(built(folder / str(i), mistake), 1, 400, seen_after.get(mistake, "none"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = dict(zip(mistakes, pool.map(look, enumerate(mistakes)), strict=True))
    unseen = {mistake: text for mistake, text in said.items() if not text.startswith("FOUND: ")}
    assert not unseen, unseen
