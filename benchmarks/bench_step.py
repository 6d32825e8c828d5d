"""A whole training step of a GPT with experts: lina's schedules against DDP's hook and plain exchanges.

    torchrun --standalone --nproc-per-node gpu benchmarks/bench_step.py --model txl [--tokens N] [--predict]
    NCCL_P2P_DISABLE=1 torchrun ...      through host memory, a stand-in for a 200 Gb/s network

Forward, backward and fused AdamW in bf16. Every FFN is a layer of experts; fewer layers than the published
model has (--layers) take as much less of its vocabulary. Designs, by name@forward/backward passes:
`torch`: torch's DDP with its default hook on the dense part, experts by the plain all-to-all of bench_ep.py
(`torch-select` likewise); `plain`: lina.ddp(schedule="plain") over c10d; `c10d`, `nccl`, `p2p`:
schedule="lina" over that transport; `packed`: the same with all experts on every rank (lina.regroup,
before the model is wrapped); `auto`: schedule="auto", which may move experts too. `tutel@N`: the layer of
microsoft/tutel where that is installed, N its a2a_ffn_overlap_degree, else as `torch`.

Before a design is timed: in float32, on a small model, its gradients equal the first design's but for
rounding, and so do the losses of five steps; in bf16, on the timed model, the losses of five steps (bounds:
training.py). Step times are the slowest rank's, of steps that follow each other. `a2a alone`: the plain
design's exchanges replayed with nothing beside them. `hidden`: the share of all-to-all time with compute
beside it, by lina.trace and by the kernels that torch's profiler sees.
"""

from __future__ import annotations

import argparse
import gc
from statistics import mean
from typing import Any

import torch
from hidden import hidden_by_kernels, hidden_by_trace
from models import LAYERS, PRESETS, TINY, Preset
from multi import Clock, arguments, attempt, designs, end, facts, save, say, slowest, start
from predict import cost_model, dense_part, step_s
from training import (
    GRADIENT,
    Agreement,
    Trainer,
    batch,
    exchanged,
    replay,
    small,
    step_times,
)

import lina
from lina import parallel
from lina._C import read_priority
from lina.parallel.ddp import SCHEDULES

DESIGNS = {"cuda": "torch,torch-select,plain,nccl@1,nccl@2,nccl@3,p2p",
           "cpu": "torch,torch-select,plain,c10d@1,c10d@3"}


class Bench:
    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.clock = Clock(device, args.repeats)
        self.dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
        self.p, self.tokens = preset(args)
        ep = args.ep or torch.distributed.get_world_size()
        self.mesh, self.check_mesh = lina.mesh(ep), lina.mesh(ep)
        self.agreement = Agreement()
        self.cost: Any = None          # what predictions follow
        self.profile: dict[str, Any] | None = None
        self.dense: Any = None
        self.plan: parallel.Plan | None = None

    def check_small(self, name: str, degree: tuple[int, int]) -> dict[str, float]:
        """In parts of what is allowed."""
        p = small(self.p)
        tokens = 4 * p.sequence
        trainer = Trainer(name, degree, p, self.check_mesh, self.device, torch.float32, tokens)
        found = dict(gradient=self.agreement.compare_gradients(trainer) / GRADIENT,
                     loss=self.agreement.compare_losses("small", trainer.losses(), torch.float32,
                                                        tokens * torch.distributed.get_world_size()))
        trainer.close()
        return found

    def run(self, name: str, degree: tuple[int, int]) -> dict[str, Any]:
        trainer = Trainer(name, degree, self.p, self.mesh, self.device, self.dtype, self.tokens)
        gradient_error = self.agreement.compare_timed(trainer)
        losses = trainer.losses()
        error = self.agreement.compare_losses("timed", losses, self.dtype,
                                              self.tokens * torch.distributed.get_world_size())
        trainer.settle()
        row: dict[str, Any] = dict(losses=losses, loss_error=error, gradient_error=gradient_error)
        if self.clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        released = self.releases()
        row["step"] = vars(step_times(trainer, self.clock))
        row["released"] = self.releases() - released
        if self.clock.cuda:
            row["peak_gib"] = slowest([torch.cuda.max_memory_allocated() / 2**30], self.device)[0]
        if name.startswith("torch"):
            sizes = exchanged(trainer)
            group = parallel.groups(self.mesh).ep
            row["a2a alone"] = vars(replay(self.p, sizes, group, self.clock, self.dtype))
            row["rows_to_each_rank"] = [e.send for e in sizes]
        elif name == "tutel":
            row["padding"] = [block.moe.padding for block in trainer.model.blocks]
        else:
            row["hidden_by_trace"] = hidden_by_trace(trainer)
        if self.clock.cuda:
            shares: list[float | None] = []
            why = attempt(lambda: shares.append(hidden_by_kernels(trainer)))
            row["hidden_by_kernels"] = f"not measured: {why}" if why else shares[0]
        if self.cost is not None and not trainer.foreign:
            optimizer_s = self.clock.stages([trainer.optimizer.step])[0].median
            row["predicted_s"] = step_s(trainer.model, self.p, self.mesh, self.cost, self.dense, optimizer_s,
                                        name, degree, self.tokens)
            row["optimizer_s"] = optimizer_s
        if name == "auto":
            self.plan = trainer.wrapped.plan
            row["plan"] = self.plan.as_json()
            row["predicted_s"] = self.plan.chosen.step_s if self.plan.chosen else None
            say(f"  {self.plan}")
        trainer.close()
        return row

    def releases(self) -> int:
        """How often the host had to let gradients go on, since all-to-alls kept them for too long."""
        return read_priority(self.device.index)[1] if self.clock.cuda else 0

    def planned(self, rows: dict[str, Any]) -> None:
        """What the plan of `auto` predicts for the designs that were timed."""
        for label, name, degree in designs(",".join(rows)):
            way = ("c10d", "plain", (1, 1)) if name == "plain" else (name, "lina", degree)
            trials = [t for t in self.plan.trials if (t.transport, t.schedule, t.degree) == way
                      and t.ep == self.plan.load.ep]
            if trials:
                took = rows[label]["step"]["median"]
                rows[label]["planned_s"] = s = min(t.step_s for t in trials)
                say(f"planned {label:13s} {s * 1e3:8.2f} ms, measured {took * 1e3:8.2f}: {s / took - 1:+.1%}")

    def prepare(self, names: list[str]) -> None:
        if self.args.predict or "auto" in names:
            self.cost = cost_model(self.p, self.mesh, self.dtype, save="auto" in names,
                                   budget_s=self.args.budget)
            self.profile = self.cost.as_json()
        if self.args.predict:
            data = batch(self.p, self.device, self.tokens)
            self.dense = dense_part(self.p, self.mesh, self.clock, self.dtype, data)
            say("dense part, ms forward and backward: layers {:.2f} {:.2f}, head {:.2f} {:.2f}".format(
                *(1e3 * s for part in self.dense for s in part)))
        else:
            self.cost = None


