"""One rank's model, optimizer and steps: the example of how lina is used."""

from __future__ import annotations

import contextlib
import inspect
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import lina
from lina import tracing

from . import checkpoint, data
from .model import Transformer
from .options import Options, passes

# DistributedDataParallel's option by its newer or older name.
SYNC_BUFFERS = "forward_sync_buffers"
if SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    SYNC_BUFFERS = "broadcast_buffers"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _same_everywhere(corpus: data.Corpus) -> None:
    """Machines whose standard libraries differ would train on different text."""
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, corpus.digest)
    if len(set(digests)) > 1:
        raise RuntimeError(f"--data: {corpus.source} is not the same text on every rank; pass one --data")


def _count(router: lina.nn.Router, _: Any, routing: Any) -> None:
    """Keeps the load of a router without a balancing loss."""
    if router.training:
        load_E = torch.bincount(routing.expert_TK.flatten(), minlength=router.count)
        router.load = load_E if router.load is None else router.load + load_E


class Trainer:
    """Model, optimizer and position of one rank. `rank`, `world` are the default group's."""

    def __init__(self, o: Options, device: torch.device) -> None:
        self.o, self.device = o, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.corpus = data.load(o)
        _same_everywhere(self.corpus)
        self.mesh = lina.mesh(ep=o.ep or 1, transport=o.transport)
        self.net = Transformer(o, self.mesh).to(device)
        options: dict[str, Any] = {SYNC_BUFFERS: False}                          # they are constants
        self.model = lina.ddp(self.net, self.mesh, schedule=o.schedule, degree=passes(o), **options)
        if not o.balance_coef:          # the routers then keep no statistics themselves
            for router in self._routers():
                router.register_forward_hook(_count)
        matrices = [p for p in self.net.parameters() if p.ndim > 1]
        vectors = [p for p in self.net.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=o.lr, betas=(0.9, 0.98), fused=True)
        self.scale = 2.0**12 if o.precision == "fp16" else 1.0
        self.good_steps = 0             # since the scale last changed
        self.step = 0
        self.backward_span: Any = None
        # The embedding's gradient is the last: what follows in backward() only waits for the network.
        self.net.embed.weight.register_post_accumulate_grad_hook(self._end_backward_span)

    def lr(self, step: int) -> float:
        """Linear warm-up over the first twentieth, then a half cosine down to a hundredth."""
        warm = max(1, self.o.steps // 20)
        along = (step - warm) / max(1, self.o.steps - warm)
        return self.o.lr * ((step + 1) / warm if step < warm else 0.505 + 0.495 * math.cos(math.pi * along))

    def loss(self, byte_BS1: Tensor) -> Tensor:
        """Mean nats per byte of this rank's sequences."""
        byte_BS1 = byte_BS1.to(self.device)
        with self.precision():
            logits_BSV = self.model(byte_BS1[:, :-1])
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), byte_BS1[:, 1:].flatten())

    def precision(self) -> Any:
        """Autocast to the run's precision."""
        dtype = AUTOCAST.get(str(self.o.precision))
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; its loss on this rank and the gradient norm over all ranks."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        with tracing.span("compute", "forward"):
            loss = self.loss(data.batch(self.corpus.train, self.o, self.step, self.rank))
            total = loss + lina.aux_loss(self.net)
        self.backward_span = tracing.begin("compute", "backward", self.device)
        (total * self.scale).backward()
        self._end_backward_span()
        norm = self._unscale_and_clip()
        with tracing.span("compute", "optimizer"):
            if self._finite(norm):
                self.optimizer.step()
            self.optimizer.zero_grad()
        self.step += 1
        return loss.detach(), norm

    def _end_backward_span(self, _: Any = None) -> None:
        token, self.backward_span = self.backward_span, None
        tracing.end(token)

    def _unscale_and_clip(self) -> Tensor:
        if self.scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.net.parameters() if p.grad is not None], 1 / self.scale)
        if (self.o.ep or 1) == 1:       # no rank waits for another here
            return lina.clip_grad_norm_(self.net, self.o.clip)
        with tracing.span("allreduce", "gradient norm"):
            return lina.clip_grad_norm_(self.net, self.o.clip)

    def _finite(self, norm: Tensor) -> bool:
        """fp16: whether to step. The norm is over all ranks, so all of them agree, experts included."""
        if self.o.precision != "fp16":
            return True
        finite = bool(norm.isfinite())
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == 500:
            self.scale, self.good_steps = self.scale * 2, 0
        return finite

    def save(self) -> None:
        """A checkpoint of this step; a collective."""
        state = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "scale": self.scale, "good_steps": self.good_steps, "rng": checkpoint.rng_state(self.device)}
        checkpoint.save(self.o, self.step, self.corpus.digest, state)

    def resume(self) -> None:
        """Continues from ``o.resume``, bit for bit."""
        self.step, state = checkpoint.load(str(self.o.resume))
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale, self.good_steps = state["scale"], state["good_steps"]
        checkpoint.set_rng_state(state["rng"], self.device)

    @torch.no_grad()
    def heldout_bits(self) -> float:
        """Bits per byte of the held-out text, its windows shared out over the ranks."""
        self.model.eval()
        byte_WS1, counts_WS = data.windows(self.corpus.heldout, self.o.seq, self.world)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for byte, counts in zip(byte_WS1.chunk(self.world)[self.rank].split(16),
                                counts_WS.chunk(self.world)[self.rank].split(16), strict=True):
            byte, counts = byte.to(self.device), counts.to(self.device)
            with self.precision():
                logits = self.net(byte[:, :-1])
            nats = F.cross_entropy(logits.flatten(0, 1).float(), byte[:, 1:].flatten(), reduction="none")
            total += torch.stack([(nats * counts.flatten()).sum(dtype=torch.float64), counts.sum().double()])
        dist.all_reduce(total)
        return (total[0] / total[1]).item() / math.log(2)

    @torch.no_grad()
    def sample(self, prompt: bytes = b"def ") -> str:
        """Text that the model goes on with. Every rank calls it, since all hold experts."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.o.seed)
        text = list(prompt)
        for _ in range(self.o.sample):
            byte_1S = torch.tensor([text[-self.o.seq :]], device=self.device)
            with self.precision():
                logits = self.net(byte_1S)[0, -1].float().cpu()
            text.append(int(torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)))
        return bytes(text).decode("utf-8", errors="replace")

    def balance(self) -> Tensor:
        """Choices of each expert since the last call, over all ranks: [MoE layers, E] int64."""
        routers = self._routers()
        loads = [torch.zeros(r.count, dtype=torch.int64) if r.load is None else r.load for r in routers]
        if not loads:
            return torch.zeros(0, self.o.experts, dtype=torch.int64)
        load_LE = torch.stack([load.to(self.device) for load in loads])
        for router in routers:
            router.load = None
        dist.all_reduce(load_LE)
        return load_LE.cpu()

    def _routers(self) -> list[lina.nn.Router]:
        return [m for m in self.net.modules() if isinstance(m, lina.nn.Router)]

    def mean(self, *values: float | Tensor) -> list[float]:
        """The values' means over all ranks."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        dist.all_reduce(total)
        return (total / self.world).tolist()
