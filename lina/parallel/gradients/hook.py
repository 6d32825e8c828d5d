"""DistributedDataParallel's communication hook that lets all-to-alls pass first.

After Lina, arXiv:2210.17223, section 4:

    1. a gradient bucket that is ready is divided by the number of ranks, as DistributedDataParallel
       does, and, if asked for, rounded to 16 bits;
    2. it is cut into micro-ops, of equal time by the link's model, where the paper has equal bytes;
    3. a micro-op starts when no all-to-all is queued, running or imminent, in the order of the
       buckets; one that runs is not interrupted;
    4. the bucket's future is done when its last micro-op is.

Differs: the paper's queue is each rank's own; here all ranks start micro-ops in one order, on a
communicator that nothing else uses, so that ranks cannot wait for each other in a circle.
"""

# Annotations must be classes, not text, for torch to accept the hook: no `from __future__` here.

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lina.parallel.experts import agree
from lina.parallel.gradients.queue import DeviceQueue, HostQueue, Queue
from lina.parallel.gradients.sequence import Sequence
from lina.parallel.mesh import groups
from lina.parallel.settings import chosen

_COMPRESS = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}
_CARRIERS = ("c10d", "nccl", "p2p")
# An allreduce over 200 Gb/s Ethernet or InfiniBand: 20 us to start, 23 GB/s from there.
DEFAULT_LINK = (20e-6, 1 / 23e9)


