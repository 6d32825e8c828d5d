"""What every rank does in test_reduce.py: sums over peers' memory against sums in float64."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from parallel_worker import error_of, everyone

from lina import _C
from lina.parallel.gradients.peer_reduce import DTYPES, PeerReducer
from lina.parallel.gradients.queue import DeviceQueue
from lina.parallel.transport import nccl

SMALL = dict(blocks=4, tile_bytes=1 << 14)      # rings of few and small tiles come round soon
# elements: one; less than a vector; a tile and a bit; many rounds of the ring; none
COUNTS = (1, 7, 8195, 1_000_003, 0)


def world() -> int:
    return dist.get_world_size()


def scatters(said: str) -> bool:
    """Only two ranks have the choice."""
    return said == "True" or world() > 2


def values(device, count: int, dtype: torch.dtype, seed: int, askew: bool = False) -> torch.Tensor:
    draw = torch.Generator(device).manual_seed(100 * seed + dist.get_rank())
    room = torch.randn(count + 1, device=device, generator=draw).to(dtype)
    return room[1:] if askew else room[:count]


def expected(flat: torch.Tensor, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and what rounding may change: each of the sums and the product in float32,
    once to the dtype; below the dtype's normal numbers by steps of its smallest."""
    total, size = flat.double().clone(), flat.double().abs()         # double() of float64 is flat itself
    if not flat.numel():
        return total, size
    dist.all_reduce(total)
    dist.all_reduce(size)
    scale = 1 / world() if mean else 1.0
    info, single = torch.finfo(flat.dtype), torch.finfo(torch.float32).eps
    off = total.abs() * scale * info.eps / 2 + size * scale * (world() + 1) * single
    return total * scale, off + info.smallest_normal * info.eps


def check(flat: torch.Tensor, want: tuple[torch.Tensor, torch.Tensor], what: str) -> str:
    """What is wrong with it here."""
    if not flat.numel():
        return ""
    error = (flat.double() - want[0]).abs()
    wrong = "" if bool((error <= want[1]).all()) else f"wrong by {error.max().item():.3g}"
    bits = flat.view(torch.int32 if flat.dtype == torch.float32 else torch.int16)
    most = torch.stack([bits.int(), -bits.int()])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if not torch.equal(most[0], -most[1]):
        wrong += " other bits on other ranks"
    return f"{what}: {wrong}" if wrong else ""


def settle(wrong: list[str]) -> None:
    """Raise what differed. Only at a scenario's end: until then the ranks stay in step."""
    wrong = [text for text in wrong if text]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:8])


def reduced(reducer: PeerReducer, flat: torch.Tensor, mean: bool, gently: bool) -> torch.Tensor:
    reducer.all_reduce(flat, mean=mean, gently=gently)
    return nccl.future(flat, reducer.stream).wait()


def sums(device, scatter: str) -> None:
    """Every dtype; sizes that fill nothing evenly; addresses off 16 bytes; mean and sum."""
    reducer, wrong = PeerReducer(dist.group.WORLD, scatter=scatters(scatter), timeout_s=10, **SMALL), []
    for dtype in DTYPES:
        for count in COUNTS:
            for askew in (False, True):
                for mean in (False, True):
                    flat = values(device, count, dtype, count, askew)
                    want = expected(flat, mean)
                    flat = reduced(reducer, flat, mean, askew)
                    wrong.append(check(flat, want, f"{dtype} {count=} {askew=} {mean=}"))
    reducer.close()
    settle(wrong)


def sequence(device, scatter: str) -> None:
    """Calls of changing size one behind the other, ranks drifting apart: tiles are numbered on."""
    wrong = []
    for shape in (SMALL, dict(blocks=24, tile_bytes=1 << 16)):
        reducer = PeerReducer(dist.group.WORLD, scatter=scatters(scatter), timeout_s=10, **shape)
        counts = [(7919 * i * i) % 300_000 + 1 for i in range(60)]
        flats = [values(device, n, DTYPES[i % 3], i) for i, n in enumerate(counts)]
        wants = [expected(flat, True) for flat in flats]
        for i, flat in enumerate(flats):
            if i % world() == dist.get_rank():
                with torch.cuda.stream(reducer.stream):
                    torch.cuda._sleep(200_000)
            reducer.all_reduce(flat)
        torch.cuda.synchronize()
        wrong += [check(flat, want, f"call {i} of {n} elements, {shape}")
                  for i, (n, flat, want) in enumerate(zip(counts, flats, wants, strict=True))]
        reducer.close()
    settle(wrong)


