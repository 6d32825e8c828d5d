"""What every rank does in test_parallel.py beyond training: the exchange itself, meshes, refusals."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from parallel_worker import Net, batch, error_of, everyone, loss_of, spread_net, whole_net
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import lina
from lina import parallel
from lina.parallel.transport import carriers
from lina.parallel.transport.nccl import NCCL

from helpers import acc_dtype, assert_within_rounding, float_dtypes


def routed(rank: int, T: int, K: int, experts: int, dtype, device, kind: str):
    """What rank `rank` sends: random ids, some of them absent; or all to expert 0; or all absent."""
    draw = torch.Generator().manual_seed(rank + 1)
    x = torch.randn(T, 5, generator=draw, dtype=torch.float64)    # 5: 10 bytes a row in bf16, not 4n
    weight = torch.rand(T, K, generator=draw, dtype=torch.float64)
    expert = torch.rand(T, experts + 2, generator=draw).argsort(-1)[:, :K] - 1      # -1 and E are absent
    if kind != "random":
        expert.fill_(0 if kind == "one" else -1)
    return x.to(device, dtype), weight.to(device, acc_dtype(dtype)), expert.to(device, torch.int32)


def routes(device, kind: str) -> None:
    """Each token once to each rank with an expert for it, in order; sums and gradients as on one rank."""
    world, me = dist.get_world_size(), dist.get_rank()
    group, experts = dist.group.WORLD, 3 * world
    for dtype in float_dtypes(device.type):
        for K in (1, 3):
            sent = [routed(r, (4, 0, 7, 1)[r], K, experts, dtype, device, kind) for r in range(world)]
            x, weight, expert = sent[me]
            x, weight = x.requires_grad_(), weight.requires_grad_()
            strided = x.t().contiguous().t()                           # rows of x are not contiguous
            x_RD, weight_RK, expert_RK, route = parallel.dispatch(strided, weight, expert, experts, group)

            want = [row for triple in sent for row in zip(*triple, strict=True)
                    if ((row[2] >= 3 * me) & (row[2] < 3 * me + 3)).any()]
            assert len(x_RD) == len(want), f"{len(x_RD)} rows arrived, want {len(want)}"
            for r, (a, w, e) in enumerate(want):
                assert torch.equal(x_RD[r], a) and torch.equal(weight_RK[r], w)
                mine = (e >= 3 * me) & (e < 3 * me + 3)
                assert torch.equal(expert_RK[r], torch.where(mine, e - 3 * me, -1).int())

            # an "expert" c scales its rows by its weight and c + 1; exact in float64 below
            scale_RK = weight_RK * torch.where(expert_RK >= 0, 3 * me + expert_RK + 1, 0)
            out = parallel.collect((x_RD * scale_RK.sum(1, keepdim=True)).to(dtype), route)
            ref_x, ref_w = (t.detach().double().requires_grad_() for t in (x, weight))
            present = (expert >= 0) & (expert < experts)
            ref = ref_x * (ref_w * torch.where(present, expert + 1, 0)).sum(1, keepdim=True)
            size = experts * (K + world) * 4.0                         # the largest |x| is below 4
            assert out.dtype == dtype
            assert_within_rounding(out, ref, K + 2, scale=size, inner=2, name="out")
            torch.autograd.backward([out, ref], [torch.ones_like(out), torch.ones_like(ref)])
            assert_within_rounding(x.grad, ref_x.grad, K + 2, scale=size, inner=world, name="dx")
            # <dout, row> sums 5 terms; where dtype is narrower, x's rows were rounded products' factors
            limit = 8 * size * torch.finfo(dtype).eps
            assert ((weight.grad - ref_w.grad).abs() <= limit).all(), "dweight"
            assert weight.grad.dtype == weight.dtype and not weight.grad[~present].any()


def disagreement(device, what: str) -> None:
    """One rank with another D, K, dtype, expert count or need of gradients: an error on all; life goes on."""
    world, odd = dist.get_world_size(), dist.get_rank() == dist.get_world_size() - 1
    x, weight = torch.zeros(2, 4, device=device), torch.zeros(2, 2, device=device)
    expert, experts = torch.zeros(2, 2, dtype=torch.int32, device=device), 2 * world
    if odd:
        x = {"D": x[:, :3], "dtype of x": x.bfloat16(),
             "need of gradients": x.clone().requires_grad_()}.get(what, x)
        experts = 4 * world if what == "number of experts" else experts
        if what == "K":
            weight, expert = weight[:, :1], expert[:, :1]
        weight = weight.double() if what == "dtype of weight" else weight
    text = error_of(ValueError, parallel.dispatch, x, weight, expert, experts, dist.group.WORLD)
    assert f"disagree on {what}: [" in text, f"{what}: {text!r}"
    assert len(set(everyone(text))) == 1
    x = torch.ones(2, 4, device=device)
    y, _, _, route = parallel.dispatch(x, weight.float()[:, :1], expert[:, :1], 2 * world, dist.group.WORLD)
    assert torch.equal(parallel.collect(y, route), x)


def meshes(device) -> None:
    """lina's mesh takes the default group's timeout; other people's meshes give the right groups."""
    world, me = dist.get_world_size(), dist.get_rank()
    mesh = lina.mesh(ep=2)
    assert (mesh.mesh_dim_names, tuple(mesh.mesh.shape)) == (("dp", "ep"), (world // 2, 2))
    assert parallel.ep_rank(mesh) == me % 2 and parallel.ep_size(mesh) == 2
    groups = parallel.groups(mesh)
    ranks = dist.get_process_group_ranks
    assert ranks(groups.ep) == [me - me % 2, me - me % 2 + 1]
    assert ranks(groups.replicas) == list(range(me % 2, world, 2))
    assert ranks(groups.world) == list(range(world))
    default = dist.group.WORLD._get_backend(device).options._timeout
    assert default != timedelta(minutes=30) and default != timedelta(minutes=10)
    assert all(g._get_backend(device).options._timeout == default for g in groups)
    assert parallel.groups(mesh) is groups

    only = init_device_mesh(device.type, (world,), mesh_dim_names=("ep",))       # no replicas
    assert parallel.groups(only).replicas.size() == 1 and parallel.local_count(2 * world, only) == 2
    if world == 4:
        deep = init_device_mesh(device.type, (2, 1, 2), mesh_dim_names=("dp", "ep", "cp"))
        assert ranks(parallel.groups(deep).replicas) == [0, 1, 2, 3]
        staged = init_device_mesh(device.type, (2, 2), mesh_dim_names=("pp", "ep"))["ep"]
        found = parallel.groups(staged)                                       # one pipeline stage
        assert ranks(found.world) == ranks(found.ep) == [me - me % 2, me - me % 2 + 1]
        assert ranks(found.replicas) == [me]


def refusals(device) -> None:
    """What cannot work is one clear error on every rank, before anything is sent."""
    world = dist.get_world_size()
    for ep in (0, 3, 2 * world):
        assert f"ep is {ep}" in error_of(ValueError, lina.mesh, ep)
    mesh = lina.mesh(ep=world)
    assert "multiple of" in error_of(ValueError, lina.MoE, 4, 8, world + 1, 1, mesh=mesh)
    assert "multiple of" in error_of(ValueError, parallel.shard, torch.zeros(world + 1, 2), mesh)
    other = init_device_mesh(device.type, (world,), mesh_dim_names=("tp",))
    assert 'named "ep"' in error_of(ValueError, parallel.groups, other)

    net = Net("softmax", mesh, device=device)
    assert "mixed_precision" in error_of(ValueError, lina.ddp, net, mesh, mixed_precision=object())
    assert "process_group" in error_of(ValueError, lina.ddp, net, mesh, process_group=dist.group.WORLD)
    assert "not 'plain'" in error_of(ValueError, lina.ddp, net, mesh, hook=lina.HookState())
    alone = lina.mesh(ep=1)["ep"]             # each rank by itself
    assert "HookState: made for ranks" in error_of(ValueError, lina.HookState(alone).over, mesh)
    assert lina.HookState().over(alone).group.size() == 1
    experts = {id(e.param) for e in parallel.expert_parameters(net)}
    for p in net.parameters():
        p.requires_grad_(id(p) in experts)
    assert "frozen" in error_of(RuntimeError, lina.ddp, net, mesh)
    odd = Net("topk" if dist.get_rank() == 0 else "softmax", mesh, device=device)
    assert "differ in names" in error_of(ValueError, lina.ddp, odd, mesh)
    wrapped = lina.ddp(Net("softmax", mesh, device=device), mesh)
    assert "zero tokens" in error_of(RuntimeError, wrapped.join)
    assert "norm_type" in error_of(ValueError, lina.clip_grad_norm_, wrapped, 1.0, 0.5)
    if world == 4:                            # experts of 2 ranks, with 2 replicas to reduce over
        halves = lina.mesh(ep=world // 2)
        hidden = Net("softmax", halves, device=device)
        blind = lina.ddp(hidden, halves)
        hidden.forward = lambda x: SimpleNamespace(out=x)
        assert "returned a SimpleNamespace" in error_of(
            RuntimeError, blind, torch.zeros(1, 4, device=device))

    x, weight = torch.zeros(2, 4, device=device), torch.zeros(2, 2, device=device)
    expert, group = torch.zeros(2, 2, dtype=torch.int32, device=device), dist.group.WORLD
    for text, args in [("x is", (x[0], weight, expert, world)),
                       ("weight is", (x, weight[:1], expert, world)),
                       ("expert is", (x, weight, expert.long(), world)),
                       ("experts is", (x, weight, expert, world + 1))]:
        assert f"dispatch: {text}" in error_of(ValueError, parallel.dispatch, *args, group)
    y, _, _, route = parallel.dispatch(x, weight, expert, world, group)
    assert "one row for each" in error_of(ValueError, parallel.collect, torch.zeros(len(y) + 1, 4), route)
    x.requires_grad_()
    y, _, _, route = parallel.dispatch(x, weight, expert, world, group)
    out = parallel.collect(y.square(), route)
    grad, = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert "differentiable once" in error_of(RuntimeError, torch.autograd.grad, grad.sum(), x)


def same_as_plain(device, how: str, schedule: str = "plain") -> None:
    """Checkpointing (both kinds), torch.compile, a user's hook and tracing change no bit."""
    mesh, rank = lina.mesh(ep=2), dist.get_rank()
    whole = whole_net("softmax", device)
    like = next(whole.parameters())
    found = []
    for changed in (False, True):
        net = spread_net(whole, "softmax", mesh)
        if changed and how in ("reentrant", "checkpoint"):
            inner = net.moe1.forward
            net.moe1.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=how == "reentrant")
        if changed and how == "compile":
            net.moe1.compile(backend="eager")      # eager: the same kernels, so the same bits
        wrapped, seen = lina.ddp(net, mesh, schedule=schedule), []
        if changed and how == "hook":
            def hook(state, bucket):
                state.append(bucket.index())
                return allreduce_hook(None, bucket)
            wrapped.register_comm_hook(seen, hook)
        for step in range(2):
            if changed and how == "trace":
                with lina.trace() as record:
                    loss_of(wrapped, *batch(rank, step, like)).backward()
                totals = record.totals()
                assert totals["a2a"] > 0 and totals["allreduce"] > 0, totals
                names = {s.name.removesuffix(" 1/2") for s in record.spans}       # of several chunks
                assert {"dispatch", "dispatch counts", "collect", "dispatch backward", "collect backward",
                        "bucket 0"} <= names, names
            else:
                loss_of(wrapped, *batch(rank, step, like)).backward()
        assert bool(seen) == (changed and how == "hook")
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def agreement(device, by: str) -> None:
    """One rank told otherwise: one ValueError on all ranks that names what differs, at once."""
    odd = dist.get_rank() == 1
    mesh = lina.mesh(ep=2)
    net = spread_net(whole_net("softmax", device), "softmax", mesh)
    if by == "fsdp":
        from fsdp_worker import sharded
        net = sharded(net)
    wrap = getattr(lina, by)

    def told(name: str, **options) -> str:
        text = error_of(ValueError, wrap, net, mesh, **{"schedule": "lina", **options})
        assert text.startswith(f"{by}: the ranks differ in {name}: ") and "on ranks [1]" in text, text
        assert len(set(everyone(text))) == 1
        return text

    told("schedule", schedule="plain" if odd else "lina")
    text = told("degree", degree=(2, 3) if odd else (3, 3))
    assert "(2, 3) on ranks [1]" in text and "(3, 3) on ranks [0, 2, 3]" in text, text
    told("degree", degree=(1, 1) if odd else None)
    for name, values in (("link", ((1e-5, 1e-9), (2e-5, 1e-9))), ("micro_op_s", (1e-3, 2e-3))):
        told(name, hook=lina.HookState(**{name: values[odd]}))
    told("find_unused_parameters", find_unused_parameters=odd)
    settings = parallel.settings(mesh)
    settings.transport = "nccl" if odd else "c10d"
    told("transport")
    settings.transport, settings.tokens = "c10d", 7 + odd
    told("tokens")
    settings.tokens = None
    if by == "ddp":
        told("compress", hook=lina.HookState(compress="bf16" if odd else None))
        told("schedule", schedule="auto" if odd else "lina")
    settings.degree = (1 + odd, 1)                       # overwritten, so of no account
    wrapped = wrap(net, mesh, schedule="lina")
    data = batch(dist.get_rank(), 0, next(net.parameters()).detach().new_empty(0))
    settings.transport = "nccl"
    assert "gradients give way to transport 'c10d'" in error_of(ValueError, wrapped, data[0])
    settings.transport = "c10d"
    loss_of(wrapped, *data).backward()


def carried(device) -> None:
    """Gradients give way to one transport: another one for tokens, set later, is refused on every rank."""
    mesh, rank = lina.mesh(ep=2), dist.get_rank()
    net = spread_net(whole_net("softmax", device), "softmax", mesh)
    like = next(net.parameters())
    hook = lina.HookState()
    wrapped = lina.ddp(net, mesh, schedule="lina", hook=hook)
    refusal = "gradients give way to transport 'c10d', and a mesh has 'nccl'"
    for now in (mesh, lina.regroup(wrapped, None, 4), lina.regroup(wrapped, None, 2)):
        parallel.settings(now).transport = "nccl"
        if now is net.moe1.experts.mesh:
            assert refusal in error_of(ValueError, wrapped, batch(rank, 0, like)[0])
        parallel.settings(now).transport = "auto"        # c10d by its other name
    net.moe2.experts.mesh = other = lina.mesh(ep=2, transport="nccl")
    assert refusal in error_of(ValueError, wrapped, batch(rank, 0, like)[0])
    assert refusal in error_of(ValueError, lina.ddp, net, mesh, schedule="lina")
    net.moe2.experts.mesh = mesh
    loss_of(wrapped, *batch(rank, 0, like)).backward()
    assert refusal in error_of(ValueError, hook.over, other)
    assert lina.HookState(mesh).over(other).carrier == "nccl", "without a queue it follows"

    world = dist.group.WORLD
    assert lina.HookState(world).carrier == lina.HookState().carrier == "nccl"
    assert lina.HookState(world, transport="c10d").carrier == "c10d"
    assert lina.HookState(world).over(mesh).carrier == "c10d"
    assert refusal in error_of(ValueError, lina.HookState(world, transport="c10d").over, other)
    for given, transport in ((world, "auto"), (world, "x"), (mesh, "c10d")):
        said = error_of(ValueError, lina.HookState, given, transport=transport)
        assert f"transport is {transport!r}, must be one of c10d, nccl, p2p" in said, said


def known_dead(device) -> None:
    """Collectives of torch's on CUDA would wait for a rank that lina's communicators know is gone."""
    mesh = lina.mesh(ep=2)
    net = spread_net(whole_net("softmax", device), "softmax", mesh)

    def check() -> None:
        raise RuntimeError("no answer")

    carrier = object.__new__(NCCL)
    carrier.group, carrier.comm = parallel.groups(mesh).ep, SimpleNamespace(check=check)
    peers = {parallel.groups(mesh).ep: {2: [SimpleNamespace(lost=lambda: True, check=check)]}}
    for place, by in ((carriers._made, {mesh: {"nccl": carrier}}), (carriers.in_use, peers)):
        with mock.patch.object(dist, "all_reduce"), mock.patch.object(dist, "all_gather"):
            for call, args in ((lina.clip_grad_norm_, (net, 1.0)), (lina.gathered_state_dict, (net,))):
                place.update(by)
                said = error_of(RuntimeError, call, *args)
                assert f"{call.__name__}: the exchange among ranks" in said and "no answer" in said, said
                assert not dist.all_reduce.called and not dist.all_gather.called
        for key in by:
            del place[key]
    lina.gathered_state_dict(net)
