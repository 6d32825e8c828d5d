"""The ranks of one NVLink domain: what they tell each other, and memory that all of them have mapped.

They speak through their group's store (rounds.py).
"""

from __future__ import annotations

import atexit
import os
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lina import _C
from lina.parallel.mesh import seconds_of
from lina.parallel.transport.rounds import Rounds

MAX_RANKS = 8
CLOSE_S = 10.0        # most that closing waits for the other ranks
DRAIN_S = 5.0         # most that the process's end waits for work in flight


class SeveralHosts(ValueError):
    """The ranks run on several hosts, where nobody can map another's memory; raised on all of them."""


class Mapped:
    """Memory of this rank that all peers have mapped, and theirs as mapped here: one lina_peers."""

    def __init__(self, handle: Any, device: torch.device) -> None:
        self.handle, self.device, self.process = handle, device, os.getpid()
        self.stream: torch.cuda.Stream | None = None      # of the last call, which is behind all before it


class Domain:
    """The ranks of ``group``, and what their kernels wait with.

    Args:
        group: 2 to 8 ranks of one host, one GPU each.
        purpose: "tokens" or "gradients". Kernels of one purpose follow each other on the GPU; those of
            both run at once.
        device: this rank's GPU; the current one by default.
        timeout_s: how long to wait for another rank; the group's own timeout by default.

    Raises:
        ValueError: too few ranks, or too many.
        RuntimeError: lina was built without CUDA.
    """

    def __init__(self, group: dist.ProcessGroup, purpose: str, device: torch.device | None = None,
                 timeout_s: float | None = None) -> None:
        ep = group.size()
        if not 2 <= ep <= MAX_RANKS:
            raise ValueError(f"p2p: the group has {ep} ranks, limit 2..{MAX_RANKS}")
        if not _C.CUDA:
            raise RuntimeError("p2p: lina was built without CUDA")
        if timeout_s is None:
            timeout_s = seconds_of(group)
        self.ep, self.rank, self.purpose, self.timeout_s = ep, group.rank(), purpose, timeout_s
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
        self.sms = 0                   # SMs that its kernels hold while they wait
        self._rounds = Rounds("p2p", group, purpose, timeout_s)
        _domains.add(self)

    def room(self) -> tuple[int, int]:
        """SMs of the GPU, and those of them that kernels of the other purpose hold while they wait.

        All that wait for peers must run at once: a kernel that waits for an SM behind one that waits for
        a peer, whose own kernel waits likewise, would do so until the timeout.
        """
        every = torch.cuda.get_device_properties(self.device).multi_processor_count
        others = [d.sms for d in list(_domains) if d.device == self.device and d.purpose != self.purpose]
        return every, max(others, default=0)

    def gather(self, kind: str, said: Any, timeout_s: float | None = None) -> list[Any]:
        """What every rank said in its next round of this kind; raises as :meth:`Rounds.gather`."""
        return self._rounds.gather(kind, said, timeout_s)

    def compare(self, op: str, facts: dict[str, Any], more: Any) -> list[Any]:
        """Every rank's ``more``; a ValueError on all of them unless ``facts`` are everywhere the same."""
        everyone = self.gather("facts", [{"host": host_id(), **facts}, more])
        for name in ("host", *facts):
            values = [said[0].get(name) for said in everyone]
            if any(value != values[0] for value in values):
                if name == "host":
                    raise SeveralHosts(f"{op}: the ranks of one group run on several hosts: {values} by rank")
                raise ValueError(f"{op}: the ranks of one group disagree on {name}: {values} by rank")
        return [said[1] for said in everyone]

    def map(self, make: Callable[[], Any]) -> Mapped:
        """The lina_peers that ``make`` returns, mapped by all ranks; or an error on all of them.

        Raises:
            ValueError: of ``make`` here: an argument outside its limits.
            RuntimeError: a rank has no memory, or cannot map another's; or did not come in time.
        """
        mine: Mapped | None = None
        export, wrong = "", None
        with torch.cuda.device(self.device):
            try:
                handle = make()
                mine = _mapped[id(handle)] = Mapped(handle, self.device)    # from here on a peer may map it
                export = _C.peers_export(handle).hex()
            except (RuntimeError, ValueError) as error:
                wrong = error
            everyone = self.gather("memory", [export, str(wrong or "")])
            if mine is not None and not any(error for _, error in everyone):
                try:
                    _C.peers_open(mine.handle, self.ep, b"".join(bytes.fromhex(said) for said, _ in everyone))
                except (RuntimeError, ValueError) as error:
                    wrong = error
                everyone = self.gather("maps", ["", str(wrong or "")])
        bad = [f"rank {r}: {error}" for r, (_, error) in enumerate(everyone) if error]
        if mine is not None and not bad:
            return mine
        self.release(mine)
        if isinstance(wrong, ValueError):
            raise wrong
        raise RuntimeError(f"p2p: the ranks could not map each other's memory: {'; '.join(bad)}")

    def release(self, memory: Mapped | None, timeout_s: float | None = None) -> None:
        """Unmap the peers' memory, and let go of this rank's once all have done so; collective.

        Where a rank does not come, this rank's stays until the process ends: that one may write to it.
        """
        if memory is not None:
            with torch.cuda.device(self.device):
                _C.peers_close(memory.handle)
        try:
            self.gather("end", "closed", min(self.timeout_s, timeout_s or CLOSE_S))
        except RuntimeError:
            return
        if memory is not None:
            del _mapped[id(memory.handle)]


_domains: weakref.WeakSet[Domain] = weakref.WeakSet()
# All memory that a peer may have mapped, whether or not anything here still uses it: work on it may be in
# flight, here or there.
_mapped: dict[int, Mapped] = {}


@atexit.register
def _end() -> None:
    """Peers wait for what was launched in good order: it may end. What has not by then waits for a peer
    that does not come, and the driver would wait for it in turn."""
    mine = [one for one in _mapped.values() if one.process == os.getpid()]
    ends = [event for one in mine for event in _marks(one)]
    until = time.monotonic() + DRAIN_S
    while not all(map(_passed, ends)) and time.monotonic() < until:
        time.sleep(0.001)
    for one in mine:
        _C.peers_abort(one.handle)


def _marks(memory: Mapped) -> list[torch.cuda.Event]:
    """Events behind what was launched; a replayed graph is likely to be on one of the last two streams."""
    try:
        streams = {torch.cuda.current_stream(memory.device), torch.cuda.default_stream(memory.device)}
        return [stream.record_event() for stream in (streams | {memory.stream}) if stream is not None]
    except RuntimeError:               # the device has failed: nothing will come to an end
        return []


def _passed(event: torch.cuda.Event) -> bool:
    try:
        return event.query()
    except RuntimeError:
        return True


def host_id() -> str:
    """The same for all processes of one running system."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
