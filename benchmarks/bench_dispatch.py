"""dispatch_layout, the tables of a layer spread over ranks, against the same tables from tensor operations.

    python benchmarks/bench_dispatch.py [--device cpu|cuda] [--threads N] [--json FILE]

One rank's part of it: nothing travels here. Traffic counted: ids read twice, the row of each token for
each rank and the rows' tokens written, all int32. The eager peer makes the same tables and header of one
direction from a mask and a stable sort; neither waits for the GPU. `host` is what a layer waits for.
"""

from __future__ import annotations

import torch
from common import Case, arguments, measure
from torch import Tensor

from lina import ops, reference

SHAPES = {  # T, E, K, ep, degree
    "cuda": [(32768, 128, 8, 8, 1), (32768, 128, 8, 8, 4), (8192, 256, 8, 64, 3), (128, 128, 8, 2, 1)],
    "cpu": [(16384, 128, 8, 8, 1), (16384, 128, 8, 8, 4), (64, 64, 8, 2, 1)],
}
SAID = torch.arange(8)


def eager(expert: Tensor, said: Tensor, E: int, ep: int, me: int, degree: int) -> tuple[Tensor, ...]:
    T, device, chunks, ranges = len(expert), expert.device, max(1, degree - 2), 1 if degree < 3 else 2
    rank = torch.where((expert >= 0) & (expert < E), expert // (E // ep), ep).long()
    t = torch.arange(T, device=device)
    hit = torch.zeros(T, ep + 1, dtype=torch.bool, device=device).scatter_(1, rank, True)[:, :ep]
    own = hit[:, me].clone()
    hit[:, me] = False
    chunk = t * chunks // max(T, 1)
    key = torch.where(hit, chunk[:, None] * ep + torch.arange(ep, device=device), chunks * ep).flatten()
    order = torch.sort(key, stable=True).indices
    count = torch.zeros(chunks * ep + 1, dtype=torch.int64, device=device).scatter_add_(
        0, key, torch.ones_like(key))
    S = count[:-1].sum()
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device)).view(T, ep)
    row = torch.where(hit, row, -1)
    row[:, me] = torch.where(own, S + t, -1)
    travels = torch.arange(len(order), device=device) < S
    token = torch.where(travels, order // ep, -1)[:T * min(expert.shape[1], ep - 1)]
    part = torch.where(rank == me, (t * ranges // max(T, 1))[:, None], chunk[:, None])
    pairs = torch.zeros(ep + 1, ops.CHUNKS, dtype=torch.int64, device=device)
    pairs.view(-1).scatter_add_(0, (rank * ops.CHUNKS + part).flatten(), torch.ones_like(rank).flatten())
    header = torch.zeros(ep, len(said) + 2 * ops.COLUMNS, dtype=torch.int64, device=device)
    columns = header[:, len(said):]
    header[:, :len(said)] = said
    columns[:, :chunks] = count[:-1].view(chunks, ep).T
    columns[:, ops.CHUNKS:ops.COLUMNS] = pairs[:ep]
    return token.int(), row.int(), header


def case(T: int, E: int, K: int, ep: int, degree: int, device: str) -> Case:
    draw = torch.Generator().manual_seed(E)
    expert = torch.rand(T, E, generator=draw).argsort(-1)[:, :K].int().to(device)
    said, me = SAID.to(device), ep // 2
    runs = {"lina": lambda: ops.dispatch_layout(expert, SAID, E, ep, me, degree),
            "eager": lambda: eager(expert, said, E, ep, me, degree)}

    def check() -> None:
        want = reference.dispatch_layout(expert, SAID, E, ep, me, degree)
        for got in (runs["lina"](), runs["eager"]()):
            for name, a in zip(("token_R", "row_TR", "header"), (*got[:2], got[-1]), strict=True):
                assert torch.equal(a, getattr(want, name)), name

    bytes_ = 8 * T * K + 4 * T * ep + 4 * T * min(K, ep - 1)
    return Case(f"dispatch {T=} {E=} {K=} {ep=} {degree=}", runs, bytes_,
                "8 T K + 4 T ep + 4 T min(K, ep - 1)", check=check)


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    measure("dispatch", [case(*shape, args.device) for shape in SHAPES[args.device]], args)


if __name__ == "__main__":
    main()
