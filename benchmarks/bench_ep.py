"""One expert-parallel MoE layer on all ranks: lina's transports against the plain design.

    torchrun --standalone --nproc-per-node gpu benchmarks/bench_ep.py [--shapes qwen3,decode] [--json FILE]

Every rank has T tokens of its own and an equal share of the experts. TFLOP/s a GPU count 6 T K D F forward
and twice that backward, over the median of each step's slowest rank; the router's product and top-k are
inside. `torch`: c10d's all-to-all of one row for each token-expert pair, counts read by the host,
torch._grouped_mm (`torch-select`: with index_select). `nccl@3`: lina's transport, in 3 passes. `ligercute`
where it is installed.

First each design's output and all gradients are compared with the dense layer in float64, on a small
shape. Of n stored values, one rounded after the other, each adds at most half an eps, in norm as independent
errors do: sqrt(n) * eps / 2, n = 16; and the worst element is off by at most 16 eps of the largest. On the
timed shapes designs are compared with the first one, token by token where they chose the same experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layers import Design, LigerCute, Lina, Problem, Shape, check, limits, make
from multi import Clock, arguments, attempt, designs, end, facts, off, save, say, start
from torch import Tensor

SHAPES = {
    "qwen3": Shape("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8),
    "mixtral": Shape("Mixtral-8x7B", 8192, 4096, 14336, 8, 2),
    "deepseek": Shape("DeepSeek-V3-like", 8192, 7168, 2048, 128, 8),
    "decode": Shape("Qwen3-30B-A3B, 128 tokens", 128, 2048, 768, 128, 8),
}
TINY = {"qwen3": Shape("tiny", 96, 32, 24, 8, 4), "decode": Shape("tiny, few tokens", 5, 32, 24, 8, 4)}
CHECK, TINY_CHECK = Shape("check", 512, 1024, 256, 16, 4), Shape("check", 64, 32, 16, 8, 4)
DESIGNS = {"cuda": "torch,torch-select,c10d@1,nccl@1,nccl@2,nccl@3,nccl@4,p2p,p2p@2,p2p@3,ligercute",
           "cpu": "torch,torch-select,c10d@1,c10d@2,c10d@3"}
GRAPH_TOKENS = 128         # up to so many, a replay of a CUDA graph is timed too


class First:
    """The output and dx of a timed shape by the design that came first."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, ...] | None = None

    def compare(self, design: Design) -> None:
        p = design.p
        design.clear()
        out = design()
        out.backward(p.dout)
        ids = design.route(F.linear(p.x, p.router).detach())[1].long().sort(1).values
        found = out.detach(), p.x.grad, ids
        if self.kept is None:
            self.kept = found
            return
        same = (ids == self.kept[2]).all(1)
        bound = 2**0.5 * limits(p.x.dtype, p.shape.D)[0]
        with torch.no_grad():
            alone = design()
        for name, got, want in (("out", found[0], self.kept[0]), ("dx", found[1], self.kept[1]),
                                ("out without gradients", alone, self.kept[0])):
            error = off(got[same], want[same])[0]
            if not (error <= bound and same.sum() * 2 >= len(same)):
                raise RuntimeError(f"{name} differs from the first design's by {error:.4f} in norm for "
                                   f"{int(same.sum())} of {len(same)} tokens; allowed {bound:.4f}")


def graph_of(design: Lina) -> Callable[[], None]:
    """A replay of the layer without gradients. Its result is the eager one's, over p2p bit by bit; over nccl
    a graph sends other rows, in one pass."""
    with torch.no_grad():
        want = design().clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = design()
    graph.replay()
    torch.cuda.synchronize()
    bound = 0.0 if design.transport == "p2p" else 2**0.5 * limits(want.dtype, design.p.shape.D)[0]
    error = off(out, want)[0]
    if not error <= bound:
        raise RuntimeError(f"a graph's replay differs from the eager layer by {error:.4f} in norm")
    return graph.replay


def time_of(design: Design, clock: Clock) -> dict[str, Any]:
    p, held = design.p, {}
    design.ready()

    def forward() -> None:
        held["out"] = design()

    def backward() -> None:
        held["out"].backward(p.dout)

    def clear() -> None:
        held.clear()
        design.clear()

    def inference() -> None:
        with torch.no_grad():
            design()

    times = dict(zip(("forward", "backward"), clock.stages([forward, backward], clear), strict=True))
    host = clock.host([forward, backward], clear)
    clear()
    times["no grad"] = clock.stages([inference])[0]
    host += clock.host([inference])
    flops = 6 * p.shape.T * p.shape.K * p.shape.D * p.shape.F
    row: dict[str, Any] = {}
    for (name, t), spent in zip(times.items(), host, strict=True):
        work = 2 * flops if name == "backward" else flops
        row[name] = dict(vars(t), host=spent, tflops=work / t.median / 1e12)
    if clock.cuda and p.shape.T <= GRAPH_TOKENS and isinstance(design, Lina) and design.transport != "c10d":
        layer = design
        made: list[Callable[[], None]] = []
        why = attempt(lambda: made.append(graph_of(layer)))
        if why:
            row["graph"] = dict(why=why)
        else:
            several = clock.stages([lambda: [made[0]() for _ in range(10)]])[0]
            row["graph"] = vars(clock.stages([made[0]])[0]) | {"ten in a row": several.median / 10}
    return row


