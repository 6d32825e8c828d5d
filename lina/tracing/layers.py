"""Which layer a span belongs to.

Forward: modules that hold experts put their name on a stack of the calling thread, by hooks that live as
long as the trace. Backward runs on other threads and in another order; there the name is found on the
autograd node that runs: when a layer's forward ends, its name is written into the metadata of the nodes
made in it. Both hold under checkpointing, which calls the modules anew. What torch.compile has
compiled runs no hooks: spans from inside it carry no layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules import module as hooks

# What a module that holds experts carries; see lina.parallel.
_MARKS = ("count", "local", "mesh")
_KEY = "lina_layer"


class Names:
    """The layers of one trace. ``recorder`` is asked for compute spans around them.

    With a model: its layers by qualified name, and spans of its own forward and backward. Without:
    every layer of the process, by class and a running number.
    """

    def __init__(self, recorder: Any, model: nn.Module | None) -> None:
        self._recorder, self._local, self._lock = recorder, threading.local(), threading.Lock()
        self._names: dict[nn.Module, str | None] = {}
        self._seen: dict[str, int] = {}
        self._owners: dict[int, str] = {}
        if model is None:
            self._handles = [hooks.register_module_forward_pre_hook(self._enter),
                             hooks.register_module_forward_hook(self._leave, always_call=True)]
            return
        root = _unwrapped(model)
        self._whole = _Whole(recorder, type(root).__name__)
        # first of all before, last of all after: other hooks' work belongs to the module
        self._handles = [root.register_forward_pre_hook(self._whole.enter, prepend=True),
                         root.register_forward_hook(self._whole.leave, always_call=True)]
        for name, module in root.named_modules():
            name = name.replace("_orig_mod.", "")
            for key, p in module._parameters.items():
                if p is not None:
                    self._owners.setdefault(id(p), name or key)
            if _holds_experts(module):
                self._names[module] = name or type(module).__name__
                self._handles += [module.register_forward_pre_hook(self._enter, prepend=True),
                                  module.register_forward_hook(self._leave, always_call=True)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def stack(self) -> list[tuple[str, Any, Any, int]]:
        """This thread's: name, module (None: by ``layer``), its span, the autograd node to come."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def current(self) -> str | None:
        if self.stack:
            return self.stack[-1][0]
        node: Any = torch._C._current_autograd_node()
        return None if node is None else node.metadata.get(_KEY)

    def owners(self, params: Iterable[Tensor]) -> str | None:
        """First and last module, in the model's order, that have one of ``params``."""
        ids = {id(p) for p in params}
        found = list(dict.fromkeys(name for key, name in self._owners.items() if key in ids))
        return None if not found else found[0] if len(found) == 1 else f"{found[0]} .. {found[-1]}"

    def _name(self, module: nn.Module) -> str | None:
        with self._lock:
            if module not in self._names:
                name = None
                if _holds_experts(module):
                    kind = type(module).__name__
                    self._seen[kind] = self._seen.get(kind, 0) + 1
                    name = f"{kind} {self._seen[kind]}"
                self._names[module] = name
            return self._names[module]

    def _enter(self, module: nn.Module, args: Any) -> None:
        # the outermost counts: experts belong to the layer that routes to them
        if torch.compiler.is_compiling() or self.stack or (name := self._name(module)) is None:
            return
        span = self._recorder.begin("compute", name, None, {"layer": name}, True)
        self.stack.append((name, module, span, torch.autograd._get_sequence_nr()))

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.compiler.is_compiling() or not self.stack or self.stack[-1][1] is not module:
            return
        name, _, span, first = self.stack.pop()
        self._recorder.end(span)
        waiting = [t.grad_fn for t in _tensors(result)]
        while waiting:
            node: Any = waiting.pop()
            # nodes made before the layer, or outside time (a leaf's), are not of it
            if node is None or not first <= node._sequence_nr() < 1 << 63 or _KEY in node.metadata:
                continue
            node.metadata[_KEY] = name
            waiting += [following for following, _ in node.next_functions]


class _Whole:
    """Compute spans of a model's forward and backward."""

    def __init__(self, recorder: Any, name: str) -> None:
        self._recorder, self._name = recorder, name
        self._local = threading.local()
        self._backward = -1

    def enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._local.span = self._recorder.begin("compute", f"{self._name} forward", None, {}, True)

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._recorder.end(self._local.__dict__.pop("span", None))
        for tensor in _tensors(result):
            if tensor.requires_grad:
                tensor.register_hook(self._reached)

    def _reached(self, grad: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward == self._backward or self._recorder.closed:
            return
        self._backward = backward
        device = grad.device if grad.is_cuda else None
        span = self._recorder.begin("compute", f"{self._name} backward", device, {}, True)
        Variable._execution_engine.queue_callback(lambda: self._recorder.end(span))


def _unwrapped(model: nn.Module) -> nn.Module:
    """Inside DistributedDataParallel and torch.compile's wrapper, whose prefixes nobody knows a layer by."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _marked(module: nn.Module) -> bool:
    return all(hasattr(module, mark) for mark in _MARKS)


def _holds_experts(module: nn.Module) -> bool:
    return _marked(module) or sum(map(_marked, module.children())) == 1


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list, dict)):
        for value in result.values() if isinstance(result, dict) else result:
            yield from _tensors(value)
