"""What every rank does in test_fsdp.py: torch's fully_shard for the dense part, lina for the experts."""

from __future__ import annotations

import os
import threading
import time
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.fsdp as torch_fsdp
from hook_worker import SMALL
from parallel_worker import (
    assert_same,
    batch,
    error_of,
    loss_of,
    mean_loss,
    spread_net,
    three_steps,
    whole_net,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lina
from lina import parallel
from lina.parallel.gradients.reduce import ExpertReducer
from lina.parallel.gradients.reduce_scatter import AtOnce, ReduceScatter
from lina.parallel.transport import nccl
from lina.parallel.transport.base import gate

from helpers import passes


def sharded(net, where=None):
    """Every layer by itself, then what is left; spread experts stay out."""
    device = next(net.parameters()).device.type            # torch's default is what the machine has
    where = where or init_device_mesh(device, (dist.get_world_size(),))
    experts = {e.param for e in parallel.expert_parameters(net)}
    for part in (net.moe1, net.middle, net.moe2, net):
        fully_shard(part, mesh=where, ignored_params=experts)
    return net


def comm_of(net):
    """The one reduce-scatter of all modules."""
    states = [m._get_fsdp_state() for m in net.modules() if isinstance(m, torch_fsdp.FSDPModule)]
    found = {(getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group])[0]._reduce_scatter_comm
             for s in states}
    assert len(states) == 4 and len(found) == 1, found
    return found.pop()


def parity(device, ep: str, schedule: str, where: str, gate_name: str = "deepseek",
           transport: str = "auto") -> None:
    """3 steps of SGD with momentum equal to one process's over all ranks' batches; also as HSDP."""
    mesh = lina.mesh(ep=int(ep), transport=transport)
    ref = whole_net(gate_name, device)
    # other replicas start wrong; the call mends them
    net = sharded(spread_net(ref, gate_name, mesh, spoil=True), mesh if where == "hsdp" else None)
    hook = lina.HookState(mesh, link=SMALL) if schedule == "lina" else None
    assert lina.fsdp(net, mesh, schedule=schedule, hook=hook, degree=passes(schedule, transport)) is net
    three_steps(net, ref, mesh)
    if schedule == "lina" and device.type == "cpu":
        [carrier] = comm_of(net)._carriers.values()
        calls, started = 3 * 4, carrier._policy.started
        assert started > calls, f"{started} micro-ops of {calls} reduce-scatters: nothing was cut"
        assert carrier._policy.pending == 0


