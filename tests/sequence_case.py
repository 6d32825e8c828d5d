"""A model whose layers ranks use differently, and the log of what its gradients' queue is given."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from parallel_worker import TOKENS, Net, assert_same, batch, dtype_of, everyone, loss_of, whole_net
from torch.utils.checkpoint import checkpoint

import lina
from lina.parallel.gradients import reduce
from lina.parallel.gradients.early import Early

LINK = (0.0, 2e-7)           # on which half a millisecond is 2500 bytes: gradients of experts are cut
reduce._SMALL = 0            # every expert's gradient goes by itself


class Odd(Net):
    """Ranks may leave the second layer's experts out, run the layers in another order, or one twice."""

    def forward(self, x, how: str = ""):
        x = self.first(x)
        for layer in (self.moe2, self.moe1) if how == "swap" else (self.moe1, self.moe2):
            if layer is self.moe2 and how == "skip":
                # its dense parameters have gradients, as DistributedDataParallel wants it
                x = x + 0 * sum(p.sum() for name, p in layer.named_parameters() if "experts" not in name)
            elif layer is self.moe2 and how in ("twice", "inner"):
                routing = layer.router(x)
                for _ in range(1 + (how == "twice")):
                    x = x + checkpoint(layer.experts, x, routing.weight_TK, routing.expert_TK,
                                       use_reentrant=True)
            else:
                x = x + layer(x)
            x = torch.tanh(self.middle(x)) if layer is self.moe1 else x
        return {"out": self.last(x)}


def build(device, ep: int, gate: str = "softmax", frozen: tuple[str, ...] = (), transport: str = "c10d",
          **options):
    """The model with all experts, the same spread, its wrapper and the log of what its queue is given."""
    mesh = lina.mesh(ep=ep, transport=transport, tokens=max(TOKENS) if transport == "p2p" else None)
    whole = whole_net(gate, device)
    whole.__class__ = Odd
    net = Odd(gate, mesh, device=device, dtype=dtype_of(device))
    net.load_state_dict(whole.state_dict())
    for name in frozen:
        whole.get_submodule(name).requires_grad_(False)
        net.get_submodule(name).requires_grad_(False)
    state = options.pop("hook", None) or lina.HookState(mesh, link=LINK)
    wrapped = lina.ddp(net, mesh, schedule="lina", hook=state, bucket_cap_mb=0.0002, **options)
    return whole, net, wrapped, mesh


@contextmanager
def logged(wrapped, net, device):
    """What goes to the queue, by name, and where the end of backward begins ("end") in between."""
    log: list[str] = []
    queue = wrapped.gently.queue(device)
    submit, rest = queue.submit, Early.rest

    def noted(flat, label, **kw):
        names = {p.grad.data_ptr(): n for n, p in net.named_parameters() if p.grad is not None}
        log.append(names.get(flat.data_ptr(), "small experts") if label == "experts" else label)
        return submit(flat, label, **kw)

    def ended(early):
        log.append("end")
        rest(early)

    queue.submit = noted
    with mock.patch.object(Early, "rest", ended):
        yield log
    del queue.submit


def reference(whole, step: int, route, like):
    net, world = copy.deepcopy(whole), dist.get_world_size()
    (sum(loss_of(net, *batch(r, step, like), how=route(r)) for r in range(world)) / world).backward()
    for p in net.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad        # a layer that nobody used
    return net


def steps(device, built, count: int, route=lambda step, rank: "", first: int = 0) -> list[list[str]]:
    """Backward passes against one process's; each one's log, the same on all ranks but for "end"."""
    whole, net, wrapped, mesh = built
    rank, like, logs = dist.get_rank(), next(whole.parameters()), []
    for step in range(first, first + count):
        wrapped.zero_grad()
        with logged(wrapped, net, device) as log:
            loss_of(wrapped, *batch(rank, step, like), how=route(step, rank)).backward()
        said = everyone(repr([key for key in log if key != "end"]))
        assert len(set(said)) == 1, f"step {step}: {said}"
        want = reference(whole, step, lambda r, step=step: route(step, r), like)
        assert_same(wrapped, want, mesh, f"step {step}")
        logs.append(log)
    return logs


def early(log: list[str]) -> set[str]:
    """Experts whose reduction was started before backward had ended."""
    return {key for key in log[:log.index("end")] if "experts" in key}


def at_end(log: list[str]) -> set[str]:
    return {key for key in log[log.index("end"):] if "experts" in key}


def pack(built, ep: int):
    whole, net, wrapped, _ = built
    wrapped.zero_grad()
    return whole, net, wrapped, lina.regroup(wrapped, None, ep)
