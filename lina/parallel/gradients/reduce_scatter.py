"""The reduce-scatter of torch's fully_shard (FSDP2), in micro-ops that let all-to-alls pass.

fully_shard reduces the gradients of each of its modules by one reduce-scatter, which
``FSDPModule.set_custom_reduce_scatter`` lets be replaced. Here it is cut by the policy of the DDP
hook (hook.py).

What torch's interface leaves alone: parameters are gathered at once, and so is the all-reduce that
follows the reduce-scatter where gradients are replicated besides (HSDP).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lina import _C, tracing
from lina.parallel.gradients.hook import HookState
from lina.parallel.gradients.queue import DeviceQueue
from lina.parallel.mesh import timeout_of
from lina.parallel.settings import UNIT
from lina.parallel.transport import nccl
from lina.parallel.transport.base import gate


class ReduceScatter:
    """For ``FSDPModule.set_custom_reduce_scatter``: a reduce-scatter that lets all-to-alls pass.

    One serves any number of modules, of any process groups. A micro-op takes the same elements of
    every rank's part and starts when no all-to-all is queued, running or imminent, in the order of
    the modules' backward passes, which all ranks share. A reduce-scatter of n bytes moves half of
    what an all-reduce of n bytes does, so ``state.link`` gives its time at n / 2 bytes.

    On CUDA with communicators of lina's own the host waits for nothing. With transport "c10d" a
    reduce-scatter there lets the all-to-alls pass that were launched before it. On a CPU, where
    torch uses the result at once, the call returns when it is done.

    Raises:
        ValueError: ``state`` compresses; fully_shard does so by MixedPrecisionPolicy(reduce_dtype=...).
            When called: tensors or an operation that it does not know.
        RuntimeError: when called: a rank failed or left, within the group's timeout.
    """

    def __init__(self, state: HookState) -> None:
        if state.compress is not None:
            raise ValueError(f"fsdp: compress is {state.compress!r}, must be None; fully_shard rounds "
                             "gradients by MixedPrecisionPolicy(reduce_dtype=...)")
        self.state = state
        self._carriers: dict[dist.ProcessGroup, _Host | nccl.Reducer] = {}

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What fully_shard puts gradients into, on the current stream."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any,
                 async_op: bool = False) -> Any:
        """``output_tensor`` [n] = this rank's row of the reduced ``input_tensor`` [ranks * n].

        float32, float64, bfloat16 or float16, contiguous; the input is overwritten. ``op``: SUM, AVG or
        PREMUL_SUM. The result is complete for what is launched on the current stream from here on.
        """
        out, ranks = output_tensor, group.size()
        if input_tensor.numel() != ranks * out.numel() or input_tensor.dtype != out.dtype:
            raise ValueError(f"fsdp: reduce-scatter of {input_tensor.numel()} elements of "
                             f"{input_tensor.dtype} to {out.numel()} of {out.dtype} on each of {ranks} ranks")
        if out.dtype not in nccl.DTYPES:
            raise ValueError(f"fsdp: reduce-scatter of {out.dtype}, must be one of "
                             f"{', '.join(str(d) for d in nccl.DTYPES)}")
        if op == dist.ReduceOp.PREMUL_SUM:
            input_tensor.mul_(op.__getstate__()[1])
        elif op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"fsdp: reduce-scatter by {op}, must be SUM, AVG or PREMUL_SUM")
        done = self._run(out.view(-1), input_tensor.view(ranks, -1), group, bool(op == dist.ReduceOp.AVG))
        return _Done(done) if async_op else None

    def _run(self, out: Tensor, parts: Tensor, group: dist.ProcessGroup, mean: bool) -> Any:
        carrier = self._carriers.get(group)
        if carrier is None:
            alpha, beta = self.state.link
            link = alpha, beta * group.size() / 2            # over the bytes of one part
            on_device = isinstance(self.state.queue(out.device), DeviceQueue)
            kind = nccl.Reducer if on_device else _Host
            carrier = self._carriers[group] = kind(group, link, self.state.micro_op_s)
            if isinstance(carrier, nccl.Reducer):            # connections, while nothing is held back
                nothing = torch.zeros_like(parts[:, :1]), torch.empty_like(out[:1])
                carrier.reduce_scatter(nothing[1], nothing[0], gently=False).synchronize()
        if isinstance(carrier, _Host):
            carrier.reduce_scatter(out, parts, mean)
            return None
        token = tracing.begin("allreduce", "reduce-scatter", out.device, bytes=parts.nbytes)
        done = carrier.reduce_scatter(out, parts, mean=mean)
        torch.cuda.current_stream(out.device).wait_event(done)
        tracing.end(token)
        return done


class AtOnce(ReduceScatter):
    """torch's own again, in modules that had another: the setter takes no None."""

    def __init__(self) -> None:
        return None

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any,
                 async_op: bool = False) -> Any:
        return _scatter()(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def _scatter() -> Any:
    """torch's reduce-scatter by its name since 2.13, or before."""
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Done:
    """As torch.distributed.Work, of what the stream of the call has waited for already."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self, timeout: Any = None) -> bool:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        return self._event is None or self._event.query()


class _Host:
    """Micro-ops over torch.distributed, by the thread that calls."""

    def __init__(self, group: dist.ProcessGroup, link: tuple[float, float], micro_op_s: float) -> None:
        self._group, self._policy = group, _C.Policy(link, micro_op_s, UNIT)
        self._changed = threading.Condition()
        self._failed: BaseException | None = None
        gate.watch(self)

    def a2a(self, delta: int) -> None:
        with self._changed:
            self._policy.a2a(delta)
            self._changed.notify_all()

    def reduce_scatter(self, out: Tensor, parts: Tensor, mean: bool) -> None:
        if self._failed is not None:
            raise RuntimeError("fsdp: no reduce-scatter after an earlier failure: "
                               f"{self._failed}") from self._failed
        try:
            self._reduce_scatter(out, parts.div_(len(parts)) if mean else parts)
        except BaseException as error:
            self._failed = error
            if not isinstance(error, RuntimeError):
                raise
            raise RuntimeError(
                f"fsdp: the reduce-scatter among ranks {dist.get_process_group_ranks(self._group)} failed on "
                f"rank {dist.get_rank()}; another rank has stopped, or hangs: {error}") from error

    def _reduce_scatter(self, out: Tensor, parts: Tensor) -> None:
        if out.numel() == 0:
            return
        with self._changed:
            self._policy.submit(out.nbytes)
        last = False
        while not last:
            _, offset, size, last = self._next()
            first, count = (n // out.element_size() for n in (offset, size))
            if out.is_cuda and gate.passed is not None:
                torch.cuda.current_stream(out.device).wait_event(gate.passed)
            packed = parts[:, first:first + count].contiguous()
            with tracing.span("allreduce", "reduce-scatter", device=out.device, bytes=packed.nbytes):
                _scatter()(out[first:first + count], packed.view(-1), group=self._group)
            with self._changed:
                self._policy.finished()

    def _next(self) -> tuple[int, int, int, bool]:
        limit = timeout_of(self._group)
        seconds = None if limit is None else limit.total_seconds()
        with self._changed:
            while (op := self._policy.next()) is None:
                if not self._changed.wait(seconds):
                    raise RuntimeError(f"all-to-alls of other threads have not ended for {seconds:.0f} s")
        return op