def describe(label: str, row: dict[str, Any], base: dict[str, Any] | None) -> str:
    said = []
    for name in ("forward", "backward", "no grad"):
        t = row[name]
        said.append(f"{name} {t['tflops']:6.1f} TFLOP/s {t['median'] * 1e6:8.0f} us ({t['low'] * 1e6:.0f} .. "
                    f"{t['high'] * 1e6:.0f}, host {t['host'] * 1e6:.0f})"
                    + (f" x{base[name]['median'] / t['median']:.2f}" if base else ""))
    if "why" in row.get("graph", {}):
        said.append(f"in a graph: not measured, {row['graph']['why']}")
    elif "graph" in row:
        g = row["graph"]
        said.append(f"no grad in a graph {g['median'] * 1e6:.0f} us ({g['low'] * 1e6:.0f} .. "
                    f"{g['high'] * 1e6:.0f}), ten in a row {g['ten in a row'] * 1e6:.0f}")
    return f"  {label:13s} " + "   ".join(said)


def best(rows: dict[str, dict]) -> list[str]:
    """For each transport the degree with the least time forward and backward together."""
    found: dict[str, str] = {}
    spent = {label: row["forward"]["median"] + row["backward"]["median"] for label, row in rows.items()}
    for label in sorted(spent, key=lambda one: spent[one]):
        if "@" in label:
            found.setdefault(label.partition("@")[0], label)
    return list(found.values())


def check_all(problem: Problem, todo: list) -> tuple[dict[str, dict], dict[str, str]]:
    """Each design's errors in norm, and why others are not timed."""
    errors: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    bound = limits(problem.x.dtype, problem.world * problem.shape.T)[0]
    say(f"\nerrors in norm against the dense layer in float64, rank 0's; allowed {bound:.3g}")
    for label, name, degree in todo:
        def one(label: str = label, name: str = name, degree: tuple[int, int] = degree) -> None:
            errors[label] = check(make(name, degree, problem))

        why = attempt(one)
        if why:
            missing[label] = why
            say(f"  {label:13s} not timed: {why}")
        else:
            say(f"  {label:13s} " + "   ".join(f"{part} {e:.2g}" for part, e in errors[label].items()))
    return errors, missing


def time_all(problem: Problem, todo: list, clock: Clock) -> dict[str, dict]:
    """Each design's row, printed as it comes."""
    shape, first, rows = problem.shape, First(), {}
    say(f"\n{shape.title}: {shape.T} tokens a rank, D {shape.D}, F {shape.F}, E {shape.E}, K {shape.K}, "
        f"{problem.x.dtype}")
    for label, name, degree in todo:
        def one(label: str = label, name: str = name, degree: tuple[int, int] = degree) -> None:
            design = make(name, degree, problem)
            design.ready()
            first.compare(design)
            rows[label] = time_of(design, clock)

        why = attempt(one)
        if why:
            rows.pop(label, None)
            say(f"  {label:13s} not timed: {why}")
        else:
            say(describe(label, rows[label], rows.get("torch") if label != "torch" else None))
        for leaf in problem.leaves().values():
            leaf.grad = None
        if clock.cuda:
            torch.cuda.empty_cache()
    return rows


def options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default: all")
    parser.add_argument("--designs", help="for example nccl@1,nccl@2/3,p2p@2 (@forward/backward: passes)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: on a CPU float32")
    return parser.parse_args()


def main() -> None:
    args = options()
    device = start(args.device)
    found = facts(device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    known = TINY if args.tiny else SHAPES
    shapes = [known[name] for name in (args.shapes.split(",") if args.shapes else known)]
    tested = TINY_CHECK if args.tiny else CHECK
    LigerCute.largest = tuple(max(s[i] for s in (tested, *shapes)) for i in (1, 2, 4, 5))
    todo = designs(args.designs or DESIGNS[device.type])
    small = Problem(tested, device, dtype)
    meshes = [small.mesh]                    # a mesh that goes would take its communicators with it
    errors, missing = check_all(small, todo)
    del small
    todo = [one for one in todo if one[0] not in missing]
    clock, cases = Clock(device, args.repeats), []
    for shape in shapes:
        problem = Problem(shape, device, dtype)
        meshes.append(problem.mesh)
        rows = time_all(problem, todo, clock)
        say(*(f"  best of its transport: {label}" for label in best(rows)))
        cases.append(dict(shape=shape._asdict(), designs=rows, best=best(rows)))
        del problem
    save(args.json, "ep", found | dict(errors=errors, not_timed=missing), cases)
    end()


if __name__ == "__main__":
    main()
