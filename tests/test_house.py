"""The rules of the house: who may include or import whom, how long files are, how they are named."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
LINA = ROOT / "lina"

C_FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".c", ".h", ".cu", ".cuh"))
PY_FILES = sorted(LINA.rglob("*.py"))
OPS = sorted({m.split("_")[0] for m in re.findall(r'\{"(\w+)",', (CSRC / "register.c").read_text())})

# ---- C: from -> patterns of what it may include; `{op}` is the file's own operator ----

C_TABLE = [
    (r"cuda/(common|mma)\.cuh", [r"(error|dtype)\.h", r"cuda/common\.cuh"]),
    (
        r"cuda/(?P<op>[a-z]+)\w*\.(cuh?|h)",
        [r"(ops|cuda)/{op}\w*\.h", r"(error|dtype)\.h", r"cuda/(common|mma|{op}\w*)\.cuh"],
    ),
    (r"ops/(?P<op>[a-z]+)\w*\.[ch]", [r"ops/{op}\w*\.h", r"(tensor|vector|error|dtype)\.h"]),
    (r"plan/\w+\.[ch]", [r"plan/\w+\.h", r"error\.h"]),
    (r"comm/\w+\.[ch]", [r"comm/\w+\.h", r"plan/\w+\.h", r"cuda/\w+\.h", r"(nccl_abi|error|dtype)\.h"]),
    (r"(tensor|register)\w*\.[ch]", [r"(tensor\w*|register|torch_abi|error|dtype)\.h"]),
    (r"vector\.h", [r"tensor\.h", r"dtype\.h"]),
    (r"(torch|nccl)_abi\.[ch]", [r"(torch|nccl)_abi\.h", r"error\.h"]),
    (r"error\.[ch]", [r"error\.h"]),
    (r"dtype\.h", []),
    (r"module\w*\.[ch]", [r"module\.h", r"register\.h", r"error\.h", r"comm/\w+\.h", r"plan/\w+\.h"]),
]
# dispatch and combine also use comm (they carry tokens between ranks).
C_EXTRA = {
    ("ops/combine", r"comm/\w+\.h"): "",
    ("ops/dispatch", r"comm/\w+\.h"): "",
    ("ops/experts", r"ops/combine\.h"): "the gradient of x is a combine of rows",
}
C_STANDARD = {
    "assert.h", "errno.h", "float.h", "inttypes.h", "limits.h", "math.h", "stdarg.h", "stdatomic.h",
    "stdbool.h", "stddef.h", "stdint.h", "stdio.h", "stdlib.h", "string.h",
}  # fmt: skip


def system_header_allowed(file: str, header: str) -> bool:
    if header in C_STANDARD:
        return True
    if header == "Python.h":
        return file == "module.h"
    if header == "dlfcn.h":
        return file in ("torch_abi.c", "nccl_abi.c")
    if header == "sys/mman.h":
        return file.startswith("ops/")  # huge pages for scratch
    if header in ("pthread.h", "time.h", "unistd.h"):
        return file.startswith("comm/")
    # CUDA's own headers; no C++ standard header, so that no libstdc++ is needed to build.
    return file.startswith(("cuda/", "comm/")) and bool(re.fullmatch(r"(cuda|mma|cooperative)\w*\.h", header))


def includes(path: Path) -> list[tuple[str, str]]:
    """(kind, name) of every #include: kind is '<' or '"', local names are relative to csrc."""
    found = []
    for kind, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        if kind == '"':
            local = (path.parent / name).resolve()
            if not local.is_file():
                local = (CSRC / name).resolve()
            assert local.is_file(), f"{path}: includes {name}, which is not there"
            name = local.relative_to(CSRC).as_posix()
        found.append((kind, name))
    return found


def c_violations(file: str, found: list[tuple[str, str]]) -> list[str]:
    rows = [(match, allowed) for p, allowed in C_TABLE if (match := re.fullmatch(p, file))]
    if not rows:
        return [f"{file}: in no row of the include table"]
    match, allowed = rows[0]
    op = match.groupdict().get("op", "")
    patterns = [p.replace("{op}", op) for p in allowed]
    patterns += [p for (start, p) in C_EXTRA if file.startswith(start)]
    bad = []
    for kind, name in found:
        if kind == "<":
            ok = system_header_allowed(file, name)
        else:
            ok = any(re.fullmatch(p, name) for p in patterns)
        if not ok:
            bad.append(f"{file}: may not include {name}")
    return bad


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: p.relative_to(CSRC).as_posix())
def test_c_includes(path):
    assert c_violations(path.relative_to(CSRC).as_posix(), includes(path)) == []


