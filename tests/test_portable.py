"""The CPU kernels built for plain vectors, which is what processors without AVX2 get."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import objects
import toolchain

ROOT = Path(__file__).resolve().parent.parent

# One module of each operator's tests, on what matters for vectors: widths, dtypes, odd sizes.
TESTS = (
    "test_gate.py::test_statistics",
    "test_gate.py::test_weights_are_accurate_where_they_are_small",
    "test_gate_edges.py::test_ties_go_to_the_lower_id",
    "test_sort.py::test_matches_reference",
    "test_moe_op.py::test_shapes",
    "test_combine.py::test_matches_reference",
)
RUN = """
import importlib.util, sys, torch
path = sys.argv[1]
spec = importlib.util.spec_from_file_location("lina._C", path)
module = importlib.util.module_from_spec(spec)
sys.modules["lina._C"] = module
spec.loader.exec_module(module)
import lina
assert lina._C is module if hasattr(lina, "_C") else sys.modules["lina._C"] is module
assert module.__file__ == path
import pytest
sys.exit(pytest.main(["-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_plain_vectors(tmp_path, monkeypatch):
    try:
        command = toolchain.c_compiler().command
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("CC", " ".join([*command, "-DLINA_NO_CLONES"]))
    monkeypatch.setenv("LINA_CUDA", "0")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    module = tmp_path / "_C.abi3.so"
    objects.build(tmp_path, module)
    made = list((tmp_path / "build").rglob("*.o"))
    assert len(made) > 10
    # What GCC calls the wider copies of a function; gate_cpu.c names its own.
    wide = (b".arch_x86_64_v", b"_avx2", b"_avx512")
    assert [p.name for p in made if any(name in p.read_bytes() for name in wide)] == []
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(module), *(str(ROOT / "tests" / test) for test in TESTS)],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
