"""The designs of bench_step.py: how each trains the same model, that they agree, what is measured of them."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from models import GPT, Exchanged, PlainMoE, Preset
from multi import Clock, Timing, off, slowest
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from tutel_layer import TutelMoE

import lina
from lina import parallel, tracing
from lina.profile.layers import uncollected

STEPS = 5
# In float32. A gradient passes some 64 stored values, each rounded by half an eps at most, in norm as
# independent errors; norms and softmax may enlarge that: 16 times. Relative to the gradient's norm.
GRADIENT = 16 * 64**0.5 * torch.finfo(torch.float32).eps / 2
# Of what the loss has lost in these steps. In float32 Adam moves an element whose gradient is all rounding by
# up to the rate either way, which changes the loss by that gradient only. In bf16 gradients are off by a
# quarter in norm (in any design: measured against float32), and updates are rounded to the weights' 8 bits:
# losses drift apart by some percent; that designs compute the same is shown in float32. Each of N tokens'
# losses is off by eps besides, which in their mean is eps / sqrt(N).
LOSS, LOSS_BF16 = 1e-3, 0.1
# Before any update a token's loss is off by some eps alone, at most.
FIRST = 8
# In bf16, on the timed model: two designs' gradients, each off by a quarter or so, whose length says that
# no part is missing or counted twice.
GRADIENT_BF16, LENGTH_BF16 = 0.6, 0.1
RATE = 3e-4


class Trainer:
    """One design's model, wrapper and optimizer; weights and data are the same in all."""

    def __init__(self, name: str, degree: tuple[int, int], p: Preset, mesh: DeviceMesh, device: torch.device,
                 dtype: torch.dtype, tokens: int) -> None:
        self.name, self.device, self.groups = name, device, parallel.groups(mesh)
        chosen = parallel.settings(mesh)
        chosen.transport = name if name in ("nccl", "p2p", "auto") else "c10d"
        if name == "packed" and device.type == "cuda":
            chosen.transport = "nccl"
        chosen.degree = degree if name in ("c10d", "nccl", "p2p") else (1, 1)
        # by CUDA IPC p2p would leave the network that is stood in for
        near = "NCCL_P2P_DISABLE" not in os.environ
        chosen.tokens = tokens if name == "p2p" or (name == "auto" and near) else None
        torch.manual_seed(1)
        self.model = GPT(p, mesh, device, dtype)
        if name == "packed":
            mesh = lina.regroup(self.model, None, 1)
        self.batch = batch(p, device, tokens)
        self.hook: lina.HookState | None = None
        self.experts = parallel.expert_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)
        self.foreign = name == "tutel" or name.startswith("torch")
        if self.foreign:
            self.wrapped = self._plain(degree)
        elif name == "plain":
            self.wrapped = lina.ddp(self.model, mesh, schedule="plain")
        elif name == "auto":
            self._load()
            self.wrapped = lina.ddp(self.model, mesh, schedule="auto", optimizer=self.optimizer, regroup=True)
        else:
            self._load()
            self.hook = lina.HookState(mesh)
            self.wrapped = lina.ddp(self.model, mesh, schedule="lina", degree=degree, hook=self.hook)

    def _load(self) -> None:
        """A kernel that is launched for the first time while gradients wait on the device may stop the host:
        launch all of them before."""
        self.model(*self.batch).backward()
        self.model.zero_grad(set_to_none=True)

    def _moe(self, moe: lina.MoE, degree: tuple[int, int]) -> nn.Module:
        if self.name == "tutel":
            return TutelMoE(moe, self.groups.ep, degree)
        return PlainMoE(moe, self.groups.ep, self.name == "torch-select")

    def _plain(self, degree: tuple[int, int]) -> DistributedDataParallel:
        ignored = [e.name for e in self.experts]
        for block in self.model.blocks:
            block.moe = self._moe(block.moe, degree)
        if self.name == "tutel":
            self._load()
        world = self.groups.world.size()
        for e in self.experts:             # a sum over all ranks' tokens, of losses that are each rank's mean
            e.param.register_hook(lambda grad: grad * (1 / world))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, ignored)
        return DistributedDataParallel(self.model, process_group=self.groups.world)

    def backward(self) -> Tensor:
        """The loss; gradients are ready."""
        self.optimizer.zero_grad(set_to_none=True)
        with tracing.span("compute", "forward"):
            loss = self.wrapped(*self.batch)
        token = tracing.begin("compute", "backward", self.device)
        loss.backward()
        tracing.end(token)
        if self.name.startswith("torch") and self.groups.replicas.size() > 1:
            for e in self.experts:
                dist.all_reduce(e.param.grad, group=self.groups.replicas)
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.backward()
        with tracing.span("compute", "optimizer"):
            self.optimizer.step()
        return loss

    def losses(self) -> list[float]:
        """Of the first steps, the mean over ranks."""
        found = torch.stack([self.step().double() for _ in range(STEPS)])
        dist.all_reduce(found)
        return (found / dist.get_world_size()).tolist()

    def settle(self) -> None:
        """Train until schedule "auto" has decided, and seen what came of it."""
        for _ in range(100):
            if getattr(self.wrapped, "_auto", None) is None:
                return
            self.step()
        raise RuntimeError("schedule 'auto' has not decided after 100 steps")

    def close(self) -> None:
        if self.hook is not None:
            self.hook.queue(self.device).close()


