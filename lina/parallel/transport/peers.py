"""Buffers that the ranks of one NVLink domain map into each other, and what those ranks agreed on.

C is the most tokens that any rank may have, ep the number of ranks, D width, K experts for each token.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lina import _C
from lina.parallel.transport.domain import Domain, Mapped

_STEP = 128           # C is a multiple: uneven batches share one layer's agreement
_TAGS = 255
_BESIDE = 16          # SMs of an exchange beside experts


class _Memory:
    """Bytes on the current device that torch.as_tensor makes a tensor of; `owner` must outlive it."""

    def __init__(self, owner: Any, address: int, size: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = dict(shape=(size,), typestr="|u1", data=(address, False), version=2)


class _Buffer(NamedTuple):
    mapped: Mapped
    rows: Tensor          # uint8: where tokens arrive
    out_bytes: int
    back_bytes: int


class Overflow(ValueError):
    """More tokens than the ranks agreed on; the peers hear of it."""


class Agreed(NamedTuple):
    C: int
    tag: int


class Peers:
    """The mapped buffers of one expert-parallel group, and what its ranks agreed on.

    Every rank of the group makes one, and calls the same layers in the same order. The first
    call of a layer with new (D, K, number of experts, dtype, need of gradients, ``tokens``) is
    collective over the group's store: the ranks compare these, and set C, the most tokens of
    any rank, rounded up to a multiple of 128. Buffers hold the worst case, C tokens from every rank
    to one; they grow when a layer needs more, and are kept. A later call with more tokens than C
    is an error on every rank, and these buffers' last: where batches grow, say how far by ``tokens``.

    Attributes:
        tokens, cap_bytes: as below; may be set between calls, on all ranks alike. Other ``tokens`` are a
            new agreement, and the cap holds from the next one on.

    Args:
        group: 2 to 8 ranks of one host, one GPU each.
        device: this rank's GPU; the current one by default.
        tokens: the most tokens any rank will have, or None: those of the first call.
        cap_bytes: limit of this rank's buffer where it grows; the smallest of all ranks' counts.
        timeout_s: how long the device waits for a peer; the group's own timeout by default.
        sms: how many of the GPU's SMs an exchange may hold while it waits for peers; by default 3/4 of them,
            or what reductions over peers' memory leave. From 32 MB on one block waits, for all.
        passes: this is one of so many under way at once, beside experts; by default each may then hold 16
            SMs, waiting or not.
        first: that of their first pass. What fails in one then ends the waits of all, within one timeout.

    Raises:
        ValueError: a group this cannot work for, or an argument outside its limits.
        RuntimeError: lina was built without CUDA.
    """

    def __init__(self, group: dist.ProcessGroup, *, device: torch.device | None = None,
                 tokens: int | None = None, cap_bytes: int | None = None, timeout_s: float | None = None,
                 sms: int = 0, passes: int = 1, first: Peers | None = None) -> None:
        if tokens is not None and tokens < 1:
            raise ValueError(f"p2p: tokens is {tokens}, must be at least 1")
        self._domain = domain = Domain(group, "tokens", device, timeout_s)
        self.ep, self.rank, self.device = domain.ep, domain.rank, domain.device
        self.tokens, self.cap_bytes = tokens, cap_bytes
        every, gradients = domain.room()
        if not 0 <= sms <= every - gradients or gradients >= every:
            raise ValueError(f"p2p: sms is {sms}, must be 0 (3/4, or what is left) to {every - gradients}: "
                             f"reductions over peers' memory hold {gradients} of the GPU's {every} SMs")
        usual = share(every) if passes == 1 else min(_BESIDE, share(every))
        self.sms = domain.sms = sms or min(usual, every - gradients)
        self._passes, self._first = passes, first
        self._layers: dict[tuple, Agreed] = {}
        self._buffer: _Buffer | None = None
        self._in_graph = False                     # a graph captured here holds the buffer's address
        self._replaced: list[_Buffer] = []         # which graphs hold, here or on another rank

    def layer(self, T: int, D: int, K: int, E: int, dtype: torch.dtype, grad: bool,
              tokens: int | None = None) -> Agreed:
        """What all ranks agreed on for calls like this one; collective when it is the first."""
        key = D, K, E, dtype, grad, tokens or self.tokens
        found = self._layers.get(key)
        if found is None:
            if self._capturing():
                raise RuntimeError("p2p: first call of a layer, or with other tokens=N, inside a graph "
                                   "capture; the ranks must agree on it first: run it once before")
            found = self._layers[key] = self._agree(T, key)
        if T > found.C:
            self.stop(overflow=True)
            raise Overflow(f"p2p: {T} tokens on rank {self.rank}, but the ranks agreed on at most "
                           f"{found.C} for calls like this one; tell the most of any rank before, on every "
                           "rank: lina.mesh(..., tokens=N) or lina.parallel.settings(mesh).tokens = N")
        return found

    def launch(self) -> tuple[Any, int]:
        """lina_peers of the current buffers, and the stream for work on them: the device's current one."""
        assert self._buffer is not None            # since the first layer()
        self._in_graph = self._in_graph or self._capturing()
        stream = self._buffer.mapped.stream = torch.cuda.current_stream(self.device)
        return self._buffer.mapped.handle, stream.cuda_stream

    def rows(self, layer: Agreed, D: int, dtype: torch.dtype) -> Tensor:
        """[ep * C, D]: the tokens of this round where they arrived; gone with the next."""
        assert self._buffer is not None
        size = self.ep * layer.C * D
        return self._buffer.rows[:size * dtype.itemsize].view(dtype).view(self.ep * layer.C, D)

    def check(self) -> None:
        """RuntimeError if a wait on the device has failed by now; its text says which."""
        if self._buffer is not None:
            _C.peers_check(self._buffer.mapped.handle)

    def lost(self) -> bool:
        """Whether a wait on the device has ended in time-out by now, or was given up."""
        return self._buffer is not None and _C.peers_lost(self._buffer.mapped.handle)

    def stop(self, overflow: bool = False) -> None:
        """Tell the peers that this rank cannot finish its round (``overflow``: it has too many tokens)."""
        if self._buffer is not None and not self._capturing():
            _C.peers_stop(*self.launch(), overflow)

    def abort(self) -> None:
        """End every wait on the device, from any thread; all later calls raise."""
        for buffer in self._buffers():
            _C.peers_abort(buffer.mapped.handle)

    def close(self) -> None:
        """Unmap and free the buffers; collective, after all work on them and without graphs to replay.

        Without it they are kept until the process ends, for a peer may still write to them.
        """
        buffers = self._buffers()
        self._buffer, self._in_graph, self._replaced, self._layers = None, False, [], {}
        self._domain.sms = 0
        for buffer in buffers:
            self._domain.release(buffer.mapped)

    def _buffers(self) -> list[_Buffer]:
        """In one order on all ranks."""
        return self._replaced + ([] if self._buffer is None else [self._buffer])

    def _capturing(self) -> bool:
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def _agree(self, T: int, key: tuple) -> Agreed:
        D, K, E, dtype, grad, tokens = key
        facts = {"D": D, "K": K, "number of experts": E, "dtype of x": str(dtype), "need of gradients": grad,
                 "tokens": tokens, "degree": self._passes}
        everyone = self._domain.compare("p2p", facts, [T, self.cap_bytes, self._in_graph])
        most = max(tokens or 0, *(said[0] for said in everyone))
        C = -(-max(most, 1) // _STEP) * _STEP
        if self.ep * C * K >= 2**31 or C >= 2**24:
            raise ValueError(f"p2p: {most} tokens of K={K} on each of {self.ep} ranks, ep*T*K must be below "
                             "2^31")
        rows = self.ep * C
        back = -(-rows * D * dtype.itemsize // 16) * 16 + rows * K * 4
        caps = [said[1] for said in everyone if said[1] is not None]
        self._grow(back + rows * K * 4, back, C, min(caps, default=None), any(said[2] for said in everyone))
        return Agreed(C, len(self._layers) % _TAGS)

    def _grow(self, out_bytes: int, back_bytes: int, C: int, cap: int | None, in_graph: bool) -> None:
        """Buffers of at least these sizes; all ranks come here with the same numbers."""
        old = self._buffer
        if old is not None:
            if out_bytes <= old.out_bytes and back_bytes <= old.back_bytes:
                return
            out_bytes, back_bytes = max(out_bytes, old.out_bytes), max(back_bytes, old.back_bytes)
        if cap is not None and out_bytes + back_bytes > cap:
            raise ValueError(f"p2p: {out_bytes + back_bytes} bytes are needed to receive {C} tokens from "
                             f"each of {self.ep} ranks, the cap is {cap}")
        tokens = max(C, min(out_bytes // 8, 2**24 - 1))          # what could fit with other shapes
        every, gradients = self._domain.room()                   # reducers may have come since
        if gradients >= every:
            raise ValueError(f"p2p: reductions over peers' memory hold all {every} SMs of the GPU")
        self.sms = min(self.sms, every - gradients)
        like = old or (self._first and self._first._buffer)
        mapped = self._domain.map(lambda: _C.peers_make(
            self.rank, self.ep, out_bytes, back_bytes, tokens, self._domain.timeout_s, self.sms,
            self._passes > 1, like and like.mapped.handle))
        memory = _Memory(mapped.handle, _C.peers_rows(mapped.handle), out_bytes)
        with torch.cuda.device(self.device):
            rows = torch.as_tensor(memory, device=self.device)
        self._buffer, self._in_graph, self._domain.sms = (
            _Buffer(mapped, rows, out_bytes, back_bytes), False, self.sms)
        if old is not None and in_graph:
            self._replaced.append(old)             # on all ranks: a replay on one writes to the others' too
        elif old is not None:
            self._domain.release(old.mapped, self._domain.timeout_s)


in_use: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, list[Peers]]] = weakref.WeakKeyDictionary()


def peers_of(group: dist.ProcessGroup, passes: int, *, device: torch.device | None = None,
             tokens: int | None = None, cap_bytes: int | None = None) -> list[Peers]:
    """The group's :class:`Peers` for layers in so many passes, made at first use: one a pass, for several
    are under way at once. ``tokens`` and ``cap_bytes``, of all passes together, hold from this call on."""
    found = in_use.setdefault(group, {})
    if passes not in found:
        found[passes] = made = [Peers(group, device=device, passes=passes)]
        made += [Peers(group, device=device, passes=passes, first=made[0]) for _ in range(1, passes)]
    for one in found[passes]:
        one.tokens = None if tokens is None else -(-tokens // passes)
        one.cap_bytes = None if cap_bytes is None else cap_bytes // passes
    return found[passes]


def share(sms: int) -> int:
    """SMs that an exchange takes of a GPU's, unless told: as csrc/comm/peers.c."""
    return 1 if sms < 4 else sms // 4 * 3
