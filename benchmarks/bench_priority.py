"""An all-to-all beside an all-reduce: alone, together as torch runs them, and with lina's priority.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_priority.py [--a2a-mb 32] [--reduce-mb 128]

Every rank starts the all-reduce, computes for --compute-us, then exchanges, as a backward pass does.
With priority it says --lead micro-ops earlier that the exchange is imminent (--peer-lead-us before
it, with the kernel over peers' memory, which pauses between tiles). `a2a` is from the end of
that computation, on the rank that ends it last, to the end of the all-to-all; `both` is from the start
of the all-reduce to the end of what ends last, against the sum of both alone. Medians over runs.
Results are checked before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

import torch
import torch.distributed as dist

from lina.parallel.gradients.peer_reduce import PeerReducer
from lina.parallel.transport import nccl


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.groups = dist.new_group(), dist.new_group()
        self.transport = nccl.NCCL(dist.group.WORLD)
        self.args = args
        n = args.a2a_mb << 20
        self.inp = torch.randint(256, (n,), dtype=torch.uint8, device=self.device)
        self.out = torch.empty_like(self.inp)
        self.splits = [n // self.size] * self.size
        self.flat = torch.randn((args.reduce_mb << 20) // 2, device=self.device).bfloat16()
        self.side = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
        self.rate = self.clock()
        self.lead_s = 0.0

    def clock(self) -> float:
        """Cycles a second of torch.cuda._sleep."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)
        start.record()
        torch.cuda._sleep(10_000_000)
        stop.record()
        stop.synchronize()
        return 10_000_000 / (start.elapsed_time(stop) * 1e-3)

    def check(self, reducer: nccl.Reducer | PeerReducer) -> None:
        torch.manual_seed(self.rank)
        flat = torch.randn(self.flat.numel(), device=self.device).bfloat16()
        want = flat.float()
        dist.all_reduce(want)
        want /= self.size
        reducer.all_reduce(flat)
        flat = nccl.future(flat, reducer.stream).wait()
        assert ((flat.float() - want).abs() <= 0.01 * want.abs() + 1e-6).all(), "all-reduce"
        want_out = torch.empty_like(self.out)
        dist.all_to_all_single(want_out, self.inp, self.splits, self.splits)
        self.out.zero_()
        self.transport.start("check", self.out, self.inp, self.splits, self.splits).wait()
        assert torch.equal(self.out, want_out), "all-to-all"

    def run(self, a2a: str | None, reduce: str | None,
            reducer: nccl.Reducer | PeerReducer | None) -> tuple[float, float]:
        """Milliseconds of the all-to-all and of both; each "torch", "lina" or None."""
        comp = torch.cuda.current_stream()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        torch.cuda._sleep(2_000_000)                       # the host is ahead from here on
        dist.all_reduce(self.meet)
        marks[0].record()
        if reduce == "torch":
            self.side[0].wait_stream(comp)
            with torch.cuda.stream(self.side[0]):
                dist.all_reduce(self.flat, dist.ReduceOp.AVG, group=self.groups[0])
            reduce_stream = self.side[0]
        elif reduce:
            reducer.all_reduce(self.flat, gently=reduce == "lina")
            reduce_stream = reducer.stream
        torch.cuda._sleep(int(self.rate * (self.args.compute_us * 1e-6 - self.lead_s)))
        if a2a == "lina":
            self.transport.imminent()
        torch.cuda._sleep(int(self.rate * self.lead_s) + 1)
        marks[1].record()
        if a2a == "lina":
            self.transport.start("bench", self.out, self.inp, self.splits, self.splits).wait()
            self.transport.settled()
        elif a2a:
            self.side[1].wait_stream(comp)
            with torch.cuda.stream(self.side[1]):
                dist.all_to_all_single(self.out, self.inp, self.splits, self.splits, group=self.groups[1])
            comp.wait_stream(self.side[1])
        marks[2].record()
        if reduce:
            comp.wait_stream(reduce_stream)
        marks[3].record()
        torch.cuda.synchronize()
        return marks[1].elapsed_time(marks[2]), marks[0].elapsed_time(marks[3])

    def median(self, *how, n: int = 20) -> tuple[float, float]:
        self.meet = torch.zeros(1, device=self.device)
        rows = torch.tensor([self.run(*how) for _ in range(n + 5)][5:], device=self.device)
        last_ready, both = rows.unbind(1)        # of the rank that was ready last, whom nobody kept waiting
        dist.all_reduce(last_ready := last_ready.contiguous(), dist.ReduceOp.MIN)
        dist.all_reduce(both := both.contiguous(), dist.ReduceOp.MAX)
        return statistics.median(last_ready.tolist()), statistics.median(both.tolist())

    def measure(self, rows: dict[str, tuple[float, float]], name: str, reducer: nccl.Reducer | PeerReducer,
                lead_us: float) -> None:
        self.check(reducer)
        self.lead_s = min(lead_us, self.args.compute_us) * 1e-6
        rows[f"all-reduce alone, {name}"] = self.median(None, "lina", reducer)
        rows[f"lina, {name}"] = self.median("lina", "lina", reducer)
        self.check(reducer)
        reducer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--a2a-mb", type=int, default=32)
    parser.add_argument("--reduce-mb", type=int, default=128)
    parser.add_argument("--compute-us", type=float, default=250)
    parser.add_argument("--lead", type=float, default=1.5)
    parser.add_argument("--micro-us", default="50,100,200,400,800")
    parser.add_argument("--ctas", default="0")
    parser.add_argument("--reducer", default="nccl", help="nccl, peers or both, by comma")
    parser.add_argument("--blocks", default="16,24,32", help="of the kernel over peers' memory")
    parser.add_argument("--tile-kb", default="32,64,128")
    parser.add_argument("--scatter", default="0", help="0, 1 or both: whether ranks sum parts of tiles")
    parser.add_argument("--peer-lead-us", type=float, default=10)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    bench = Bench(args)
    say = (lambda *a: print(*a, flush=True)) if bench.rank == 0 else (lambda *a: None)
    setting = {k: v for k, v in os.environ.items() if k in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")}
    say(torch.cuda.get_device_name(), "torch", torch.__version__, "nccl", torch.cuda.nccl.version(), setting)
    whole = nccl.Reducer(dist.group.WORLD, (20e-6, 1 / 250e9), 1e-4)
    bench.check(whole)
    rows = {}
    rows["a2a alone, torch"] = bench.median("torch", None, None)
    rows["a2a alone"] = bench.median("lina", None, None)
    rows["all-reduce alone, torch"] = bench.median(None, "torch", None)
    rows["all-reduce alone"] = bench.median(None, "whole", whole)
    rows["together, torch"] = bench.median("torch", "torch", None)
    alone = rows["a2a alone"][0]
    total = alone + rows["all-reduce alone"][1]
    rate = (args.reduce_mb << 20) / (rows["all-reduce alone"][1] * 1e-3)
    kinds = args.reducer.split(",")
    if "nccl" in kinds:
        for ctas in map(int, args.ctas.split(",")):
            for micro in map(float, args.micro_us.split(",")):
                reducer = nccl.Reducer(dist.group.WORLD, (20e-6, 1 / rate), micro * 1e-6, ctas)
                name = f"micro-ops of {micro:.0f} us, {reducer.micro_op_bytes / 2**20:.1f} MB, {ctas} CTAs"
                bench.measure(rows, name, reducer, args.lead * micro)
    if "peers" in kinds:
        for scatter in (bool(int(n)) for n in args.scatter.split(",")):
            for blocks in map(int, args.blocks.split(",")):
                for tile in map(int, args.tile_kb.split(",")):
                    over = PeerReducer(dist.group.WORLD, blocks=blocks, tile_bytes=tile << 10,
                                       scatter=scatter or bench.size > 2)
                    name = f"peers, {blocks} blocks, tiles of {tile} KB" + ", scatter" * scatter
                    bench.measure(rows, name, over, args.peer_lead_us)
    for name, (a2a, both) in rows.items():
        say(f"{name:62s} a2a {a2a:7.3f} ms x{a2a / alone:5.2f}   both {both:7.3f} ms x{both / total:5.2f}")
    if args.json and bench.rank == 0:
        with open(args.json, "w") as file:
            json.dump(dict(args=vars(args), setting=setting, rows=rows), file, indent=1)
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)


if __name__ == "__main__":
    main()