class HookState:
    """What :func:`allreduce_hook` is told, and what it keeps.

    Set by the user, the same on every rank:
        mesh_or_group: a mesh with a dimension "ep", whose ranks all hold the dense parameters, or the
            process group that the model was wrapped with; None: the default group.
        micro_op_s: seconds of one micro-op by ``link``. An all-to-all that comes up waits for at
            most one, and each costs about one start of the link: half a millisecond is a few
            percent of a layer's backward, and 25 starts of the default link.
        compress: "fp16" or "bf16": round gradients to 16 bits before they travel. Each element is
            rounded once on every rank and once at each of the n - 1 additions: the average is off by at
            most n * eps / 2 times the mean of the n ranks' absolute values (eps 2^-10, 2^-7), in fp16
            by n * 2^-25 besides; a sum above 65504 overflows fp16.
        link: (alpha, beta) of an allreduce, seconds and seconds a byte; None: a 200 Gb/s network.
        transport: where no mesh says it, what carries the all-to-alls to give way to, on GPUs: "nccl", the
            default, or "p2p": gradients are held back on the device, and travel over peers' memory among
            ranks that share NVLink, else in micro-ops over NCCL; "c10d": by a thread on the host, which
            all-to-alls of lina's own transports do not see.

    Kept: the queue, made when the first bucket comes, by all ranks together, for the transport of
    then. Pickling drops it and the group; a state that was unpickled works on the default group.

    Raises:
        ValueError: one of them is outside its limits, or a transport beside a mesh.
    """

    def __init__(self, mesh_or_group: DeviceMesh | dist.ProcessGroup | None = None, *,
                 micro_op_s: float = 0.5e-3, compress: str | None = None,
                 link: tuple[float, float] | None = None, transport: str | None = None) -> None:
        if compress not in _COMPRESS:
            raise ValueError(f"HookState: compress is {compress!r}, must be None, 'fp16' or 'bf16'")
        if not 0 < micro_op_s < float("inf"):
            raise ValueError(f"HookState: micro_op_s is {micro_op_s}, must be above 0 seconds and finite")
        alpha, beta = link = DEFAULT_LINK if link is None else tuple(link)      # type: ignore[assignment]
        if not (0 <= alpha < float("inf") and 0 <= beta < float("inf")):
            raise ValueError(f"HookState: link is {link}, must be (seconds, seconds a byte), 0 or more")
        if transport is not None and (isinstance(mesh_or_group, DeviceMesh) or transport not in _CARRIERS):
            raise ValueError(f"HookState: transport is {transport!r}, must be one of {', '.join(_CARRIERS)}, "
                             "or None; None with a mesh, whose own counts")
        self.mesh_or_group, self.transport = mesh_or_group, transport
        self.micro_op_s, self.compress, self.link = micro_op_s, compress, (alpha, beta)
        self._queue: Queue | None = None
        self._made_for = ""            # the queue's carrier

    def over(self, mesh: DeviceMesh) -> "HookState":
        """This state, for a model wrapped over ``mesh``, whose transport counts from then on.

        Raises:
            ValueError: it was given other ranks or another transport.
        """
        if self.mesh_or_group is None:
            self.mesh_or_group = mesh
        own, others = (sorted(dist.get_process_group_ranks(g)) for g in (self.group, groups(mesh).world))
        if own != others:
            raise ValueError(f"HookState: made for ranks {own}, the mesh has {others}")
        self.check([mesh], self.bound)
        self.mesh_or_group = mesh
        return self

    @property
    def bound(self) -> str | None:
        """The only transport that this state can serve; None: any."""
        return self._made_for or self.transport

    def check(self, meshes: Iterable[DeviceMesh], carrier: str | None = None) -> None:
        """ValueError if all-to-alls over one of ``meshes`` are carried otherwise than ``carrier``, by default
        what the queue was made for: gradients would no longer give way to them."""
        carrier = carrier or self._made_for
        for mesh in meshes:
            if carrier and chosen(mesh) != carrier:
                raise ValueError(f"HookState: gradients give way to transport {carrier!r}, and a mesh has "
                                 f"{chosen(mesh)!r}; set it before lina.ddp or lina.fsdp, and for each model "
                                 "a HookState of its own")

    @property
    def carrier(self) -> str:
        """What carries the all-to-alls to give way to."""
        if isinstance(self.mesh_or_group, DeviceMesh):
            return chosen(self.mesh_or_group)
        return self.transport or "nccl"

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks whose gradients are averaged."""
        if isinstance(self.mesh_or_group, DeviceMesh):
            return groups(self.mesh_or_group).world
        if self.mesh_or_group is not None:
            return self.mesh_or_group
        if dist.group.WORLD is None:
            raise RuntimeError("HookState: no process group; call torch.distributed.init_process_group first")
        return dist.group.WORLD

    def queue(self, device: torch.device) -> Queue:
        """The queue of gradients on ``device``; the first call is collective.

        Raises:
            ValueError: the first: ranks whose states differ, on every rank. Later: another transport.
        """
        if self._queue is None:
            carrier = self.carrier if device.type == "cuda" else "c10d"
            agree("HookState", {**user_settings(self), "transport": carrier}, self.group, device)
            if carrier != "c10d":
                self._queue = DeviceQueue(self.group, self.link, self.micro_op_s, carrier == "p2p")
            else:
                self._queue = HostQueue(self.group, self.link, self.micro_op_s)
            self._made_for = self.carrier
        elif isinstance(self.mesh_or_group, DeviceMesh):
            self.check([self.mesh_or_group])
        return self._queue

    def __getstate__(self) -> dict[str, Any]:
        logging.getLogger(__name__).warning("HookState: the process group is not pickled")
        return {**self.__dict__, "mesh_or_group": None, "_queue": None, "_made_for": ""}


def over_meshes(hook: HookState, mesh: DeviceMesh, others: list[DeviceMesh]) -> tuple[HookState, str]:
    """``hook`` over ``mesh``, beside layers over ``others``; or as it is, with the reason why that cannot be:
    ranks compare reasons before any of them raises one."""
    try:
        state = hook.over(mesh)
        state.check(others, state.carrier)
    except ValueError as error:
        return hook, str(error)
    return state, ""


def user_settings(state: HookState | None) -> dict[str, Any]:
    """What all ranks' states have in common, by name."""
    return {name: getattr(state, name, None) for name in ("micro_op_s", "compress", "link")}


def allreduce_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The average of a gradient bucket over ``state``'s ranks, in micro-ops that let all-to-alls pass.

    For ``register_comm_hook``, of ``lina.ddp``'s result or of torch's own DistributedDataParallel; every
    rank registers it, with equal settings.

    Raises:
        ValueError: at the first bucket, ranks whose settings differ; on every rank.
        RuntimeError: a rank failed or left, within the group's timeout; in backward.
    """
    return ordered_hook((state, None), bucket)


def ordered_hook(how: tuple[HookState, Sequence | None],
                 bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """:func:`allreduce_hook`, in one order with what else comes to a sequence."""
    state, sequence = how
    buffer = bucket.buffer()
    size = state.group.size()
    if size == 1:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future(
            devices=[buffer.device] if buffer.is_cuda else None)
        done.set_result(buffer)
        return done
    queue, label = state.queue(buffer.device), f"bucket {bucket.index()}"
    submit = queue.submit if sequence is None else partial(sequence.submit, label, queue)
    narrow = _COMPRESS[state.compress]
    if narrow is None or buffer.dtype == narrow:
        return submit(buffer, label)
    sent = buffer.div_(size).to(narrow)

    def widen(future: Any) -> torch.Tensor:
        return buffer.copy_(future.value())

    return submit(sent, label, average=False).then(widen)
