"""What ranks of a group tell each other on the host, whatever their devices are doing.

They speak through the group's store, in rounds: in each every rank says something and hears what all
others said. Rounds have a kind, and each kind a count of its own, so that a rank which is at another
step is waited for in vain, instead of being misunderstood.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store


class Rounds:
    """Rounds among the ranks of ``group`` for one purpose, apart from those for others.

    Args:
        op: what errors begin with.
        timeout_s: how long to wait for another rank.
    """

    def __init__(self, op: str, group: dist.ProcessGroup, purpose: str, timeout_s: float) -> None:
        self.size, self.rank, self.timeout_s = group.size(), group.rank(), timeout_s
        self._op, self._purpose = op, purpose
        self._group = weakref.ref(group)
        self._store: Any = None
        self._counts: Counter[str] = Counter()
        self._lost = ""                # why no further round can be

    def gather(self, kind: str, said: Any, timeout_s: float | None = None) -> list[Any]:
        """What every rank said in its next round of this kind: what JSON can hold.

        Raises:
            RuntimeError: a rank did not come in time. Nor does any later round begin then: some ranks may
                have heard of this one what others have not.
        """
        if self._lost:
            raise RuntimeError(self._lost)
        store, seconds = self._rendezvous(), timeout_s or self.timeout_s
        n = self._counts[kind]
        self._counts[kind] += 1
        store.set(f"{kind}.{n}.{self.rank}", json.dumps(said))
        keys = [f"{kind}.{n}.{r}" for r in range(self.size)]
        try:
            store.wait(keys, timedelta(seconds=seconds))
        except (RuntimeError, ValueError) as error:
            self._lost = (f"{self._op}: not all {self.size} ranks came to tell of their {kind} within "
                          f"{seconds:g} s; one has stopped, or does something else: {error}")
            raise RuntimeError(self._lost) from error
        return [json.loads(store.get(key)) for key in keys]

    def _rendezvous(self) -> Any:
        """Keys of these rounds alone. They are numbered at the first of them, which all ranks take together,
        and not as they are made: in which order that happens is each rank's own affair."""
        if self._store is None:
            group = self._group()
            if group is None:
                raise RuntimeError(f"{self._op}: the process group is destroyed")
            ranks = "-".join(map(str, sorted(dist.get_process_group_ranks(group))))
            _numbers[group.group_name, self._purpose] += 1
            name = f"lina/{self._purpose}/{ranks}/{_numbers[group.group_name, self._purpose]}"
            self._store = dist.PrefixStore(name, _get_process_group_store(group))
        return self._store


_numbers: Counter[tuple[str, str]] = Counter()
