"""Gradients over peers' memory: one kernel that looks at the priority word between small tiles.

It pauses on the GPU itself and goes on at once, where nccl.Reducer launches one NCCL kernel for each
micro-op. Contract of the kernel: csrc/cuda/peers_reduce.h.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lina import _C
from lina.parallel.transport.nccl import stream
from lina.parallel.transport.peers import Peers, host_id, left_mapped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)       # in the order of csrc/dtype.h


class PeerReducer:
    """Reduces gradients over the ranks of ``group``, on the reduce stream; as nccl.Reducer.

    Collective over the group's store. Every rank makes the same calls in the same order.

    Args:
        group: 2 to 8 ranks of one host, one GPU each.
        blocks: thread blocks of the kernel, an SM each, 1 to 64. With what else waits for peers on this GPU
            they must fit at once: p2p's exchanges take 3/4 of the SMs.
        tile_bytes: what a block moves at a time, a power of two from 4 KiB to 1 MiB; a pause begins when the
            tiles on their way have passed.
        scatter: each rank sums a part of every tile and sends it on; always so with more than 2 ranks. Else
            both sum all: one hop less, and as many bytes.
        timeout_s: how long the device waits for a peer; the group's own timeout by default.

    Raises:
        ValueError: a group this cannot work for, or an argument outside its limits.
        RuntimeError: lina was built without CUDA, or the ranks cannot map each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, *, blocks: int = 24, tile_bytes: int = 1 << 16,
                 scatter: bool | None = None, timeout_s: float | None = None) -> None:
        self._peers = peers = Peers(group, timeout_s=timeout_s)
        self.group, self.device = group, peers.device
        if scatter is None:
            scatter = peers.ep > 2
        self._shape = blocks, tile_bytes, scatter
        facts = {"host": host_id(), "blocks": blocks, "tile_bytes": tile_bytes, "scatter": scatter}
        everyone = peers._gather(facts)
        for name in facts:
            values = [said[name] for said in everyone]
            if any(value != values[0] for value in values):
                what = "run on several hosts" if name == "host" else f"disagree on {name}"
                raise ValueError(f"p2p reduce: the ranks of one group {what}: {values} by rank")
        self.stream = stream(self.device, "reduce")
        self._handle: Any = self._map()
        for dtype in DTYPES:               # loads the kernels, while nothing waits for anything
            self.all_reduce(torch.zeros(1, dtype=dtype, device=self.device), gently=False)
        self.stream.synchronize()
        _C.peers_check(self._handle)

    def _map(self) -> Any:
        """Memory that all ranks have mapped, or an error on all of them."""
        peers, (blocks, tile_bytes, scatter) = self._peers, self._shape
        handle, said, wrong = None, ["", ""], None
        try:
            handle = _C.peers_reduce_make(peers.rank, peers.ep, blocks, tile_bytes, scatter, peers.timeout_s)
            said[0] = _C.peers_export(handle).hex()
        except ValueError as error:        # of the arguments, which are the same on all ranks
            said[1], wrong = str(error), error
        except RuntimeError as error:
            said[1] = str(error)
        try:
            everyone = peers._all_well(said)
        except RuntimeError:
            if wrong is not None:
                raise wrong from None
            raise
        try:
            _C.peers_open(handle, peers.ep, b"".join(bytes.fromhex(export) for export, _ in everyone))
        except RuntimeError as error:
            said[1] = str(error)
        peers._all_well(said)
        return handle

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
        if self._handle is None:
            raise RuntimeError("p2p reduce: the reducer was closed")
        if flat.dtype not in DTYPES or flat.device != self.device or not flat.is_contiguous():
            raise ValueError(f"p2p reduce: {flat.dtype} of strides {flat.stride()} on {flat.device}, must be "
                             f"contiguous float32, bfloat16 or float16 on {self.device}")
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        _C.peers_reduce(self._handle, self.stream.cuda_stream, *self._shape, flat.data_ptr(), flat.numel(),
                        DTYPES.index(flat.dtype), mean, gently)
        flat.record_stream(self.stream)

    def future(self, value: Any) -> torch.futures.Future:
        """A future of ``value``, complete as of what the reduce stream holds so far."""
        result: torch.futures.Future = torch.futures.Future(devices=[self.device])
        with torch.cuda.stream(self.stream):       # outside, the result would not wait for the stream
            result.set_result(value)
        return result

    def check(self) -> None:
        """RuntimeError if a wait on the device has failed by now; its text says which."""
        if self._handle is not None:
            _C.peers_check(self._handle)

    def abort(self) -> None:
        """End every wait on the device, from any thread; all later calls raise."""
        if self._handle is not None:
            _C.peers_abort(self._handle)

    def close(self) -> None:
        """Unmap and free the memory; collective, after all work on it and without graphs to replay."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        _C.peers_close(handle)
        try:
            self._peers._gather("closed", min(self._peers.timeout_s, 10.0))
        except RuntimeError:
            left_mapped.append(handle)           # a peer may still write to it