def batch(p: Preset, device: torch.device, tokens: int) -> tuple[Tensor, Tensor]:
    """This rank's token ids and targets, at random."""
    draw = torch.Generator().manual_seed(50 + dist.get_rank())
    ids = torch.randint(p.vocab, (2, tokens // p.sequence, p.sequence), generator=draw).to(device)
    return ids[0], ids[1]


def small(p: Preset) -> Preset:
    """Two narrow layers with the model's experts, top-k, activation and kind of attention."""
    return replace(p, layers=2, dim=64, ffn_dim=32, heads=4, kv_heads=4 if p.kv_heads == p.heads else 2,
                   head_dim=16, vocab=256, sequence=32)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Of one backward pass, by name."""
    trainer.backward()
    return {name: q.grad.clone() for name, q in trainer.model.named_parameters() if q.grad is not None}


def shared(got: Tensor, want: Tensor, trainer: Trainer) -> Tensor:
    """Of a gradient where all experts are here, those that ``want`` has."""
    return got if len(got) == len(want) else got[trainer.groups.ep.rank() * len(want):][:len(want)]


class Agreement:
    """What the first design computes; RuntimeError where another one differs by more than rounding."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] | None = None
        self.timed: dict[str, Tensor] | None = None
        self.losses: dict[str, list[float]] = {}

    def compare_gradients(self, trainer: Trainer) -> float:
        """After one backward pass in float32; gives the largest error."""
        found = gradients(trainer)
        missing = [name for name, q in trainer.model.named_parameters() if name not in found]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing)}")
        if self.gradients is None:
            self.gradients = found
        errors = {name: off(shared(found[name], want, trainer), want)[0]
                  for name, want in self.gradients.items()}
        wrong = [f"{name}: {error:.2e}" for name, error in errors.items() if not error <= GRADIENT]
        if wrong:
            raise RuntimeError(f"gradients differ from the first design's by, in parts of their norm, "
                               f"{', '.join(wrong)}; allowed {GRADIENT:.2e}")
        return max(errors.values())

    def compare_timed(self, trainer: Trainer) -> float:
        """The timed model's gradients before any update, by their norms; gives the largest error in parts of
        what is allowed."""
        found = gradients(trainer)
        trainer.optimizer.zero_grad(set_to_none=True)
        if self.timed is None:
            self.timed = found
        worst = 0.0
        for name, want in self.timed.items():
            got = shared(found[name], want, trainer)
            norm, length = want.float().norm(), got.float().norm()
            error = off(got, want)[0] / GRADIENT_BF16
            off_length = abs((length / norm).item() - 1) / LENGTH_BF16
            if norm > 0 and not max(error, off_length) <= 1:
                raise RuntimeError(f"the gradient of {name} differs from the first design's by "
                                   f"{error * GRADIENT_BF16:.3f} in norm, its length by "
                                   f"{off_length * LENGTH_BF16:.3f}; allowed {GRADIENT_BF16}, {LENGTH_BF16}")
            worst = max(worst, error, off_length) if norm > 0 else worst
        return worst

    def compare_losses(self, what: str, losses: list[float], dtype: torch.dtype, tokens: int) -> float:
        """Of means over ``tokens`` of all ranks; gives the largest difference in parts of what is allowed."""
        want = self.losses.setdefault(what, losses)
        share = LOSS if dtype == torch.float32 else LOSS_BF16
        rounded = torch.finfo(dtype).eps * want[0] / tokens**0.5
        allowed = share * abs(want[0] - want[-1]) + rounded
        error = max(abs(a - b) for a, b in zip(losses, want, strict=True))
        first = FIRST * (rounded + torch.finfo(torch.float32).eps * want[0])     # the mean is of float32
        if not (error <= allowed and abs(losses[0] - want[0]) <= first):
            shown = [[f"{a:.5f}" for a in one] for one in (losses, want)]
            raise RuntimeError(f"losses {shown[0]}, the first design's {shown[1]}; allowed {allowed:.1e}")
        return error / allowed


def step_times(trainer: Trainer, clock: Clock) -> Timing:
    """Steps that follow each other; of each, the slowest rank's time."""
    for _ in range(3):
        trainer.step()
    marks: list[Any] = []
    dist.barrier()
    with uncollected():
        for _ in range(clock.repeats + 1):
            if clock.cuda:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())
            trainer.step()
    if clock.cuda:
        torch.cuda.synchronize()
    times = [a.elapsed_time(b) / 1e3 if clock.cuda else b - a for a, b in pairwise(marks)]
    return Timing.of(slowest(times, clock.device))


def exchanged(trainer: Trainer) -> list[Exchanged]:
    """What each layer of the plain design sends and gets, in this batch."""
    seen: list[Exchanged] = []
    for block in trainer.model.blocks:
        block.moe.seen = seen
    trainer.backward()
    for block in trainer.model.blocks:
        block.moe.seen = None
    return seen


def replay(p: Preset, sizes: list[Exchanged], group: dist.ProcessGroup, clock: Clock,
           dtype: torch.dtype) -> Timing:
    """The plain design's exchanges of a step, one after the other: counts, rows out, rows back, and both ways
    again in backward."""
    most = max(max(sum(e.send), sum(e.recv)) for e in sizes)
    sent, got = (torch.randn(most, p.dim, device=clock.device).to(dtype) for _ in range(2))
    counts = torch.ones(2, p.experts, dtype=torch.int64, device=clock.device)

    def run() -> None:
        for backward in (False, True):
            for e in sizes:
                if not backward:
                    dist.all_to_all_single(counts[1], counts[0], group=group)
                for out, into in ((e.send, e.recv), (e.recv, e.send)):
                    dist.all_to_all_single(got[:sum(into)], sent[:sum(out)], into, out, group=group)

    return clock.stages([run])[0]
