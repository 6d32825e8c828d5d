"""What every rank does in test_hook.py: gradients in micro-ops that let all-to-alls pass."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from parallel_worker import WIDTH, batch, error_of, everyone, loss_of, spread_net, whole_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lina
from lina import parallel
from lina.parallel.gradients.queue import HostQueue
from lina.parallel.transport.base import gate

from helpers import assert_within_rounding

SMALL = (0.0, 1e-6)          # a link on which half a millisecond is 500 bytes: micro-ops of 256


class Recorder:
    """Stands for a queue's policy; its calls come under one lock, so their order is what happened."""

    def __init__(self, policy) -> None:
        self.policy, self.events, self.works = policy, [], []

    def a2a(self, delta: int) -> None:
        self.policy.a2a(delta)
        self.events.append(("a2a", delta))
        if not self.policy.outstanding:
            assert all(work.is_completed() for work in self.works), "micro-ops may start too early"

    def submit(self, size: int) -> int:
        found = self.policy.submit(size)
        self.events.append(("submit", found, size))
        return found

    def next(self):
        op = self.policy.next()
        if op:
            self.events.append(("start", *op))
        return op

    def finished(self) -> None:
        self.policy.finished()
        self.events.append(("end",))

    @property
    def outstanding(self) -> int:
        return self.policy.outstanding


def assert_in_order(events: list, what: str) -> None:
    """Nothing starts beside an all-to-all or another micro-op; every byte goes once, in order."""
    outstanding = running = 0
    buckets: list[list[int]] = []          # [bytes, bytes gone]
    for kind, *more in events:
        if kind == "a2a":
            outstanding += more[0]
            assert outstanding >= 0, what
        elif kind == "submit":
            assert more[0] == len(buckets), what
            buckets.append([more[1], 0])
        elif kind == "start":
            bucket, offset, size, last = more
            assert outstanding == 0, f"{what}: a micro-op starts beside {outstanding} all-to-alls"
            assert not running, f"{what}: two micro-ops at a time"
            assert all(size == gone for size, gone in buckets[:bucket]), f"{what}: bucket {bucket} overtakes"
            assert offset == buckets[bucket][1], f"{what}: bucket {bucket} continues at {offset}"
            buckets[bucket][1] += size
            assert last == (buckets[bucket][0] == buckets[bucket][1]), what
            running = 1
        else:
            running = 0
    assert outstanding == running == 0 and all(size == gone for size, gone in buckets), what
    assert buckets, f"{what}: nothing was reduced"


def order(device, ep: str, degree: str) -> None:
    """The recorded order of 3 steps: all-to-alls first, every gradient once, the same on all ranks."""
    mesh = lina.mesh(ep=int(ep))
    whole = whole_net("deepseek", device)
    rank, like = dist.get_rank(), next(whole.parameters())
    net = spread_net(whole, "deepseek", mesh)
    state = lina.HookState(mesh, link=SMALL)
    wrapped = lina.ddp(net, mesh, schedule="lina", degree=(int(degree), int(degree)), hook=state,
                       bucket_cap_mb=0.0005)
    inner = state.queue(device)._state
    recorder = inner.policy = Recorder(inner.policy)
    exchange = dist.all_to_all_single

    def watched(*args, **kw):
        assert gate.outstanding > 0, "an all-to-all starts while micro-ops may"
        work = exchange(*args, **kw)
        recorder.works += [work] if work else []
        return work

    dist.all_to_all_single = watched
    for step in range(3):
        wrapped.zero_grad()
        loss_of(wrapped, *batch(rank, step, like)).backward()
    dist.all_to_all_single = exchange
    assert bool(recorder.works) == (int(degree) > 1)           # the plain way waits for each at once
    assert_in_order(recorder.events, f"ep {ep}, degree {degree}")
    ops = [e for e in recorder.events if e[0] in ("submit", "start")]
    assert len(set(everyone(repr([e for e in ops if e[0] == "submit"])))) == 1
    assert len(set(everyone(repr([e for e in ops if e[0] == "start"])))) == 1
    gradients = sum(p.nbytes for p in net.parameters())
    local = sum(e.param.nbytes for e in parallel.expert_parameters(net))
    expected = gradients if dist.get_world_size() > int(ep) else gradients - local     # without replicas
    submitted = [e[2] for e in ops if e[0] == "submit"]
    assert len(submitted) > 2 * 3, submitted                   # several buckets a step
    # after the first step DistributedDataParallel fills its buckets anew, with the same gradients
    assert sum(submitted) == 3 * expected, (sum(submitted), 3 * expected)
    assert any(not e[4] for e in ops if e[0] == "start"), "no bucket was cut"


