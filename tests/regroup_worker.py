"""What every rank does in test_regroup.py: experts and optimizer state on the way between degrees.

Rank r of W; degrees W, W / 2, 1. Whether experts and state lie where they should is seen by
``lina.gathered_state_dict``, which knows nothing of regrouping.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from parallel_worker import batch, dtype_of, error_of, everyone, loss_of, spread_net, terms, whole_net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import lina
from lina import parallel

import swap_cases
from helpers import assert_within_rounding

swap_cases.EXPERTS = 8     # for 1, 2 and 4 ranks


def degrees() -> list[int]:
    world = dist.get_world_size()
    return [world, max(world // 2, 1), 1, world]


def build(kind: str, device, mesh) -> nn.Module:
    """The same weights whatever the mesh: lina.MoE twice, or a swapped block and swapped stacked experts."""
    if kind == "moe":
        return spread_net(whole_net("topk", device), "topk", mesh)
    torch.manual_seed(3)
    model = swap_cases.Model(transposed=kind == "swap_transposed").to(device, dtype_of(device))
    return lina.swap(model, mesh)


def optimizer_of(model: nn.Module, how: str, device) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    if how == "adamw":
        return torch.optim.AdamW(named, lr=0.01, amsgrad=True, capturable=device.type == "cuda")
    if how == "fused":
        return torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    split: dict[bool, list] = {}     # biases without decay
    for name, p in named:
        split.setdefault("bias" in name or ".b_" in name, []).append((name, p))
    assert len(split) == 2
    return torch.optim.SGD([dict(params=split[False], weight_decay=0.1), dict(params=split[True])], lr=0.05,
                           momentum=0.9, foreach=how == "foreach")


def wrap(net: nn.Module, mesh, how: str) -> lina.parallel.DataParallel:
    return lina.ddp(net, mesh, schedule="lina" if how == "foreach" else "plain")


def train(model, net, optimizer, steps) -> list:
    """Losses, with their graphs still alive, as of a script that keeps them."""
    losses = []
    for step in steps:
        like = next(net.parameters())
        if isinstance(net, swap_cases.Model):
            draw = torch.Generator().manual_seed(50 * step + dist.get_rank())
            x = torch.randn(7 - dist.get_rank(), swap_cases.D, generator=draw, dtype=torch.float64).to(like)
            losses.append(model(x).square().mean())
        else:
            losses.append(loss_of(model, *batch(dist.get_rank(), step, like)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def values(net, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """All experts' weights, and each kind of state in the place of the weights; single values as they are."""
    found = {"weights": {k: v.clone() for k, v in lina.gathered_state_dict(net).items()}}
    params = list(net.parameters())
    assert {id(p) for p in optimizer.state} <= {id(p) for p in params}, "state of experts that have left"
    for key in sorted({key for state in optimizer.state.values() for key in state}):
        kept = [p.data.clone() for p in params]
        for p in params:
            value = optimizer.state[p][key]
            p.data.copy_(value) if value.shape == p.shape else p.data.fill_(value)
        found[key] = {k: v.clone() for k, v in lina.gathered_state_dict(net).items()}
        for p, data in zip(params, kept, strict=True):
            p.data.copy_(data)
    return found


def assert_equal(got, want, what: str) -> None:
    assert got.keys() == want.keys(), f"{what}: {got.keys()}, want {want.keys()}"
    for kind in want:
        odd = got[kind].keys() ^ want[kind].keys()
        assert not odd, f"{what}: {kind} of {odd}"
        for name, value in want[kind].items():
            assert torch.equal(got[kind][name], value), f"{what}: {kind} of {name} differ"


def fresh(kind: str, how: str, device, mesh, found):
    """Model, wrapper and optimizer made for ``mesh``, with ``values``.

    After one backward pass: DistributedDataParallel then lays its buckets out anew, and where a
    gradient lies decides in which order gloo sums it.
    """
    net = build(kind, device, mesh)
    model = wrap(net, mesh, how)
    train(model, net, torch.optim.SGD(net.parameters(), lr=0.0), range(1))
    optimizer = optimizer_of(net, how, device)
    for key in [*(key for key in found if key != "weights"), "weights"]:
        net.load_state_dict(found[key])
        for p in net.parameters() if key != "weights" else ():
            value = p.detach().flatten()[0].float() if key == "step" else p.detach()
            optimizer.state[p][key] = value.clone()
    return net, model, optimizer


def trained(kind: str, how: str, device):
    mesh = lina.mesh(dist.get_world_size())
    net = build(kind, device, mesh)
    return net, wrap(net, mesh, how), optimizer_of(net, how, device), mesh


