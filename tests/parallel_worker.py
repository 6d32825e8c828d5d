"""What every rank does in test_parallel.py: scenarios take the rank's device and text arguments."""

from __future__ import annotations

import copy
import gc
import math
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import lina
from lina import parallel
from lina.parallel.gradients import reduce

from helpers import assert_within_rounding, passes

TOKENS = (5, 0, 9, 3)      # per rank: uneven, and one rank without any
WIDTH, EXPERTS = 6, 8      # WIDTH * itemsize is no multiple of 16; EXPERTS shared by 1, 2 and 4 ranks
GATES = {
    "softmax": dict(score="softmax", renormalize=False),
    "deepseek": dict(score="sigmoid", select_bias=True, groups=4, top_groups=2, scale=2.5, shared_experts=1),
    "topk": dict(score="topk_softmax", bias=True, activation="gelu", shared_experts=2),
}


class Net(nn.Module):
    """Dense, MoE, dense, MoE, dense; returns a dict, as many models do."""

    def __init__(self, gate: str, mesh=None, **where) -> None:
        super().__init__()
        def layer():
            return lina.MoE(WIDTH, 10, EXPERTS, 3, mesh=mesh, **GATES[gate], **where)
        self.first = nn.Linear(4, WIDTH, **where)
        self.moe1 = layer()
        self.middle = nn.Linear(WIDTH, WIDTH, **where)
        self.moe2 = layer()
        self.last = nn.Linear(WIDTH, 4, **where)

    def forward(self, x, skip: bool = False):
        x = self.first(x)
        x = x + self.moe1(x)
        x = torch.tanh(self.middle(x))
        if not skip:
            x = x + self.moe2(x)
        return {"out": self.last(x)}


def dtype_of(device) -> torch.dtype:
    return torch.float64 if device.type == "cpu" else torch.float32


def whole_net(gate: str, device, dtype=None) -> Net:
    """The same weights on every rank, with all experts."""
    torch.manual_seed(7)
    net = Net(gate, device=device, dtype=dtype or dtype_of(device))
    for name, tensor in net.named_buffers():
        if name.endswith("select_bias"):
            tensor.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    for name, param in net.named_parameters():
        if name.split(".")[-1] in ("b_up", "b_down"):
            nn.init.normal_(param, std=0.1)
    return net


def spread_net(net: Net, gate: str, mesh, spoil: bool = False) -> Net:
    """The same with this rank's experts only; ``spoil``: zeros in other replicas than the first."""
    like = next(net.parameters())
    mine = Net(gate, mesh, device=like.device, dtype=like.dtype)
    mine.load_state_dict(net.state_dict())
    if spoil and mesh.get_coordinate()[0] != 0:
        for e in parallel.expert_parameters(mine):
            nn.init.zeros_(e.param)
    return mine


def batch(rank: int, step: int, like, tokens=None):
    draw = torch.Generator().manual_seed(100 * step + rank)
    T = TOKENS[rank % 4] if tokens is None else tokens
    x, y = (torch.randn(T, 4, generator=draw, dtype=torch.float64).to(like) for _ in range(2))
    return x, y


def loss_of(net, x, y, **kw):
    out = net(x, **kw)["out"]
    return F.mse_loss(out, y) if len(x) else out.sum() * 0      # the mean over this rank's own tokens


def mean_loss(net, step: int, **kw):
    """What the step of all ranks together must be equal to."""
    like, world = next(net.parameters()), dist.get_world_size()
    return sum(loss_of(net, *batch(r, step, like), **kw) for r in range(world)) / world


def terms(layers: int = 5) -> int:
    """Roundings on the longest path: every product's inner sums and the tokens' sum, per layer and step."""
    return 3 * layers * (WIDTH + 20 + sum(TOKENS))


