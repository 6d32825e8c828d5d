"""The compilers of a build: which are there, whether they will do, and what to say if not.

Nothing here needs a package beyond the standard library: the build backend asks the same questions
before any build requirement is installed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

GCC_NEEDED = (9, 0)
CLANG_NEEDED = (11, 0)
NVCC_NEEDED = (12, 8)

# CUDA's compiler as PyPI has it: 104 MB to download. Asked for only where no nvcc is found.
NVCC_REQUIREMENTS = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]
# nvcc preprocesses and compiles its host stubs with a C++ compiler, which Debian's gcc package is not.
# PyPI's ziglang holds clang 19: 80 MB, asked for only where no C++ compiler is found.
CXX_REQUIREMENTS = ["ziglang==0.14.*"]
CXX_HEADERS = Path(__file__).resolve().parent / "cxx"


class BuildError(SystemExit):
    """One line for the person who builds; a SystemExit, so that no traceback hides it."""

    def __init__(self, text: str) -> None:
        super().__init__(f"lina: {text}")


@dataclass(frozen=True)
class Compiler:
    command: list[str]
    name: str  # with its version, e.g. "gcc 12.2"


@dataclass(frozen=True)
class Cuda:
    nvcc: list[str]  # the command with -ccbin, ready for flags
    host: str  # the C++ compiler behind it
    include: Path
    library: Path  # the folder with libcudart_static.a
    version: tuple[int, int]


def check_system() -> None:
    if sys.platform != "linux":
        raise BuildError(f"builds on Linux only (this is {sys.platform}); on Windows use WSL 2")
    if sys.implementation.name != "cpython":
        raise BuildError(f"needs CPython 3.10 or newer (this is {sys.implementation.name})")


def cuda_wanted() -> bool | None:
    """LINA_CUDA: 0 never, 1 always, unset: where CUDA's compiler can be had."""
    value = os.environ.get("LINA_CUDA", "").strip()
    if value not in ("", "0", "1"):
        raise BuildError(f"LINA_CUDA is {value!r}; 0 (CPU only), 1 (CUDA or fail) or unset are known")
    return None if value == "" else value == "1"


def _macros(command: list[str], language: str) -> dict[str, str] | None:
    """The compiler's predefined macros; None if it does not run."""
    try:
        done = subprocess.run(
            [*command, "-dM", "-E", "-x", language, os.devnull], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return dict(line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.count(" ") >= 2)


def _version(macros: dict[str, str]) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """Name, version, version needed."""
    if "__clang__" in macros:
        return "clang", (int(macros["__clang_major__"]), int(macros["__clang_minor__"])), CLANG_NEEDED
    return "gcc", (int(macros.get("__GNUC__", 0)), int(macros.get("__GNUC_MINOR__", 0))), GCC_NEEDED


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def c_compiler() -> Compiler:
    """The C compiler's command: $CC, else gcc, cc or clang, whichever is there first."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["gcc"], ["cc"], ["clang"]]:
        macros = _macros(command, "c")
        if macros is None:
            continue
        name, version, needed = _version(macros)
        if version < needed:
            found = f"{shlex.join(command)} is {name} {_dotted(version)}"
            raise BuildError(f"{found}; {name} {_dotted(needed)} or newer is needed")
        return Compiler(command, f"{name} {_dotted(version)}")
    if given:
        raise BuildError(f"the C compiler {shlex.join(given)} (from CC) does not run")
    raise BuildError("no C compiler found; install one (Debian: apt install gcc libc6-dev) or set CC")


def cxx_compiler() -> list[str] | None:
    """A C++ compiler with its headers, which nvcc runs over its own output; None if there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["g++"], ["c++"], ["clang++"]]:
        if not shutil.which(command[0]):
            continue
        # Really preprocess: a driver may be there without its compiler proper or its headers.
        probe = [*command, "-E", "-x", "c++", "-"]
        if subprocess.run(probe, input=b"#include <cmath>\n", capture_output=True).returncode == 0:
            return command
    return None


