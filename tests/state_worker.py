"""What every rank does in test_state.py: checkpoints, loss scaling, and the way back from a mesh."""

from __future__ import annotations

import copy
import math

import torch
import torch.distributed as dist
from parallel_worker import batch, dtype_of, error_of, everyone, loss_of, spread_net, whole_net
from torch.nn.parallel import DistributedDataParallel

import lina
from lina import parallel
from lina.swap import probe

from swap_cases import D, Model


def agree(got, want) -> bool:
    return probe.agree(got, want, torch.finfo(got.dtype).eps)


def rank0s(state):
    """The customary checkpoint: what rank 0 saves is what all load."""
    box = [state]
    dist.broadcast_object_list(box)
    return box[0]


def swapped(device, mesh, seed: int = 0, transposed: bool = True) -> Model:
    torch.manual_seed(seed)
    model = Model(transposed).to(device, dtype_of(device))
    return model if mesh is None else lina.swap(model, mesh)


def checkpoint(device, kind: str) -> None:
    """One rank's state is refused elsewhere, its own is taken; the gathered one goes anywhere."""
    mesh = lina.mesh(ep=2)
    rank = dist.get_rank()
    like = torch.empty((), device=device, dtype=dtype_of(device))

    def build(mesh, seed):
        if kind == "swap":
            return swapped(device, mesh, seed), torch.randn(5, D).to(like)
        torch.manual_seed(seed)
        return whole_or_spread(mesh, seed), batch(rank, 0, like, 5)[0]

    def whole_or_spread(mesh, seed):
        net = whole_net("topk", device)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 + seed)
        return net if mesh is None else spread_net(net, "topk", mesh)

    whole, x = build(None, 1)
    spread, _ = build(mesh, 1)
    out = (lambda m: m(x)) if kind == "swap" else (lambda m: m(x)["out"])
    want = out(spread)
    mine, key = spread.state_dict(), "lina_ep" if kind == "swap" else "ep"
    stamps = [v.tolist() for k, v in mine.items() if k.endswith(key)]
    assert stamps == [[rank, 2]] * 2

    other, _ = build(mesh, 2)
    assert not torch.equal(out(other), want)
    said = everyone(error_of(RuntimeError, other.load_state_dict, rank0s(mine)))
    assert said[0] == "" and "rank 0 of ep=2, here is rank 1 of ep=2" in said[1], said
    assert "gathered_state_dict" in said[1]
    bare = {k: v for k, v in mine.items() if not k.endswith(key)}
    assert "does not say which" in error_of(RuntimeError, other.load_state_dict, bare)
    assert "does not say which" in error_of(RuntimeError, other.load_state_dict, bare, strict=False)
    alone, _ = build(None, 2)
    lina.swap(alone)
    assert "here are all" in error_of(RuntimeError, alone.load_state_dict, mine)
    other, _ = build(mesh, 2)
    assert str(other.load_state_dict(mine, strict=True)) == "<All keys matched successfully>"
    assert torch.equal(out(other), want)

    state = {k: v.to(device) for k, v in rank0s(lina.gathered_state_dict(spread)).items()}
    ref = whole.state_dict()
    assert state.keys() == ref.keys()
    assert all(torch.equal(state[k], ref[k]) for k in ref)
    for assign in (False, True):
        for where in (mesh, lina.mesh(ep=1), None):
            other, _ = build(where, 2)
            fresh = {k: v.clone() for k, v in state.items()}
            other.load_state_dict(fresh, strict=True, assign=assign)
            assert agree(out(other), want) if where is not mesh else torch.equal(out(other), want)
    assert mine.keys() == spread.state_dict().keys()      # gathering is over


def scaler(device, how: str) -> None:
    """An inf in one gradient of one rank: all skip that step, and all halve their scale."""
    mesh = lina.mesh(ep=2)
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = spread_net(whole_net("softmax", device, torch.float32), "softmax", mesh)
    model = lina.ddp(net, mesh)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=how == "fused")
    scaling = lina.GradScaler(device.type, init_scale=1024.0, growth_interval=100)
    for step in range(3):
        before = [p.detach().clone() for p in net.parameters()]
        scaling.scale(loss_of(model, *batch(rank, step, before[0]))).backward()
        if step == 1 and rank == 1:
            net.moe1.experts.w_up.grad[0, 0, 0] = math.inf
        if how == "unscale":
            scaling.unscale_(optimizer)
            lina.clip_grad_norm_(model, 1.0)
        scaling.step(optimizer)
        scaling.update()
        same = all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert same == (step == 1), f"step {step}: {'skipped' if same else 'not skipped'}"
        assert scaling.get_scale() == (1024.0 if step < 1 else 512.0)
        assert len(set(everyone(repr(net.first.weight.tolist())))) == 1
        optimizer.zero_grad()
    idle = torch.nn.Parameter(torch.ones(2, device=device))     # a rank with no gradients takes part
    if rank == 1:
        idle.grad = torch.tensor([1.0, math.inf], device=device)
    other = torch.optim.SGD([idle], lr=1.0)
    scaling.step(other)
    scaling.update()
    assert scaling.get_scale() == 256.0 and torch.equal(idle, torch.ones_like(idle))


def way_back(device) -> None:
    """After unswap gradients are the original's: of one process, by torch's wrapper and by lina's."""
    mesh = lina.mesh(ep=2)
    rank = dist.get_rank()
    model = swapped(device, None)
    ref = copy.deepcopy(model)
    old = lina.ddp(lina.swap(model, mesh), mesh)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    torch.manual_seed(10 + rank)                           # each rank its own tokens
    x = torch.randn(6 - rank, D).to(device, dtype_of(device))
    old(x).square().mean().backward()
    lina.unswap(model)

    def compare(a, b, what: str) -> None:
        for module, call in ((model, a), (ref, b)):
            module.zero_grad()
            call(x).square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), ref.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), f"{what}: {name}"
            assert q.grad is None or agree(p.grad, q.grad), f"{what}: {name}"

    assert "no longer spread" in error_of(RuntimeError, old, x)
    option = dict(find_unused_parameters=True)             # the original's experts without tokens
    compare(DistributedDataParallel(model, **option), DistributedDataParallel(ref, **option), "torch's ddp")
    compare(lina.ddp(model, mesh, **option), DistributedDataParallel(ref, **option), "lina.ddp")
    lina.swap(model, mesh)
    lina.swap(lina.ddp(model, mesh), mesh)                 # nothing left to do: not refused
    assert "no longer spread" in error_of(RuntimeError, old, x)    # for good: its scaling is gone
    lina.unswap(model)

    bare = copy.deepcopy(ref)
    said = error_of(ValueError, lina.swap, DistributedDataParallel(bare), mesh)
    assert "wrapped in DistributedDataParallel" in said, said
    assert not any(entry.swapped for entry in lina.swap_report(bare))
    marked = copy.deepcopy(ref)
    marked._ddp_params_and_buffers_to_ignore = ["router.bias"]     # the user's stays
    wrapped = parallel.ddp(lina.swap(marked, mesh), mesh)
    assert marked._ddp_params_and_buffers_to_ignore == ["router.bias"]
    assert {"router.bias", "stacked.down_proj"} <= wrapped.parameters_to_ignore
