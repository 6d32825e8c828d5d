"""What every rank does in test_memory.py: train, and look at what it holds."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import lina

from helpers import passes

EVERY = 10                   # steps between looks at the heap


class Grown(NamedTuple):
    """What a process holds."""

    tensors: int                # that Python knows
    threads: int
    handles: int
    heap: int                   # bytes that the C library has given out, to torch too, and not got back
    rss: int                    # of memory, with what its allocator keeps
    allocated: int              # of the GPU's: by torch's allocator, in use and in all; by anyone
    reserved: int
    device: int


class Heap(ctypes.Structure):
    """glibc's mallinfo2: what all threads' arenas hold, and what lies outside them."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
        "keepcost"))


def heap_bytes() -> int:
    """0 where the C library does not say."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = Heap
    found = ask()
    return found.uordblks + found.hblkhd


def held(device: torch.device) -> Grown:
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    cuda = (0, 0, 0)
    if device.type == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        cuda = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free
    return Grown(tensors, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")),
                 heap_bytes(), pages * os.sysconf("SC_PAGE_SIZE"), *cuda)


def steady(device: torch.device, ep: str, transport: str, schedule: str, steps: str) -> None:
    """Training with another number of tokens at each step holds no more as it goes on.

    Objects, and what torch's allocator has given out on a GPU, must not grow at all. In the C library's
    heap a few buffers of its users come late (megabytes at a time, for products of a new shape), and much
    comes and goes: what would grow for ever grows between most looks, and from the first half of them to the
    second. The steps are those whose numbers of tokens have all been there before, for torch keeps a program
    for each, and its record of the last 2,000 collectives is full: after 170 steps. 48 tokens of 64 float32
    are 12 KB: were the smallest activation kept at one step in ten, that would show.
    """
    D, most, rank = 64, 96, dist.get_rank()
    mesh = lina.mesh(ep=int(ep), transport=transport, **(dict(tokens=most) if transport == "p2p" else {}))
    net = nn.Sequential(nn.Linear(D, D), lina.MoE(D, D, 8, 2, mesh=mesh, balance_coef=0.01),
                        nn.Linear(D, D), lina.MoE(D, D, 8, 2, mesh=mesh)).to(device)
    if device.type == "cuda":       # a kernel's first launch stops the host while a stream waits
        net(torch.randn(most, D, device=device)).sum().backward()
        net.zero_grad()
    wrapped = lina.ddp(net, mesh, schedule=schedule, degree=passes(schedule, transport))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(rank)
    heap, seen = [], []
    for step in range(int(steps)):
        if step == 2 * int(steps) // 3:
            seen.append(held(device))
        # every count comes once in 97 steps, on each rank at another time
        x = torch.randn((37 * step + 50 * rank) % (most + 1), D, generator=draw).to(device)
        out = wrapped(x)
        loss = (out - x).square().mean() if len(x) else out.sum() * 0
        (loss + lina.aux_loss(net)).backward()
        lina.clip_grad_norm_(wrapped, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        del x, out, loss
        if seen and step % EVERY == 0:
            heap.append(heap_bytes())
    seen.append(held(device))
    first, last = seen
    print(f"rank {rank}, {transport}, {schedule}: {first} {last}", flush=True)
    for name in ("tensors", "threads", "handles", "allocated"):
        assert getattr(last, name) <= getattr(first, name), f"{name} grow: {first} {last}"
    half = len(heap) // 2
    early, late = statistics.median(heap[:half]), statistics.median(heap[half:])
    growth = min(statistics.median(b - a for a, b in pairwise(heap)), (late - early) / half)
    assert growth < 48 * D * 4, f"the heap grows by {growth} bytes in {EVERY} steps: {heap}"
    # torch's allocator takes 2 or 20 MiB at a time from the GPU
    assert last.reserved - first.reserved <= 20 << 20, f"{first} {last}"
    assert last.device - first.device <= 20 << 20, f"{first} {last}"
