"""Gradients of experts that travel during backward, each when it is ready and its turn has come."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn import Parameter

from lina import tracing
from lina.parallel.experts import ExpertParameter
from lina.parallel.gradients.queue import Queue
from lina.parallel.gradients.sequence import Sequence


class Early:
    """Of one wrapped model.

    Args:
        queue: what carries gradients on a device.
        world: the ranks of the model's mesh.
        large: whether a parameter goes by itself.

    Attributes:
        gone: of parameters whose reduction was submitted in this pass: what is reduced, and its future.
    """

    def __init__(self, queue: Callable[[torch.device], Queue], world: dist.ProcessGroup,
                 large: Callable[[Parameter], bool]) -> None:
        self._queue, self._large, self.sequence = queue, large, Sequence(world)
        self.gone: dict[Parameter, tuple[Tensor, Future]] = {}
        self._keys: dict[Parameter, tuple[str, ExpertParameter]] = {}
        self._hooks: list[Any] = []
        weakref.finalize(self, _remove, self._hooks)

    def listen(self, experts: list[ExpertParameter]) -> None:
        """Hear when gradients of ``experts`` are ready; on all ranks between the same two passes."""
        self.close()
        # with its place: after a regroup several may have one name
        self._keys = {e.param: (f"{i} {e.name}", e) for i, e in enumerate(experts)
                      if e.param.requires_grad and e.groups.replicas.size() > 1}
        self._hooks += [p.register_post_accumulate_grad_hook(_Ready(self)) for p in self._keys]
        self.sequence.forget()

    def close(self) -> None:
        _remove(self._hooks)

    def begin(self, backward: int) -> None:
        """A reduced backward pass: see Sequence.begin."""
        self.gone.clear()
        self.sequence.begin(backward, [key for p, (key, _) in self._keys.items() if not p.requires_grad])

    @torch.no_grad()
    def ready(self, param: Parameter) -> None:
        """Its gradient has been accumulated, in whatever backward pass."""
        if not self.sequence.running:
            return
        key, expert = self._keys[param]
        if param in self.gone:
            raise RuntimeError(f"ddp: a second part of the gradient of {expert.name} came when the reduction "
                               "of the first had begun; a module that is checkpointed and runs twice in a "
                               "step needs torch.utils.checkpoint with use_reentrant=False")
        if self._large(param):            # small ones travel together, at the end
            self.sequence.ready(key)
            if self.sequence.goes_early(key):
                self._submit(param)

    def _submit(self, param: Parameter) -> None:
        key, expert = self._keys[param]
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        flat = param.grad.contiguous()
        token = tracing.begin("allreduce", "experts", flat.device, bytes=flat.nbytes,
                              layer=tracing.owners([param]))
        future = self.sequence.submit(key, self._queue(flat.device), flat, "experts",
                                      group=expert.groups.replicas)
        if token is not None:
            future.add_done_callback(lambda _: tracing.end(token))
        self.gone[param] = flat, future

    def rest(self) -> None:
        """Backward has ended: submit what has not come, and launch what is held."""
        for param in self._own():
            if param not in self.gone and self.sequence.goes_early(self._keys[param][0]):
                self._submit(param)
        self.sequence.finish()

    def end(self) -> None:
        """All gradients of the pass have been submitted; on all ranks together."""
        self.gone.clear()
        self.sequence.end()
        self.sequence.learn([self._keys[param][0] for param in self._own()])

    def _own(self) -> list[Parameter]:
        return [p for p in self._keys if p.requires_grad and self._large(p)]


class _Ready:
    """The hook by which what still lives hears of a gradient."""

    def __init__(self, early: Early) -> None:
        self._early = weakref.ref(early)

    def __call__(self, param: Parameter) -> None:
        early = self._early()
        if early is not None:
            early.ready(param)


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()