def there_and_back(device, kind: str, how: str) -> None:
    """Bit for bit at every degree, twice round; nobody's objects change, no groups are left behind."""
    net, model, optimizer, mesh = trained(kind, how, device)
    train(model, net, optimizer, range(2))
    want, mine = values(net, optimizer), {n: p.detach().clone() for n, p in net.named_parameters()}
    first = dict(net.named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    listed = [group["params"] for group in optimizer.param_groups]
    made = []
    for _ in range(2):
        for ep in degrees()[1:]:
            now = lina.regroup(model, optimizer, ep)
            assert parallel.ep_size(now) == ep and now.device_type == device.type
            assert_equal(values(net, optimizer), want, f"ep {ep}")
            stamp = [] if ep == 1 else [[parallel.ep_rank(now), ep]] * 2
            state = net.state_dict()
            assert [v.tolist() for k, v in state.items() if k.endswith(("ep",))] == stamp
            net.load_state_dict(state)
            like = optimizer_of(net, how, device)
            for group, other in zip(optimizer.param_groups, like.param_groups, strict=True):
                assert list(map(id, group["params"])) == list(map(id, other["params"]))
                assert group.get("param_names") == other.get("param_names")
            assert {e.name for e in parallel.expert_parameters(net)} == (set() if ep == 1 else {
                n for n, _ in net.named_parameters() if "experts." in n or "stacked." in n})
        made.append(len(dist.distributed_c10d._world.pg_map))
    assert now is mesh and made[0] == made[1], made
    assert scheduler.optimizer is optimizer
    assert all(group["params"] is old for group, old in zip(optimizer.param_groups, listed, strict=True))
    for name, p in net.named_parameters():
        assert p is first[name] and torch.equal(p, mine[name]), name
    if kind != "moe":
        for ep in (degrees()[1], dist.get_world_size() if kind == "swap" else 1):
            lina.regroup(model, optimizer, ep)
        plain = lina.unswap(build(kind, device, None))
        plain.load_state_dict(want["weights"])
        got, wanted = (train(m, m, torch.optim.SGD(m.parameters(), lr=1.0), [9]) and m.state_dict()
                       for m in (lina.unswap(net), plain))       # the step is the gradient: nothing scales it
        assert_equal({"weights": got}, {"weights": wanted}, "unswapped")
        assert "no longer spread" in error_of(RuntimeError, model, torch.zeros(2, swap_cases.D))


def continues(device, kind: str, how: str) -> None:
    """Two steps at each degree: the same bits as with everything made anew for that degree, and, to the
    rounding of sums taken in another order, the losses of a run that stays."""
    net, model, optimizer, mesh = trained(kind, how, device)
    stay = trained(kind, how, device)
    for each in (net, model, optimizer), stay[:3]:
        train(each[1], each[0], each[2], range(1))
    alive = []      # graphs of earlier steps, which know the parameters' old shapes
    for stage, ep in enumerate(degrees()):
        mesh = lina.regroup(model, optimizer, ep)
        assert parallel.settings(mesh) == parallel.settings(stay[3])
        found, steps = values(net, optimizer), range(2 * stage + 1, 2 * stage + 3)
        losses = train(model, net, optimizer, steps)
        alive += losses
        if ep > 1:        # at 1 a new wrapper has experts in its buckets, summed in another order
            twin, wrapped, other = fresh(kind, how, device, mesh, found)
            again = train(wrapped, twin, other, steps)
            assert [a.item() for a in losses] == [b.item() for b in again], f"ep {ep}: {losses}, {again}"
            assert_equal(values(net, optimizer), values(twin, other), f"after two steps at ep {ep}")
        for got, want in zip(losses, train(stay[1], stay[0], stay[2], steps), strict=True):
            if how in ("sgd", "foreach"):       # Adam's step of a gradient that is all rounding is of size lr
                scale = max(a.item() for a in alive)
                assert_within_rounding(got, want.detach(), terms() * (steps.stop + 1), scale=scale,
                                       name=f"loss at ep {ep}")


def bare(device) -> None:
    """No wrapper, no optimizer, or one without state: results and gradients are those of all experts."""
    world = dist.get_world_size()
    ref = whole_net("deepseek", device)
    net = spread_net(ref, "deepseek", lina.mesh(world))
    like = next(ref.parameters())
    x, y = batch(dist.get_rank(), 0, like, 5)
    optimizer = torch.optim.Adam(net.parameters())
    for given, ep in ((None, degrees()[1]), (optimizer, 1), ([optimizer], degrees()[1]), (None, world)):
        mesh = lina.regroup(net, given, ep)
        assert_within_rounding(net(x)["out"], ref(x)["out"].detach(), terms(), name=f"ep {ep}")
        loss_of(net, x, y).backward()
        ref.zero_grad()
        members = dist.get_process_group_ranks(parallel.groups(mesh).ep)     # whose tokens come here
        sum(loss_of(ref, *batch(r, 0, like, 5)) for r in members).backward()
        whole = dict(ref.named_parameters())
        for name, p, _ in parallel.expert_parameters(net):
            want = whole[name].grad
            assert_within_rounding(p.grad, parallel.shard(want, mesh), terms(), scale=want.abs().max().item(),
                                   name=f"ep {ep}: gradient of {name}")
        net.zero_grad()
    loss_of(net, x, y).backward()
    optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in net.parameters())


