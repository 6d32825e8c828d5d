"""Transport over NCCL communicators of lina's own: all-to-alls that gradients give way to on the device.

Two communicators at most a group, "a2a" and "reduce", each on a stream of its own, so that neither
waits for the other's kernels. The a2a stream alone writes the device's priority word (csrc/comm/
priority.h); each gradient micro-op on the reduce stream waits for it there, without a host thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lina import _C, tracing
from lina.parallel.mesh import seconds_of
from lina.parallel.transport.base import Transport, failure

# enum lina_dtype of csrc/dtype.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def communicator(name: str, group: dist.ProcessGroup, device: torch.device, *,
                 max_ctas: int = 0) -> _C.Communicator:
    """A communicator over the ranks of ``group``; collective over it.

    Args:
        name: shown in errors.
        max_ctas: most thread blocks of one of its kernels; 0: NCCL's choice.

    Raises:
        RuntimeError: lina or torch is built without CUDA, NCCL is too old or fails, or a rank does
            not answer within the group's timeout.
    """
    rank, size = group.rank(), group.size()
    box: list[Any] = [b"", None]         # the id, or why there is none: then all ranks raise
    if rank == 0:
        try:
            box[0] = _C.nccl_id()
        except RuntimeError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, group=group, group_src=0, device=device)
    if box[1] is not None:
        raise RuntimeError(box[1])
    return _C.Communicator(box[0], rank, size, device.index, name, seconds_of(group), max_ctas)


# Over links as slow as these NCCL's exchanges run for as long as the experts beside them, on 2 SMs, of two
# clusters. Over faster ones they take more SMs, for so short a time that leaving these free costs more.
_SLOW_BYTES_S = 1e11
_FEW_SMS = 4
_PROBE_BYTES = 16 << 20     # half of which leave one of two ranks: at 300 GB/s longer than a launch takes

_streams: dict[tuple[int, str], torch.cuda.Stream] = {}


def stream(device: torch.device, name: str) -> torch.cuda.Stream:
    """The device's one stream "a2a" (high priority) or "reduce"."""
    found = _streams.get((device.index, name))
    if found is None:
        found = _streams[device.index, name] = torch.cuda.Stream(device, priority=-1 if name == "a2a" else 0)
    return found


def future(value: Any, done_on: torch.cuda.Stream,
           into: torch.futures.Future | None = None) -> torch.futures.Future:
    """A future of ``value``, by default a new one, complete as of what ``done_on`` holds so far."""
    result = torch.futures.Future(devices=[done_on.device]) if into is None else into
    with torch.cuda.stream(done_on):           # outside, the result would not wait for the stream
        result.set_result(value)
    return result


def _best_rate(on: torch.cuda.Stream, size: int, send: Callable[[], object]) -> float:
    """Bytes a second of what sends ``size`` of them on a stream, the best of some."""
    ends = []
    for _ in range(5):
        send()
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record(on)
    on.synchronize()
    return size / min(a.elapsed_time(b) / 1e3 for a, b in pairwise(ends))


class NCCL(Transport):
    """All-to-alls on the a2a stream; see Transport."""

    name = "nccl"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("nccl: the first exchange of a group makes connections, which a graph capture "
                               "cannot hold: run the layer once before")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = stream(self.device, "a2a")
        self.comm = communicator("a2a", group, self.device)
        self._raised = 0                    # open imminent()s
        spare = torch.zeros(2, self.size, dtype=torch.uint8, device=self.device)
        ones = [1] * self.size              # connections are made by the first exchange
        self.start("first exchange", spare[0], spare[1], ones, ones).wait()
        self.stream.synchronize()
        self.fast = self._rate() >= _SLOW_BYTES_S
        self.sms = 0 if self.fast else _FEW_SMS

    def _rate(self) -> float:
        """Bytes a second that leave a rank for the others; collective."""
        part = _PROBE_BYTES // self.size
        spare = torch.empty(2, part * self.size, dtype=torch.uint8, device=self.device)
        splits = [part] * self.size
        found = _best_rate(self.stream, part * (self.size - 1),
                           lambda: self.start("first exchanges", spare[0], spare[1], splits, splits))
        self._check("first exchanges")
        return found

    def counts(self, label: str, mine: Tensor) -> Callable[[], Tensor]:
        if not mine.is_cuda:
            raise ValueError(f"{label}: tokens are on {mine.device}, transport nccl takes tensors of GPUs; "
                             "make the mesh with device_type='cpu', or with transport='c10d'")
        mine = mine.contiguous()
        theirs = torch.empty_like(mine)
        host = torch.empty(2, *mine.shape, dtype=mine.dtype, device="cpu", pin_memory=True)
        row = [mine.shape[1] * mine.element_size()] * self.size
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            token = tracing.begin("a2a", label, self.device, bytes=mine.nbytes)
            self._run(label, mine, row, theirs, row)
            tracing.end(token)
            for at, half in zip(host, (mine, theirs), strict=True):
                at.copy_(half, non_blocking=True)
        done = self.stream.record_event()
        for tensor in (mine, theirs):
            tensor.record_stream(self.stream)    # nobody may read it, after an error elsewhere

        def read() -> Tensor:
            with tracing.span("a2a", f"{label}: wait", device=self.device):
                done.synchronize()
            self._check(label)
            return host

        return read

    def start(self, label: str, out: Tensor, inp: Tensor, out_splits: list[int],
              in_splits: list[int]) -> _Pending:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        # only a trace's marks go to the current stream
        with torch.cuda.stream(self.stream) if tracing.active() else nullcontext():
            token = tracing.begin("a2a", label, self.device, bytes=inp.numel())
            self._run(label, inp, in_splits, out, out_splits)
            tracing.end(token)
        # Nothing else keeps their memory from reuse: holding the tensors until wait() would not do where
        # nobody waits, after an error elsewhere, nor where another stream waits than theirs, which would
        # then reuse them while bytes travel.
        for tensor in (inp, out):
            tensor.record_stream(self.stream)
        return _Pending(self, label, self.stream.record_event())

    def _run(self, label: str, inp: Tensor, in_splits: list[int], out: Tensor, out_splits: list[int]) -> None:
        how = 0 if self._raised else _C.A2A_RAISE | _C.A2A_LOWER
        try:
            self.comm.all_to_all(inp.data_ptr(), in_splits, out.data_ptr(), out_splits, how,
                                 self.stream.cuda_stream)
        except RuntimeError as error:
            raise failure(label, self.group, error) from error

    def _check(self, label: str) -> None:
        try:
            self.comm.check()
        except RuntimeError as error:
            raise failure(label, self.group, error) from error

    def imminent(self) -> None:
        if not self._raised:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            _C.set_priority(self.device.index, True, self.stream.cuda_stream)
        self._raised += 1

    def settled(self) -> None:
        self._raised -= 1
        if not self._raised:
            _C.set_priority(self.device.index, False, self.stream.cuda_stream)

    def close(self) -> None:
        self.stream.synchronize()
        self.comm.close()


