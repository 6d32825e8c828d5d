"""The package as a thing that is built, shipped and imported: file, wheel, errors, other Pythons."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lina._C

import objects
import toolchain
from elf import read_elf

ROOT = Path(__file__).resolve().parent.parent
MODULE = Path(lina._C.__file__)

needs_cc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build a stub of libtorch with")


def python(code: str, *arguments: str, interpreter: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [interpreter, "-c", code, *arguments],
        capture_output=True, text=True, timeout=120, cwd=MODULE.parent.parent,
    )  # fmt: skip


# ---- the compiled module ----


def test_module_is_abi3():
    assert MODULE.name == "_C.abi3.so"


def test_needs_nothing_but_libc():
    allowed = ("libc.so.", "libm.so.", "libdl.so.", "librt.so.", "libpthread.so.", "ld-linux")
    elf = read_elf(MODULE)
    assert [name for name in elf.needed if not name.startswith(allowed)] == []
    assert [name for name in elf.versions if not name.startswith("GLIBC_")] == []
    assert [name for name in elf.undefined if not name.startswith(("Py", "_Py"))] == []


def test_exports_its_init_function_only():
    """Other symbols would clash with those of another library in the process."""
    assert read_elf(MODULE).defined == ["PyInit__C"]


def test_import_is_light():
    """lina adds to torch's import: no plotting, no trainer, and (in processor time) under 0.3 s."""
    done = python(
        "import sys, torch, time; before = set(sys.modules)\n"
        "start = time.process_time(); import lina; took = time.process_time() - start\n"
        "heavy = {'matplotlib', 'tqdm', 'transformers', 'lina.train'}\n"
        "print(took, *heavy & (set(sys.modules) - before))"
    )
    assert done.returncode == 0, done.stderr
    took, *heavy = done.stdout.split()
    assert heavy == []
    assert float(took) < 0.3


# ---- the module without torch, with another torch, in another Python ----

LOAD = """
import ctypes, importlib.util, sys
if sys.argv[2]:
    ctypes.CDLL(sys.argv[2])
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
try:
    spec.loader.exec_module(module)
except ImportError as error:
    print("ImportError:", error)
else:
    print("imported", module.CUDA)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A libtorch_cpu.so of fake_torch.c, with further macros."""

    def build(*macros: str) -> str:
        target = tmp_path_factory.mktemp("stub") / "libtorch_cpu.so"
        command = ["gcc", "-std=c11", "-shared", "-fPIC", "-Wl,-soname,libtorch_cpu.so", *macros]
        subprocess.run([*command, "-o", str(target), str(ROOT / "tests" / "fake_torch.c")], check=True)
        return str(target)

    return build


def test_without_torch():
    done = python(LOAD, str(MODULE), "")
    assert "import torch" in done.stdout and done.stdout.count("\n") == 1, done.stderr


@needs_cc
@pytest.mark.parametrize("symbol", ["torch_parallel_for", "aoti_torch_library_impl"])
def test_missing_symbol_is_one_import_error(stub, symbol):
    """What an older torch looks like: one line with the symbol and the version needed."""
    done = python(LOAD, str(MODULE), stub(f"-D{symbol}=renamed_away"))
    assert done.stdout.startswith("ImportError: ") and done.stdout.count("\n") == 1, done.stderr
    assert symbol in done.stdout and "2.10" in done.stdout


def interpreters() -> list[str]:
    names = [f"python3.{minor}" for minor in range(10, 16)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(n) for n in names] + [str(p) for p in sorted(pyenv.glob("3.*/bin/python3"))]
    return [f for f in found if f]


@needs_cc
def test_same_file_in_every_python_here(stub):
    """CPython 3.10 and newer, whichever are on this machine; a stub stands for torch."""
    library = stub("-DFAKE_OLD")
    ask = "import sys; v = sys.version_info; print(v >= (3, 10) and 'PyPy' not in sys.version, v[1])"
    seen = set()
    for interpreter in [sys.executable, *interpreters()]:
        answer = python(ask, interpreter=interpreter).stdout.split()  # nothing from a shim without a version
        if answer[:1] != ["True"] or answer[1] in seen:
            continue
        done = python(LOAD, str(MODULE), library, interpreter=interpreter)
        assert done.stdout.startswith("imported"), f"{interpreter}: {done.stdout}{done.stderr}"
        seen.add(answer[1])
    assert str(sys.version_info[1]) in seen