@pytest.mark.parametrize(
    "file,kind,name",
    [
        ("cuda/gate.cu", "<", "Python.h"),
        ("cuda/gate.cu", "<", "torch/all.h"),
        ("cuda/gate.cu", "<", "cstdint"),
        ("cuda/gate.cu", '"', "ops/sort.h"),
        ("cuda/gate.cu", '"', "tensor.h"),
        ("ops/gate.c", '"', "ops/sort.h"),
        ("ops/gate.c", '"', "torch_abi.h"),
        ("ops/gate.c", "<", "cuda_runtime.h"),
        ("plan/link.c", '"', "tensor.h"),
        ("tensor.c", "<", "Python.h"),
        ("module.c", '"', "ops/gate.h"),
        ("surprise.c", '"', "error.h"),
    ],
)
def test_c_table_refuses(file, kind, name):
    assert c_violations(file, [(kind, name)]) != []


# ---- Python: layer -> other layers it may use by their public names; third parties ----

PY_TABLE = {
    "reference": set(),
    "ops": {"_C"},
    "nn": {"ops", "parallel", "tracing"},
    "parallel": {"ops", "_C", "tracing"},
    "swap": {"ops", "nn", "parallel", "tracing"},
    "tracefile": set(),
    "tracing": {"tracefile"},
    "train": {"", "parallel", "tracing", "tracefile", "reference"},
    "doctor": {"", "_C", "parallel", "train"},
    "profile": {"", "_C", "parallel", "train"},
    "simulate": {"_C"},
    "cli": {"", "doctor", "profile", "simulate", "train", "tracefile"},
    "__init__": {"_C", "nn", "ops", "parallel", "profile", "simulate", "swap", "tracing"},
}
PROGRAMS = {"cli", "doctor", "profile", "simulate", "train"}  # they may reach into each other
THIRD_PARTY = {  # at module level; inside a function anything in pyproject.toml's dependencies
    "tracefile": set(),
    "cli": set(),
    "train": {"torch", "tqdm", "numpy"},
}
OPTIONAL = {"torch", "numpy", "matplotlib", "tqdm", "transformers", "pynvml"}


