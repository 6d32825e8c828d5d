"""What every rank does in test_nccl.py: one GPU each."""

from __future__ import annotations

import os
import random
import time
from unittest import mock

import torch
import torch.distributed as dist
from faults_worker import CYCLES
from parallel_worker import error_of, everyone

from lina import _C
from lina.parallel.transport import nccl

WORLD_TIMEOUT_S = 8
LINK = (20e-6, 1 / 250e9)
HELD_S = 0.2                # not yet as long as the host's watch lets gradients wait


def world():
    return dist.group.WORLD


def splits(seed: int):
    """bytes[r][s]: what r sends to s; some of it nothing, no size a round one."""
    draw = random.Random(seed)
    size = dist.get_world_size()
    return [[draw.choice([0, 1, 77, 4096, 100_003, 3 << 20]) for _ in range(size)] for _ in range(size)]


def exchange(device) -> None:
    """Bytes arrive where torch's all_to_all_single puts them; also on a side stream."""
    transport, rank = nccl.NCCL(world()), dist.get_rank()
    for seed in range(12):
        sizes = splits(seed)
        out_splits = [row[rank] for row in sizes]
        inp = torch.randint(256, (sum(sizes[rank]),), dtype=torch.uint8, device=device)
        got, want = (torch.empty(sum(out_splits), dtype=torch.uint8, device=device) for _ in range(2))
        dist.all_to_all_single(want, inp, out_splits, sizes[rank])
        on = torch.cuda.Stream() if seed % 2 else torch.cuda.current_stream()
        on.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(on):
            pending = transport.start("test", got, inp.clone(), out_splits, sizes[rank])
            pending.wait()
            got = got.clone()
        torch.cuda.current_stream().wait_stream(on)
        assert torch.equal(got, want), f"seed {seed}"
        mine = torch.arange(2 * len(sizes), device=device).view(-1, 2) + 100 * rank
        both = transport.counts("counts", mine)()
        assert torch.equal(both[0], mine.cpu())
        assert both[1].tolist() == [[100 * r + 2 * rank, 100 * r + 2 * rank + 1] for r in range(len(sizes))]
    transport.close()
    assert "closed" in error_of(RuntimeError, transport.comm.check)
    for rate, sms in ((2e10, 4), (3e11, 0)):         # experts leave SMs to slow links alone
        with mock.patch.object(nccl.NCCL, "_rate", lambda self, rate=rate: rate):
            transport = nccl.NCCL(world())
        assert (transport.sms, transport.fast) == (sms, rate > 1e11)
        transport.close()


def dropped(device) -> None:
    """A rank that is ahead drops its transport: what it has queued still reaches the other, and is right."""
    rank = dist.get_rank()
    for size in (1000, 1 << 22):
        transport = nccl.NCCL(world())
        draw = torch.Generator().manual_seed(size)
        sent = torch.randint(256, (size,), dtype=torch.uint8, generator=draw).to(device)
        nothing, got, back = sent[:0], torch.zeros_like(sent), torch.zeros_like(sent)
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 0:
            torch.cuda._sleep(int(0.3 * CYCLES))
            pending = transport.start("out", nothing, sent, [0, 0], [0, size])
            pending.wait()
            pending = transport.start("back", back, nothing, [0, size], [0, 0])
            pending.wait()
        else:
            pending = transport.start("out", got, nothing, [size, 0], [0, 0])
            pending.wait()
            pending = transport.start("back", nothing, got.clone(), [0, 0], [size, 0])
            pending.wait()
        del transport, pending                     # by rank 1 while rank 0 sleeps
        assert rank == 0 or torch.equal(got, sent)
        assert rank == 1 or torch.equal(back, sent)
        dist.barrier()