# ---- the build ----


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def cuda_home(folder: Path, release: str) -> str:
    (folder / "bin").mkdir()
    script(folder / "bin" / "nvcc", f'echo "Cuda compilation tools, release {release}, V{release}.1"')
    return str(folder)


BAD_MACHINES = {
    "no compiler": (lambda tmp: {"CC": str(tmp / "none"), "LINA_CUDA": "0"}, "does not run"),
    "old gcc": (
        lambda tmp: {
            "CC": script(tmp / "gcc", "echo '#define __GNUC__ 7'; echo '#define __GNUC_MINOR__ 5'"),
            "LINA_CUDA": "0",
        },
        "gcc 7.5; gcc 9.0 or newer",
    ),
    "old nvcc": (
        lambda tmp: {"CUDA_HOME": cuda_home(tmp, "11.8"), "CXX": script(tmp / "g++", "")},
        "CUDA 11.8; 12.8",
    ),
    "wrong CUDA_HOME": (lambda tmp: {"CUDA_HOME": str(tmp)}, "no bin/nvcc"),
    "unknown switch": (lambda tmp: {"LINA_CUDA": "yes"}, "LINA_CUDA is 'yes'"),
}


@pytest.mark.parametrize("machine", BAD_MACHINES)
def test_bad_machine_is_one_line(machine, tmp_path):
    change, words = BAD_MACHINES[machine]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import objects\n"
        "objects.build(Path(sys.argv[2]), Path(sys.argv[2]) / 'x.so')"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CUDA_HOME", "LINA_CUDA")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "build_backend"), str(tmp_path)],
        env={**environment, **change(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.startswith("lina: ") and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr


def test_other_systems_are_one_line(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="builds on Linux only"):
        toolchain.check_system()


@needs_cc
def test_build_is_incremental(tmp_path, monkeypatch, capsys):
    """A changed source builds itself, a changed header what includes it, nothing nothing."""
    monkeypatch.setenv("LINA_CUDA", "0")
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "a.h").write_text("int lina_a(void);\n")
    (csrc / "a.c").write_text('#include "a.h"\nint lina_a(void) { return 1; }\n')
    (csrc / "b.c").write_text('#include "a.h"\nint lina_b(void) { return lina_a(); }\n')
    (csrc / "c.c").write_text("int lina_c(void) { return 3; }\n")
    target = tmp_path / "x.so"

    def built() -> set[str]:
        objects.build(tmp_path, target)
        return {line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}

    def touch(name: str) -> None:
        newest = max(p.stat().st_mtime for p in tmp_path.rglob("*"))
        os.utime(csrc / name, (newest + 1, newest + 1))

    assert built() == {"csrc/a.c", "csrc/b.c", "csrc/c.c"}
    assert built() == set()
    touch("c.c")
    assert built() == {"csrc/c.c"}
    touch("a.h")
    assert built() >= {"csrc/a.c", "csrc/b.c"}
    target.unlink()
    objects.build(tmp_path, target)
    assert target.is_file()


# A function that nothing reaches is left out, and what it calls with it.
EXPORTED = 'int lina_lost(void);\n__attribute__((visibility("default"))) '


@needs_cc
def test_undefined_function_fails_the_build(tmp_path, monkeypatch):
    """The linker itself lets a shared object have any."""
    monkeypatch.setenv("LINA_CUDA", "0")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.c").write_text(EXPORTED + "int lina_a(void) { return lina_lost(); }\n")
    with pytest.raises(SystemExit, match=r"undefined in x\.so: lina_lost"):
        objects.build(tmp_path, tmp_path / "x.so")
    assert not (tmp_path / "x.so").exists()


@needs_cc
def test_wheel(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("lina/_C.abi3.so", "lina/_C.pyi", "lina/py.typed", "lina/reference.py"):
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert [name for name in names if not name.startswith(("lina/", "lina-"))] == []
    assert [name for name in names if name.endswith((".c", ".h", ".cu"))] == []
