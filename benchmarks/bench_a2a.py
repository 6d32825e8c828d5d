"""Tokens between GPUs: stores into peers' memory against NCCL, by size; a round in a graph.

    torchrun --standalone --nproc-per-node gpu benchmarks/bench_a2a.py [--sms N ..] [--json F]

Bandwidth counts the bytes that leave a GPU. p2p: rows to the other ranks and the wait for theirs (dispatch),
and back with the sum (collect). NCCL's all_to_all_single: equal parts to every
rank, its own part copied, as torch does it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

import torch
import torch.distributed as dist
from common import machine
from torch import Tensor

from lina.parallel.tokens.round import Round
from lina.parallel.transport.peers import Peers

MEGABYTES = (1, 4, 16, 64, 256)
REPEATS = 20


def time_us(run, before=None, after=None, inner: int = 1) -> tuple[float, float, float]:
    """Median, least and most over steps of the slowest rank's GPU time; ranks start together on the device.

    ``before`` and ``after`` are not timed: the two halves of a round must take turns. ``run`` does its
    work ``inner`` times.
    """
    meet, taken = torch.zeros(1, device="cuda"), []
    for turn in range(REPEATS + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before:
            before()
        torch.cuda._sleep(2_000_000)                 # the host's head start
        dist.all_reduce(meet)
        begin.record()
        run()
        end.record()
        if after:
            after()
        torch.cuda.synchronize()
        if turn >= 5:
            taken.append(begin.elapsed_time(end) * 1e3 / inner)
    times = torch.tensor(taken, device="cuda")
    dist.all_reduce(times, dist.ReduceOp.MAX)
    values = times.tolist()
    return statistics.median(values), min(values), max(values)


class Exchange:
    """T tokens of width D with K experts each, of E over all ranks; results checked."""

    def __init__(self, peers: Peers, T: int, D: int, K: int, E: int, away: bool = False) -> None:
        rank, ep = peers.rank, peers.ep
        draw = torch.Generator().manual_seed(rank)
        layer = peers.layer(T, D, K, E, torch.bfloat16, False, tokens=T)
        self.round, self.C = Round(peers, layer, T, D, K, E, torch.bfloat16), layer.C
        self.x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
        expert = torch.rand(T, E, generator=draw).argsort(-1)[:, :K]
        if away:                                     # each row leaves, to the other ranks in turn
            to = (rank + 1 + torch.arange(T) % (ep - 1)) % ep
            expert = (to * (E // ep))[:, None].expand(T, K)
        self.expert = expert.int().contiguous().cuda()
        self.weight = torch.rand(T, K, generator=draw).cuda()
        self.slot = torch.empty(T, ep, dtype=torch.int32, device="cuda")
        self.count = torch.empty(2, ep, dtype=torch.int32, device="cuda")
        self.weight_R = torch.empty(ep * layer.C, K, device="cuda")
        self.expert_R = torch.empty(ep * layer.C, K, dtype=torch.int32, device="cuda")
        self.y = torch.empty(ep * layer.C, D, device="cuda", dtype=torch.bfloat16)
        self.pairs: tuple[Tensor | None, Tensor | None] = None, None       # rows of y and weights, by pair
        self.out = torch.empty_like(self.x)
        self.rows = peers.rows(layer, D, torch.bfloat16)

    def dispatch(self) -> None:
        self.round.dispatch("dispatch", self.x, self.expert, self.weight, self.slot, self.count, None,
                            self.weight_R, self.expert_R)

    def collect(self) -> Tensor:
        self.round.collect("collect", self.y, *self.pairs, None, self.slot, self.count, self.expert, self.out,
                           None)
        return self.out

    def by_pair(self) -> None:
        """From here on rows that come back are summed over their experts first, as a layer's forward does."""
        rows = torch.ops.lina.sort(self.expert_R, self.round.E // self.round.peers.ep)
        self.y = torch.randn(len(rows[1]), self.round.D, device="cuda", dtype=torch.bfloat16)
        self.pairs = rows[2], self.weight_R

    def both(self) -> None:
        self.dispatch()
        self.collect()

    def check(self) -> None:
        """Rows come back as often as they left: the sum is a power of two times the token, or zero."""
        self.dispatch()
        self.y.copy_(self.rows)
        out = self.collect()
        times = (self.slot >= 0).sum(1, keepdim=True)
        want = (self.x.float() * times).bfloat16()
        assert torch.equal(out, want), "wrong rows came back; not timed"
        L = self.round.E // self.round.peers.ep
        sent = ((self.expert // L)[:, :, None] == torch.arange(self.round.peers.ep, device="cuda")).any(1)
        assert torch.equal(sent, self.slot >= 0), "wrong ranks; not timed"


def row(name: str, sizes: dict[str, float], times: dict[str, tuple[float, float, float]]) -> dict:
    said = [f"{what} {t[0]:8.1f} us ({t[1]:.1f} .. {t[2]:.1f})"
            + (f" {sizes[what] / t[0] / 1e3:6.1f} GB/s" if what in sizes else "")
            for what, t in times.items()]
    if dist.get_rank() == 0:
        print(f"{name:22s} " + "   ".join(said), flush=True)
    return dict(case=name, bytes=sizes, us=times)


def graphed(run, times: int):
    """`times` runs in one CUDA graph: no launch costs between kernels."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(times):
            run()
    return graph.replay


def by_size(peers: Peers, megabytes: int, note: str = "") -> dict:
    size, D, ep = megabytes << 20, 4096, peers.ep
    case = Exchange(peers, size // (2 * D), D, 1, ep, away=True)
    case.check()
    # NCCL's buffer so that as much leaves the GPU
    source = torch.empty(size // 2 // (ep - 1) * ep, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = {"dispatch": time_us(case.dispatch, after=case.collect),
             "collect": time_us(case.collect, before=case.dispatch),
             "round": time_us(graphed(case.both, 10), inner=10)}
    if not note:
        times["NCCL"] = time_us(lambda: dist.all_to_all_single(target, source))
    return row(f"{megabytes} MB out{note}", dict.fromkeys(times, size) | {"round": 2 * size}, times)


def layer_back(peers: Peers, T: int, D: int, K: int, E: int) -> dict:
    """collect with the sum over a row's experts in it."""
    case = Exchange(peers, T, D, K, E)
    case.check()
    case.by_pair()
    away = (case.slot >= 0).sum() - (case.slot[:, peers.rank] >= 0).sum()
    return row(f"{T=} {D=} {K=}", {"collect": 2 * int(away) * D},
               {"collect": time_us(case.collect, before=case.dispatch)})


def decode(peers: Peers, T: int, D: int, K: int, E: int) -> dict:
    """A whole round, both ways, as a CUDA graph runs it."""
    case = Exchange(peers, T, D, K, E)
    case.check()
    away = (case.slot >= 0).sum() - (case.slot[:, peers.rank] >= 0).sum()
    times = {"round": time_us(graphed(case.both, 10), inner=10)}
    return row(f"{T=} {D=} {K=}", {"round": 4 * int(away) * D}, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sms", type=int, nargs="*", default=[], help="64 MB also with so many SMs")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    ep, rank = dist.get_world_size(), dist.get_rank()
    facts = machine("cuda") | {"ranks": ep}
    if rank == 0:
        print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    peers = Peers(dist.group.WORLD, timeout_s=5)
    rows = [decode(peers, 128, 7168, 8, 256), decode(peers, 128, 2048, 8, 128)]
    rows += [by_size(peers, megabytes) for megabytes in MEGABYTES]
    rows += [decode(peers, 8192, 2048, 8, 128), layer_back(peers, 8192, 2048, 8, 128)]
    for sms in args.sms:
        rows.append(by_size(Peers(dist.group.WORLD, timeout_s=5, sms=sms), 64, f", {sms} SMs"))
    peers.check()
    if args.json and rank == 0:
        with open(args.json, "w") as file:
            json.dump(dict(title="a2a", machine=facts, cases=rows), file, indent=1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
