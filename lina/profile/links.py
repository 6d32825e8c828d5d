"""What travels between ranks, by operation and transport: the registry, and lina's own measurers.

A transport that is to be measured too registers, for each operation, how to do it once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lina import _C
from lina.profile.measure import Ranks, Run

KIB = 1024
SIZES = tuple(64 * KIB * 4**i for i in range(6))        # 64 KiB to 64 MiB
OPERATIONS = ("a2a", "allreduce")


class Measurer(NamedTuple):
    """How an operation is done by a transport."""

    prepare: Callable[[Ranks, int], Run]
    available: Callable[[Ranks], bool]
    each: int                           # operations of one run


_registry: dict[tuple[str, str], Measurer] = {}


def _several(ranks: Ranks) -> bool:
    return ranks.world is not None and ranks.world.size() > 1


def exchanges(ranks: Ranks) -> bool:
    """Whether tokens travel between these ranks at all."""
    return ranks.ep is not None and ranks.ep.size() > 1


def register(operation: str, transport: str, prepare: Callable[[Ranks, int], Run],
             available: Callable[[Ranks], bool] = _several, each: int = 1) -> None:
    """Lets :func:`lina.profile` measure ``operation`` by ``transport``; a later one of the same names
    takes its place.

    Args:
        operation: "a2a": n bytes leave each rank of ``ranks.ep``, as many for each other rank;
            nothing goes to itself.  "allreduce": the sum over ``ranks.world`` of a buffer of n bytes,
            in place.
        prepare: ``prepare(ranks, n)`` returns what does it once. It is called on all ranks in one
            order, and may be collective. On CUDA the work, on whatever stream, begins after what is
            queued on the current stream, which later waits for it, and the host waits for nothing;
            on the CPU it is done when the call returns. What it raises is reported, on all ranks, as
            the reason why nothing was measured.
        available: whether the ranks have that transport; the same answer on all of them. By default
            where there are several.
        each: how many operations of n bytes, one after the other, one call of what ``prepare`` returns does.

    Raises:
        ValueError: another operation.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"register: operation is {operation!r}, must be one of {', '.join(OPERATIONS)}")
    _registry[operation, transport] = Measurer(prepare, available, each)


def unregister(operation: str, transport: str) -> None:
    """Takes back :func:`register`. KeyError if there is nothing to take back."""
    del _registry[operation, transport]


def registered() -> dict[tuple[str, str], Measurer]:
    """By (operation, transport), in the order of registration."""
    return dict(_registry)


def random_bytes(n: int, device: torch.device) -> Tensor:
    """uint8 [n], at random: some links compress."""
    wide = torch.randint(-2**62, 2**62, ((n + 7) // 8,), dtype=torch.int64, device=device)
    return wide.view(torch.uint8)[:n]


def exchange(make: Callable[[dist.ProcessGroup], Any]) -> Callable[[Ranks, int], Run]:
    """What :func:`register` takes for "a2a", of a transport that ``make(ep group)`` gives.

    It is made once, at the first size, and its ``start(label, out, inp, out_splits, in_splits)``,
    whose result's ``wait()`` ends the exchange, is timed (lina.parallel's Transport).
    """
    made: weakref.WeakKeyDictionary[dist.ProcessGroup, Any] = weakref.WeakKeyDictionary()

    def prepare(ranks: Ranks, n: int) -> Run:
        received, sent, splits = _buffers(ranks, n)
        group = ranks.ep
        assert group is not None        # exchanges
        if group not in made:
            made[group] = make(group)
        return lambda: made[group].start("profile", received, sent, splits, splits).wait()
    return prepare


def _buffers(ranks: Ranks, n: int) -> tuple[Tensor, Tensor, list[int]]:
    """What an a2a receives into and sends, and the bytes to each rank, as many as from it."""
    group = ranks.ep
    assert group is not None            # exchanges
    ep, me = group.size(), group.rank()
    each = -(-n // (ep - 1))
    sent, received = (random_bytes(each * (ep - 1), ranks.device) for _ in range(2))
    return received, sent, [0 if rank == me else each for rank in range(ep)]


def _c10d_a2a(ranks: Ranks, n: int) -> Run:
    received, sent, splits = _buffers(ranks, n)
    return lambda: dist.all_to_all_single(received, sent, splits, splits, group=ranks.ep)


def _c10d_allreduce(ranks: Ranks, n: int) -> Run:
    buffer = torch.rand((n + 3) // 4, device=ranks.device)
    return lambda: dist.all_reduce(buffer, group=ranks.world)


def _on_gpus(ranks: Ranks) -> bool:
    return _several(ranks) and ranks.device.type == "cuda" and _C.CUDA


def _nccl_transport(group: dist.ProcessGroup) -> Any:
    from lina.parallel import makers

    return makers["nccl"](group)


_reducers: weakref.WeakKeyDictionary[dist.ProcessGroup, Any] = weakref.WeakKeyDictionary()


def _nccl_allreduce(ranks: Ranks, n: int) -> Run:
    """Whole, as a single micro-op would be: what the policy cuts by."""
    from lina.parallel import Reducer

    group = ranks.world
    assert group is not None            # _on_gpus
    if group not in _reducers:
        _reducers[group] = Reducer(group, (0.0, 1e-12), 1.0)
    reducer = _reducers[group]
    buffer = torch.rand((n + 3) // 4, device=ranks.device)

    def run() -> None:
        reducer.all_reduce(buffer, mean=False, gently=False)
        torch.cuda.current_stream(ranks.device).wait_stream(reducer.stream)
    return run


def _p2p_a2a(ranks: Ranks, n: int) -> Run:
    """There and back, as nothing can be sent twice the same way."""
    from lina.parallel import round_trip

    assert ranks.ep is not None         # exchanges
    return round_trip(ranks.ep, ranks.device, n)


register("a2a", "c10d", _c10d_a2a, exchanges)
register("allreduce", "c10d", _c10d_allreduce)
register("a2a", "nccl", exchange(_nccl_transport), lambda ranks: exchanges(ranks) and _on_gpus(ranks))
register("allreduce", "nccl", _nccl_allreduce, _on_gpus)
register("a2a", "p2p", _p2p_a2a, lambda ranks: exchanges(ranks) and _on_gpus(ranks), each=2)
