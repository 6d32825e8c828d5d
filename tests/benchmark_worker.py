"""What every rank does in test_benchmarks.py: the benchmarks' checks, and what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import layers
import models
import multi
import training

import lina


class Wrong(layers.Plain):
    """The plain design with one fault."""

    fault = ""

    def experts(self, x, weight, ids):
        if self.fault == "row":                  # one pair of one token counts nothing
            weight = weight.clone()
            weight[0, 0] = 0
        out = super().experts(x, weight, ids)
        if self.fault == "scale" and torch.is_grad_enabled():     # the output is right
            out = out.detach() + 1.01 * (out - out.detach())
        return out * float("nan") if self.fault == "nan" else out


def layer(device, fault: str) -> None:
    """bench_ep.py's check passes the sound design and refuses each fault, on every rank."""
    problem = layers.Problem(layers.Shape("small", 24, 32, 16, 8, 4), device, torch.float32)
    layers.check(layers.make("torch", (1, 1), problem))
    design = Wrong(problem)
    design.fault = fault
    why = multi.attempt(lambda: layers.check(design))
    wanted = {"row": "out off by", "scale": "w_down off by", "nan": "out off by nan"}[fault]
    assert why is not None and wanted in why, why
    assert ("out off by" in why) == (fault != "scale"), why
    assert fault != "row" or "x off by" in why, why


def steps(device, fault: str) -> None:
    """bench_step.py's checks refuse gradients of experts that are scaled, and losses of another rate."""
    p = training.small(models.TINY["qwen3"])
    mesh = lina.mesh(dist.get_world_size())
    agreement = training.Agreement()
    for name, degree in (("torch", (1, 1)), ("c10d", (3, 2))):
        trainer = training.Trainer(name, degree, p, mesh, device, torch.float32, 2 * p.sequence)
        agreement.compare_gradients(trainer)
        agreement.compare_losses("small", trainer.losses(), torch.float32, 4 * p.sequence)
        trainer.close()
    trainer = training.Trainer("torch", (1, 1), p, mesh, device, torch.float32, 2 * p.sequence)
    if fault == "gradient":                      # as if the sum over all ranks' tokens were not divided
        for expert in trainer.experts:
            expert.param.register_hook(lambda grad: grad * 2)
        why = multi.attempt(lambda: agreement.compare_gradients(trainer))
        assert why is not None and "gradients differ" in why and "experts.w_up" in why, why
        assert "router" not in why, why          # the others are right
    else:
        for group in trainer.optimizer.param_groups:
            group["lr"] *= 1.1
        why = multi.attempt(lambda: agreement.compare_losses("small", trainer.losses(), torch.float32,
                                                             4 * p.sequence))
        assert why is not None and "losses [" in why, why
