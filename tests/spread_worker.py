"""What every rank does in test_spread.py: the layer in several passes against the plain one."""

from __future__ import annotations

import random
import time
from typing import ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from parallel_worker import EXPERTS, batch, error_of, everyone, loss_of, spread_net, whole_net

import lina
from lina import parallel
from lina.parallel.tokens import spread
from lina.parallel.transport import carriers
from lina.parallel.transport.base import gate

from helpers import Carveout, acc_dtype, assert_within_rounding, float_dtypes, passes

D, F, K, LOCAL = 5, 6, 3, 2      # D: rows of 10 bytes in bf16, no multiple of 4
TOKENS = {                       # by rank
    "uneven": (9, 0, 14, 3),
    "few": (1, 2, 0, 1),         # fewer than there are chunks
    "none": (0, 0, 0, 0),
}
PAIRS = K * max(map(sum, TOKENS.values()))
NAMES = ("out", "dx", "dweight", "dw_up", "dw_down", "db_up", "db_down")


def exact(device) -> torch.dtype:
    return torch.float64 if device.type == "cpu" else torch.float32


def weights(device, dtype, *, bias: bool, gated: bool) -> list:
    draw = torch.Generator().manual_seed(10 + dist.get_rank())
    U = 2 * F if gated else F
    shapes = [(LOCAL, U, D), (LOCAL, D, F), *([(LOCAL, U), (LOCAL, D)] if bias else [])]
    made = [torch.randn(s, generator=draw, dtype=torch.float64).mul(0.5).to(device, dtype) for s in shapes]
    return made + [None] * (4 - len(made))


def tokens(device, dtype, T: int, experts: int, kind: str = "random"):
    """Ids are random, some of them absent; or all of expert 0; or all absent."""
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    x = torch.randn(T, D, generator=draw, dtype=torch.float64)
    weight = torch.rand(T, K, generator=draw, dtype=torch.float64)
    expert = torch.rand(T, experts + 2, generator=draw).argsort(-1)[:, :K] - 1       # -1 and E are absent
    if kind != "random":
        expert.fill_(-1)
        expert[:, 0] = 0 if kind == "one" else -1
    return x.to(device, dtype), weight.to(device, acc_dtype(dtype)), expert.to(device, torch.int32)


def results(mesh, how, x, weight, expert, experts, w, frozen=(), **options) -> list:
    """out and the gradients of all that is not frozen; ``how`` is a degree, or None for the plain way."""
    chosen = parallel.settings(mesh)
    carrier, degree = chosen.transport, chosen.degree
    chosen.degree = how or (1, 1)
    if how is None:
        chosen.transport = "c10d"
    given = [None if t is None else t.detach().requires_grad_(i not in frozen)
             for i, t in enumerate((x, weight, *w))]
    out = parallel.moe(given[0], given[1], expert, given[2], given[3], experts=experts, mesh=mesh,
                       b_up=given[4], b_down=given[5], **options)
    dout = torch.linspace(-1, 1, max(out.numel(), 1), dtype=torch.float64, device=out.device)
    out.backward(dout[:out.numel()].view(out.shape).to(out.dtype))
    chosen.transport, chosen.degree = carrier, degree
    assert gate.outstanding == 0, "the gate was left closed"
    return [out.detach(), *(None if t is None else t.grad for t in given)]


def assert_equal(got, want, passes: int, what: str) -> None:
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert (a is None) == (b is None), f"{what}: {name} is {a}"
        if a is not None:
            # the same sums in another grouping; rounded on the way where dtypes are narrow: h, activation
            # and row of each of K experts forward and backward, and each pass's share
            assert_within_rounding(a, b, D + F + PAIRS, scale=b.abs().max().item() if b.numel() else 0.0,
                                   inner=6 * K + passes, name=f"{what}: {name}")


