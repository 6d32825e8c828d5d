"""The text of peers_dispatch.cu and peers_collect.cu on the CPU, thread by thread; and planted mistakes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from emulated_text import CSRC, HERE, assert_holds, assert_seen, between, needs_cxx, once

UNITS = ("peers_dispatch", "peers_collect")
HEADERS = ("cuda/common.cuh", "cuda/peers.cuh", "cuda/peers.h", "cuda/peers_slots.cuh",
           "cuda/peers_sums.cuh", "dtype.h", "error.h")
# Sizes that make a few rows many pieces, and a few tokens several tiles: warps stay as they are.
SMALLER = {
    "cuda/peers.cuh": [("#define PEERS_THREADS 512", "#define PEERS_THREADS 64"),
                       ("#define PEERS_DEPTH   4", "#define PEERS_DEPTH   2"),
                       ("#define PEERS_SPLIT_LEAST (32 << 20)",
                        'extern "C" int64_t emulated_split;\n#define PEERS_SPLIT_LEAST emulated_split'),
                       ("if (polls % 256) continue;", "if (polls % 12) continue;"),
                       ("peers_stopped(links, polls / 256)", "peers_stopped(links, polls / 12)")],
    "cuda/peers.h": [("#define LINA_PEERS_TILE   512", "#define LINA_PEERS_TILE   64")],
}

FAULTS = {"none": 300, "stop": 100, "death": 100, "mismatch": 100, "abort": 100}      # runs

PEERS, SLOTS, SUMS = "cuda/peers.cuh", "cuda/peers_slots.cuh", "cuda/peers_sums.cuh"
DISPATCH, COLLECT = "cuda/peers_dispatch.cu", "cuda/peers_collect.cu"
# File, text, and what stands there instead.
MISTAKES = {
    "a flag by the first block that has sent":
        (PEERS, "&state->sent, 1u) != gridDim.x - 1", "&state->sent, 1u) != 0"),
    "a flag before the rows":
        (DISPATCH, "  for (; u < all; u += step) {",
         "  if (part & PEERS_SEND && peers_all_sent(a.links.state))\n    peers_announce(a.links, "
         "LINA_PEERS_OUT, turn.epoch, count_here ? counts.total : a.count, true);\n  part = (peers_part)"
         "(part & ~PEERS_SEND);\n  for (; u < all; u += step) {"),
    "no barrier before a block says it has sent":
        (PEERS, "  __syncthreads();\n  if (threadIdx.x != 0) return false;",
         "  if (threadIdx.x != 0) return false;"),
    "no fence before a block says it has sent":
        (PEERS, "  peers_fence();\n  if (atomicAdd", "  if (atomicAdd"),
    "no fence before the flag":
        (PEERS, "  state->sent = 0;\n  peers_fence();", "  state->sent = 0;"),
    "a flag read without acquire":
        (PEERS, "ld.acquire.sys.global.u64", "ld.relaxed.sys.global.u64"),
    "any flag will do":
        (PEERS, "if ((int32_t)(at - epoch) >= 0)", "if (at != 0)"),
    "no barrier behind dispatch's wait":
        (DISPATCH, "  __syncthreads();\n  take_rows", "  take_rows"),
    "no barrier behind collect's wait":
        (COLLECT, "    __syncthreads();\n    if (lowers)", "    if (lowers)"),
    "collect waits for no one":
        (COLLECT, "threadIdx.x < ep && threadIdx.x != a.links.rank", "threadIdx.x > 1000"),
    "the last rank is not awaited":
        (DISPATCH, "  if (threadIdx.x < ep) {\n    const uint32_t n = peers_wait",
         "  if (threadIdx.x == ep - 1) received[threadIdx.x] = 0;\n  if (threadIdx.x < ep - 1) {\n"
         "    const uint32_t n = peers_wait"),
    "the epoch back stays":
        (PEERS, "  state->epoch[direction] = turn.epoch;",
         "  state->epoch[direction] = turn.epoch - (direction == LINA_PEERS_BACK);"),
    "the epoch goes on with the first block":
        (PEERS, "turn.order != gridDim.x - 1) return;", "turn.order != 0) return;"),
    "the epoch goes on between a half's kernels":
        (PEERS, "turn.order == gridDim.x - 1) state->begun = 0;",
         "turn.order == gridDim.x - 1) state->begun = 0, state->epoch[0] = turn.epoch;"),
    "slots from each warp's start":
        (SLOTS, "slot[d] += counts->before[warp][d]", "slot[d] += 0"),
    "no barrier before warps are counted":
        (SLOTS, "counts->before[warp][d] = __popc(same);\n  }\n  __syncthreads();",
         "counts->before[warp][d] = __popc(same);\n  }"),
    "tiles are not awaited":
        (SLOTS, "!= epoch);", "> epoch);"),
    "a row's place without its part":
        (DISPATCH, "const int64_t row = (int64_t)rank * a.C + slot;", "const int64_t row = slot;"),
    "an id too many":
        (DISPATCH, "for (int64_t i = thread; i < a.C * a.K;", "for (int64_t i = thread; i <= a.C * a.K;"),
    "own rows from the buffer":
        (SUMS, "e == a.links.rank ? (const char *)a.y :", "e < 0 ? (const char *)a.y :"),
    "sums in another order":
        (SUMS, "lina_vector<T, N>::widen(v[e][i], f);",
         "lina_vector<T, N>::widen(v[RANKS - 1 - e][i], f);"),
    "rows that came as constants":
        (SUMS, "v[e][i] = load<T, N>(row", "v[e][i] = load_const<T, N>(row"),
    "a row's sum without fma":
        (SUMS, "sum[j] = fmaf(w[k], f[j], sum[j]);", "sum[j] += w[k] * f[j];"),
    "gradients of weights from the token's rank":
        (SUMS, "const int64_t row = (int64_t)d * a.C", "const int64_t row = (int64_t)rank * a.C"),
    "gradients go on as rows leave":
        (COLLECT, "    if (lowers) peers_announce",
         "    if (lowers) peers_lower(a.links);\n    if (lowers) peers_announce"),
    "rows of a rank that failed leave":
        (DISPATCH, "  if (peers_stays(failed_before)) all = 0;", ""),
    "sums of a rank that failed":
        (COLLECT, "const bool lost = peers_read_failed(a.links.state) != 0;", "const bool lost = false;"),
    "who stops leaves the word raised":
        (DISPATCH, "  peers_lower(links);\n", ""),
    "who fails says nothing":
        (PEERS, "failed = peers_read_failed(links.state) != 0;\n  for (int i = own",
         "failed = peers_read_failed(links.state) != 0;\n  for (int i = failed ? links.ep : own"),
    "no time-out":
        (PEERS, "now - start > links.timeout_ns", "now < start"),
    "no look at the host":
        (PEERS, "&& (links.word->abort || links.word->failure)", "&& false"),
}
SEEN_AFTER = {"rows of a rank that failed leave": "death", "sums of a rank that failed": "stop",
              "who stops leaves the word raised": "stop", "who fails says nothing": "mismatch",
              "no time-out": "death", "no look at the host": "abort"}    # the others without a fault


def as_cpp(text: str, first_id: int) -> str:
    """asm and launches as calls, __shared__ as references into the block's."""
    text = re.sub(r"#include <cuda\w+\.h>\n", "", text)
    text = re.sub(r'asm volatile\("mov.*globaltimer.*\(t\)\);', "t = emulated_time();", text)
    text = re.sub(r'asm volatile\(\s*"ld\.(acquire|relaxed)[^"]*"\s*: "=\w"\((\w+)\)\s*: "l"\((.*)\)\s*'
                  r': "memory"\);',
                  lambda found: f"{found[2]} = emulated_load({found[3]}, sizeof {found[2]}, "
                                f"{int(found[1] == 'acquire')});", text)
    text = re.sub(r'asm volatile\("st\.relaxed.*"l"\((\w+)\), "l"\((\w+)\) : "memory"\);',
                  r"emulated_store(\1, \2);", text)
    text = re.sub(r'asm volatile\("fence\.acq_rel.*;', "emulated_fence();", text)
    text = re.sub(r'asm volatile\(\s*"\{\.reg \.pred q;.*?"r"\(\(int\)wanted\)\);',
                  "r = wanted ? __ldg(p) : uint4{};", text, flags=re.S)
    shared = iter(range(first_id, first_id + 10))
    text = re.sub(r"__shared__ (\w+) (\w+)((?:\[\w+\])*);",
                  lambda found: f"auto &{found[2]} = block_shared<{found[1]}{found[3]}>({next(shared)});",
                  text)
    text = re.sub(r"([\w<>]+)<<<(\w+), (\w+), 0,\s*(?:\(cudaStream_t\))?stream>>>\(([^;]*)\);",
                  r"launched(\2, \3, \1, \4);", text)
    assert not re.search(r"\basm\b|<<<|__shared__", text), text
    return text


