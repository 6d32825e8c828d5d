"""A case of the experts: inputs, the float64 truth, and the check of every result against its bound."""

from __future__ import annotations

import torch
from torch import Tensor

from lina import ops, reference

from bounds import assert_bounded, moe_bounds
from helpers import acc_dtype, generator, random_experts

NAMES = ("x", "weight", "w_up", "w_down", "b_up", "b_down")


class Case:
    """Inputs of moe as leaves (``low``), and float64 leaves with exactly their values (``ref``)."""

    def __init__(
        self,
        T: int,
        D: int,
        F: int,
        E: int,
        K: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        activation: str = "swiglu",
        bias: bool = True,
        transposed: bool = False,
        expert: Tensor | None = None,
        seed: int = 0,
        **options,
    ) -> None:
        U = 2 * F if activation in reference.GATED else F
        draw = generator(seed)
        # b_up's spread and x's scale put values on both sides of the clamp at 7.
        values = {
            "x": torch.randn(T, D, generator=draw) * 2,
            "weight": torch.rand(T, K, generator=draw),
            "w_up": torch.randn(E, U, D, generator=draw) * D**-0.5,
            "w_down": torch.randn(E, D, F, generator=draw) * F**-0.5,
        }
        if bias:
            values |= {
                "b_up": torch.randn(E, U, generator=draw) * 2,
                "b_down": torch.randn(E, D, generator=draw),
            }
        self.dtype, self.device = dtype, device
        self.options = dict(activation=activation, **options)
        self.expert = (random_experts(T, E, K, seed=seed) if expert is None else expert).to(device)
        self.dout = torch.randn(T, D, generator=draw).bfloat16()
        self.low, self.ref = {}, {}
        for name, v in values.items():
            v = v.to(device=device, dtype=acc_dtype(dtype) if name == "weight" else dtype)
            if transposed and name.startswith("w_"):
                v = v.transpose(1, 2).contiguous().transpose(1, 2)
            self.low[name] = v.requires_grad_()
            self.ref[name] = v.detach().double().cpu().requires_grad_()

    def run(self, module=ops, low: bool = True, **replaced) -> Tensor:
        """moe of ``ops`` or ``reference``, with some inputs replaced."""
        v = {**(self.low if low else self.ref), **replaced}
        expert = self.expert if low else self.expert.cpu()
        return module.moe(
            v["x"],
            v["weight"],
            expert,
            v["w_up"],
            v["w_down"],
            b_up=v.get("b_up"),
            b_down=v.get("b_down"),
            **self.options,
        )

    def run_parts(self, low: bool = True, weighted: bool = True) -> Tensor:
        """The same by sort, experts and combine, each a node of its own."""
        module, v = (ops, self.low) if low else (reference, self.ref)
        rows = module.sort(self.expert if low else self.expert.cpu(), v["w_up"].shape[0])
        y = module.experts(
            v["x"], rows, v["w_up"], v["w_down"], b_up=v.get("b_up"), b_down=v.get("b_down"), **self.options
        )
        return module.combine(y, rows, v["weight"] if weighted else None)

    def gradients(self, out: Tensor, low: bool = True) -> dict[str, Tensor]:
        leaves = self.low if low else self.ref
        dout = self.dout.to(device=out.device, dtype=out.dtype)
        found = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
        return {n: g for n, g in zip(leaves, found, strict=True)}

    def bounds(self, weighted: bool = True) -> dict:
        r = {n: t.detach() for n, t in self.ref.items()}
        return moe_bounds(
            r["x"],
            r["weight"] if weighted else None,
            self.expert.cpu().long(),
            r["w_up"],
            r["w_down"],
            r.get("b_up"),
            r.get("b_down"),
            self.dout.double(),
            self.dtype,
            **self.options,
        )

    def check(self, out: Tensor | None = None, weighted: bool = True) -> None:
        """Result and every gradient lie within their bounds of the reference's."""
        out = self.run() if out is None else out
        truth, bound = self.run_parts(low=False, weighted=weighted), self.bounds(weighted)
        assert out.dtype == self.dtype
        assert_bounded(out, bound["out"], truth, "out")
        got, want = self.gradients(out), self.gradients(truth, low=False)
        for name, g in got.items():
            if name == "weight" and not weighted:
                continue
            assert g.dtype == self.low[name].dtype
            if name.startswith("w_"):
                assert g.stride() == self.low[name].stride(), f"d{name} is laid out as {g.stride()}"
            ref = want[name] if want[name] is not None else torch.zeros_like(self.ref[name])
            assert_bounded(g, bound["d" + name], ref, "d" + name)


def tensors(case: Case, out: Tensor | None = None) -> tuple[Tensor, ...]:
    """The result and all gradients."""
    out = case.run() if out is None else out
    return out, *case.gradients(out).values()


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)
