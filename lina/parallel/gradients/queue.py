"""Gradient micro-ops: what waits for all-to-alls to pass, one at a time, in one order on all ranks.

HostQueue is driven by the host, for c10d. A thread asks the policy (csrc/plan/policy.h) what may
start, reduces that piece and waits for it. DeviceQueue launches all pieces at
once; there the device itself holds each of them back (peer_reduce.py, transport/nccl.py).

No deadlock: the thread starts pieces in the order of submission, which is the same on every rank;
it waits for all-to-alls, and these wait for no gradient. So on the rank that is furthest behind
something can always go on.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from lina import _C, tracing
from lina.parallel.gradients.peer_reduce import DTYPES, PeerReducer
from lina.parallel.mesh import new_group, timeout_of
from lina.parallel.settings import UNIT
from lina.parallel.transport.base import gate
from lina.parallel.transport.domain import MAX_RANKS, SeveralHosts
from lina.parallel.transport.nccl import Reducer, future


class Queue(Protocol):
    def submit(self, flat: Tensor, label: str, *, average: bool = True,
               group: dist.ProcessGroup | None = None, into: Future | None = None) -> Future[Tensor]:
        """Sum ``flat`` over the ranks of ``group`` (by default the queue's own), in place.

        Args:
            flat: contiguous; not to be used until the future is done.
            average: divide by the number of ranks first, as DistributedDataParallel does.
            into: the future to complete and return, of flat's device; by default a new one.

        Returns:
            a future of ``flat``. A rank that fails gives it a RuntimeError.

        Raises:
            RuntimeError: an earlier reduction failed, or the group is destroyed.
        """

    def close(self) -> None:
        """End what serves it; what has not started fails."""


@dataclass
class _Entry:
    flat: Tensor
    label: str
    group: dist.ProcessGroup | None
    future: Future
    ready: Any = None                  # CUDA: event after which flat may be read


@dataclass
class _State:
    """What the thread knows; it does not keep the queue itself or the group alive."""

    policy: _C.Policy
    group: Any                         # weak reference
    changed: threading.Condition = field(default_factory=threading.Condition)
    entries: deque[_Entry] = field(default_factory=deque)
    failed: BaseException | None = None
    closed: bool = False

    def a2a(self, delta: int) -> None:
        with self.changed:
            self.policy.a2a(delta)
            if self.policy.outstanding == 0:
                self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    __hash__ = object.__hash__         # it is kept in weak sets


class HostQueue:
    """A thread for the gradients of one group of ranks; ends with the queue, or with its group.

    Args:
        group: the ranks; the queue makes a group of its own of them, so that nothing else that
            is reduced there can come between. Collective over them.
        link: (alpha, beta) of an allreduce: seconds, and seconds a byte.
        micro_op_s: seconds that one micro-op should take by that model.
    """

    def __init__(self, group: dist.ProcessGroup, link: tuple[float, float], micro_op_s: float) -> None:
        own = new_group(dist.get_process_group_ranks(group), timeout_of(group))
        self._state = state = _State(_C.Policy(link, micro_op_s, UNIT), weakref.ref(own))
        self._thread = threading.Thread(target=_serve, args=(state,), name="lina gradients", daemon=True)
        self._groups: weakref.WeakKeyDictionary[dist.ProcessGroup, Any] = weakref.WeakKeyDictionary()
        weakref.finalize(own, state.close)         # destroy_process_group drops it
        weakref.finalize(self, state.close)
        gate.watch(state)
        self._thread.start()
        _threads.add(self)

    def submit(self, flat: Tensor, label: str, *, average: bool = True,
               group: dist.ProcessGroup | None = None, into: Future | None = None) -> Future[Tensor]:
        """See Queue."""
        state, over = self._state, self._state.group() if group is None else self._own(group)
        if over is None:
            raise RuntimeError(f"gradients: {label} cannot be reduced, the process group is destroyed")
        if average:
            flat.div_(over.size())
        if into is None:
            into = Future(devices=[flat.device] if flat.is_cuda else None)
        entry = _Entry(flat, label, None if group is None else over, into)
        if flat.is_cuda:
            entry.ready = torch.cuda.current_stream(flat.device).record_event()
        with state.changed:
            if state.failed is not None or state.closed:
                raise RuntimeError(f"gradients: {label} cannot be reduced after an earlier failure: "
                                   f"{state.failed or 'the queue is closed'}") from state.failed
            state.policy.submit(flat.nbytes)
            state.entries.append(entry)
            state.changed.notify_all()
        return entry.future

    def _own(self, group: dist.ProcessGroup) -> dist.ProcessGroup | None:
        """One of the ranks of ``group`` for this queue alone: the first call is collective over them. During
        backward others may use theirs. None: it is destroyed."""
        if group not in self._groups:
            own = new_group(dist.get_process_group_ranks(group), timeout_of(group))
            self._groups[group] = weakref.ref(own)
        return self._groups[group]()

    def close(self) -> None:
        """See Queue."""
        self._state.close()
        self._thread.join()


_threads: weakref.WeakSet[HostQueue] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """A thread that comes back from a collective while the interpreter goes away would abort the process;
    but one whose peers never come must not keep it from ending."""
    for queue in list(_threads):
        queue._state.close()
    for queue in list(_threads):
        queue._thread.join(1.0)


def _serve(state: _State) -> None:
    stream: Any = None
    while True:
        with state.changed:
            op = None
            while not state.closed and (op := state.policy.next()) is None:
                state.changed.wait()
            entry = state.entries[0] if op else None
        error: BaseException | None = None
        if entry is None or op is None:
            error = RuntimeError("gradients: the queue was closed before its end")
        else:
            _, offset, size, _ = op
            try:
                if entry.ready is not None and stream is None:
                    stream = torch.cuda.Stream(entry.flat.device)
                _reduce(entry, state.group, offset, size, stream)
            except BaseException as caught:      # whatever it is, those who wait must learn of it
                error = caught
        with state.changed:
            if op:
                state.policy.finished()
            done = []
            if error is not None:
                state.failed, done = error, list(state.entries)
                state.entries.clear()
            elif op and op[3]:
                done = [state.entries.popleft()]
        while done:                              # outside the lock: callbacks run in here
            _finish(done.pop(0), error, stream)
        if error is not None:
            return
        del entry, done                          # an idle thread keeps no tensor


def _finish(entry: _Entry, error: BaseException | None, stream: Any) -> None:
    if error is not None:
        entry.future.set_exception(error)
    elif stream is None:
        entry.future.set_result(entry.flat)
    else:
        with torch.cuda.stream(stream):          # outside, the result would not wait for the stream
            entry.future.set_result(entry.flat)


def _reduce(entry: _Entry, own: Any, offset: int, size: int, stream: Any) -> None:
    group = entry.group or own()
    if group is None:
        raise RuntimeError(f"gradients: {entry.label} cannot be reduced, the process group is destroyed")
    first, count = (n // entry.flat.element_size() for n in (offset, size))
    piece = entry.flat.view(-1)[first:first + count]
    if count == 0:
        return
    try:
        if stream is None:
            token = tracing.begin("allreduce", entry.label, bytes=size)
            dist.all_reduce(piece, group=group, async_op=True).wait()
            tracing.end(token)
            return
        with torch.cuda.device(piece.device), torch.cuda.stream(stream):
            if gate.passed is not None:
                gate.passed.synchronize()        # the host is ahead of the last all-to-all
            stream.wait_event(entry.ready)
            token = tracing.begin("allreduce", entry.label, piece.device, bytes=size)
            dist.all_reduce(piece, group=group, async_op=True).wait()
            tracing.end(token)
            piece.record_stream(stream)
            done = torch.cuda.Event(blocking=True)
            done.record()
            done.synchronize()
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(f"gradients: the allreduce of {entry.label} among ranks {ranks} failed on rank "
                           f"{dist.get_rank()}; another rank has stopped, or hangs: {error}") from error


class DeviceQueue:
    """The same on the device, one reducer for each group: over peers' memory (peer_reduce.py) among ranks of
    one host, if its links are fast, else over NCCL communicators of lina's own (nccl.Reducer).

    Args:
        peers: over peers' memory however fast; else where NCCL reaches what takes NVLink, for there its
            micro-ops, which hold SMs while they wait for a peer, slow the experts more than they gain.
    """

    def __init__(self, group: dist.ProcessGroup, link: tuple[float, float], micro_op_s: float,
                 peers: bool = False) -> None:
        self._group, self._model, self._peers, self._must = group, (link, micro_op_s), peers, peers
        self._reducers: dict[tuple[dist.ProcessGroup, bool], Reducer | PeerReducer] = {}
        first = self._reducer(group, torch.float32)
        if not peers and isinstance(first, Reducer) and first.fast():
            self._peers = True
            self._reducer(group, torch.float32)

    def submit(self, flat: Tensor, label: str, *, average: bool = True,
               group: dist.ProcessGroup | None = None, into: Future | None = None) -> Future[Tensor]:
        """See Queue."""
        reducer = self._reducer(group or self._group, flat.dtype)
        reducer.all_reduce(flat, mean=average)
        return future(flat, reducer.stream, into)

    def _reducer(self, group: dist.ProcessGroup, dtype: torch.dtype) -> Reducer | PeerReducer:
        over_peers = self._peers and dtype in DTYPES and 2 <= group.size() <= MAX_RANKS
        found = self._reducers.get((group, over_peers))
        if found is None:
            found = self._over_peers(group) if over_peers else None
            if found is None:
                found = self._reducers.get((group, False)) or Reducer(group, *self._model)
                self._reducers[group, False] = found
            self._reducers[group, over_peers] = found
        return found

    def _over_peers(self, group: dist.ProcessGroup) -> PeerReducer | None:
        """None, on all ranks alike, where they cannot, and need not."""
        try:
            return PeerReducer(group)
        except SeveralHosts:
            return None
        except (RuntimeError, ValueError) as error:
            if self._must:
                raise
            logging.getLogger(__name__).warning("gradients travel over NCCL: %s", error)
            return None

    def close(self) -> None:
        """See Queue."""
        for reducer in dict.fromkeys(self._reducers.values()):      # in one order on all ranks
            reducer.close()
        self._reducers.clear()
