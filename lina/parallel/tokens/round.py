"""One round over peers' memory: rows to other ranks, and as many back, summed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lina import _C, tracing
from lina.parallel.tokens.carveout import carveout
from lina.parallel.transport.nccl import stream
from lina.parallel.transport.peers import Agreed, Peers, peers_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)      # in the order of csrc/dtype.h


class Round(NamedTuple):
    """One layer's exchanges: rows out, rows back."""

    peers: Peers
    layer: Agreed
    T: int
    D: int
    K: int
    E: int
    dtype: torch.dtype
    raises: bool = False               # gradients give way from its dispatch on,
    lowers: bool = False               # until the rows of its collect have arrived

    def dispatch(self, name: str, x: Tensor, expert: Tensor | None, weight: Tensor | None, slot: Tensor,
                 count: Tensor, x_R: Tensor | None, weight_R: Tensor | None, expert_R: Tensor | None) -> None:
        width = self.D * self.dtype.itemsize + (0 if expert is None else 8 * self.K)
        with tracing.span("a2a", name, bytes=lambda: self._leaving(count[0]) * width):
            _C.peers_dispatch(*self.peers.launch(), self.layer.tag, self.raises,
                              self.T, self.layer.C, self.K, self.E, self.D * self.dtype.itemsize,
                              *map(_at, (x, expert, weight, slot, count, x_R, weight_R, expert_R)))

    def collect(self, name: str, y: Tensor, pair_row: Tensor | None, weight_R: Tensor | None,
                dweight_R: Tensor | None, slot: Tensor, count: Tensor, expert: Tensor, out: Tensor,
                dweight: Tensor | None) -> None:
        width = self.D * self.dtype.itemsize + (0 if dweight is None else 4 * self.K)
        with tracing.span("a2a", name, bytes=lambda: self._leaving(count[1]) * width):
            _C.peers_collect(*self.peers.launch(), self.layer.tag, self.lowers,
                             self.T, self.layer.C, self.K, self.E, self.D, DTYPES.index(self.dtype),
                             *map(_at, (y, pair_row, weight_R, dweight_R, slot, count, expert, out, dweight)))

    def _leaving(self, rows: Tensor) -> int:
        """Rows that go to other ranks, of those to each rank."""
        return int(rows.sum() - rows[self.peers.rank])


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def overlap(passes: int, leave: Callable[[int], object], compute: Callable[[int], object],
            back: Callable[[int], object], device: torch.device, sms: int) -> None:
    """Exchanges of ``passes`` rounds beside what is computed in between: round j + 1 leaves before j
    is computed, and j goes back before j + 1 is. ``sms``: what an exchange takes of the GPU's.

    On CUDA several rounds have a stream for their exchanges, on which these follow each other in this one
    order on every rank: each waits, on a part of the SMs, for the same one of the peers. What they read and
    write is allocated on the current stream, and kept by the caller until this returns.
    """
    if passes == 1 or device.type != "cuda":
        _take_turns(passes, leave, compute, back)
        return
    main, side, arrived = torch.cuda.current_stream(device), stream(device, "a2a"), {}

    def aside(exchange: Callable[[int], object], j: int) -> None:
        side.wait_stream(main)
        with torch.cuda.stream(side):
            exchange(j)
            arrived[j] = side.record_event()

    def after(j: int) -> None:
        main.wait_event(arrived[j])
        with carveout(sms):
            compute(j)

    try:
        _take_turns(passes, lambda j: aside(leave, j), after, lambda j: aside(back, j))
    finally:
        main.wait_stream(side)


def _take_turns(passes: int, leave: Callable[[int], object], compute: Callable[[int], object],
                back: Callable[[int], object]) -> None:
    leave(0)
    for j in range(passes):
        if j + 1 < passes:
            leave(j + 1)
        compute(j)
        back(j)


def round_trip(group: dist.ProcessGroup, device: torch.device, size: int) -> Callable[[], None]:
    """What sends ``size`` bytes of rows from every rank to the others, in turn, and as many back.

    Collective, over the group's own buffers, as layers use them; so is every call of what it returns.

    Raises:
        ValueError, RuntimeError: as :class:`Peers`, on every rank.
    """
    D, K = 4096, 1
    (peers,) = peers_of(group, 1, device=device)
    ep, T = peers.ep, max(1, size // (2 * D))
    agreed = peers.layer(T, D, K, ep, torch.bfloat16, False, T)
    call = Round(peers, agreed, T, D, K, ep, torch.bfloat16)
    x_TD = torch.randn(T, D, device=device).bfloat16()
    others_T = (peers.rank + 1 + torch.arange(T, device=device) % (ep - 1)) % ep
    expert_TK = others_T.int().view(T, K)
    weight_TK = torch.rand(T, K, device=device)
    slot_TR, count = expert_TK.new_empty(T, ep), expert_TK.new_empty(2, ep)
    weight_RK, expert_RK = weight_TK.new_empty(ep * agreed.C, K), expert_TK.new_empty(ep * agreed.C, K)
    y_RD, out_TD = torch.randn(ep * agreed.C, D, device=device).bfloat16(), torch.empty_like(x_TD)

    def run() -> None:
        call.dispatch("dispatch", x_TD, expert_TK, weight_TK, slot_TR, count, None, weight_RK, expert_RK)
        call.collect("collect", y_RD, None, None, None, slot_TR, count, expert_TK, out_TD, None)
    return run
