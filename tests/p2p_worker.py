"""What every rank does in test_p2p.py: the transport over peers' memory against the plain one."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist
from p2p_case import (
    TOKENS,
    both,
    compare,
    inputs,
    on_fresh,
    ours,
    plain,
    same,
    settle,
    world,
    wrong,
)
from p2p_rounds import degree, large, priority
from parallel_worker import error_of, everyone

from lina.parallel.tokens.p2p import moe
from lina.parallel.transport.domain import _mapped
from lina.parallel.transport.peers import Peers

from helpers import on_side_stream

__all__ = ["degree", "large", "priority"]          # scenarios as those below


def parity(device, kind: str) -> None:
    """Outputs and all gradients as over c10d: dtypes, K, widths with and without whole vectors, uneven T."""
    group = dist.group.WORLD
    peers = Peers(group, tokens=max(TOKENS), timeout_s=10)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for D, F, K in ((64, 32, 3), (20, 12, 1), (7, 5, 8)):     # 16-byte rows; 8-byte rows; odd
            for turn in range(2):                                 # every rank is without tokens once
                T = TOKENS[(dist.get_rank() + turn) % 4]
                leaves, expert, E = inputs(device, T, D, F, K, dtype, kind, turn, bias=D != 20)
                for grad in (True, False):
                    both(leaves, expert, E, peers, group, f"{dtype} {D=} {K=} {T=} {grad=}", grad)
    (x, weight, *frozen), expert, E = inputs(device, 5, 20, 12, 3, torch.float32, kind)
    out = ours([x, weight, *(w.detach() for w in frozen)], expert, E, peers)
    grad, = torch.autograd.grad(out.sum(), x, create_graph=True)
    said = error_of(RuntimeError, torch.autograd.grad, grad.sum(), x)
    if "differentiable once" not in said:
        wrong.append(f"a gradient of a gradient: {said or 'no error'}")
    peers.close()
    settle()


def many_tokens(device) -> None:
    """More tokens than one block counts (512), and tiles that are not full; K of two 16-byte loads."""
    group = dist.group.WORLD
    peers = Peers(group, tokens=3001, timeout_s=10)
    for T, K in ((512, 8), (513, 2), (3001, 8)):
        leaves, expert, E = inputs(device, T - 7 * dist.get_rank(), 256, 64, K, torch.bfloat16, "wide")
        both(leaves, expert, E, peers, group, f"{T=} {K=}")
    peers.close()
    settle()


def layers(device) -> None:
    """Two layers of other widths and dtypes over one buffer, all forward before backward; repeats bitwise."""
    group = dist.group.WORLD
    peers = Peers(group, timeout_s=10)
    first = inputs(device, 50, 24, 16, 2, torch.float32, "random", 1)
    second = inputs(device, 50, 24, 40, 4, torch.float32, "random", 2)

    def run(layer):
        x = first[0][0]
        y = x + layer(first[0], *first[1:])
        z = layer([y, *second[0][1:]], *second[1:]).bfloat16()
        third = [z, second[0][1], *(w.detach().bfloat16() for w in second[0][2:])]
        out = z + layer(third, *second[1:])
        return [out, *torch.autograd.grad(out, [*first[0], *second[0][1:]], torch.ones_like(out))]

    got = run(lambda leaves, expert, E: ours(leaves, expert, E, peers))
    want = run(lambda leaves, expert, E: plain(leaves, expert, E, group))
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        # third layer's activations are bfloat16 for both; what differs is products' tiling in front of that
        error, scale = (g.double() - w.double()).abs().max().item(), w.double().abs().max().item()
        if not error <= 16 * torch.finfo(torch.bfloat16).eps * scale:
            wrong.append(f"result {i} is wrong by {error:.3g} of {scale:.3g}")
    for turn in range(5):
        same(run(lambda leaves, expert, E: ours(leaves, expert, E, peers)), got, f"turn {turn}")
    again = on_side_stream(lambda: run(lambda leaves, expert, E: ours(leaves, expert, E, peers)))
    torch.cuda.synchronize()
    same(again, got, "side stream")
    peers.close()
    settle()


def growth(device) -> None:
    """More tokens in the settings from one call to the next, and a backward behind it of the call before."""
    group, before = dist.group.WORLD, len(_mapped)
    peers = Peers(group, tokens=30, timeout_s=10)
    few, many = (inputs(device, T - dist.get_rank(), 24, 16, 2, torch.float32, "random") for T in (30, 700))
    want = plain(*few, group)
    wants = [want.detach(), *torch.autograd.grad(want.sum(), few[0])]
    out = ours(*few, peers)
    peers.tokens = 700
    both(*many, peers, group, "grown")
    got = [out.detach(), *torch.autograd.grad(out.sum(), few[0])]
    compare(got, wants, 24 + 16 + sum(TOKENS), "before it grew")
    peers.tokens = 30
    both(*few, peers, group, "few again")
    assert peers.layer(30, 24, 2, few[2], torch.float32, True).C == 128
    assert len(_mapped) == before + 1, "the small buffer was not given back"
    peers.close()
    assert len(_mapped) == before
    settle()


def graph(device) -> None:
    """Forward and backward captured once, replayed 20 times with other tokens and routes."""
    group = dist.group.WORLD
    peers = Peers(group, timeout_s=10)
    leaves, expert, E = inputs(device, 40 + dist.get_rank(), 64, 32, 3, torch.bfloat16, "random")
    error_of_capture = ""
    for grad in (False, True):
        def run(grad=grad):
            return on_fresh(lambda fresh: ours(fresh, expert, E, peers), leaves, grad)

        with torch.cuda.stream(torch.cuda.Stream()):
            run()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            got = run()
        for turn in range(20):
            other, ids, _ = inputs(device, 40 + dist.get_rank(), 64, 32, 3, torch.bfloat16, "random", turn)
            with torch.no_grad():
                for leaf, value in zip(leaves, other, strict=True):
                    leaf.copy_(value)
            expert.copy_(ids)
            if dist.get_rank() == turn % world():
                time.sleep(0.01)                                  # ranks drift apart
            captured.replay()
            want = on_fresh(lambda fresh: plain(fresh, expert, E, group), leaves, grad)
            compare(got, want, 64 + 32 + 100, f"replay {turn}")
    other, ids, _ = inputs(device, 4, 8, 8, 1, torch.bfloat16, "random")
    try:                                                          # a layer nobody agreed on, inside a capture
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            ours(other, ids, E, peers)
    except RuntimeError as error:
        error_of_capture = str(error)
    assert "run it once before" in error_of_capture, error_of_capture
    peers.close()
    settle()


def disagreement(device, what: str) -> None:
    """One rank with another D, K, dtype, number of experts or need of gradients: one error on all."""
    peers = Peers(dist.group.WORLD, timeout_s=10)
    odd = dist.get_rank() == world() - 1
    D, K, dtype, kind = 16, 2, torch.float32, "random"
    if odd:
        D, K = (24 if what == "D" else D), (3 if what == "K" else K)
        dtype = torch.bfloat16 if what == "dtype of x" else dtype
        kind = "wide" if what == "number of experts" else kind
    leaves, expert, E = inputs(device, 4, D, 8, K, dtype, kind)
    if odd and what == "need of gradients":
        leaves = [t.detach() for t in leaves]
    text = error_of(ValueError, ours, leaves, expert, E, peers)
    assert f"disagree on {what}: [" in text, text
    assert len(set(everyone(text))) == 1
    leaves, expert, E = inputs(device, 4, 16, 8, 2, torch.float32, "random")
    both(leaves, expert, E, peers, dist.group.WORLD, "after it")
    peers.close()
    settle()


def refusals(device) -> None:
    """Caps, and what cannot be sent: before anything is."""
    group = dist.group.WORLD
    leaves, expert, E = inputs(device, 4, 16, 8, 2, torch.float32, "random")
    capped = Peers(group, cap_bytes=1000 if dist.get_rank() == 0 else None, timeout_s=10)
    text = error_of(ValueError, ours, leaves, expert, E, capped)
    assert "the cap is 1000" in text and len(set(everyone(text))) == 1, text
    peers = Peers(group, timeout_s=10)
    x, weight, *weights = (t.detach() for t in leaves)
    for words, args in [("x is", (x.double(), weight, expert)), ("x is", (x.cpu(), weight, expert)),
                        ("weight is", (x, weight[:2], expert)), ("expert is", (x, weight, expert.long())),
                        ("width", (x[:, :8], weight, expert))]:
        text = error_of(ValueError, moe, *args, *weights[:2], experts=E, peers=[peers])
        assert f"p2p: {words}" in text or words in text, text
    text = error_of(ValueError, moe, x, weight, expert, *weights[:2], experts=E + 1, peers=[peers])
    assert "must be" in text, text
    assert "tokens is 0" in error_of(ValueError, Peers, group, tokens=0)


def broken(device, how: str) -> None:
    """A rank that cannot go on: the others have an error that names it, within their timeout.

    "late" is "absent" with 34 MB, where sending and waiting are kernels apart.
    """
    peers = Peers(dist.group.WORLD, timeout_s=2)
    odd, absent = world() - 1, how in ("absent", "late")
    size = (2100, 4096) if how == "late" else (4, 16)
    def call(T=size[0], D=size[1], seed=0):
        leaves, expert, E = inputs(device, T, D, 8, 2, torch.float32, "random", seed)
        return ours(leaves, expert, E, peers)
    first = call()
    other = call(D=24)
    (other.sum() + first.sum()).backward()
    torch.cuda.synchronize()
    said, start = "", time.time()
    try:
        if dist.get_rank() == odd:
            if how == "overflow":
                call(T=1000)
            if how == "mismatch":
                call(D=24)
            if absent:
                time.sleep(3)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() != odd or not (absent or how == "overflow"):
            out = call()
            torch.cuda.synchronize()
            assert out.isnan().all(), "a result without its peer"
            call()
    except (RuntimeError, ValueError) as error:
        said = str(error)
    # of two ranks in different layers one may hear from the other that it failed before it looks itself
    wanted = dict(overflow=["tokens=N"], mismatch=["another layer", "which failed"]).get(how, ["has stopped"])
    if dist.get_rank() != odd or not (absent or how == "kill"):
        assert any(words in said for words in wanted), f"{said!r}"
        assert time.time() - start < 2 + 4, "later than the timeout"
    if dist.get_rank() != odd:
        assert f"of rank {odd}" in said or world() > 2, said
    if how == "mismatch":
        assert any("another layer" in text for text in everyone(said))
    print(f"survived: {said}", flush=True)
    if how == "kill":
        os._exit(0)                            # the process group's own goodbye would wait for the dead