def graph(device) -> None:
    """Captured once, replayed between other calls."""
    reducer, wrong = PeerReducer(dist.group.WORLD, timeout_s=10, **SMALL), []
    flat, source = (torch.empty(100_003, device=device) for _ in range(2))
    captured = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(captured, capture_error_mode="thread_local"):
        flat.copy_(source)
        reducer.all_reduce(flat)
        torch.cuda.current_stream().wait_stream(reducer.stream)
    for turn in range(20):
        source.copy_(values(device, source.numel(), torch.float32, turn))
        want = expected(source, True)
        if dist.get_rank() == turn % world():
            time.sleep(0.005)                                     # ranks drift apart
        captured.replay()
        torch.cuda.synchronize()          # the next call knows nothing of a replay
        wrong.append(check(flat, want, f"replay {turn}"))
        other = values(device, 5000 + turn, torch.bfloat16, turn)
        want = expected(other, False)
        wrong.append(check(reduced(reducer, other, False, True), want, f"between replays {turn}"))
    torch.cuda.synchronize()
    del captured
    reducer.close()
    settle(wrong)


def queue(device, peers: str) -> None:
    """DistributedDataParallel's queue takes it where asked to, or where links are fast; float64 goes over
    NCCL."""
    queue, wrong = DeviceQueue(dist.group.WORLD, (2e-5, 1 / 2e11), 1e-4, peers=peers == "True"), []
    for dtype in (*DTYPES, torch.float64):
        flat = values(device, 50_001, dtype, 3)
        want = expected(flat, True)
        flat = queue.submit(flat, "test").wait()
        if dtype != torch.float64:
            wrong.append(check(flat, want, str(dtype)))
        elif not ((flat - want[0]).abs() <= want[1] + 1e-9).all():
            wrong.append("float64")
    nccls = queue._reducers[dist.group.WORLD, False]
    assert isinstance(nccls, nccl.Reducer), nccls
    over_peers = isinstance(queue._reducers.get((dist.group.WORLD, True)), PeerReducer)
    assert over_peers == (peers == "True" or nccls.fast()), "the wrong reducer"
    torch.cuda.synchronize()
    queue.close()
    settle(wrong)


def cycles(seconds: float) -> int:
    return int(seconds * 2e9)                  # at most 2 GHz: it lasts as long, or longer


def timed(device, reducer: PeerReducer, flat: torch.Tensor, hold_s: float) -> float:
    """Seconds of a reduction that is held back from a fifth of a millisecond after its start."""
    a2a = nccl.stream(device, "a2a")
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda._sleep(cycles(0.002))
    with torch.cuda.stream(reducer.stream):
        reducer.stream.wait_stream(torch.cuda.default_stream(device))
        marks[0].record()
    a2a.wait_event(marks[0])
    if hold_s:
        with torch.cuda.stream(a2a):
            torch.cuda._sleep(cycles(0.0002))
            _C.set_priority(device.index, True, a2a.cuda_stream)
            torch.cuda._sleep(cycles(hold_s))
            _C.set_priority(device.index, False, a2a.cuda_stream)
    reducer.all_reduce(flat)
    with torch.cuda.stream(reducer.stream):
        marks[1].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) * 1e-3


