"""Buffers that the ranks of one NVLink domain map into each other, and what those ranks agreed on.

C is the most tokens that any rank may have, ep the number of ranks, D width, K experts for each token.
"""

from __future__ import annotations

import json
import socket
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_process_group_store

from lina import _C
from lina.parallel.mesh import timeout_of

MAX_RANKS = 8
_STEP = 128           # C is a multiple: uneven batches share one layer's agreement
_TAGS = 255
left_mapped: list[Any] = []  # buffers that a peer may still have mapped: freed when the process ends


class _Memory:
    """Bytes on the current device that torch.as_tensor makes a tensor of; `owner` must outlive it."""

    def __init__(self, owner: Any, address: int, size: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = dict(shape=(size,), typestr="|u1", data=(address, False), version=2)


class _Buffer(NamedTuple):
    handle: Any           # lina_peers
    rows: Tensor          # uint8: where tokens arrive
    out_bytes: int
    back_bytes: int


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
    is an error on every rank; where batches grow, say how far by ``tokens``.

    Args:
        group: 2 to 8 ranks of one host, one GPU each.
        tokens: the most tokens any rank will have, or None: those of the first call.
        cap_bytes: limit of this rank's buffer; the smallest of all ranks' counts.
        timeout_s: how long the device waits for a peer; the group's own timeout by default.
        sms: how many of the GPU's SMs an exchange may take; 3/4 of them by default.

    Raises:
        ValueError: a group this cannot work for, or an argument outside its limits.
        RuntimeError: lina was built without CUDA.
    """

    def __init__(self, group: dist.ProcessGroup, *, tokens: int | None = None,
                 cap_bytes: int | None = None, timeout_s: float | None = None, sms: int = 0) -> None:
        ep = group.size()
        if not 2 <= ep <= MAX_RANKS:
            raise ValueError(f"p2p: the group has {ep} ranks, limit 2..{MAX_RANKS}")
        if sms < 0:
            raise ValueError(f"p2p: sms is {sms}, must be at least 0")
        if tokens is not None and tokens < 1:
            raise ValueError(f"p2p: tokens is {tokens}, must be at least 1")
        if not _C.CUDA:
            raise RuntimeError("p2p: lina was built without CUDA")
        if timeout_s is None:
            timeout_s = (timeout_of(group) or timedelta(minutes=10)).total_seconds()
        self.ep, self.rank = ep, group.rank()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.tokens, self.cap_bytes, self.timeout_s, self.sms = tokens, cap_bytes, timeout_s, sms
        made = _made.setdefault(group, [0])
        made[0] += 1
        self._store = dist.PrefixStore(f"lina.p2p.{made[0]}", _get_process_group_store(group))
        self._rounds = 0
        self._layers: dict[tuple, Agreed] = {}
        self._buffer: _Buffer | None = None
        self._captured: list[_Buffer] = []         # graphs hold their addresses

    def layer(self, T: int, D: int, K: int, E: int, dtype: torch.dtype, grad: bool,
              tokens: int | None = None) -> Agreed:
        """What all ranks agreed on for calls like this one; collective when it is the first."""
        key = D, K, E, dtype, grad, tokens or self.tokens
        found = self._layers.get(key)
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("p2p: first call of a layer inside a graph capture; the ranks must agree "
                                   "on its shapes first: run it once before")
            found = self._layers[key] = self._agree(T, key)
        if T > found.C:
            self.stop(overflow=True)
            raise ValueError(f"p2p: {T} tokens on rank {self.rank}, but the ranks agreed on at most "
                             f"{found.C} when this layer was first called; give the most of any rank, "
                             "lina.mesh(..., tokens=N)")
        return found

    @property
    def handle(self) -> Any:
        """lina_peers of the current buffers."""
        assert self._buffer is not None            # since the first layer()
        if torch.cuda.is_current_stream_capturing() and self._buffer not in self._captured:
            self._captured.append(self._buffer)
        return self._buffer.handle

    def rows(self, layer: Agreed, D: int, dtype: torch.dtype) -> Tensor:
        """[ep * C, D]: the tokens of this round where they arrived; gone with the next."""
        assert self._buffer is not None
        size = self.ep * layer.C * D
        return self._buffer.rows[:size * dtype.itemsize].view(dtype).view(self.ep * layer.C, D)

    def check(self) -> None:
        """RuntimeError if a wait on the device has failed by now; its text says which."""
        if self._buffer is not None:
            _C.peers_check(self._buffer.handle)

    def stop(self, overflow: bool = False) -> None:
        """Tell the peers that this rank cannot finish its round (``overflow``: it has too many tokens)."""
        if self._buffer is not None and not torch.cuda.is_current_stream_capturing():
            _C.peers_stop(self._buffer.handle, current_stream(), overflow)

    def abort(self) -> None:
        """End every wait on the device, from any thread; all later calls raise."""
        for buffer in {id(b): b for b in (self._buffer, *self._captured) if b}.values():
            _C.peers_abort(buffer.handle)

    def close(self) -> None:
        """Unmap and free the buffers; collective, after all work on them and without graphs to replay.

        Without it they are kept until the process ends, for a peer may still write to them.
        """
        buffers = {id(b): b for b in (self._buffer, *self._captured) if b}.values()
        self._buffer, self._captured, self._layers = None, [], {}
        for buffer in buffers:
            self._release(buffer)

    def _release(self, buffer: _Buffer) -> None:
        _C.peers_close(buffer.handle)
        try:
            self._gather("closed", min(self.timeout_s, 10.0))
        except RuntimeError:
            left_mapped.append(buffer)

    def _gather(self, said: Any, timeout_s: float | None = None) -> list[Any]:
        """What every rank said in this round of the group's store."""
        n, self._rounds = self._rounds, self._rounds + 1
        self._store.set(f"{n}.{self.rank}", json.dumps(said))
        keys = [f"{n}.{r}" for r in range(self.ep)]
        try:
            self._store.wait(keys, timedelta(seconds=timeout_s or self.timeout_s))
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(f"p2p: not all {self.ep} ranks came to agree on a layer within "
                               f"{timeout_s or self.timeout_s:g} s; one has stopped, or calls another "
                               f"layer: {error}") from error
        return [json.loads(self._store.get(key)) for key in keys]

    def _agree(self, T: int, key: tuple) -> Agreed:
        D, K, E, dtype, grad, tokens = key
        facts = {"host": host_id(), "D": D, "K": K, "number of experts": E, "dtype of x": str(dtype),
                 "need of gradients": grad, "tokens": tokens}
        everyone = self._gather([facts, T, self.cap_bytes])
        for name in facts:
            values = [said[0][name] for said in everyone]
            if any(value != values[0] for value in values):
                what = "run on several hosts" if name == "host" else f"disagree on {name}"
                raise ValueError(f"p2p: the ranks of one expert group {what}: {values} by rank")
        most = max(tokens or 0, *(said[1] for said in everyone))
        C = -(-max(most, 1) // _STEP) * _STEP
        if self.ep * C * K >= 2**31 or C >= 2**24:
            raise ValueError(f"p2p: {most} tokens of K={K} on each of {self.ep} ranks, ep*T*K must be below "
                             "2^31")
        rows = self.ep * C
        back = -(-rows * D * dtype.itemsize // 16) * 16 + rows * K * 4
        caps = [said[2] for said in everyone if said[2] is not None]
        self._grow(back + rows * K * 4, back, C, min(caps) if caps else None)
        return Agreed(C, len(self._layers) % _TAGS)

    def _grow(self, out_bytes: int, back_bytes: int, C: int, cap: int | None) -> None:
        """Buffers of at least these sizes; all ranks come here with the same numbers."""
        old = self._buffer
        if old is not None:
            if out_bytes <= old.out_bytes and back_bytes <= old.back_bytes:
                return
            out_bytes, back_bytes = max(out_bytes, old.out_bytes), max(back_bytes, old.back_bytes)
        if cap is not None and out_bytes + back_bytes > cap:
            raise ValueError(f"p2p: {out_bytes + back_bytes} bytes are needed to receive {C} tokens from "
                             f"each of {self.ep} ranks, the cap is {cap}")
        handle, said = None, ["", ""]
        try:
            tokens = max(C, min(out_bytes // 8, 2**24 - 1))      # what could fit with other shapes
            handle = _C.peers_make(self.rank, self.ep, out_bytes, back_bytes, tokens, self.timeout_s,
                                   self.sms)
            said[0] = _C.peers_export(handle).hex()
        except (RuntimeError, ValueError) as error:
            said[1] = str(error)
        exports = self._all_well(said)
        try:
            _C.peers_open(handle, self.ep, b"".join(bytes.fromhex(export) for export, _ in exports))
        except (RuntimeError, ValueError) as error:
            said[1] = str(error)
        self._all_well(said)
        memory = _Memory(handle, _C.peers_rows(handle), out_bytes)
        self._buffer = _Buffer(handle, torch.as_tensor(memory, device=self.device), out_bytes, back_bytes)
        if old is not None and old not in self._captured:
            self._release(old)

    def _all_well(self, said: list[str]) -> list[list[str]]:
        everyone = self._gather(said)
        bad = [f"rank {r}: {error}" for r, (_, error) in enumerate(everyone) if error]
        if bad:
            raise RuntimeError(f"p2p: the ranks could not map each other's memory: {'; '.join(bad)}")
        return everyone


_made: weakref.WeakKeyDictionary[dist.ProcessGroup, list[int]] = weakref.WeakKeyDictionary()
_peers: weakref.WeakKeyDictionary[dist.ProcessGroup, Peers] = weakref.WeakKeyDictionary()


def peers_of(group: dist.ProcessGroup, **options: Any) -> Peers:
    """The group's :class:`Peers`, made with ``options`` on first use."""
    if group not in _peers:
        _peers[group] = Peers(group, **options)
    return _peers[group]


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def host_id() -> str:
    """The same for all processes of one running system."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