def reduction(device) -> None:
    """The mean and the sum, whole and in micro-ops, for every dtype; sizes around a micro-op's."""
    reducer = nccl.Reducer(world(), LINK, 5e-5)
    n = reducer.micro_op_bytes
    assert n % 256 == 0 and n > 0
    for dtype in nccl.DTYPES:
        for count in (0, 1, 1000, n // 4, n // 2 + 1, 3 * n + 5):
            torch.manual_seed(count + dist.get_rank())
            x = torch.randn(count, device=device, dtype=torch.float64).to(dtype)
            for mean in (True, False):
                for gently in (True, False):
                    want = x.double().clone()
                    dist.all_reduce(want)
                    want = want / dist.get_world_size() if mean else want
                    flat = x.clone()
                    reducer.all_reduce(flat, mean=mean, gently=gently)
                    got = nccl.future(flat, reducer.stream).wait()
                    # one rounding of each of the sum and the division
                    limit = 2 * torch.finfo(dtype).eps * want.abs()
                    assert count == 0 or ((got.double() - want).abs() <= limit).all(), (dtype, count, mean)
    for bad, why in ((torch.ones(3, device=device, dtype=torch.int32), "flat is torch.int32"),
                     (torch.ones(4, 4, device=device).t(), "not contiguous"), (torch.ones(3), "on cpu")):
        assert why in error_of(ValueError, reducer.all_reduce, bad)
    reducer.close()


def priority(device) -> None:
    """A raised word holds micro-ops back, on the device; the host's watch releases a forgotten one."""
    transport, reducer = nccl.NCCL(world()), nccl.Reducer(world(), LINK, 5e-5)
    flat = torch.ones(1 << 20, device=device)
    reducer.all_reduce(flat)
    torch.cuda.synchronize()
    dist.barrier()
    for _ in range(5):                         # a host that others keep busy may let the watch come first
        releases, start = _C.read_priority(device.index)[1], time.perf_counter()
        transport.imminent()
        transport.stream.synchronize()         # the reduce stream does not wait for this one to raise
        reducer.all_reduce(flat)
        done = reducer.stream.record_event()
        time.sleep(0.05)
        waits, raised, took = not done.query(), _C.read_priority(device.index)[0], time.perf_counter() - start
        transport.settled()
        done.synchronize()
        took = max(everyone(took))
        if took < HELD_S:
            break
    assert took < HELD_S, f"a host this slow shows nothing: {took:.3f} s"
    assert raised and waits, "the micro-op did not wait"
    assert not _C.read_priority(device.index)[0] and _C.read_priority(device.index)[1] == releases
    dist.barrier()
    transport.imminent()                      # and nobody settles it
    transport.stream.synchronize()
    start = time.perf_counter()
    reducer.all_reduce(flat)
    reducer.stream.synchronize()
    took = time.perf_counter() - start
    assert 0.15 < took < 2.0, f"released after {took:.3f} s"
    assert _C.read_priority(device.index) == (False, releases + 1)
    transport.settled()
    torch.cuda.synchronize()
    assert torch.equal(flat, torch.ones_like(flat))
    transport.close()
    reducer.close()


def interleaved(device) -> None:
    """All-to-alls beside micro-ops, every rank late at random on the host and on the device."""
    transport, reducer = nccl.NCCL(world()), nccl.Reducer(world(), LINK, 2e-5)
    rank, size = dist.get_rank(), dist.get_world_size()
    draw = random.Random(rank)
    n = 1 << 20
    for step in range(100):
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0, 0.02))
        flats = [torch.full((count,), float(rank + step), device=device) for count in (3 << 20, 5, 1 << 18)]
        for flat in flats[:2]:
            reducer.all_reduce(flat)
        if draw.random() < 0.5:
            torch.cuda._sleep(draw.randrange(20_000_000))
        transport.imminent()
        inp = torch.full((size, n), rank * 16 + step % 16, dtype=torch.uint8, device=device).view(-1)
        out = torch.empty_like(inp)
        if draw.random() < 0.5:
            torch.cuda._sleep(draw.randrange(10_000_000))
        first = transport.start("out", out, inp, [n] * size, [n] * size)
        first.wait()
        back = torch.empty_like(inp)
        transport.start("back", back, out, [n] * size, [n] * size).wait()
        transport.settled()
        reducer.all_reduce(flats[2])
        assert torch.equal(back, inp), f"step {step}"
        mean = step + (size - 1) / 2
        for flat in flats:
            assert (nccl.future(flat, reducer.stream).wait() == mean).all(), f"step {step}"
    transport.close()
    reducer.close()


def misuse(device) -> None:
    transport = nccl.NCCL(world())
    x = torch.zeros(8, dtype=torch.uint8, device=device)
    size = dist.get_world_size()
    at, on, comm = x.data_ptr(), transport.stream.cuda_stream, transport.comm
    assert "send_bytes has 1 entries" in error_of(ValueError, comm.all_to_all, at, [1], at, [1], 0, on)
    bad = [-1] * size
    assert "-1 bytes to" in error_of(ValueError, comm.all_to_all, at, bad, at, bad, 0, on)
    assert "tokens are on cpu, transport nccl" in error_of(ValueError, transport.counts, "dispatch counts",
                                                           torch.zeros(size, 2, dtype=torch.int64))
    assert "no policy" in error_of(RuntimeError, comm.all_reduce, at, 1, 0, True, True, on)
    assert "id has 3 bytes" in error_of(ValueError, _C.Communicator, b"abc", 0, 1, 0, "x", 1.0)
    assert "rank=5" in error_of(ValueError, _C.Communicator, bytes(128), 5, 2, 0, "x", 1.0)
    assert "timeout_s=0" in error_of(ValueError, _C.Communicator, bytes(128), 0, 2, 0, "x", 0.0)
    transport.close()


def left_alone(device, how: str) -> None:
    """The other rank dies, or hangs, with an all-to-all or a reduction under way."""
    transport, reducer = nccl.NCCL(world()), nccl.Reducer(world(), LINK, 5e-5)
    everyone("here")
    if dist.get_rank() == 1:
        if how == "hang":
            time.sleep(WORLD_TIMEOUT_S + 6)
        os._exit(3)
    x = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    splits = [x.numel() // dist.get_world_size()] * dist.get_world_size()
    print(f"failing at {time.time()}", flush=True)
    reducer.all_reduce(torch.ones(1 << 22, device=device))
    pending = transport.start("test", torch.empty_like(x), x, splits, splits)
    pending.wait()
    torch.cuda.synchronize()
    print(f"released at {time.time()}", flush=True)
    transport.start("test", torch.empty_like(x), x, splits, splits)
    print("went on", flush=True)
