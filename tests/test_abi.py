"""lina's declarations of libtorch's functions agree with torch's headers, and a wrong one is caught.

Nothing else would: a C symbol has no type, so a wrong declaration links, loads and then corrupts
memory.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "torch_abi.h"
TORCH = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))


def compile_check(header_folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["g++", "-std=c++20", "-fsyntax-only", "-w", f"-I{header_folder}"]
    command += [f"-isystem{path}" for path in include_paths()]
    if TORCH >= (2, 13):
        command.append("-DLINA_ABI_NEWER")
    command.append(str(ROOT / "tests" / "abi_check.cpp"))
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: torch's headers are C++")


@needs_cxx
def test_declarations_agree_with_torch():
    done = compile_check(HEADER.parent)
    assert done.returncode == 0, done.stderr[-3000:]


# Each is a mistake that would compile, link and load.
MISTAKES = {
    "width of an integer": ("aoti_torch_get_dtype, (void *tensor, int32_t", "int64_t"),
    "a const lost": ("aoti_torch_library_def, (void *library, const char", "char"),
    "one level of pointer": ("aoti_torch_get_data_ptr, (void *tensor, void **", "void *"),
    "an argument lost": ("aoti_torch_get_dim, (void *tensor, int64_t *dim", None),
    "another result": ("X(int32_t, aoti_torch_dtype_float32", "X(int64_t, aoti_torch_dtype_float32"),
}


@needs_cxx
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_does_not_compile(mistake, tmp_path):
    found, instead = MISTAKES[mistake]
    # The list is aligned by hand: spaces and line breaks do not count.
    pattern = r"\s*".join(map(re.escape, re.findall(r"\w+|\S", found)))
    if instead is None:
        wrong = found[: found.rindex(",")]
    elif instead.startswith("X("):
        wrong = instead
    else:
        last = re.search(r"(void \*\*|const char|int32_t)$", found)
        assert last is not None
        wrong = found[: last.start()] + instead
    text, count = re.subn(pattern, lambda _: wrong, HEADER.read_text().replace("\\\n", " "), count=1)
    assert count == 1, f"torch_abi.h no longer says {found}"
    (tmp_path / "torch_abi.h").write_text(text)
    done = compile_check(tmp_path)
    assert done.returncode != 0
    name = re.search(r"\w*aoti_\w+", found)
    assert name is not None and f"{name.group()}: torch_abi.h differs" in done.stderr


def test_every_function_is_in_this_torch():
    """Also without g++: the names, in the library that is loaded here."""
    library = ctypes.CDLL("libtorch_cpu.so", mode=4)  # RTLD_NOLOAD
    text = HEADER.read_text()
    start, end = "#define LINA_TORCH_FUNCTIONS", "#define LINA_TORCH_CUDA_FUNCTIONS"
    needed = text[text.index(start) : text.index(end)]
    names = re.findall(r"\b(aoti_torch_\w+|torch_\w+)\s*,", needed)
    assert len(names) >= 20
    assert [name for name in names if not hasattr(library, name)] == []


# ---- NCCL ----


def nccl_folders() -> list[Path]:
    """Include folders of NCCL's header and of CUDA's, both or none."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    found = []
    for name in ("nccl.h", "cuda_runtime.h"):
        places = [*packages.glob(f"*/include/{name}"), Path("/usr/local/cuda/include", name)]
        found += [place.parent for place in places if place.is_file()][:1]
    return found if len(found) == 2 else []


needs_nccl = pytest.mark.skipif(
    not nccl_folders() or shutil.which("g++") is None, reason="no NCCL or CUDA header, or no g++"
)


def compile_nccl_check(header_folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["g++", "-std=c++20", "-fsyntax-only", "-w", f"-I{header_folder}"]
    command += [f"-isystem{path}" for path in nccl_folders()]
    command.append(str(ROOT / "tests" / "nccl_check.cpp"))
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@needs_nccl
def test_declarations_agree_with_nccl():
    done = compile_nccl_check(HEADER.parent)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_nccl
@pytest.mark.parametrize(
    "right,wrong",
    [
        ("int dtype, int op,", "int dtype,"),
        ("size_t count, int dtype, int peer", "int count, int dtype, int peer"),
        ("char internal[128]", "char internal[64]"),
        ("LINA_NCCL_BF16 = 9", "LINA_NCCL_BF16 = 10"),
        ("unsigned magic, version", "unsigned version, magic"),
    ],
)
def test_a_wrong_nccl_declaration_is_caught(tmp_path, right, wrong):
    text = (ROOT / "csrc" / "nccl_abi.h").read_text()
    assert right in text
    (tmp_path / "nccl_abi.h").write_text(text.replace(right, wrong))
    assert compile_nccl_check(tmp_path).returncode != 0