def layer_of(path: Path) -> str:
    first = path.relative_to(LINA).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> list[tuple[str, bool]]:
    """(absolute module, at module level) of every import; names of a package count as modules."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    package = ["lina", *path.relative_to(LINA).parts[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "lina":
                found += [(f"lina.{alias.name}", id(node) in top) for alias in node.names]
            else:
                found.append((module, id(node) in top))
    return found


def py_violations(layer: str, found: list[tuple[str, bool]]) -> list[str]:
    if layer not in PY_TABLE:
        return [f"lina/{layer}: in no row of the import table"]
    bad = []
    for module, at_top in found:
        root, _, rest = module.partition(".")
        if root in sys.stdlib_module_names:
            continue
        if root != "lina":
            allowed = THIRD_PARTY.get(layer, {"torch"}) if at_top else OPTIONAL
            if root not in allowed:
                bad.append(f"lina/{layer}: may not import {module}" + (" at module level" if at_top else ""))
            continue
        target, _, inner = rest.partition(".")
        if target == layer:
            continue
        if target not in PY_TABLE[layer] and not ("" in PY_TABLE[layer] and target not in PY_TABLE):
            bad.append(f"lina/{layer}: may not import {module}")
        elif inner and not {layer, target} <= PROGRAMS:
            bad.append(f"lina/{layer}: may use lina.{target}'s public names only, not {module}")
    return bad


@pytest.mark.parametrize("path", PY_FILES, ids=lambda p: p.relative_to(LINA).as_posix())
def test_python_imports(path):
    found = imported(path)
    if layer_of(path) == "__init__":
        found = [(".".join(m.split(".")[:2]), top) for m, top in found]  # it names what is public
    assert py_violations(layer_of(path), found) == []


@pytest.mark.parametrize(
    "layer,module",
    [
        ("reference", "lina.ops"),
        ("ops", "lina.nn"),
        ("ops", "lina.reference"),
        ("nn", "lina._C"),
        ("nn", "lina.parallel.mesh"),
        ("parallel", "lina.nn.moe"),
        ("ops", "numpy"),
        ("tracefile", "matplotlib"),
        ("surprise", "torch"),
    ],
)
def test_python_table_refuses(layer, module):
    assert py_violations(layer, [(module, True)]) != []


# Inside lina/parallel imports point to earlier rows, or stay in a folder; what is in no row comes last.
PARALLEL_ROWS = ({"settings"}, {"mesh"}, {"experts"}, {"transport", "plan"}, {"tokens", "gradients"})


def row_of(module: str) -> int:
    return next((i for i, row in enumerate(PARALLEL_ROWS) if module in row), len(PARALLEL_ROWS))


def downwards(part: str, modules: list[str]) -> list[str]:
    """Of the imports in a file or folder of lina/parallel, those that do not point downwards."""
    own, last = row_of(part), len(PARALLEL_ROWS)
    found = [m.split(".")[2] for m in modules if m.startswith("lina.parallel.")]
    return [f"lina/parallel/{part}: may not import {m}" for m in found
            if m != part and row_of(m) >= own and own < last]


@pytest.mark.parametrize("path", sorted((LINA / "parallel").rglob("*.py")),
                         ids=lambda p: p.relative_to(LINA / "parallel").as_posix())
def test_parallel_imports_point_downwards(path):
    part = path.relative_to(LINA / "parallel").parts[0].removesuffix(".py")
    assert downwards(part, [module for module, _ in imported(path)]) == []


@pytest.mark.parametrize("part,module", [("mesh", "experts"), ("transport", "plan"), ("plan", "gradients"),
                                         ("tokens", "gradients"), ("gradients", "ddp")])
def test_parallel_rows_refuse(part, module):
    assert downwards(part, [f"lina.parallel.{module}.x"]) != []


# ---- length and names ----

# Over 300 lines, with the reason. 500 is the end.
LONG = {"tests/fake_torch.c": "one library: halves would need a header of their own"}

SOURCES = sorted(
    path
    for folder in ("csrc", "lina", "tests", "benchmarks", "build_backend")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".c", ".h", ".cu", ".cuh", ".cpp", ".py", ".pyi")
)


def test_file_lengths():
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in SOURCES}
    long = {name: n for name, n in lines.items() if n > (500 if name in LONG else 300)}
    assert long == {}, "split these, or give the reason in LONG (500 lines at most)"
    assert [name for name in LONG if lines.get(name, 0) <= 300] == [], "no longer long"


@pytest.mark.parametrize("op", OPS)
def test_one_subject_one_name(op):
    wanted = [f"csrc/ops/{op}.h", f"csrc/ops/{op}.c", f"lina/ops/{op}.py", f"tests/test_{op}.py"]
    wanted.append(f"benchmarks/bench_{op}.py")
    assert [name for name in wanted if not (ROOT / name).is_file()] == []
    assert [p.name for p in CSRC.glob("cuda/*.cu") if re.fullmatch(rf"{op}(_[a-z_]+)?", p.stem)] != []


def test_no_numbered_files_or_kernels():
    numbered = re.compile(r"(_v\d+|_(new|old|final)|[a-z]_?\d)$")
    files = [p.name for p in SOURCES if numbered.search(p.stem)]
    kernels = re.compile(r"__global__[^;{(]*?\b(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
    names = [n for p in C_FILES if "cuda" in p.parts for n in kernels.findall(p.read_text())]
    assert files == []
    assert [n for n in names if re.search(r"(_v|kernel_?)\d+$", n)] == []


def test_no_loose_ends():
    """What is left to do is an issue, not a comment."""
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    here = Path(__file__).name
    assert [p.name for p in SOURCES if p.name != here and marks.search(p.read_text())] == []


def test_no_machine_paths():
    """Nothing names a place on the machine it was written on."""
    places = re.compile(r"/(work|root|home|tmp/\w*job)\w*/")
    here = Path(__file__).name
    assert [p.name for p in SOURCES if p.name != here and places.search(p.read_text())] == []