def whole(tensor):
    """Of what fully_shard has sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(net, ref, mesh, what: str, grads: bool = True) -> None:
    module = net.module if hasattr(net, "module") else net
    local = {e.name for e in parallel.expert_parameters(module)}
    refs = dict(ref.named_parameters())
    for name, param in module.named_parameters():
        pairs = [("weight", whole(param), refs[name])]
        if grads:
            assert param.grad is not None, f"{what}: {name} has no gradient"
            pairs.append(("gradient", whole(param.grad), refs[name].grad))
        for kind, got, want in pairs:
            want = parallel.shard(want, mesh) if name in local else want
            # an expert whose share of the result is small still sums terms of the layer's scale
            scale = refs[name].grad.abs().max().item() if kind == "gradient" else want.abs().max().item()
            assert_within_rounding(got, want, terms(), scale=scale, name=f"{what}: {kind} of {name}")


def everyone(text: str) -> list[str]:
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, text)
    return said


def parity(device, ep: str, gate: str, schedule: str = "plain", transport: str = "auto") -> None:
    """3 steps of SGD with momentum equal to one process's over all ranks' batches."""
    mesh = parallel.mesh(int(ep), transport=transport)
    ref = whole_net(gate, device)
    # other replicas start wrong; construction mends them
    net = parallel.ddp(spread_net(ref, gate, mesh, spoil=True), mesh, schedule=schedule,
                       degree=passes(schedule, transport))
    three_steps(net, ref, mesh)


def by_kind(model) -> list[dict]:
    """Parameter groups: on CUDA optimizers refuse DTensors beside plain tensors (docs/ranks.md)."""
    kinds = {type(p) for p in model.parameters()}
    return [dict(params=[p for p in model.parameters() if type(p) is kind]) for kind in kinds]


def three_steps(net, ref, mesh) -> None:
    """Losses, gradients, their norm and weights are one process's, with SGD and momentum."""
    optimizers = [torch.optim.SGD(by_kind(m), lr=0.1, momentum=0.9) for m in (net, ref)]
    for step in range(3):
        loss = loss_of(net, *batch(dist.get_rank(), step, next(ref.parameters())))
        want = mean_loss(ref, step)
        loss.backward()
        want.backward()
        got = loss.detach().clone()
        dist.all_reduce(got)
        got /= dist.get_world_size()
        assert_within_rounding(got, want.detach(), terms(), name=f"loss of step {step}")
        assert_same(net, ref, mesh, f"step {step}")
        norms = [parallel.clip_grad_norm_(net, 0.5), nn.utils.clip_grad_norm_(ref.parameters(), 0.5)]
        assert_within_rounding(*norms, terms(), name="gradient norm")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same(net, ref, mesh, f"after step {step}", grads=False)


def accumulation(device, ep: str, schedule: str = "plain") -> None:
    """no_sync, then a synchronised pass, then another without zero_grad: as torch's own average.

    Gradients travel together in the first two passes, one by one (as large ones do) in the last.
    """
    mesh = parallel.mesh(int(ep))
    ref = whole_net("softmax", device)
    net = parallel.ddp(spread_net(ref, "softmax", mesh), mesh, schedule=schedule,
                       gradient_as_bucket_view=True)
    small = reduce._SMALL
    for step, context in enumerate([net.no_sync, nullcontext, nullcontext]):
        reduce._SMALL = 0 if step == 2 else small
        with context():
            loss_of(net, *batch(dist.get_rank(), step, next(ref.parameters()))).backward()
        mean_loss(ref, step).backward()
        if step:
            assert_same(net, ref, mesh, f"pass {step}")
    reduce._SMALL = small


def unused(device, ep: str, static: str, schedule: str = "plain") -> None:
    """One replica skips a layer; a layer that all skip keeps no gradient."""
    mesh = parallel.mesh(int(ep))
    ref = whole_net("topk", device)
    option = dict(static_graph=True) if static == "static" else dict(find_unused_parameters=True)
    net = parallel.ddp(spread_net(ref, "topk", mesh), mesh, schedule=schedule, **option)
    like, world, rank = next(ref.parameters()), dist.get_world_size(), dist.get_rank()
    for step in range(2):
        # one replica alone cannot skip where it is the only one
        def skips(r):
            return r // int(ep) == 0 and world > int(ep) and not option.get("static_graph")
        loss_of(net, *batch(rank, step, like), skip=skips(rank)).backward()
        (sum(loss_of(ref, *batch(r, step, like), skip=skips(r)) for r in range(world)) / world).backward()
        assert_same(net, ref, mesh, f"step {step}")
    if not option.get("static_graph"):
        net.zero_grad()
        loss_of(net, *batch(rank, 0, like), skip=True).backward()
        for name, param in net.module.moe2.named_parameters():
            assert param.grad is None, f"moe2.{name} was used by no rank, yet has a gradient"
        assert net.module.moe1.experts.w_up.grad is not None


