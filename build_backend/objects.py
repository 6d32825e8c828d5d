"""Compiles csrc into one shared object: incremental by time, headers and command; parallel over cores."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from elf import read_elf
from toolchain import BuildError, Cuda, c_compiler, check_system, find_cuda

C_FLAGS = [
    "-std=c11", "-O3", "-g0", "-fPIC", "-fexceptions", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Icsrc",
]  # fmt: skip
# Host stubs without exceptions, RTTI and thread-safe statics need nothing of libstdc++.
NVCC_FLAGS = [
    "-std=c++17", "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-Xcompiler", "-fPIC,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics,-fvisibility=hidden",
    "-DLINA_CUDA=1", "-Icsrc",
]  # fmt: skip


def cores() -> int:
    return len(os.sched_getaffinity(0))


def sources(root: Path, cuda: bool) -> list[Path]:
    """Relative to the root; CUDA first, for it takes longest."""
    c = sorted(p.relative_to(root) for p in root.glob("csrc/**/*.c"))
    cu = sorted(p.relative_to(root) for p in root.glob("csrc/cuda/*.cu")) if cuda else []
    return cu + c


@dataclass(frozen=True)
class Tool:
    """A compiler with its flags. `key` says what its output depends on: versions, not paths, for
    pip's build environments lie elsewhere each time."""

    command: list[str]
    key: str


def _prerequisites(root: Path, depfile: Path) -> list[Path]:
    """lina's own files in a make rule `object: a b \\`; system headers belong to the tool's key."""
    text = depfile.read_text().replace("\\\n", " ")
    names = shlex.split(text.split(":", 1)[1])
    return [root / name for name in names if root in (root / name).resolve().parents]


def _is_current(root: Path, target: Path, depfile: Path, key: str) -> bool:
    try:
        built = target.stat().st_mtime_ns
        if target.with_suffix(".key").read_text() != key:
            return False
        return all(p.stat().st_mtime_ns <= built for p in _prerequisites(root, depfile))
    except (OSError, IndexError, ValueError):
        return False


def _run(root: Path, command: list[str], what: str) -> None:
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout.strip():
        print(done.stdout, end="", file=sys.stderr)
    if done.returncode != 0:
        raise BuildError(f"{what} does not compile; the compiler's own words are above")


def _compile(root: Path, source: Path, folder: Path, tool: Tool) -> tuple[Path, bool]:
    """The object file, and whether it is new."""
    target = folder / source.with_suffix(source.suffix + ".o")
    depfile = target.with_suffix(".d")
    if _is_current(root, target, depfile, tool.key):
        return target, False
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"  {source}", flush=True)
    target.unlink(missing_ok=True)
    command = [*tool.command, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(target)]
    _run(root, command, str(source))
    target.with_suffix(".key").write_text(tool.key)
    return target, True


def _link(root: Path, cc: list[str], objects: list[Path], target: Path, cuda: Cuda | None) -> None:
    libraries = [str(cuda.library / "libcudart_static.a")] if cuda else []
    fresh = target.with_suffix(".new")
    command = [
        *cc, "-shared", "-o", str(fresh), *map(str, objects), *libraries,
        "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-Wl,--as-needed", "-Wl,-s",
        "-lm", "-ldl", "-lrt", "-lpthread",
    ]  # fmt: skip
    _run(root, command, target.name)
    # Python's own symbols stay undefined, so the linker cannot be asked to check the rest.
    undefined = [name for name in read_elf(fresh).undefined if not name.startswith(("Py", "_Py"))]
    if undefined:
        fresh.unlink()
        raise BuildError(f"undefined in {target.name}: {', '.join(sorted(undefined))}")
    os.replace(fresh, target)  # a process that has the old file mapped keeps it


def build(root: Path, target: Path, jobs: int | None = None) -> None:
    """Brings `target` (lina/_C.abi3.so) up to date with csrc."""
    check_system()
    (root / "build").mkdir(exist_ok=True)
    with open(root / "build" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
        _build(root, target, jobs)


def _build(root: Path, target: Path, jobs: int | None) -> None:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("free-threaded Python refuses abi3 modules; use the ordinary build of CPython")
    cc, cuda = c_compiler(), find_cuda(root / "build" / "zig")
    folder = root / "build" / ("objects-cuda" if cuda else "objects-cpu")
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").is_file():
        raise BuildError(f"no Python.h in {include} (Debian: apt install python3-dev)")
    flags = [*C_FLAGS, f"-DLINA_CUDA={int(cuda is not None)}"]
    cuda_include = ["-isystem", str(cuda.include)] if cuda else []
    kind = f"CUDA {cuda.version[0]}.{cuda.version[1]}" if cuda else "CPU only"
    c = Tool([*cc.command, *flags, f"-I{include}", *cuda_include], f"{cc.name} {kind} {include} {flags}")
    nvcc = Tool([*cuda.nvcc, *NVCC_FLAGS], f"{kind} {cuda.host} {NVCC_FLAGS}") if cuda else c
    todo = sources(root, cuda is not None)
    print(f"lina: {len(todo)} sources, {kind}", flush=True)
    with ThreadPoolExecutor(jobs or cores()) as pool:
        done = list(
            pool.map(lambda s: _compile(root, s, folder, nvcc if s.suffix == ".cu" else c), todo)
        )
    objects = [target for target, _ in done]
    listing = "\n".join([str(target), *map(str, objects)])
    stamp = folder / "linked"
    current = (
        not any(changed for _, changed in done)
        and target.is_file()
        and stamp.is_file()
        and stamp.read_text() == listing
        and target.stat().st_mtime_ns >= max(o.stat().st_mtime_ns for o in objects)
    )
    if not current:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(root, cc.command, objects, target, cuda)
        stamp.write_text(listing)