def preset(args: argparse.Namespace) -> tuple[Preset, int]:
    """The model, and tokens a rank: whole sequences."""
    p = TINY[args.model] if args.tiny else PRESETS[args.model].cut(args.layers or LAYERS[args.model])
    tokens = args.tokens or (4 * p.sequence if args.tiny else 8192)
    return p, max(1, tokens // p.sequence) * p.sequence


def describe(label: str, row: dict[str, Any], base: dict[str, Any] | None) -> str:
    t = row["step"]
    said = [f"  {label:13s} {t['median'] * 1e3:8.2f} ms ({t['low'] * 1e3:.2f} .. {t['high'] * 1e3:.2f})"]
    if base:
        said.append(f"x{base['step']['median'] / t['median']:.3f}")
    if "a2a alone" in row:
        alone = row["a2a alone"]["median"]
        said.append(f"a2a alone {alone * 1e3:.2f} ms, {alone / t['median']:.1%} of the step")
    for key, name in (("hidden_by_trace", "trace"), ("hidden_by_kernels", "kernels")):
        if key in row:
            share = row[key]
            said.append(f"hidden by {name} " + (f"{share:.1%}" if isinstance(share, float) else f"{share}"))
    if "padding" in row:
        said.append(f"rows by padding x{mean(row['padding']):.2f} (at most x{max(row['padding']):.2f})")
    if row["released"]:
        said.append(f"gradients were let go on {row['released']} times")
    if "peak_gib" in row:
        said.append(f"{row['peak_gib']:.1f} GiB")
    if row.get("predicted_s"):
        s = row["predicted_s"]
        said.append(f"predicted {s * 1e3:.2f} ms, {s / t['median'] - 1:+.1%}")
    small_off, losses = row["small"], row["losses"]
    said.append(f"loss {losses[0]:.4f} .. {losses[-1]:.4f}; of what is allowed it is off by "
                f"{row['loss_error']:.2f}, its gradients by {row['gradient_error']:.2f}, in the small model "
                f"by {small_off['loss']:.2f}, gradients there by {small_off['gradient']:.2f}")
    return "   ".join(said)


def options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=tuple(PRESETS), default="txl")
    parser.add_argument("--layers", type=int, help=f"default: {LAYERS}")
    parser.add_argument("--tokens", type=int, help="a rank; default 8192")
    parser.add_argument("--ep", type=int, help="ranks that the experts are spread over; default: all")
    parser.add_argument("--designs", help="for example torch,plain,nccl@1,nccl@3,nccl@2/3,p2p,auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: on a CPU float32")
    parser.add_argument("--predict", action="store_true", help="also the step that lina.simulate predicts")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for profiling")
    return parser.parse_args()


def todo(args: argparse.Namespace, device: torch.device) -> list[tuple[str, str, tuple[int, int]]]:
    default = DESIGNS[device.type] + (",auto" if "auto" in SCHEDULES else "")
    return designs(args.designs or default)


def main() -> None:
    args = options()
    device = start(args.device)
    found = facts(device)
    bench = Bench(args, device)
    p, wanted = bench.p, todo(args, device)
    say(f"\n{args.model}: {p}\n{bench.tokens} tokens a rank, {bench.dtype}, experts over "
        f"{parallel.ep_size(bench.mesh)} ranks" + (f"; {found['links']}" if "links" in found else ""))
    bench.prepare([name for _, name, _ in wanted])
    rows: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for label, name, degree in wanted:
        def one(label: str = label, name: str = name, degree: tuple[int, int] = degree) -> None:
            checked = bench.check_small(name, degree)
            rows[label] = bench.run(name, degree) | dict(small=checked)

        why = attempt(one)
        if why:
            rows.pop(label, None)
            missing[label] = why
            say(f"  {label:13s} not timed: {why}")
        else:
            say(describe(label, rows[label], rows.get("torch") if label != "torch" else None))
        gc.collect()
        if bench.clock.cuda:
            torch.cuda.empty_cache()
    if bench.plan is not None:
        bench.planned(rows)
    case = dict(model=args.model, preset=vars(p), tokens=bench.tokens, designs=rows, profile=bench.profile)
    save(args.json, "step", found | dict(not_timed=missing), [case])
    end()


if __name__ == "__main__":
    main()
