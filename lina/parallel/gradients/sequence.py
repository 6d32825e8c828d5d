"""One order of gradients for all ranks, before they come to a queue.

All ranks hand a queue the same gradients in the same order, or they wait for each other for ever. Buckets
of DistributedDataParallel come in such an order by themselves; experts' gradients do not: ranks may use
layers in another order, and a replica may leave one out. So

    1. in the first passes, while DistributedDataParallel finds its buckets, experts wait for the end of
       backward; in the last of these every rank notes in which order gradients are ready;
    2. at its end all ranks take rank 0's order;
    3. from there each gradient goes in its turn: what comes early is held, what comes in turn is launched,
       and so are the held ones that follow it;
    4. the end of backward hands in what has not come, and launches the rest.

No deadlock: all-to-alls wait for nothing that is held, so backward ends on every rank, and every pass's
sequence with it. What comes and is not in the order (buckets were made anew) is launched at the end of
backward, after all others; what is missing is passed over there. So what a queue gets depends on the order
and on what there was in this pass, both equal on all ranks, and not on when it came. Nothing is learned anew
then: that is collective, and ranks that saw the change in different passes would wait for each other in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from lina.parallel.experts import together
from lina.parallel.gradients.queue import Queue

_LEARN = 2            # the reduced pass in which buckets are those of all later ones

_last: weakref.ref[Sequence] | None = None       # that began a pass


@dataclass
class _Held:
    queue: Queue
    flat: Tensor
    label: str
    average: bool
    group: dist.ProcessGroup | None
    future: Future
    written: Any                  # CUDA: event after which flat may be read

    def launch(self) -> None:
        if self.written is not None:
            torch.cuda.current_stream(self.flat.device).wait_event(self.written)
        self.queue.submit(self.flat, self.label, average=self.average, group=self.group, into=self.future)


class Sequence:
    """The gradients of one wrapped model; its backward passes run in one thread at a time.

    Args:
        world: the ranks of the model's mesh, which learn the order together.
    """

    def __init__(self, world: dist.ProcessGroup) -> None:
        self._world = world
        self.running = False              # from the first gradient of a reduced pass to end()
        self.forget()

    def forget(self) -> None:
        """Learn again; on all ranks between the same two passes."""
        self._order: list[str] | None = None
        self._passes = 0                  # reduced ones since
        self.reset()

    def reset(self) -> None:
        """As before a pass: also after one that raised."""
        self.running = False
        self._line: list[str] = []        # what is awaited in this pass; empty: nothing is held
        self._next = 0                    # in it
        self._held: dict[str, _Held] = {}
        self._ready: list[str] = []       # on this rank, while learning
        self._before: Sequence | None = None      # the one of another model that must finish first
        self._after: list[Sequence] = []

    def begin(self, backward: int, absent: Iterable[str] = ()) -> None:
        """A reduced pass begins, in the autograd engine's graph task ``backward``.

        Args:
            absent: keys that do not come in this pass, on any rank.
        """
        global _last
        self.reset()
        self.running, self._backward = True, backward
        gone = set(absent)
        self._line = [key for key in self._order or () if key not in gone]
        # Of two models in one backward pass the later waits for the earlier: what each has held, and with it
        # the order between the two, would be each rank's own.
        other = _last() if _last is not None else None
        if (other is not None and other is not self and other.running and other._backward == backward
                and (self._line or other._line)):
            self._before = other
            other._after.append(self)
        _last = weakref.ref(self)

    def goes_early(self, key: str) -> bool:
        """Whether its place is among those that go during backward."""
        return self.running and key in self._line

    def ready(self, key: str) -> None:
        """It could go now; noted while learning."""
        if self.running and self._order is None:
            self._ready.append(key)

    def submit(self, key: str, queue: Queue, flat: Tensor, label: str, *, average: bool = True,
               group: dist.ProcessGroup | None = None) -> Future[Tensor]:
        """As Queue.submit, in turn."""
        self.ready(key)
        if not self._line and self._before is None:
            return queue.submit(flat, label, average=average, group=group)
        future: Future = Future(devices=[flat.device] if flat.is_cuda else None)
        written = None
        if flat.is_cuda and (self._before is not None or self._line[self._next:self._next + 1] != [key]):
            written = torch.cuda.current_stream(flat.device).record_event()
        self._held[key] = _Held(queue, flat, label, average, group, future, written)
        self._release()
        return future

    def _release(self) -> None:
        while self._before is None and self._next < len(self._line):
            if self._line[self._next] not in self._held:
                return
            self._next += 1
            self._held.pop(self._line[self._next - 1]).launch()

    def finish(self) -> None:
        """Backward has ended and all has come: launch what is held. What comes from here on goes at once."""
        self._before = None               # it has finished before, or raised
        line, self._line = self._line[self._next:], []
        for key in [key for key in line if key in self._held]:
            self._held.pop(key).launch()
        self._launch_held()

    def end(self) -> None:
        """Of the pass: all there is has been launched."""
        self.running = False
        after, self._after = self._after, []
        for other in after:
            other._follow()

    def _follow(self) -> None:
        """The one before has ended its pass."""
        self._before = None
        self._release()
        if not self._line:
            self._launch_held()

    def _launch_held(self) -> None:
        """In the order of submission, which is that of buckets."""
        while self._held:
            self._held.pop(next(iter(self._held))).launch()

    def learn(self, experts: list[str]) -> None:
        """After a reduced pass, on all ranks together: take rank 0's order, if this is the pass for it.

        Args:
            experts: the keys that may go during backward; none of them where it changes nothing. One that was
                ready twice on some rank, or on rank 0 not at all, stays at the end.
        """
        self._passes += 1
        if self._passes != _LEARN or not experts:
            return
        buckets = [key for key in self._ready if key not in set(experts)]
        twice = [key for key in experts if self._ready.count(key) > 1]
        said = together("ddp: the order of gradients", self._world,
                        lambda: (self._ready, twice, (buckets, experts)))
        if any(facts != said[0][2] for _, _, facts in said):
            return                        # experts stay at the end of backward, on all ranks
        late = {key for _, keys, _ in said for key in keys}
        self._order = [key for key in said[0][0] if key not in late]
        self._ready = []
