"""How a module changes its computation and nothing else: its class gets one more base.

The instance stays: its Parameters, hooks, buffers, attributes and every reference to it. Its class
becomes a subclass of the original one, so that ``isinstance`` checks of the model's library hold,
and going back is one assignment.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lina import ops, parallel

STAMP = "lina_ep"     # the entry of a state_dict, and an attribute, as some of torch's tools expect
# What lina.parallel looks for on a module that holds experts.
MARKS = ("count", "local", "mesh")


def is_dtensor(p: Tensor) -> bool:
    """Without importing torch.distributed.tensor, which takes longer than all of lina."""
    return hasattr(p, "placements")


class Match(NamedTuple):
    """A module that lina can take over: by which shell, in which form, with how many experts."""

    shell: type[Shell]
    form: Any
    experts: int
    text: str


class Shell(nn.Module):
    """First base of a swapped module's class; ``lina_form`` says how to read its weights."""

    lina_shell: ClassVar[type[Shell]]
    lina_original: ClassVar[type[nn.Module]]
    lina_form: Any
    lina_text: str
    lina_first: int              # of the experts here

    @property
    def lina_ep(self) -> Tensor | None:
        """What the state_dict says of whose experts these are; None where all are here."""
        return self.lina_part().stamp()

    def lina_part(self) -> parallel.Part:
        experts = self.lina_experts()
        return parallel.Part(self.lina_first, experts.local, experts.count)

    def lina_experts(self) -> Any:
        """The module whose parameters are the experts; it carries count, local and mesh."""
        raise AssertionError("a shell names its experts module")

    def lina_spread(self, first: int) -> None:
        """Keep ``local`` experts, from ``first`` on."""
        raise AssertionError("a shell can spread its experts")

    def lina_gather(self, mesh: DeviceMesh) -> None:
        """Undo ``lina_spread``; collective over the "ep" group."""
        raise AssertionError("a shell can gather its experts")

    def lina_ready(self) -> None:
        """Called when the module is in its shell and holds its experts."""

    def lina_leave(self) -> None:
        """Called before the module leaves its shell."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle must be told how to make it again.
        if type(self) is not shell_class(self.lina_shell, self.lina_original):
            return super().__reduce_ex__(protocol)
        state = {key: value for key, value in vars(self).items() if key != "lina_joined"}
        return _remake, (self.lina_shell, self.lina_original), state


_made: dict[tuple[Any, Any], Any] = {}


def shell_class(shell: Any, original: Any) -> Any:
    """The class of modules of class ``original`` in ``shell``; one for each pair."""
    if (shell, original) not in _made:
        _made[shell, original] = type(
            f"Lina{original.__name__}", (shell, original),
            {"lina_shell": shell, "lina_original": original, "__module__": original.__module__})
    return _made[shell, original]


def _remake(shell: Any, original: Any) -> Any:
    made = shell_class(shell, original)
    return made.__new__(made)


def put_on(module: Any, match: Match, mesh: DeviceMesh | None) -> None:
    module.lina_form, module.lina_text, module.lina_first = match.form, match.text, 0
    module.__class__ = shell_class(match.shell, type(module))
    experts = module.lina_experts()
    mark(experts, match.experts, match.experts, mesh)
    if mesh is not None and parallel.ep_size(mesh) > 1:
        experts.local = parallel.local_count(match.experts, mesh)
        module.lina_first = parallel.ep_rank(mesh) * experts.local
        module.lina_spread(module.lina_first)
    module.lina_ready()


def take_off(module: Any) -> None:
    experts = module.lina_experts()
    if experts.local != experts.count:
        parallel.release(experts.parameters())
        module.lina_gather(experts.mesh)
    unmark(experts)
    module.lina_leave()
    module.__class__ = module.lina_original
    del module.lina_form, module.lina_text, module.lina_first


def mark(module: Any, count: int, local: int, mesh: DeviceMesh | None) -> None:
    module.count, module.local, module.mesh = count, local, mesh


def unmark(module: nn.Module) -> None:
    for name in MARKS:
        delattr(module, name)


def run(experts: Any, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w_up: Tensor,
        w_down: Tensor, **options: Any) -> Tensor:
    """ops.moe here, or on the ranks that hold the experts. The result has x's dtype.

    Weights go in as the operators take them: float32, or float64 beside float64 tokens.
    """
    weight_TK = weight_TK.to(ops.sum_dtype(x_TD.dtype))
    expert_TK = expert_TK.to(torch.int32)
    if experts.local == experts.count:
        return ops.moe(x_TD, weight_TK, expert_TK, w_up, w_down, **options).to(x_TD.dtype)
    return parallel.moe(x_TD, weight_TK, expert_TK, w_up, w_down, experts=experts.count, mesh=experts.mesh,
                        **options).to(x_TD.dtype)
