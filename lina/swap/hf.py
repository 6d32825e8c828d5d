"""Hugging Face transformers 5: experts modules with stacked weights.

Recognised by what they hold, not by name, so that no transformers is needed: parameters
``gate_up_proj`` (or ``up_proj``) and ``down_proj`` of three dimensions, and a
``forward(hidden_states, top_k_index, top_k_weights)``. transformers' decorator
``use_experts_implementation`` leaves attributes that say how the weights lie (``is_transposed``,
``has_bias``); where a version lacks one it follows from the shapes. Which activation it is, and
that nothing else happens in between, is seen by running the class's own eager forward on a copy
with a few small random experts. The router is another module and stays as it is.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lina import ops, parallel
from lina.swap.probe import agree, line, quiet, random
from lina.swap.shell import MARKS, STAMP, Match, Shell, is_dtensor, run

# Attributes that name a size, for the small copy: experts, model width, expert width.
_SIZES = (("num_experts", "num_local_experts"), ("hidden_dim", "hidden_size"),
          ("intermediate_dim", "intermediate_size", "moe_intermediate_size", "expert_dim"))


class Form(NamedTuple):
    up: str                      # name of the first weight
    transposed: bool             # stored [E, D, U] and [E, F, D]
    biased: bool
    activation: str
    interleaved: bool
    alpha: float
    limit: float
    inputs: tuple[str, ...]      # the forward's own names of tokens, ids, weights

    def names(self) -> tuple[str, ...]:
        weights = (self.up, "down_proj")
        return (*weights, *(f"{name}_bias" for name in weights)) if self.biased else weights


class StackedExperts(Shell):
    """An experts module computing by lina.ops.moe."""

    def lina_experts(self) -> Any:
        return self

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        form: Form = self.lina_form
        if len(args) + len(kwargs) != 3:
            raise TypeError(f"{type(self).__name__}: got {len(args) + len(kwargs)} arguments, takes "
                            f"{', '.join(form.inputs)}")
        x, expert, weight = (*args, *(kwargs[name] for name in form.inputs[len(args):]))
        y_TD = run(self, x.reshape(-1, x.shape[-1]), weight.reshape(-1, weight.shape[-1]),
                   expert.reshape(-1, expert.shape[-1]), **_weights(self, form))
        return y_TD.view(x.shape)

    def lina_spread(self, first: int) -> None:
        for name in self.lina_form.names():
            _renew(getattr(self, name), getattr(self, name).detach().narrow(0, first, self.local).clone())

    def lina_gather(self, mesh: DeviceMesh) -> None:
        for name in self.lina_form.names():
            _renew(getattr(self, name), parallel.gather(getattr(self, name), mesh))

    def regroup_layer(self) -> parallel.Layer:
        """What lina.regroup moves, and whom it tells."""
        slots = {name: [getattr(self, name)] for name in self.lina_form.names()}
        return parallel.Layer(self, slots, self.lina_place)

    def lina_place(self, mesh: DeviceMesh, first: int, local: int) -> None:
        """``local`` experts, from ``first`` on, are here now."""
        self.mesh, self.local, self.lina_first = mesh, local, first

    def lina_leave(self) -> None:
        parallel.release(self.parameters())            # lina.regroup may have made them whole

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        parallel.stamp_or_gather(destination, prefix, self.lina_form.names(), STAMP, self.lina_part(),
                                 self.lina_experts().mesh)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *more: Any) -> None:
        parallel.take_part(state_dict, prefix, self.lina_form.names(), STAMP, self.lina_part(),
                           copy=local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)


def _renew(parameter: nn.Parameter, data: Tensor) -> None:
    parameter.grad, parameter.data = None, data


def _weights(module: Any, form: Form) -> dict[str, Any]:
    w_up, w_down = getattr(module, form.up), module.down_proj
    if form.transposed:
        w_up, w_down = w_up.transpose(1, 2), w_down.transpose(1, 2)
    biases = dict.fromkeys(("b_up", "b_down"))
    if form.biased:
        biases = dict(b_up=getattr(module, f"{form.up}_bias"), b_down=module.down_proj_bias)
    return dict(w_up=w_up, w_down=w_down, **biases, activation=form.activation,
                interleaved=form.interleaved, alpha=form.alpha, limit=form.limit)


def examine(module: Any) -> Match | str | None:
    """A match, the reason why not, or None where it is no such module."""
    held = {**module._parameters, **module._buffers}
    up = "gate_up_proj" if "gate_up_proj" in held else "up_proj"
    if up not in held or "down_proj" not in held:
        return None
    reason = _obstacle(module, up)
    if reason is not None:
        return reason
    biased = f"{up}_bias" in held
    names = {up, "down_proj", *((f"{up}_bias", "down_proj_bias") if biased else ())}
    if set(held) != names:
        return f"holds {sorted(set(held) ^ names)}, which lina's experts do not, or lacks it"
    shape = tuple(held[up].shape)
    E = shape[0]
    gated = up == "gate_up_proj"
    inputs = tuple(inspect.signature(module.forward).parameters)
    if len(inputs) != 3:
        return f"its forward takes ({', '.join(inputs)}), not tokens, expert ids and weights"
    tries: list[Form | str | None] = []
    for transposed in (False, True):
        D, U = shape[1:] if transposed else shape[:0:-1]
        F = U // 2 if gated else U
        down = (E, F, D) if transposed else (E, D, F)
        said = getattr(module, "is_transposed", transposed)
        if said == transposed and tuple(held["down_proj"].shape) == down:
            tries.append(_tried(module, up, transposed, biased, inputs))
    found = next((t for t in tries if isinstance(t, Form)), None)
    if found is None:
        return next((t for t in tries if isinstance(t, str)),
                    f"its function is none of lina's activations of these weights ({_act(module)})")
    return Match(StackedExperts, found, E, f"Hugging Face experts, {found.activation}")


def _obstacle(module: Any, up: str) -> str | None:
    for name, p in (*module._parameters.items(), *module._buffers.items()):
        if is_dtensor(p):
            return f"{name} is a DTensor: call lina.swap before sharding the model"
        if p is not None and p.dtype not in ops.FLOATS:
            return f"{name} is {p.dtype}, lina takes float64, float32, bfloat16 or float16"
    w_up, w_down = getattr(module, up), module.down_proj
    if w_up is None or w_down is None or w_up.dim() != 3 or w_down.dim() != 3:
        return f"{up} and down_proj are not stacked weights of three dimensions"
    if w_up.shape[0] > ops.MAX_EXPERTS:
        return f"it has {w_up.shape[0]} experts, lina takes at most {ops.MAX_EXPERTS}"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm follows each expert (has_post_expert_norm)"
    if "forward" in vars(module):
        return "its forward is replaced on the instance (by a hook of another library?)"
    taken = [name for name in MARKS if hasattr(module, name)]
    return f"it has attributes {taken} of its own" if taken else None


def _tried(module: Any, up: str, transposed: bool, biased: bool,
           inputs: tuple[str, ...]) -> Form | str | None:
    """The form whose result is the class's own on a small copy; the reason if that cannot be run."""
    gated = up == "gate_up_proj"
    E, D, F, T, K = 3, 6, 5, 16, 2
    shapes = [(E, 2 * F if gated else F, D), (E, D, F)]
    small: Any = object.__new__(type(module))
    small.__dict__.update(vars(module))
    for attributes, size in zip(_SIZES, (E, D, F), strict=True):
        small.__dict__.update({name: size for name in attributes if isinstance(vars(module).get(name), int)})
    with quiet() as generator:
        names = (up, "down_proj")
        small._buffers = {}
        small._parameters = {
            name: nn.Parameter(random(shape[:1] + shape[:0:-1] if transposed else shape, generator), False)
            for name, shape in zip(names, shapes, strict=True)}
        if biased:
            small._parameters.update({f"{name}_bias": nn.Parameter(random(shape[:2], generator), False)
                                      for name, shape in zip(names, shapes, strict=True)})
        x_TD = random((T, D), generator) * 4      # wide enough to reach a clamp
        expert_TK = random((T, E), generator).argsort(-1)[:, :K]
        weight_TK = random((T, K), generator)
        try:
            want = inspect.unwrap(type(module).forward)(small, x_TD, expert_TK, weight_TK)
        except Exception as error:  # its code is not ours: whatever it raises is the reason
            return f"its eager forward could not be tried: {line(error)}"
        for activation in (ops.GATED if gated else [a for a in ops.ACTIVATIONS if a not in ops.GATED]):
            for interleaved in (False, True) if gated else (False,):
                form = Form(up, transposed, biased, activation, interleaved,
                            *_clamp(module), inputs)
                got = ops.moe(x_TD, weight_TK, expert_TK.int(), **_weights(small, form))
                if agree(got, want):
                    return form
    return None


def _clamp(module: Any) -> tuple[float, float]:
    """alpha and limit of a clamped activation; those of gpt-oss where the module has none."""
    alpha, limit = (next((value for name in (stem, f"swiglu_{stem}")
                          if isinstance(value := getattr(module, name, None), int | float)), default)
                    for stem, default in (("alpha", 1.702), ("limit", 7.0)))
    return float(alpha), float(limit)


def _act(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    for name in ("hidden_act", "mlp_hidden_act", "hidden_activation", "activation_function"):
        if isinstance(getattr(config, name, None), str):
            return f"{name}={getattr(config, name)!r}"
    return f"act_fn is {type(getattr(module, 'act_fn', None)).__name__}"