def _zig_compiler(folder: Path) -> list[str] | None:
    """clang out of PyPI's ziglang, as a command that nvcc's -ccbin takes; None if it is not installed.

    A named target rather than the native one, or zig would compile for this very CPU. Its libc++
    and nvcc's headers disagree, so it gets the few declarations they want from build_backend/cxx.
    """
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    zig = Path(spec.submodule_search_locations[0]) / "zig"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "clang++"
    cache = shlex.quote(str(folder / "cache"))
    script.write_text(
        "#!/bin/sh\n"
        f"export ZIG_GLOBAL_CACHE_DIR={cache} ZIG_LOCAL_CACHE_DIR={cache}\n"
        f"exec {shlex.quote(str(zig))} c++ -target {platform.machine()}-linux-gnu -fno-sanitize=all "
        f'-nostdinc++ -isystem {shlex.quote(str(CXX_HEADERS))} "$@"\n'
    )
    script.chmod(0o755)
    return [str(script)]


def _nvidia_folders() -> list[Path]:
    """nvidia/cu13 of every place Python imports from."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return []
    return [Path(folder) / "cu13" for folder in (spec.submodule_search_locations or [])] if spec else []


def find_nvcc(packages: bool = True) -> Path | None:
    """nvcc from CUDA_HOME (or CUDA_PATH), PATH, the usual place, else (`packages`) from PyPI's packages."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise BuildError(f"{variable} is {home}, but there is no bin/nvcc in it")
            return nvcc
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    homes = [Path("/usr/local/cuda"), *(_nvidia_folders() if packages else [])]
    return next((home / "bin" / "nvcc" for home in homes if (home / "bin" / "nvcc").is_file()), None)


def _nvcc_home(nvcc: Path) -> Path:
    """The toolkit's root as nvcc itself sees it: the one on PATH may be a link or a script."""
    done = subprocess.run([str(nvcc), "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else nvcc.resolve().parent.parent


def find_cuda(scratch: Path) -> Cuda | None:
    """Everything that compiling csrc/cuda needs; None for a CPU-only build, having said why.

    `scratch` is a folder that a wrapper script may be written to.
    """
    wanted = cuda_wanted()
    if wanted is False:
        return None
    missing = None
    nvcc = find_nvcc()
    cxx = cxx_compiler() or _zig_compiler(scratch)
    if nvcc is None:
        missing = "no nvcc found (set CUDA_HOME, or build with pip install, which fetches one)"
    elif cxx is None:
        missing = "no C++ compiler, which nvcc needs (apt install g++, or pip install, which fetches one)"
    if nvcc is None or cxx is None:
        if wanted:
            raise BuildError(f"LINA_CUDA=1, but {missing}")
        print(f"lina: CPU only: {missing}", file=sys.stderr)
        return None

    home = _nvcc_home(nvcc)
    done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if not found:
        raise BuildError(f"{nvcc} --version does not name a release; is it CUDA's compiler?")
    version = (int(found.group(1)), int(found.group(2)))
    if version < NVCC_NEEDED:
        raise BuildError(
            f"{nvcc} is CUDA {_dotted(version)}; {_dotted(NVCC_NEEDED)} or newer is needed "
            "(set CUDA_HOME to a newer one, or LINA_CUDA=0 for a CPU-only build)"
        )
    folders = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))]
    library = next((f for f in folders if (f / "libcudart_static.a").is_file()), None)
    if library is None:
        raise BuildError(f"no libcudart_static.a in lib64, lib or targets/*/lib of {home}")
    includes = [home / "include", *sorted(home.glob("targets/*/include"))]
    include = next((f for f in includes if (f / "cuda_runtime.h").is_file()), None)
    if include is None:
        raise BuildError(f"no cuda_runtime.h in include or targets/*/include of {home}")
    return Cuda([str(nvcc), "-ccbin", shlex.join(cxx)], Path(cxx[0]).name, include, library, version)