class Dense(nn.Module):
    """Without experts; the last layer may be left out."""

    def __init__(self, **where) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, **where) for _ in range(6))

    def forward(self, x, skip: bool = False):
        for part in self.parts[:-1] if skip else self.parts:
            x = torch.tanh(part(x))
        return x


OPTIONS = {"plain": {}, "view": dict(gradient_as_bucket_view=True),
           "unused": dict(find_unused_parameters=True), "static": dict(static_graph=True)}


def alone(device, which: str) -> None:
    """With torch's own DistributedDataParallel, against its own allreduce; no_sync accumulates."""
    torch.manual_seed(3)
    first = Dense(device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    nets = []
    for hooked in (False, True):
        net = Dense(device=device, dtype=first.parts[0].weight.dtype)
        net.load_state_dict(first.state_dict())
        net = DistributedDataParallel(net, bucket_cap_mb=0.0005, **OPTIONS[which])
        if hooked:
            net.register_comm_hook(lina.HookState(link=SMALL), lina.allreduce_hook)
        nets.append(net)
    draw = torch.Generator().manual_seed(dist.get_rank())
    for step in range(4):
        x = torch.randn(3, WIDTH, generator=draw, dtype=torch.float64).to(device, first.parts[0].weight.dtype)
        for net in nets:
            if step % 2 == 0:
                net.zero_grad()
            with net.no_sync() if step % 2 == 0 and which != "static" else nullcontext():
                net(x, skip=which == "unused" and step < 2).square().mean().backward()
        for (name, want), got in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            assert (want.grad is None) == (got.grad is None), name
            if want.grad is not None:          # the ranks' sum in another order
                assert_within_rounding(got.grad, want.grad, dist.get_world_size(),
                                       scale=want.grad.abs().max().item(), name=f"step {step}: {name}")


def compressed(device, dtype: str) -> None:
    """The stated bound on what 16 bits cost, element by element; and that they do travel in 16 bits."""
    n, narrow = dist.get_world_size(), dict(fp16=torch.float16, bf16=torch.bfloat16)[dtype]
    net = nn.Linear(64, 40, bias=False, device=device)
    wrapped = DistributedDataParallel(net)
    wrapped.register_comm_hook(lina.HookState(compress=dtype, link=SMALL), lina.allreduce_hook)
    torch.manual_seed(dist.get_rank())
    x = (torch.randn(1, 64) * 10.0 ** torch.randint(-6, 3, (64,))).to(device)     # down to fp16's subnormals
    x[0, 0] = 1e5 if dist.get_rank() == 0 else 0.0         # over fp16's range, but not once divided
    wrapped(x).sum().backward()
    mine = x.expand(40, 64).contiguous().double()
    parts = [torch.empty_like(mine) for _ in range(n)]
    dist.all_gather(parts, mine)
    want, size = sum(parts) / n, sum(p.abs() for p in parts) / n
    eps = torch.finfo(narrow).eps
    limit = n * eps / 2 * size * (1 + eps) ** n + (n * 2.0 ** -25 if dtype == "fp16" else 0)
    limit += torch.finfo(torch.float32).eps * size              # dividing by n, in float32
    error = (net.weight.grad.double() - want).abs()
    assert (error <= limit).all(), f"{(error - limit).max()} over the bound"
    assert (error > torch.finfo(torch.float32).eps * size).any(), "nothing was rounded"


def differing(device, name: str) -> None:
    """Ranks whose states differ learn it at the first bucket, all of them, whoever wrapped the model."""
    values = dict(compress=(None, "bf16"), link=(SMALL, (0.0, 2e-6)), micro_op_s=(1e-3, 2e-3))[name]
    wrapped = DistributedDataParallel(Dense(device=device))
    state = lina.HookState(**{name: values[dist.get_rank() == 2]})
    wrapped.register_comm_hook(state, lina.allreduce_hook)
    text = error_of(ValueError, wrapped(torch.ones(2, WIDTH, device=device)).sum().backward)
    shown = f"HookState: the ranks differ in {name}: {values[0]!r} on ranks [0, 1, 3]; {values[1]!r}"
    assert shown in text, text
    assert len(set(everyone(text))) == 1 and state._queue is None


def uneven(device) -> None:
    """With a group that rank 0 alone is in, by which torch may name others differently: one of all ranks is
    made, one of some is made or refused on each of them, and nobody waits in vain."""
    alone = dist.new_group([0])
    half = parallel.groups(parallel.mesh(2)).ep
    queue, flat = HostQueue(dist.group.WORLD, SMALL, 1e-3), torch.full((8,), 1.0 + dist.get_rank() // 2)
    members = dist.get_process_group_ranks(half)
    names = everyone(c10d._hash_ranks_to_str(members))
    refused = names[members[0]] != names[members[1]]
    said = error_of(ValueError, queue.submit, flat, "half", group=half)
    assert ("different numbers of groups" in said) == refused, said
    assert torch.equal(queue.submit(flat, "all").wait(), torch.full((8,), 1.5))
    queue.close()
    if dist.get_rank() == 0:
        dist.destroy_process_group(alone)


def states(device) -> None:
    """Pickling keeps the user's settings alone; what is out of limits is refused; threads end."""
    state = lina.HookState(parallel.mesh(1), micro_op_s=1e-3, compress="bf16", link=(1e-5, 1e-9))
    again = pickle.loads(pickle.dumps(state))
    assert (again.micro_op_s, again.compress, again.link) == (1e-3, "bf16", (1e-5, 1e-9))
    assert again.group is dist.group.WORLD and again._queue is None
    for text, options in (("compress is 'int8'", dict(compress="int8")),
                          ("micro_op_s is 0", dict(micro_op_s=0)), ("link is", dict(link=(-1.0, 0.0)))):
        assert text in error_of(ValueError, lina.HookState, **options)
    assert "schedule is 'other'" in error_of(ValueError, lina.ddp, nn.Linear(2, 2, device=device),
                                             parallel.mesh(1), schedule="other")

    def threads() -> int:
        deadline = time.time() + 5                   # an ended thread takes a moment to be gone
        while time.time() < deadline and any(t.name == "lina gradients" for t in threading.enumerate()):
            time.sleep(0.01)
        return sum(t.name == "lina gradients" for t in threading.enumerate())

    gc.collect()                                     # queues of scenarios before
    assert threads() == 0
    queue = HostQueue(dist.group.WORLD, SMALL, 1e-3)
    flat = torch.arange(1000.0, device=device)
    want = flat.clone()
    assert torch.equal(queue.submit(flat, "test").wait(), want)        # the mean of equal things
    with gate:                                       # as during an all-to-all: nothing may start
        late = queue.submit(flat, "held back")
        time.sleep(0.05)
        assert not late.done()
    assert torch.equal(late.wait(), want)
    with gate:
        late = queue.submit(flat, "never to start")
        queue.close()
    assert "closed" in error_of(RuntimeError, late.wait)
    assert "after an earlier failure" in error_of(RuntimeError, queue.submit, flat, "test")
    assert threads() == 0
    queue = HostQueue(dist.group.WORLD, SMALL, 1e-3)
    assert any(t.name == "lina gradients" for t in threading.enumerate())
    dist.barrier()
    dist.destroy_process_group(queue._state.group())
    assert threads() == 0, "the thread outlives its group"
    assert "destroyed" in error_of(RuntimeError, queue.submit, flat, "test")


def reduced(state) -> torch.Tensor:
    return state._queue.submit(torch.zeros(3), "what comes later").wait()


def dying(device, how: str) -> None:
    """A rank fails in backward, with micro-ops of the last layers queued behind its all-to-alls."""
    mesh = lina.mesh(ep=2)
    net = spread_net(whole_net("softmax", device), "softmax", mesh)
    state = lina.HookState(mesh, link=SMALL)
    wrapped = lina.ddp(net, mesh, schedule="lina", hook=state, bucket_cap_mb=0.0005)
    like = next(net.parameters())

    def fail(_):
        print(f"queued {state._queue._state.policy.pending}", flush=True)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this rank's own mistake")

    rank, victim = dist.get_rank(), dist.get_world_size() - 1
    for step in range(3):
        if step == 2:
            print(f"failing at {time.time()}", flush=True)
            if rank >= victim - 1:     # it and who shares its experts: nothing of theirs may start
                gate.change(1)
            if rank == victim:
                net.moe1.experts.register_forward_hook(lambda module, args, y: y.register_hook(fail) and None)
        try:
            loss_of(wrapped, *batch(rank, step, like, tokens=5)).backward()
        finally:
            if step == 2 and rank >= victim - 1:
                gate.change(-1)
            if step == 2 and rank != victim:
                print(f"later: {error_of(RuntimeError, reduced, state)}", flush=True)
    print("three steps done", flush=True)
