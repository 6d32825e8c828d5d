"""`lina simulate`: step times of a published model under each schedule, before any GPU is rented."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lina import simulate
from lina.simulate import Result, models, timeline

WATCHED = 3         # ranks in a picture: the first, the middle and the last


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=models.MODELS, default="transformer-xl", metavar="NAME",
                        help=f"one of {', '.join(models.MODELS)} (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=16, metavar="N", help="GPUs (default: %(default)s)")
    parser.add_argument("--ep", type=int, metavar="N",
                        help="ranks that a layer's experts are spread over (default: the most that divides "
                             "ranks and experts)")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="a rank (default: %(default)s)")
    parser.add_argument("--schedule", choices=("all", *simulate.SCHEDULES), default="all",
                        help="default: %(default)s")
    parser.add_argument("--link", choices=models.PRESETS, default="a100-100g", metavar="PRESET",
                        help=f"one of {', '.join(models.PRESETS)} (default: %(default)s)")
    parser.add_argument("--micro-op", type=float, default=0.5, metavar="MS",
                        help="length of lina's micro-ops (default: %(default)s)")
    parser.add_argument("--straggle", type=float, default=0.0, metavar="MS",
                        help="each operation is late on each rank by up to this much (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of the delays (default: %(default)s)")
    parser.add_argument("--png", metavar="FILE", help="draw a timeline of the first, middle and last rank")


def run(model: str, ranks: int, ep: int | None, tokens: int, schedule: str, link: str, micro_op: float,
        straggle: float, seed: int, png: str | None) -> dict[str, Any]:
    """Simulate, print the table, draw; what was found, JSON-able. Raises ValueError, OSError."""
    for name, value, low in (("ranks", ranks, 1), ("tokens", tokens, 1), ("seed", seed, 0)):
        if value < low:
            raise ValueError(f"--{name}: {value}, at least {low}")
    if not (micro_op > 0 and math.isfinite(micro_op)):
        raise ValueError(f"--micro-op: {micro_op}, milliseconds over 0")
    if not (straggle >= 0 and math.isfinite(straggle)):
        raise ValueError(f"--straggle: {straggle}, milliseconds, at least 0")
    shape, machine = models.MODELS[model], models.PRESETS[link]
    if ep is None:
        ep = models.spread(shape, ranks)
    built = models.build(shape, ranks, ep, machine, tokens=tokens)
    watch = sorted({0, ranks // 2, ranks - 1})[:WATCHED] if png else ()
    names = simulate.SCHEDULES if schedule == "all" else (schedule,)
    results = [simulate.step(built.layers, ranks, ep, machine.links, name, micro_op_s=1e-3 * micro_op,
                             optimizer_s=built.optimizer_s, straggle_s=1e-3 * straggle, seed=seed,
                             watch=watch)
               for name in names]
    print(f"{model}, {ranks} ranks, experts over {ep}, {tokens} tokens a rank, {link}")
    print("\n".join(lines(results)))
    if png:
        timeline.draw(results, png)
        print(f"picture   {png}")
    found = [dataclasses.asdict(result) for result in results]
    for one in found:
        del one["spans"]
    return {"model": model, "ranks": ranks, "ep": ep, "tokens": tokens, "link": link, "seed": seed,
            "straggle_ms": straggle, "micro_op_ms": micro_op, "schedules": found}


def lines(results: Sequence[Result]) -> list[str]:
    """A table, one row a schedule; speedup over the first."""
    rows = [f"{'schedule':<10}{'step ms':>10}{'speedup':>9}{'compute ms':>12}{'a2a ms':>10}{'hidden':>8}"
            f"{'slowed':>8}{'allreduce ms':>14}{'hidden':>8}{'link idle':>11}{'passes':>9}"]
    for r in results:
        passes = "/".join(f"{degree:.2g}" for degree in r.degrees)
        rows.append(
            f"{r.schedule:<10}{1e3 * r.step_s:>10.2f}{results[0].step_s / r.step_s:>8.2f}x"
            f"{1e3 * r.compute_s:>12.2f}{1e3 * r.a2a_s:>10.2f}{_share(r.a2a_hidden):>8}"
            f"{'-' if r.slowdown is None else f'{r.slowdown:.2f}x':>8}{1e3 * r.reduce_s:>14.2f}"
            f"{_share(r.reduce_hidden):>8}{_share(r.link_idle):>11}{passes:>9}")
    return rows


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
