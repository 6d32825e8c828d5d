"""How bytes travel among the ranks that share one copy of the experts, and who gives way to whom.

A spread layer (tokens/spread.py) starts all-to-alls and waits for them; what carries them is a Transport:
c10d.py over any backend of torch.distributed, nccl.py over communicators of lina's own. Gradient
micro-ops (gradients/queue.py) start only while no all-to-all is queued, running or imminent.
"""

from __future__ import annotations

import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lina import tracing
from lina.parallel.mesh import seconds_of

_SPIN_S = 0.02         # on the host, before it sleeps: longer than a GPU takes that is not held up


class Pending(Protocol):
    """An all-to-all that was started."""

    def wait(self) -> None:
        """Return when the output can be used: by the host on a CPU, on CUDA by what is launched
        afterwards on the current stream (the host does not wait there).

        Raises:
            RuntimeError: a rank failed or left, within the transport's timeout; names the exchange.
        """


class Transport(ABC):
    """The all-to-alls of one process group; one for each group, made by the first layer that asks.

    Every rank of the group makes the same calls in the same order. A transport sees to it that the
    memory it was given is not used anew before an exchange ends, on streams of its own too.
    """

    name: str
    fast = False    # its links: 100 GB/s or more, measured here when it was made
    sms = 0         # which experts on CUDA leave free, for the exchanges beside them

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()

    @abstractmethod
    def counts(self, label: str, mine: Tensor) -> Callable[[], Tensor]:
        """Exchange small numbers: row r of ``mine`` [ep, n] (int64, on the layer's device) goes to rank r.

        Returns:
            a function, called once, that gives [2, ep, n] int64 on the CPU: ``mine``, and what
            arrived, row r from rank r. Over CUDA the calls so far have queued one copy to the host;
            only that function waits for it.
        """

    @abstractmethod
    def start(self, label: str, out: Tensor, inp: Tensor, out_splits: list[int],
              in_splits: list[int]) -> Pending:
        """Start an all-to-all of bytes.

        Args:
            label: shown in traces and errors.
            inp, out: uint8, contiguous, of one dimension: what is sent, by rank, and where what
                arrives is put, by rank. Valid on the current stream.
            in_splits, out_splits: bytes to and from each rank; 0 is common.

        Starts are carried out in order; those of one group never overtake each other.
        """

    @abstractmethod
    def imminent(self) -> None:
        """All-to-alls follow at once: no gradient micro-op may start from here (on CUDA: from this
        point of the current stream) until ``settled``."""

    @abstractmethod
    def settled(self) -> None:
        """Called once for each ``imminent``, after the last wait, also when a call raised."""

    def close(self) -> None:
        """Give back what the transport holds; nothing is in flight."""
        return None


@contextmanager
def ahead(carrier: Transport) -> Iterator[None]:
    carrier.imminent()
    try:
        yield
    finally:
        carrier.settled()


class Gate:
    """All-to-alls queued, running or imminent in this process, for queues driven by the host.

    ``watchers`` are told of every change, by +1 or -1, under the gate's lock.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.outstanding = 0
        self.passed: Any = None        # CUDA: event after the last all-to-all that was launched
        self.watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()

    def change(self, delta: int) -> None:
        with self.lock:
            self.outstanding += delta
            for watcher in self.watchers:
                watcher.a2a(delta)

    def __enter__(self) -> None:
        self.change(1)

    def __exit__(self, *exc: object) -> None:
        self.lower()

    def lower(self) -> None:
        """One all-to-all less; over CUDA it is launched, and those who wait for ``passed`` wait for it."""
        try:
            if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
                passed = torch.cuda.Event(blocking=True)     # sleeps, rather than spins, on the host
                passed.record()
                self.passed = passed                         # recorded: one that is not counts as passed
        finally:                                             # also where the device has failed
            self.change(-1)

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of every change from now on, and of what is outstanding already."""
        with self.lock:
            for _ in range(self.outstanding):
                watcher.a2a(1)
            self.watchers.add(watcher)


class Watcher(Protocol):
    def a2a(self, delta: int) -> None: ...


gate = Gate()


def to_host(label: str, values: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Queues one copy of ``values`` to the host; the function returned waits for it, and gives it.

    torch's own waits end with the process, about a minute after the group's timeout: torch's watchdog
    collects traces first. So this one looks at the clock.

    Raises:
        RuntimeError: from that function: what the values depend on has not come within the group's timeout.
    """
    if not values.is_cuda:
        return lambda: values
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))    # whichever device is the current one

    def arrived() -> Tensor:
        start = time.monotonic()
        with tracing.span("a2a", f"{label}: wait", device=values.device):
            while not copied.query():
                waited = time.monotonic() - start
                if waited <= _SPIN_S:
                    time.sleep(0)                      # lets other threads have their turn
                    continue
                if waited > seconds_of(group):
                    raise failure(label, group, TimeoutError(f"no answer for {waited:.0f} s"))
                time.sleep(1e-4)
        return host
    return arrived


def failure(label: str, group: dist.ProcessGroup, error: BaseException) -> RuntimeError:
    """What every transport raises when an exchange fails."""
    return RuntimeError(f"{label}: the exchange among ranks {dist.get_process_group_ranks(group)} failed on "
                        f"rank {dist.get_rank()}; another rank has stopped, or hangs: {error}")
