"""Gradients over peers' memory: a kernel that looks at the priority word between small tiles.

Where the word is raised it ends, so that the experts have all SMs, and one launched behind it goes on,
where nccl.Reducer launches one NCCL kernel for each micro-op. Contract: csrc/cuda/peers_reduce.h.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lina import _C
from lina.parallel.transport.domain import Domain, Mapped
from lina.parallel.transport.nccl import stream
from lina.parallel.transport.peers import share

DTYPES = (torch.float32, torch.bfloat16, torch.float16)       # in the order of csrc/dtype.h
_BLOCKS = 32          # they fit beside p2p's exchanges on GPUs of 128 SMs and more


class PeerReducer:
    """Reduces gradients over the ranks of ``group``, on the reduce stream; as nccl.Reducer.

    Collective over the group's store. Every rank makes the same calls in the same order.

    Args:
        group: 2 to 8 ranks of one host, one GPU each.
        blocks: thread blocks of the kernel, an SM each, 1 to 64; by default 32, or what p2p's exchanges of
            tokens leave, by default a quarter of the SMs.
        tile_bytes: what a block moves at a time, a power of two from 4 KiB to 1 MiB; a pause begins when the
            tiles on their way have passed.
        scatter: each rank sums a part of every tile and sends it on; always so with more than 2 ranks. Else
            both sum all: one hop less, and as many bytes.
        timeout_s: how long the device waits for a peer; the group's own timeout by default.

    Raises:
        SeveralHosts: the ranks share no memory.
        ValueError: a group this cannot work for otherwise, or an argument outside its limits.
        RuntimeError: lina was built without CUDA, or the ranks cannot map each other's memory, or cannot sum
            over it; on all of them.
    """

    def __init__(self, group: dist.ProcessGroup, *, blocks: int | None = None, tile_bytes: int = 1 << 16,
                 scatter: bool | None = None, timeout_s: float | None = None) -> None:
        self._domain = domain = Domain(group, "gradients", timeout_s=timeout_s)
        self.group, self.device = group, domain.device
        if scatter is None:
            scatter = domain.ep > 2
        facts = {"blocks": blocks, "tile_bytes": tile_bytes, "scatter": scatter}
        blocks = _fitting(blocks, domain.compare("p2p reduce", facts, domain.room()))
        domain.sms, self._shape = blocks, (blocks, tile_bytes, scatter)
        self.stream = stream(self.device, "reduce")
        self._memory: Mapped | None = domain.map(
            lambda: _C.peers_reduce_make(domain.rank, domain.ep, *self._shape, domain.timeout_s))
        self._memory.stream = self.stream
        wrong = ""
        try:
            for dtype in DTYPES:           # loads the kernels, while nothing waits for anything
                self.all_reduce(torch.zeros(1, dtype=dtype, device=self.device), gently=False)
            self.stream.synchronize()
            self.check()
        except RuntimeError as error:
            wrong = str(error)
        bad = [f"rank {r}: {text}" for r, text in enumerate(domain.gather("first sums", wrong)) if text]
        if bad:
            self.close()
            raise RuntimeError(f"p2p reduce: the first sums failed: {'; '.join(bad)}")

    def all_reduce(self, flat: Tensor, *, mean: bool = True, gently: bool = True) -> None:
        """In place, on the reduce stream, after what the current stream holds so far.

        Args:
            flat: contiguous, float32, bfloat16 or float16, of one size, dtype and ``mean`` on all ranks;
                kept from reuse until done. Summed in float32, rounded once.
            gently: giving way to all-to-alls.

        Raises:
            ValueError: ``flat`` is none of these.
            RuntimeError: a peer failed, left, or reduces something else: at the first call (or ``check``)
                after the device noticed; ``flat`` is NaN then, in whole or in part. Also after ``close``.
        """
        if self._memory is None:
            raise RuntimeError("p2p reduce: the reducer was closed")
        if flat.dtype not in DTYPES or flat.device != self.device or not flat.is_contiguous():
            raise ValueError(f"p2p reduce: {flat.dtype} of strides {flat.stride()} on {flat.device}, must be "
                             f"contiguous float32, bfloat16 or float16 on {self.device}")
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        _C.peers_reduce(self._memory.handle, self.stream.cuda_stream, *self._shape, flat.data_ptr(),
                        flat.numel(), DTYPES.index(flat.dtype), mean, gently)
        flat.record_stream(self.stream)

    def check(self) -> None:
        """RuntimeError if a wait on the device has failed by now; its text says which."""
        if self._memory is not None:
            _C.peers_check(self._memory.handle)

    def abort(self) -> None:
        """End every wait on the device, from any thread; all later calls raise."""
        if self._memory is not None:
            _C.peers_abort(self._memory.handle)

    def close(self) -> None:
        """Unmap and free the memory; collective, after all work on it and without graphs to replay."""
        memory, self._memory, self._domain.sms = self._memory, None, 0
        if memory is not None:
            self._domain.release(memory)


def _fitting(blocks: int | None, rooms: list[list[int]]) -> int:
    """``blocks``, or their default, if they fit beside what waits for tokens on every rank's GPU.

    Args:
        rooms: of each rank, the GPU's SMs and those that exchanges of tokens hold (0: none so far).
    """
    most = min(every - tokens for every, tokens in rooms)
    if blocks is None:
        blocks = min(_BLOCKS, *(every - (tokens or share(every)) for every, tokens in rooms))
    if blocks > most or most < 1:
        every, tokens = min(rooms, key=lambda room: room[0] - room[1])
        raise ValueError(f"p2p reduce: blocks is {blocks}, limit {most}: exchanges of tokens hold {tokens} "
                         f"of the GPU's {every} SMs, and all that wait for peers must fit at once")
    return blocks