def degrees(device, ep: str, transport: str = "c10d") -> None:
    """All degrees from 1 to 5 forward, with all backward, tight; empty, few and uneven tokens."""
    mesh, experts = lina.mesh(ep=int(ep), transport=transport), LOCAL * int(ep)
    w = weights(device, exact(device), bias=True, gated=True)
    for name, counts in TOKENS.items():
        given = (*tokens(device, exact(device), counts[dist.get_rank() % 4], experts), experts, w)
        want = results(mesh, None, *given)
        for forward in range(1, 6):
            for backward in range(1, 6):
                got = results(mesh, (forward, backward), *given)
                assert_equal(got, want, backward, f"{name}, degree {forward}, {backward}")


def kinds(device, transport: str = "c10d") -> None:
    """All dtypes; all tokens to one rank, and to none; no biases, a plain activation; frozen inputs."""
    world, me = dist.get_world_size(), dist.get_rank()
    mesh, experts = lina.mesh(ep=world, transport=transport), LOCAL * world
    for dtype in float_dtypes(device.type):
        for kind in ("random", "one", "none"):
            given = (*tokens(device, dtype, TOKENS["uneven"][me], experts, kind), experts)
            w = weights(device, dtype, bias=kind == "one", gated=kind != "none")
            options = dict(activation="swiglu" if kind != "none" else "gelu")
            want = results(mesh, None, *given, w, **options)
            for how in ((1, 3), (2, 2), (4, 3)):
                assert_equal(results(mesh, how, *given, w, **options), want, how[1], f"{dtype} {kind} {how}")
    given = (*tokens(device, exact(device), TOKENS["uneven"][me], experts), experts)
    w = weights(device, exact(device), bias=True, gated=True)
    for frozen in ((0,), (1,), (0, 1), (2, 3, 4, 5), (3, 5), (1, 2, 3, 4, 5)):
        want = results(mesh, None, *given, w, frozen)
        assert_equal(results(mesh, (3, 2), *given, w, frozen), want, 2, f"frozen {frozen}")


