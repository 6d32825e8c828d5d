"""csrc/comm without a GPU: several ranks in one process, over a fake CUDA and a fake NCCL.

What is checked stands in fuzz_comm.c and fake_cuda.h; `make sanitize` runs more of it, under
ThreadSanitizer and AddressSanitizer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "build/fuzz/plain/comm"

needs_compiler = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which(os.environ.get("CC", "cc"))),
    reason="needs make and a C compiler",
)


@needs_compiler
def test_rounds_and_faults() -> None:
    built = subprocess.run(
        ["make", "--no-print-directory", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    # Rounds enough for two sessions with other numbers of ranks; then each fault once.
    ran = subprocess.run(
        [PROGRAM, "40", "1"],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(ROOT / "build/fuzz/plain")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    assert re.search(r"40 rounds in .* 13 faults in", ran.stdout), ran.stdout