def written(folder: Path, mistake: str | None = None) -> None:
    """The kernels' files as C++, without float16 (bfloat16 goes the same way) to compile sooner."""
    text = {name: (CSRC / name).read_text()
            for name in (*HEADERS, *(f"cuda/{unit}.cu" for unit in UNITS))}
    if mistake is not None:
        name, old, new = MISTAKES[mistake]
        text[name] = once(text[name], old, new)
    for name, changes in SMALLER.items():
        for old, new in changes:
            text[name] = once(text[name], old, new)
    common = text["cuda/common.cuh"]
    text["cuda/common.cuh"] = '#include "device.h"\n' + once(
        common, between(common, "/* ---- reductions", "/* ---- host ---- */"), "")
    half = "    case LINA_F16: return collect<lina_f16>(a, (cudaStream_t)stream);\n"
    text["cuda/peers_collect.cu"] = once(text["cuda/peers_collect.cu"], half, "")
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    for i, (name, body) in enumerate(text.items()):
        (folder / name).write_text(as_cpp(body, 10 * i))


def built(folder: Path, harness: Path, mistake: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    written(folder, mistake)
    for unit in UNITS:
        subprocess.run(["g++", "-std=c++17", "-w", "-fno-exceptions", "-fsanitize=thread",
                        "--param", "tsan-distinguish-volatile=1", f"-I{folder}", f"-I{HERE}", "-x", "c++",
                        "-c", str(folder / "cuda" / f"{unit}.cu"), "-o", str(folder / f"{unit}.o")],
                       check=True, timeout=120)
    subprocess.run(["g++", str(harness), *(str(folder / f"{unit}.o") for unit in UNITS),
                    "-o", str(folder / "exchange")], check=True, timeout=120)
    return folder / "exchange"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs the kernels: compiled once, for the text as it is and for all mistakes in it."""
    made = tmp_path_factory.mktemp("exchange") / "exchange.o"
    subprocess.run(["g++", "-std=c++17", "-O2", "-w", f"-I{HERE}", f"-I{CSRC}", "-c",
                    str(HERE / "exchange.cpp"), "-o", str(made)], check=True, timeout=120)
    return made


@pytest.fixture(scope="module")
def program(harness: Path) -> Path:
    return built(harness.parent / "right", harness)


@needs_cxx
@pytest.mark.parametrize("fault", FAULTS)
def test_all_orders_exchange(program: Path, fault: str) -> None:
    assert_holds(program, FAULTS[fault], fault)


@needs_cxx
def test_mistakes_are_seen(harness: Path, tmp_path: Path) -> None:
    assert_seen(MISTAKES, SEEN_AFTER, tmp_path, lambda folder, mistake: built(folder, harness, mistake))