class _Pending:
    def __init__(self, transport: NCCL, label: str, done: torch.cuda.Event) -> None:
        self._transport, self._label, self._done = transport, label, done

    def wait(self) -> None:
        device = self._transport.device
        with tracing.span("a2a", f"{self._label}: wait", device=device):
            torch.cuda.current_stream(device).wait_event(self._done)
        self._transport._check(self._label)


class Reducer:
    """Reduces gradients over the ranks of ``group`` in micro-ops that give way to all-to-alls.

    Args:
        link: (alpha, beta) of an all-reduce, seconds and seconds a byte.
        micro_op_s: seconds of one micro-op, by that model.
    """

    def __init__(self, group: dist.ProcessGroup, link: tuple[float, float], micro_op_s: float,
                 max_ctas: int = 0) -> None:
        self.group = group
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = stream(self.device, "reduce")
        self.comm = communicator("reduce", group, self.device, max_ctas=max_ctas)
        self.micro_op_bytes = self.comm.set_policy(*link, micro_op_s, 256)
        self.all_reduce(torch.zeros(1, device=self.device), gently=False)      # makes connections
        self.stream.synchronize()

    def fast(self) -> bool:
        """Whether bytes leave every rank as they do over NVLink; collective."""
        ranks, flat = self.group.size(), torch.zeros(_PROBE_BYTES // 4, device=self.device)
        rate = _best_rate(self.stream, 2 * (ranks - 1) * flat.nbytes // ranks,
                          lambda: self.all_reduce(flat, gently=False))
        slow = torch.full((1,), float(rate < _SLOW_BYTES_S), device=self.device)
        self.all_reduce(slow, gently=False)
        self.stream.synchronize()
        return slow.item() == 0

    def all_reduce(self, flat: Tensor, *, mean: bool = True, gently: bool = True) -> None:
        """In place, on the reduce stream, after what the current stream holds so far.

        Args:
            flat: contiguous, float32, float64, bfloat16 or float16; kept from reuse until done.
            gently: in micro-ops; else whole and at once.

        Raises:
            ValueError: a tensor that is not as said, before anything is sent.
            RuntimeError: another rank failed, or the communicator did before.
        """
        self._check("all_reduce", "flat", flat)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self.comm.all_reduce(flat.data_ptr(), flat.numel(), DTYPES[flat.dtype], mean, gently,
                             self.stream.cuda_stream)
        flat.record_stream(self.stream)

    def reduce_scatter(self, out: Tensor, parts: Tensor, *, mean: bool = True,
                       gently: bool = True) -> torch.cuda.Event:
        """``out`` [n] of all ranks' ``parts`` [ranks, n], on the reduce stream, as :meth:`all_reduce`.

        A micro-op takes as many bytes of every rank's part as the link says: its beta must be the
        seconds of one byte of ``out``. Each is packed first, in at most 1.5 * ranks * micro_op_bytes.

        Returns:
            when it is done; the caller keeps both tensors until then.

        Raises:
            ValueError, RuntimeError: as :meth:`all_reduce`.
        """
        self._check("reduce_scatter", "out", out)
        self._check("reduce_scatter", "parts", parts)
        if parts.dtype != out.dtype or parts.numel() != self.group.size() * out.numel():
            raise ValueError(f"reduce_scatter: parts is {parts.dtype} of {parts.numel()} elements, must be "
                             f"{out.dtype} of {self.group.size()} * {out.numel()}")
        room = min(out.nbytes, 3 * self.micro_op_bytes // 2 + 256) * self.group.size()
        cuts = gently and out.nbytes > self.micro_op_bytes
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            scratch = torch.empty(room if cuts else 0, dtype=torch.uint8, device=self.device)
            self.comm.reduce_scatter(parts.data_ptr(), out.data_ptr(), out.numel(), scratch.data_ptr(),
                                     scratch.numel(), DTYPES[out.dtype], mean, gently,
                                     self.stream.cuda_stream)
        return self.stream.record_event()

    def _check(self, op: str, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in DTYPES or tensor.device != self.device or not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} is {tensor.dtype} on {tensor.device}"
                             f"{'' if tensor.is_contiguous() else ', not contiguous'}; must be contiguous "
                             f"float32, float64, bfloat16 or float16 on {self.device}")

    def close(self) -> None:
        self.stream.synchronize()
        self.comm.close()
