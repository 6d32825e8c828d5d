"""The text of peers_reduce.cu on the CPU, thread by thread: sums, turns, faults; and planted mistakes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from emulated_text import CSRC, HERE, assert_holds, assert_seen, between, needs_cxx, once

FAULTS = {"none": 150, "death": 40, "mismatch": 50, "abort": 50}         # runs

# File, text, and what stands there instead.
MISTAKES = {
    "no barrier before the first step":
        ("cu", "  __syncthreads(); /* from here on both", "  /* from here on both"),
    "sums before it leaves":
        ("cu", "    if (left && !lost) break;\n", "    if (left && !lost && warp <= 1) break;\n"),
    "leaves a step too late":
        ("cu", "= left ? s : DONE;", "= left ? s + 1 : DONE;"),
    "leaves a step too early":
        ("cu", "= left ? s : DONE;", "= left && s ? s - 1 : left ? 0 : DONE;"),
    "numbers on where it leaves":
        ("cu", "    if (!left) *first_tile(a) = end;", "    *first_tile(a) = end;"),
    "does again what is done":
        ("cu", "  if (begun == DONE) return;\n", "  if (begun == DONE) begun = 0;\n"),
    "keeps a notice":
        ("cu", "if (a.turn) tell(a, a.turn - 1, 0);", ""),
    "half the slots":
        ("cuh", "#define SLOTS  LINA_REDUCE_SLOTS", "#define SLOTS  (LINA_REDUCE_SLOTS / 2)"),
    "leaves in the last turn":
        ("host", "a->leaves = a->turn + 1 < turns;", "a->leaves = a->priority != NULL;"),
}
SEEN_AFTER = {"no barrier before the first step": "mismatch"}            # the others without a fault


def written(folder: Path, mistake: str | None = None) -> None:
    """kernel.h: the kernel's text, with asm as calls, __shared__ as members and launches as calls."""
    names = {"cu": "cuda/peers_reduce.cu", "cuh": "cuda/peers_reduce.cuh", "peers": "cuda/peers.cuh",
             "host": "comm/peers_reduce.c"}
    text = {key: (CSRC / name).read_text() for key, name in names.items()}
    if mistake is not None:
        where, old, new = MISTAKES[mistake]
        text[where] = once(text[where], old, new)
    peers = between(text["peers"], "static __device__ __forceinline__ uint32_t peers_read_failed",
                    "/* For a whole warp") + between(text["peers"], "/* The first failure of this rank",
                                                     "/* Rows that `source`")
    cuh = text["cuh"][text["cuh"].index("#define DEPTH"):text["cuh"].rindex("#endif")]
    cuh = re.sub(r'asm volatile\("ld.*"l"\((.*)\) : "memory"\);', r"v = load(\1);", cuh)
    cuh = re.sub(r'asm volatile\("st.*"l"\((.*)\), "r"\(v\) : "memory"\);', r"store(\1, v);", cuh)
    assert "asm" not in cuh
    # looks are rarer than polls, but not so rare as where a poll takes a microsecond
    for usual, here in (("% 256", "% 12"), ("/ 256", "/ 12"), ("% 16", "% 3")):
        usual, here = f"polls {usual}", f"polls {here}"
        assert usual in cuh
        cuh = cuh.replace(usual, here)
    cuh = once(cuh, "  const int from = source -", "  perhaps();\n  const int from = source -")
    cu = between(text["cu"], "#define WORKERS", 'extern "C" int lina_peers_reduce_cuda')
    cu = once(cu, "#define WORKERS 512", "#define WORKERS 4")
    shared: dict[str, str] = {}

    def members(found: re.Match[str]) -> str:
        names = found[2].split(", ")
        shared.update(dict.fromkeys(names, found[1]))
        return "".join(f"  {found[1]} &{name} = current->block->shared->{name};\n" for name in names)

    cu = re.sub(r"  __shared__ (\w+) ([\w, ]+);\n", members, cu)
    cu, launches = re.subn(r"(peers_reduce<T, \w+>)<<<blocks, THREADS, 0, stream>>>\(\*a, p\);",
                           r"launched(\1, blocks, *a, p);", cu)
    assert launches == 2 and "<<<" not in cu and "__shared__" not in cu
    host = between(text["host"], "/* One more than", "int lina_peers_reduce(lina_peers *p")
    turns = once(between(text["host"], "  gently = gently &&", "done:\n  lina_peers_leave"),
                 "lina_peers_reduce_cuda(a, stream)", "reduce_on_device<T>(a)")
    most = re.search(r"#define MAX_TURNS +\d+", text["host"])
    assert most is not None
    fields = "".join(f"  {kind} {name};\n" for name, kind in shared.items())
    (folder / "kernel.h").write_text(
        f"struct Shared {{\n{fields}}};\n{peers}\n{cuh}\n{cu}\n{most[0]}\n{host}\n"
        f"template <class T> static int reduce(Args *a, bool gently) {{\n  int device = 0, rc = 0;\n"
        f"  void *stream = nullptr;\n{turns}done:\n  return rc;\n}}\n")


def built(folder: Path, mistake: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    written(folder, mistake)
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", f"-I{CSRC}", f"-I{folder}", f"-I{HERE}",
                    str(HERE / "reduce.cpp"), "-o", str(folder / "reduce")], check=True, timeout=120)
    return folder / "reduce"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("emulated"))


@needs_cxx
@pytest.mark.parametrize("fault", FAULTS)
def test_all_orders_sum(program: Path, fault: str) -> None:
    assert_holds(program, FAULTS[fault], fault)


@needs_cxx
def test_mistakes_are_seen(tmp_path: Path) -> None:
    assert_seen(MISTAKES, SEEN_AFTER, tmp_path, built)