def repeats(device, transport: str = "c10d") -> None:
    """The same bits again, with 64-bit ids, and without gradients, when nothing is kept; float32 beside
    autocast gives bf16's bits."""
    world, me = dist.get_world_size(), dist.get_rank()
    mesh, experts = lina.mesh(ep=world, transport=transport), LOCAL * world
    x, weight, expert = tokens(device, exact(device), TOKENS["uneven"][me], experts)
    w = weights(device, exact(device), bias=True, gated=True)
    first = results(mesh, (4, 5), x, weight, expert, experts, w)
    again = results(mesh, (4, 5), x, weight, expert.long(), experts, w)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    absent = (expert < 0) | (expert >= experts)
    beyond = torch.where(absent, 2**32, expert.long())         # as 32 bits it would be expert 0
    for how in ((1, 1), (3, 2)):
        want, got = (results(mesh, how, x, weight, ids, experts, w) for ids in (expert, beyond))
        assert all(map(torch.equal, got, want)), f"64-bit ids, degree {how}"
    stored = lina.mesh(ep=world, transport="p2p")       # what it would be given on GPUs
    with mock.patch.object(spread, "peers_of"), mock.patch.object(spread.p2p, "moe") as call:
        parallel.moe(x, weight, beyond, w[0], w[1], experts=experts, mesh=stored)
    assert torch.equal(call.call_args.args[2], torch.where(absent, experts, expert))

    parallel.settings(mesh).degree = (4, 5)
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.no_grad(), keep:
        out = parallel.moe(x.requires_grad_(), weight, expert, w[0], w[1], experts=experts, mesh=mesh,
                           b_up=w[2], b_down=w[3])
    assert torch.equal(out, first[0]) and not out.requires_grad and not kept

    narrow, wide = ([t if t is None else t.to(dtype) for t in (x.detach(), *w)]
                    for dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        want = parallel.moe(narrow[0], weight.float(), expert, *narrow[1:3], experts=experts, mesh=mesh,
                            b_up=narrow[3], b_down=narrow[4])
        with torch.autocast(device.type, torch.bfloat16):
            got = parallel.moe(wide[0], weight.float(), expert, *wide[1:3], experts=experts, mesh=mesh,
                               b_up=wide[3], b_down=wide[4])
    # torch.equal does not wait for a rank without tokens, which leaves here while others' rows travel
    assert got.dtype == torch.bfloat16 and torch.equal(got, want), (got, want)


def leaves_sms(device, transport: str = "c10d") -> None:
    """Experts beside exchanges leave SMs where these ask for some, both ways; the bits are the same."""
    world, me = dist.get_world_size(), dist.get_rank()
    mesh, experts = lina.mesh(ep=world, transport=transport), LOCAL * world
    dtype = exact(device) if device.type == "cpu" else torch.bfloat16        # a grouped product
    given = (*tokens(device, dtype, TOKENS["uneven"][me], experts), experts,
             weights(device, dtype, bias=False, gated=True))
    results(mesh, (3, 3), *given)                       # makes the transport
    setting, seen = Carveout(), []

    def noted(call):
        def after(*args):
            seen.append(setting.value)
            return call(*args)
        return after

    found = []
    for sms in (0, 4):
        none, some = None, sms or None
        # half of the own rows, all others', which are there and have not left, half of the own; all backward
        for degree, want in ((3, [some, none, some, *[some] * 3]), (1, [none, some])):
            seen.clear()
            with setting, mock.patch.object(carriers.transport(mesh), "sms", sms), \
                    mock.patch.object(spread.ops, "sort", noted(spread.ops.sort)), \
                    mock.patch.object(spread, "add_up", noted(spread.add_up)):
                run = results(mesh, (degree, degree), *given)
                assert setting.value is None
            if degree > 1 or transport != "c10d":          # which is another path in one pass
                assert seen == want, (sms, degree, seen)
            if degree > 1:
                found.append(run)
    assert all(map(torch.equal, *([t for t in run if t is not None] for run in found)))


def refusals(device, transport: str = "c10d") -> None:
    """Degrees that differ, an error inside a layer, wrong arguments: clear, the gate open, life goes on."""
    world, me = dist.get_world_size(), dist.get_rank()
    mesh, experts = lina.mesh(ep=world, transport=transport), LOCAL * world
    given = (*tokens(device, exact(device), 3, experts), experts, weights(device, exact(device), bias=True,
                                                                         gated=True))
    for which, mine, theirs in (("forward", (3, 3), (2, 3)), ("backward", (3, 2), (3, 1)),
                                ("forward", (3, 3), (1, 1)), ("backward", (1, 3), (1, 1))):
        text = error_of(ValueError, results, mesh, mine if me else theirs, *given)
        values = [(mine if r else theirs)[which == "backward"] for r in range(world)]
        assert f"disagree on degree {which}: {values}" in text, text
        assert len(set(everyone(text))) == 1 and gate.outstanding == 0
    x, weight, expert, _, w = given
    for degree in ((1, 1), (3, 3)):
        text = error_of(ValueError, results, mesh, degree, *given, frozen=(2, 3, 4, 5) if me else ())
        assert "disagree on need of gradients" in text and len(set(everyone(text))) == 1, text
        parallel.settings(mesh).degree = degree
        for text, kind, args in (("x_TD", TypeError, (x.int(), weight, expert, *w[:2])),
                                 ("weight_TK has shape", ValueError, (x, weight[:1], expert, *w[:2])),
                                 ("expert_TK is of", TypeError, (x, weight, expert.float(), *w[:2])),
                                 (f"must have {LOCAL}", ValueError, (x, weight, expert, w[0][:1], w[1]))):
            said = error_of(kind, parallel.moe, *args, experts=experts, mesh=mesh)
            assert said.startswith("moe: ") and text in said, said
    assert "multiple of ep" in error_of(ValueError, parallel.moe, x, weight, expert, *w[:2],
                                        experts=experts + 1, mesh=mesh)
    for degree in ((0, 1), (1, 9), (1,), (1.5, 2)):
        assert "degree is" in error_of(ValueError, setattr, parallel.settings(mesh), "degree", degree)
    assert "transport is 'x'" in error_of(ValueError, lina.mesh, 1, transport="x")

    x = x.requires_grad_()
    for degree in ((1, 1), (3, 3)):             # also where neither weights nor what comes in ask for it
        parallel.settings(mesh).degree = degree
        out = parallel.moe(x, weight, expert, w[0].detach(), w[1].detach(), experts=experts, mesh=mesh)
        for loss in (out.square().sum(), out.sum()):
            grad, = torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
            assert "differentiable once" in error_of(RuntimeError, torch.autograd.grad, grad.sum(), x)
    assert gate.outstanding == 0
    assert_equal(results(mesh, (3, 3), *given), results(mesh, None, *given), 3, "after refusals")


class Event:
    """Stands for a CUDA event."""

    made: ClassVar[list] = []

    def __init__(self, blocking: bool) -> None:
        self.while_up = 0
        self.made.append(self)

    def record(self) -> None:
        assert gate.passed is not self, "who waits for it now would not wait at all"
        self.while_up = gate.outstanding


def passed(device) -> None:
    """Over CUDA, where the host runs ahead, gradients wait for the last all-to-all: of every way to run."""
    world = dist.get_world_size()
    mesh, experts = lina.mesh(ep=world), LOCAL * world
    given = (*tokens(device, exact(device), 3, experts), experts, weights(device, exact(device), bias=True,
                                                                         gated=True))
    # counts, rows, results and both ways back, each by itself; or all of a direction together
    for degree, events in (((1, 1), 5), ((3, 2), 2)):
        Event.made.clear()
        with mock.patch.multiple(torch.cuda, is_initialized=lambda: True, Event=Event,
                                 is_current_stream_capturing=lambda: False):
            results(mesh, degree, *given)
        assert len(Event.made) == events and gate.passed is Event.made[-1], (degree, len(Event.made))
        assert all(event.while_up == 1 for event in Event.made), "the gate was open before"
    gate.passed = None


def delayed(call, draw: random.Random):
    def late(*args, **kw):
        time.sleep(0.05 * draw.random() ** 4)          # often early, at times very late
        return call(*args, **kw)
    return late


def delays(device, ep: str, runs: str, transport: str = "c10d") -> None:
    """Training steps with every rank 0 to 50 ms late at every collective: equal to one on time."""
    mesh = lina.mesh(ep=int(ep), transport=transport)
    whole = whole_net("deepseek", device)
    rank, like = dist.get_rank(), next(whole.parameters())
    net = spread_net(whole, "deepseek", mesh)
    hook = lina.HookState(mesh, link=(0.0, 2e-7))           # 2304 bytes a micro-op: several a bucket
    wrapped = lina.ddp(net, mesh, schedule="lina", hook=hook, degree=passes("lina", transport))
    used = ("all_to_all_single", "all_reduce")
    originals = [getattr(dist, name) for name in used]
    draw, wanted = random.Random(rank), None
    for run in range(int(runs) + 1):
        if run == 1:
            for name, call in zip(used, originals, strict=True):
                setattr(dist, name, delayed(call, draw))
        wrapped.zero_grad()
        parallel.settings(mesh).degree = (1 + run % 4, 3)
        loss_of(wrapped, *batch(rank, 0, like)).backward()
        got = [p.grad.clone() for p in net.parameters()]
        wanted = wanted or got
        for name, a, b in zip(dict(net.named_parameters()), got, wanted, strict=True):
            assert_within_rounding(a, b, EXPERTS * PAIRS, scale=b.abs().max().item(),
                                   name=f"run {run}: {name}")
    for name, call in zip(used, originals, strict=True):
        setattr(dist, name, call)