def gives_way(device, scatter: str) -> None:
    """A kernel that runs gives way while the word is raised, here for 20 ms, on every rank or on one; on
    every rank it leaves the SMs."""
    reducer = PeerReducer(dist.group.WORLD, scatter=scatters(scatter), timeout_s=10)
    flat = values(device, 1 << 28, torch.float32, 0)             # 1 GiB: 2 ms at the links' 450 GB/s and more
    want = expected(flat[:100_000], True)
    free = timed(device, reducer, flat, 0)
    wrong = [check(flat[:100_000], want, "free")]
    for holders in (range(world()), [0]):
        flat = values(device, 1 << 28, torch.float32, 0)
        held = timed(device, reducer, flat, 0.02 if dist.get_rank() in holders else 0)
        wrong.append(check(flat[:100_000], want, f"held by {holders}"))
        if not 0.018 <= held < free + 0.06:
            wrong.append(f"held by {holders} for 20 ms it took {held * 1e3:.2f} ms, free {free * 1e3:.2f} ms")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        timed(device, reducer, flat, 0.02)
    on_sms = sum(e.time_range.elapsed_us() for e in profiler.events() if "peers_reduce" in e.name) * 1e-6
    if not 0 < on_sms < free + 0.01:
        wrong.append(f"held for 20 ms its kernels took {on_sms * 1e3:.2f} ms, free {free * 1e3:.2f} ms")
    print(f"gives way: free {free * 1e3:.3f} ms, held {held * 1e3:.3f} ms", flush=True)
    reducer.close()
    settle(wrong)


def gives_up_waiting(device) -> None:
    """A word that nobody lowers holds a reduction for a quarter of a second, not for ever."""
    reducer = PeerReducer(dist.group.WORLD, timeout_s=10)
    flat = values(device, 1 << 28, torch.float32, 0)
    want = expected(flat[:1000], True)
    held = timed(device, reducer, flat, 0.6)
    wrong = [check(flat[:1000], want, "held")]
    if not 0.2 < held < 0.5:
        wrong.append(f"took {held:.3f} s beside a word raised for 0.6 s")
    reducer.close()
    settle(wrong)


def refusals(device) -> None:
    """What cannot be reduced, before anything is; ranks that disagree, on all of them."""
    reducer = PeerReducer(dist.group.WORLD, timeout_s=10, **SMALL)
    for flat in (torch.zeros(3, device=device, dtype=torch.float64), torch.zeros(3),
                 torch.zeros(4, 4, device=device).t()[1:]):
        assert "must be contiguous" in error_of(ValueError, reducer.all_reduce, flat)
    text = error_of(ValueError, PeerReducer, dist.group.WORLD, blocks=2 + dist.get_rank(), timeout_s=10)
    assert "disagree on blocks: [2, 3" in text and len(set(everyone(text))) == 1, text
    assert "tile_bytes=5000" in error_of(ValueError, PeerReducer, dist.group.WORLD, tile_bytes=5000,
                                        timeout_s=10)
    flat = values(device, 100, torch.float32, 0)
    want = expected(flat, True)
    wrong = [check(reduced(reducer, flat, True, True), want, "after refusals")]
    reducer.close()
    assert "was closed" in error_of(RuntimeError, reducer.all_reduce, flat)
    settle(wrong)


def broken(device, how: str) -> None:
    """A rank that does not come, or with something else: an error that names it, in time, and NaN."""
    reducer = PeerReducer(dist.group.WORLD, timeout_s=2, **SMALL)
    odd = dist.get_rank() == world() - 1
    flat = values(device, 100_000, torch.bfloat16, 0)
    reduced(reducer, flat, True, True)
    torch.cuda.synchronize()
    start, said = time.time(), ""
    if odd and how in ("absent", "abort"):
        time.sleep(3)
    else:
        flat = flat[:90_000] if odd else flat
        reducer.all_reduce(flat)
        if how == "abort":
            time.sleep(0.5)
            reducer.abort()
        torch.cuda.synchronize()
        assert time.time() - start < (1.5 if how == "abort" else 4), "later than the limit"
        assert flat.isnan().all(), "a result without its peer"
    said = "" if odd and how != "mismatch" else error_of(RuntimeError, reducer.all_reduce, flat)
    wanted = dict(absent="has stopped, or hangs", abort="given up", mismatch="")[how]
    if not odd or how == "mismatch":
        # of several ranks one may hear from another that it gave up before it does so itself
        heard = wanted in said or (world() > 2 and "failed" in said)
        assert "waited for the gradients of rank" in said and heard, said
    if how == "mismatch":
        assert any("shape or dtype" in text for text in everyone(said))
    if odd and how != "mismatch":                      # it comes late, and hears that the others gave up
        reducer.all_reduce(flat)
        torch.cuda.synchronize()
        assert flat.isnan().all(), "a result of a rank that comes too late"
        assert "failed" in error_of(RuntimeError, reducer.all_reduce, flat)
    dist.barrier()
    reducer.close()