def mixed(device) -> None:
    """Layers of different degrees come to one; a mesh of some ranks; a frozen layer."""
    world, rank = dist.get_world_size(), dist.get_rank()
    ref = whole_net("softmax", device)
    net = spread_net(ref, "softmax", lina.mesh(world))
    net.moe2 = spread_net(ref, "softmax", lina.mesh(1)).moe2
    for p in net.moe1.experts.parameters():
        p.requires_grad_(False)
    mesh = lina.regroup(net, None, degrees()[1])
    assert net.moe1.experts.mesh is mesh and net.moe2.experts.mesh is mesh
    assert_equal({"": lina.gathered_state_dict(net)}, {"": ref.state_dict()}, "mixed")
    assert not net.moe1.experts.w_up.requires_grad and net.moe2.experts.w_up.requires_grad
    if world == 4:
        stages = init_device_mesh(device.type, (2, 2), mesh_dim_names=("ep", "stage"))   # ranks 0, 2 and 1, 3
        part = stages["ep"]
        net = spread_net(ref, "softmax", part)
        if rank % 2 == 0:                      # the other stage takes no part
            assert lina.regroup(net, None, 1).mesh.tolist() == [[0], [2]]
            assert_equal({"": net.state_dict()}, {"": ref.state_dict()}, "one stage")
            assert lina.regroup(net, None, 2) is part
            assert_equal({"": lina.gathered_state_dict(net)}, {"": ref.state_dict()}, "one stage")


def refusals(device) -> None:
    """Every rank says why, in one line, and nothing has changed; what one rank has wrong, all refuse."""
    world, rank = dist.get_world_size(), dist.get_rank()
    last = rank == world - 1
    net, model, optimizer, mesh = trained("moe", "adamw", device)
    train(model, net, optimizer, range(1))
    odd = nn.ModuleList(lina.MoE(4, 4, count, 1, mesh=lina.mesh(ep)) for count, ep in
                        ((8, world), (world * 3 // 2, 1)))
    up, step = net.moe2.experts.w_up, optimizer.state[net.moe2.experts.w_up]["step"]

    def refuse(words: str, *args) -> None:
        params, state = list(net.parameters()), optimizer.state
        tensors = [p.data for p in params] + [value for p in params for value in state[p].values()]
        kept = [(t.data_ptr(), t.clone()) for t in tensors]
        said = everyone(error_of(ValueError, lina.regroup, *args))
        assert all(words in text and "\n" not in text for text in said), f"want {words!r}: {said}"
        assert net.moe1.experts.mesh is mesh and net.moe1.experts.local == 8 // world
        tensors = [p.data for p in params] + [value for p in params for value in state[p].values()]
        assert all(t.data_ptr() == at and torch.equal(t, old) for t, (at, old) in
                   zip(tensors, kept, strict=True)), f"{words}: something has changed"

    other = degrees()[1]
    for ep in (3, 0, -1, True, 2.0, None):
        refuse(f"ep is {ep}, must divide the {world} ranks", model, optimizer, ep)
    refuse(f"must divide the {world * 3 // 2} experts of 1.experts", odd, None, world)
    refuse("disagree on ep", model, optimizer, world if last else other)
    refuse("has no experts with a mesh", nn.Linear(2, 2), None, other)
    refuse("must be one of torch.optim", model, "adam", other)
    if last:
        up.grad = torch.zeros_like(up)
    refuse("moe2.experts.w_up has a gradient", model, optimizer, other)
    up.grad = None
    if last:
        step += 1
    refuse("number of steps", model, optimizer, other)
    if last:
        step -= 1
        optimizer.state[up]["row_var"] = torch.zeros(8 // world, up.shape[1], 1, device=device)
    refuse("optimizer state 'row_var'", model, optimizer, other)
    if last:
        del optimizer.state[up]["row_var"]
    up.requires_grad_(not last)
    refuse("requires_grad", model, optimizer, other)
    up.requires_grad_(True)
    whole = lina.ddp(spread_net(whole_net("topk", device), "topk", lina.mesh(1)), lina.mesh(1))
    refuse("is in the buckets of DistributedDataParallel", whole, None, other if other > 1 else world)
    plain = DistributedDataParallel(copy.deepcopy(whole.module))
    refuse("is in the buckets of DistributedDataParallel", plain, None, other if other > 1 else world)
    lina.regroup(model, optimizer, other)
    train(model, net, optimizer, range(1))
