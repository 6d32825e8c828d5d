"""Gradients of experts: averaged over their replicas at the end of each backward pass, or (early.py) in it.

With each rank's loss a mean over its own tokens, and ranks = dp * ep, the gradient that
DistributedDataParallel would give, were all experts on every rank, is

    1/(dp * ep) * sum over all ranks of d(loss of that rank) / d(weight).

Expert parallelism already sums a weight's gradient over the tokens of its ep group. So
each incoming gradient is scaled by 1/ep before it is accumulated, and ``.grad`` is then
averaged over the dp replicas: like DistributedDataParallel's own average this composes with
gradients accumulated before, under ``no_sync`` or not.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakTensorKeyDictionary

from lina import tracing
from lina.parallel.experts import ExpertParameter
from lina.parallel.gradients.early import Early
from lina.parallel.gradients.queue import Queue
from lina.parallel.gradients.sequence import Sequence

_SMALL = 1 << 20     # gradients of fewer bytes travel together, larger ones in place

_reducers: weakref.WeakSet[ExpertReducer] = weakref.WeakSet()


class _Scaling:
    """The hook by which an expert's gradient is divided by ep: one a parameter, however often its model
    is wrapped, and in force while one of those wrappers lives."""

    def __init__(self, param: torch.nn.Parameter) -> None:
        self.factor = 1.0
        self.owners: weakref.WeakSet[ExpertReducer] = weakref.WeakSet()
        self.handle = param.register_hook(self)

    def __call__(self, grad: Tensor) -> Tensor:
        return grad * self.factor if self.owners else grad


_scalings: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class ExpertReducer:
    """Averages the gradients of ``experts`` over their replicas.

    may_be_unused: agree first on which parameters have a gradient on any replica, and leave the
        others' ``.grad`` alone; else a missing gradient counts as zeros.
    static: that agreement is made once, in the first backward pass.
    """

    def __init__(self, experts: list[ExpertParameter], *, may_be_unused: bool, static: bool) -> None:
        self.experts: list[ExpertParameter] = []
        self.by_replicas: dict[dist.ProcessGroup, list[torch.nn.Parameter]] = {}
        self.may_be_unused, self.static = may_be_unused, static
        self._used: dict[dist.ProcessGroup, list[bool]] = {}
        self._backward = -1
        self.released = False          # by release(), for good
        # What carries gradients on a device: micro-ops that let all-to-alls pass; None: at once.
        self.queue: Callable[[torch.device], Queue] | None = None
        self.early: Early | None = None    # what goes to the queue during backward
        _reducers.add(self)
        self._hold(experts)

    def _hold(self, experts: list[ExpertParameter]) -> None:
        self.experts, self.by_replicas = experts, {}
        self._used.clear()
        for expert in experts:
            self.by_replicas.setdefault(expert.groups.replicas, []).append(expert.param)
        self._scale()
        if self.early is not None:
            self.early.listen(experts)

    def carry(self, queue: Callable[[torch.device], Queue] | None,
              world: dist.ProcessGroup | None = None) -> Sequence | None:
        """From the next pass of all ranks on gradients travel by ``queue`` (None: at once).

        Args:
            world: ranks that learn together in which order experts' gradients go during backward.

        Returns:
            through which the model's other gradients go to the queue, to be in one order with these, if it
            is not None.
        """
        self.queue = queue
        if self.early is not None:
            self.early.close()
            self.early = None
        if queue is None or world is None or not self.experts or self.may_be_unused:
            return None
        self.early = Early(queue, world, _large)
        self.early.listen(self.experts)
        return self.early.sequence

    def _scale(self) -> None:
        self._frozen = [expert.param for expert in self.experts if not expert.param.requires_grad]
        for _, param, groups in self.experts:
            if param.requires_grad:
                if param not in _scalings:
                    _scalings[param] = _Scaling(param)
                _scalings[param].factor = 1 / groups.ep.size()
                _scalings[param].owners.add(self)

    def follow(self, moves: list[tuple[list[torch.nn.Parameter], list[ExpertParameter]]]) -> None:
        """Experts have moved: of each pair those that are gone, and those that came in their place."""
        held = {id(expert.param) for expert in self.experts}
        followed = [(gone, come) for gone, come in moves if id(gone[0]) in held]
        if not followed:
            return
        left = {id(p): p for gone, _ in followed for p in gone}
        for param in left.values():
            if param in _scalings:
                _scalings[param].owners.discard(self)
        self._hold([expert for expert in self.experts if id(expert.param) not in left]
                   + [expert for _, come in followed for expert in come])

    @torch.no_grad()
    def broadcast(self) -> None:
        """Every replica takes the values of the first."""
        for group, params in self.by_replicas.items():
            if group.size() > 1:
                for param in params:
                    value = param.detach().contiguous()
                    dist.broadcast(value, group=group, group_src=0)
                    param.copy_(value)

    def watch(self, output: Any, reduces: bool = True) -> None:
        """Reduce in the backward pass that first reaches a tensor of ``output``, and at its end what has not
        gone before; unless ``reduces``, scale alone.

        Not from the experts' own hooks, unless in an order of all ranks that the end completes: a layer that
        one replica does not use would leave the others waiting.
        """
        if any(p.requires_grad for p in self._frozen):      # unfrozen since
            self._used.clear()
            self._scale()
            if self.early is not None:
                self.early.listen(self.experts)
        if self.early is not None and torch._C._current_graph_task_id() == -1:
            self.early.sequence.reset()         # of a pass that raised
        if not reduces:
            return
        tensors = list(_tensors(output))
        if not tensors and any(group.size() > 1 for group in self.by_replicas):
            raise RuntimeError(f"ddp: the model returned a {type(output).__name__}, in which no tensor is "
                               "found whose backward the experts' reduction could follow; return a "
                               "tensor, or a mapping, list, tuple or dataclass of them")
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(self._on_backward)

    def _on_backward(self, grad: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:          # once a pass, also after one that raised
            self._backward = backward
            if self.early is not None:
                self.early.begin(backward)
            Variable._execution_engine.queue_callback(self.reduce)

    @torch.no_grad()
    def reduce(self) -> None:
        """Average what has not gone before; called by the autograd engine."""
        if self.early is not None:
            self.early.rest()
        for group, params in self.by_replicas.items():
            params = [p for p in params if p.requires_grad]
            if group.size() > 1 and params:
                size = sum(p.nbytes for p in params if p not in self._gone
                           and (p.grad is not None or not self.may_be_unused))
                with tracing.span("allreduce", "experts", device=params[0].device, bytes=size,
                                  layer=tracing.owners(params)):
                    self._reduce(group, params)
        if self.early is not None:
            self.early.end()

    @property
    def _gone(self) -> dict[torch.nn.Parameter, tuple[Tensor, Any]]:
        return {} if self.early is None else self.early.gone

    def _reduce(self, group: dist.ProcessGroup, params: list[torch.nn.Parameter]) -> None:
        if self.may_be_unused:
            params = [p for p, used in zip(params, self._agree(group, params), strict=True) if used]
        small: dict[torch.dtype, list[Tensor]] = {}
        work: list[Any] = []
        finish: list[tuple[Tensor, Tensor]] = []      # what is copied where, once all are done
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            if param in self._gone:
                flat, done = self._gone[param]
            elif _large(param):
                flat = param.grad.contiguous()
                done = self._average(flat, group)
            else:
                small.setdefault(param.dtype, []).append(param.grad)
                continue
            work.append(done)
            if flat is not param.grad:
                finish.append((param.grad, flat))
        for grads in small.values():
            flat = torch.cat([g.reshape(-1) for g in grads])
            work.append(self._average(flat, group))
            parts = flat.split([g.numel() for g in grads])
            finish.extend((g, part.view_as(g)) for g, part in zip(grads, parts, strict=True))
        for w in work:
            _wait(w, group)
        if finish:
            torch._foreach_copy_([to for to, _ in finish], [done for _, done in finish])

    def _average(self, flat: Tensor, group: dist.ProcessGroup) -> Any:
        if self.queue is not None:
            return self.queue(flat.device).submit(flat, "experts", group=group)
        flat.div_(group.size())             # before the sum, as DistributedDataParallel does
        return dist.all_reduce(flat, group=group, async_op=True)

    def _agree(self, group: dist.ProcessGroup, params: list[torch.nn.Parameter]) -> list[bool]:
        if group not in self._used:
            used = torch.tensor([p.grad is not None for p in params], dtype=torch.int32,
                                device=params[0].device)
            _wait(dist.all_reduce(used, dist.ReduceOp.MAX, group=group, async_op=True), group)
            found = [bool(u) for u in used.tolist()]
            if not self.static:
                return found
            self._used[group] = found
        return self._used[group]


def _large(param: torch.nn.Parameter) -> bool:
    return param.nbytes >= _SMALL       # by the parameter: the same choice on every replica


def _wait(work: Any, group: dist.ProcessGroup) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(f"ddp: the allreduce of expert gradients among ranks {ranks} failed on rank "
                           f"{dist.get_rank()}; another rank has stopped, or hangs: {error}") from error


def living() -> list[ExpertReducer]:
    """Of all wrappers, and not released."""
    return [reducer for reducer in _reducers if not reducer.released]


def release(params: Iterable[torch.nn.Parameter]) -> None:
    """Forget parameters that are spread no longer: their gradients are ordinary ones from now on."""
    params = list(params)
    for param in params:
        if param in _scalings:
            _scalings.pop(param).handle.remove()
        vars(param).pop("_ddp_ignored", None)       # torch's mark, set when their model was wrapped
    gone = {id(p) for p in params}
    for reducer in list(_reducers):
        if any(id(p) in gone for params in reducer.by_replicas.values() for p in params):
            reducer.released = True
            if reducer.early is not None:
                reducer.early.close()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))