def accumulation(device) -> None:
    """A pass without reduction, one with, another without zero_grad: as torch's own average; and once
    more after the schedule was changed."""
    mesh = lina.mesh(ep=dist.get_world_size() // 2)
    ref = whole_net("softmax", device)
    net = lina.fsdp(sharded(spread_net(ref, "softmax", mesh)), mesh, schedule="lina")
    rank, like = dist.get_rank(), next(ref.parameters())
    reduces = mock.patch.object(ExpertReducer, "reduce", autospec=True, side_effect=ExpertReducer.reduce)
    with reduces as reduce:
        for step, syncs in enumerate([False, True, True]):
            net.set_requires_gradient_sync(syncs)
            loss_of(net, *batch(rank, step, like)).backward()
            mean_loss(ref, step).backward()
            assert reduce.call_count == step, "experts are reduced when fully_shard reduces, and only then"
            if syncs:
                assert_same(net, ref, mesh, f"pass {step}")
    hooks = len(net._forward_hooks), len(net._forward_pre_hooks)
    lina.fsdp(net, mesh)
    assert (len(net._forward_hooks), len(net._forward_pre_hooks)) == hooks
    assert isinstance(comm_of(net), AtOnce)
    net.zero_grad()
    ref.zero_grad()
    loss_of(net, *batch(rank, 7, like)).backward()
    mean_loss(ref, 7).backward()
    assert_same(net, ref, mesh, "plain again")


def exact(device) -> None:
    """Every dtype and operation against float64, at sizes around a micro-op's; the order of ranks is kept."""
    group, n, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    scatter = ReduceScatter(lina.HookState(group, link=SMALL))
    third = dist._make_nccl_premul_sum(1 / 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        # nothing, one element, less than one micro-op (256 bytes here), several, and a remainder
        for count in (0, 1, 31, 1000, 1024):
            for op, factor in ((dist.ReduceOp.SUM, 1), (dist.ReduceOp.AVG, 1 / n), (third, 1 / 3)):
                rows = [torch.randn(n, count, generator=torch.Generator().manual_seed(r)).to(device, dtype)
                        for r in range(n)]
                # torch gives new memory, that may hold anything
                out = scatter.allocate((count,), dtype=dtype, device=device).fill_(float("nan"))
                inp = scatter.allocate((n * count,), dtype=dtype, device=device).copy_(rows[rank].view(-1))
                assert scatter(out, inp, group, op) is None
                want = sum(r[rank].double() for r in rows) * factor
                size = sum(r[rank].double().abs() for r in rows)
                # scaled once, and rounded at each of n - 1 additions
                limit = n * torch.finfo(dtype).eps * size + n * torch.finfo(dtype).tiny
                assert ((out.double() - want).abs() <= limit).all(), (dtype, count, op)
    [carrier] = scatter._carriers.values()
    size = carrier._policy.size if device.type == "cpu" else carrier.micro_op_bytes
    assert size < 1000, "nothing was cut"
    work = scatter(out, inp, group, dist.ReduceOp.SUM, async_op=True)
    assert work.wait()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert work.is_completed()
    assert "must be SUM" in error_of(ValueError, scatter, out, inp, group, dist.ReduceOp.MAX)
    assert "int32" in error_of(ValueError, scatter, out.int(), inp.int(), group, dist.ReduceOp.SUM)
    said = error_of(ValueError, scatter, out, inp[:-1], group, dist.ReduceOp.SUM)
    assert f"{n * 1024 - 1} elements" in said


def held(device) -> None:
    """No micro-op starts while an all-to-all is outstanding on any rank; then all go."""
    group, n = dist.group.WORLD, dist.get_world_size()
    scatter = ReduceScatter(lina.HookState(group, link=SMALL))
    out, inp = torch.zeros(1000, device=device), torch.ones(n * 1000, device=device)
    scatter(out, inp, group, dist.ReduceOp.SUM)
    [carrier] = scatter._carriers.values()
    before = carrier._policy.started
    dist.barrier()
    late = dist.get_rank() == 0
    if late:
        gate.change(1)
    thread = threading.Thread(target=scatter, args=(out.zero_(), inp, group, dist.ReduceOp.SUM))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    if late:
        assert carrier._policy.started == before, "a micro-op started beside an all-to-all"
        gate.change(-1)
    thread.join(20)
    assert not thread.is_alive() and (out == n).all()


def held_on_device(device) -> None:
    """The same by the priority word: the stream waits, the host does not."""
    group, n = dist.group.WORLD, dist.get_world_size()
    transport = nccl.NCCL(group)
    scatter = ReduceScatter(lina.HookState(group, link=SMALL))
    out, inp = torch.zeros(1000, device=device), torch.ones(n * 1000, device=device)
    scatter(out, inp, group, dist.ReduceOp.SUM)          # makes connections, loads kernels
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    transport.imminent()
    transport.stream.synchronize()
    start = time.perf_counter()
    scatter(out.zero_(), inp, group, dist.ReduceOp.SUM)
    done = torch.cuda.current_stream().record_event()
    assert time.perf_counter() - start < 0.1, "the host waited"
    time.sleep(0.05)                # less than the word may stay raised, LINA_PRIORITY_HOLD_S
    assert not done.query(), "a micro-op started beside an all-to-all"
    transport.settled()
    done.synchronize()
    assert (out == n).all()
    transport.close()


def left_alone(device) -> None:
    """One rank dies: the others' reduce-scatter ends with an error, and the next refuses."""
    group = dist.group.WORLD
    scatter = ReduceScatter(lina.HookState(group, link=SMALL))
    out, inp = torch.zeros(1000), torch.ones(1000 * group.size())
    scatter(out, inp, group, dist.ReduceOp.SUM)
    if group.rank() == 3:
        os._exit(3)
    print(f"first {error_of(RuntimeError, scatter, out, inp, group, dist.ReduceOp.SUM)}", flush=True)
    print(f"later {error_of(RuntimeError, scatter, out, inp, group, dist.ReduceOp.SUM)}", flush=True)
    os._exit(0)


def errors(device) -> None:
    """Each on every rank, before anything has changed."""
    n = dist.get_world_size()
    mesh = lina.mesh(ep=2)
    ref = whole_net("softmax", device)

    def fresh():
        return spread_net(ref, "softmax", mesh)

    net = fresh()
    assert "call torch.distributed.fsdp.fully_shard" in error_of(ValueError, lina.fsdp, net, mesh)
    flat = init_device_mesh(device.type, (n,))
    fully_shard(net.middle, mesh=flat)
    assert "first.weight is sharded by no fully_shard" in error_of(ValueError, lina.fsdp, net, mesh)
    assert "schedule is 'other'" in error_of(ValueError, lina.fsdp, net, mesh, schedule="other")
    assert "compress is 'bf16'" in error_of(ValueError, lina.fsdp, net, mesh, schedule="lina",
                                            hook=lina.HookState(mesh, compress="bf16"))
    with mock.patch.object(torch_fsdp, "FSDPModule", nn.Linear):
        assert "has no FSDPModule.set_custom" in error_of(RuntimeError, lina.fsdp, net, mesh)
    net = fresh()
    fully_shard(net, mesh=flat)
    assert "fully_shard has sharded it besides" in error_of(ValueError, lina.fsdp, net, mesh)
    part = init_device_mesh(device.type, (n // 2, 2), mesh_dim_names=("a", "b"))["a"]
    net = sharded(fresh(), part)
    assert "must be over all ranks of the mesh given" in error_of(ValueError, lina.fsdp, net, mesh)
    net = sharded(fresh())
    part = init_device_mesh(device.type, (n // 2, 2), mesh_dim_names=("a", "ep"))["ep"]
    assert "experts.w_up is spread over ranks" in error_of(ValueError, lina.fsdp, net, part)
    lina.fsdp(net, mesh)
    parallel.release(e.param for e in parallel.expert_parameters(net))
    assert "no longer spread" in error_of(RuntimeError, net, batch(0, 0, next(ref.parameters()))[0])