def wrappers(device, ep: str) -> None:
    """Gradients are right after a second wrapper has come and gone, also of experts unfrozen after the
    wrapping; once the last wrapper has gone they are the model's own."""
    mesh, rank = parallel.mesh(int(ep)), dist.get_rank()
    ref = whole_net("softmax", device)
    like = next(ref.parameters())
    net = spread_net(ref, "softmax", mesh)
    net.moe1.experts.requires_grad_(False)
    first, second = parallel.ddp(net, mesh), parallel.ddp(net, mesh)
    del second
    gc.collect()
    net.moe1.experts.requires_grad_(True)
    with first.no_sync():                               # the first backward pass since then
        loss_of(first, *batch(rank, 1, like)).backward()
    loss_of(first, *batch(rank, 0, like)).backward()
    for step in range(2):
        mean_loss(ref, step).backward()
    assert_same(first, ref, mesh, "wrapped")
    if int(ep) == dist.get_world_size():               # no replica to be averaged with
        scaled = net.moe2.experts.w_up.grad
        net.zero_grad(set_to_none=True)
        del first
        gc.collect()
        for step in range(2):
            loss_of(net, *batch(rank, step, like)).backward()
        assert_within_rounding(net.moe2.experts.w_up.grad, int(ep) * scaled, terms(), name="unwrapped")


def norms(device, ep: str) -> None:
    """The norm is one process's for several p, the same bits on all ranks; inf is refused if asked."""
    mesh = parallel.mesh(int(ep))
    ref = whole_net("deepseek", device)
    net = parallel.ddp(spread_net(ref, "deepseek", mesh), mesh)
    loss_of(net, *batch(dist.get_rank(), 0, next(ref.parameters()))).backward()
    mean_loss(ref, 0).backward()
    for p in (1.0, 2.0, 3.5, math.inf):
        got = parallel.clip_grad_norm_(net, 1e9, p)
        want = nn.utils.get_total_norm([q.grad for q in ref.parameters() if q.grad is not None], p)
        assert_within_rounding(got, want, terms() + 1000, name=f"{p}-norm")     # 1000: sums over elements
        assert len(set(everyone(repr(got.item())))) == 1
    before = net.module.first.weight.grad.clone()
    if dist.get_rank() == dist.get_world_size() - 1:
        net.module.moe1.experts.w_up.grad[0, 0, 0] = math.inf
    said = everyone(error_of(RuntimeError, parallel.clip_grad_norm_, net, 1.0, error_if_nonfinite=True))
    if int(ep) == dist.get_world_size():          # a spread expert: every rank learns of it
        assert all("not finite" in text for text in said), said
        assert torch.equal(before, net.module.first.weight.grad)


def error_of(kind, call, *args, **kw) -> str:
    try:
        call(*args, **kw)
    except kind as error:
        return str(error)
    return ""


def low_precision(device, schedule: str = "plain") -> None:
    """bf16 parameters, and bf16 autocast over float32 ones: as one process in the same precision."""
    ep = dist.get_world_size() // 2
    mesh, rank = parallel.mesh(ep), dist.get_rank()
    for dtype, cast in ((torch.bfloat16, False), (torch.float32, True)):
        exact = whole_net("softmax", device, torch.float32).to(dtype)
        net = parallel.ddp(spread_net(exact, "softmax", mesh), mesh, schedule=schedule)
        ref = copy.deepcopy(exact)
        with torch.autocast(device.type, torch.bfloat16, enabled=cast):
            loss = loss_of(net, *batch(rank, 0, next(ref.parameters())))
            want = mean_loss(ref, 0)
        loss.backward()
        want.backward()
        local = {e.name for e in parallel.expert_parameters(net.module)}
        for (name, param), other in zip(net.module.named_parameters(), ref.parameters(), strict=True):
            assert param.grad.dtype == dtype
            g = parallel.shard(other.grad, mesh) if name in local else other.grad
            # what is rounded to bf16 on one path and not on the other: rows between ranks, each
            # rank's gradient, their average, in each of the 5 layers after
            limit = 5 * 3 * torch.finfo(torch.bfloat16).eps * other.grad.abs().max().item()
            worst = (param.grad.float() - g.float()).abs().max().item()
            assert worst <= limit, f"{dtype}, autocast {cast}, {name}: off by {worst}, limit {limit}"
