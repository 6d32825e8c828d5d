"""What every rank does in test_p2p.py on CPUs: the layer over peers' memory, its rounds by torch.distributed.

The stand-in follows csrc/cuda/peers.h word by word: slots, parts, absent rows, which rank's gradients.
"""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist
from p2p_case import compare, inputs, ours, plain, settle, world
from parallel_worker import error_of

from lina.parallel.tokens.round import Round
from lina.parallel.transport.peers import Agreed, Overflow

UNSET = float("nan")              # what no rank has written


class Memory:
    """In the place of Peers: this rank's buffer, and the rounds in their order."""

    def __init__(self, place: int, log: list, most: int = 0) -> None:
        self.ep, self.rank, self.device = world(), dist.get_rank(), torch.device("cpu")
        self.sms, self.place, self.log, self.most, self.stopped = 0, place, log, most, []

    def layer(self, T, D, K, E, dtype, grad, tokens):
        C = everyone(T if tokens is None else tokens)
        if self.most and self.most < T:
            raise Overflow(f"p2p: {T} tokens")
        return Agreed(max(C), 0)

    def rows(self, layer, D, dtype):
        return self.arrived

    def stop(self, overflow=False):
        self.stopped.append(overflow)


def everyone(said) -> list:
    found = [None] * world()
    dist.all_gather_object(found, said)
    return found


def dispatch(self, name, x, expert, weight, slot, count, x_R, weight_R, expert_R) -> None:
    peers, (ep, C, L) = self.peers, (self.peers.ep, self.layer.C, self.E // self.peers.ep)
    peers.log.append((name, peers.place, self.raises))
    if expert is not None:
        slot.fill_(-1)
        for d in range(ep):
            hit = ((expert >= d * L) & (expert < (d + 1) * L)).any(1)
            slot[hit, d] = torch.arange(int(hit.sum()), dtype=slot.dtype)
    sent = []
    for d in range(ep):
        mine = slot[:, d] >= 0
        sent.append([t if t is None else t[mine] for t in (x, weight, expert)])
    arrived = [theirs[peers.rank] for theirs in everyone(sent)]
    rows = torch.full((ep * C, self.D), UNSET, dtype=self.dtype)
    for s, (x_s, weight_s, expert_s) in enumerate(arrived):
        part = slice(s * C, s * C + len(x_s))
        rows[part] = x_s
        if expert is not None:
            local = expert_s - peers.rank * L
            expert_R[s * C:(s + 1) * C] = -1
            expert_R[part] = torch.where((local >= 0) & (local < L), local, -1)
            weight_R[part] = weight_s
    if expert is not None:
        count.copy_(torch.tensor([[len(rows) for rows, *_ in them] for them in (sent, arrived)]))
    peers.arrived = rows
    if x_R is not None:
        x_R.copy_(rows)


def collect(self, name, y, pair_row, weight_R, dweight_R, slot, count, expert, out, dweight) -> None:
    peers, (ep, C, L) = self.peers, (self.peers.ep, self.layer.C, self.E // self.peers.ep)
    peers.log.append((name, peers.place, self.lowers))
    if pair_row is not None:
        y = torch.ops.lina.combine_fwd(y, weight_R, pair_row)
    parts = [[None if t is None else t[s * C:s * C + int(count[1, s])] for t in (y, dweight_R)]
             for s in range(ep)]
    back = [theirs[peers.rank] for theirs in everyone(parts)]
    total = torch.zeros(self.T, self.D)
    for d, (rows, _) in enumerate(back):
        hit = slot[:, d] >= 0
        total[hit] += rows[slot[hit, d].long()].float()
    out.copy_(total)
    if dweight is not None:
        dweight.zero_()
        for d, (_, found) in enumerate(back):
            here = (expert >= d * L) & (expert < (d + 1) * L)
            t, k = here.nonzero(as_tuple=True)
            dweight[t, k] = found[slot[t, d].long(), k]


def both(leaves, expert, E, peers, what: str) -> None:
    results = []
    for call in (lambda: ours(leaves, expert, E, peers), lambda: plain(leaves, expert, E, dist.group.WORLD)):
        out = call()
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent)])
    compare(*results, leaves[0].shape[1] + leaves[3].shape[2] + 400, what)


def passes(device) -> None:
    """In 1 to 4 passes as over c10d: out and gradients; the order of exchanges; who raises and lowers."""
    with mock.patch.object(Round, "dispatch", dispatch), mock.patch.object(Round, "collect", collect):
        for r in (1, 2, 4):
            for kind in ("random", "one", "none"):
                for T in ((37, 0, 5, 3)[dist.get_rank()], 2):
                    log: list = []
                    leaves, expert, E = inputs(device, T, 20, 12, 3, torch.float32, kind)
                    both(leaves, expert, E, [Memory(j, log) for j in range(r)], f"{r} passes, {kind}, {T=}")
                    for name in ("", " backward"):
                        assert in_order(log, name) == expected(r), (r, log)
            with torch.no_grad():
                log = []
                got = ours(leaves, expert, E, [Memory(j, log) for j in range(r)])
                assert not any(priority for *_, priority in log)
                compare([got], [plain(leaves, expert, E, dist.group.WORLD)], 400, f"{r} passes, no gradients")
        both_frozen(device)
        overflow(device)
    settle()


def both_frozen(device) -> None:
    """Gradients of some arguments alone."""
    for frozen in ((0,), (1,), (2, 3, 4, 5), (3, 5)):
        leaves, expert, E = inputs(device, 9, 20, 12, 3, torch.float32, "random")
        for i in frozen:
            leaves[i].requires_grad_(False)
        wanted = [t for t in leaves if t.requires_grad]
        got, want = (torch.autograd.grad(call.sum(), wanted) for call in (
            ours(leaves, expert, E, [Memory(j, []) for j in range(3)]),
            plain(leaves, expert, E, dist.group.WORLD)))
        none = torch.zeros(1)                            # in the place of out
        compare([none, *got], [none, *want], 400, f"frozen {frozen}")


def overflow(device) -> None:
    """Too many tokens for the second pass: no pass's peers are left waiting."""
    leaves, expert, E = inputs(device, 9, 20, 12, 3, torch.float32, "random")
    several = [Memory(0, []), Memory(1, [], most=2)]
    assert "4 tokens" in error_of(Overflow, ours, leaves, expert, E, several)
    assert [one.stopped for one in several] == [[True], [True]]


def in_order(log, name: str) -> list:
    return [(what[4] if what.startswith("p2p ") else what, j, priority) for what, j, priority in log
            if what.endswith(" backward") == bool(name)]


def expected(r: int) -> list:
    """d0 (d1 c0) (d2 c1) ...: first letters, passes, whether the priority word changes."""
    order = [("d", 0, True)]
    for j in range(r):
        if j + 1 < r:
            order.append(("d", j + 1, False))
        order.append(("c", j, j == r - 1))
    return order
