"""lina.swap with experts spread over two ranks, over gloo."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lina
from lina.swap.probe import agree

from swap_cases import EXPERTS, Block, D, Model, Stacked, assert_agree, results


def _two_ranks(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = lina.mesh(ep=2)
    for transposed in (False, True):
        torch.manual_seed(0)
        model = Model(transposed)
        whole, first = copy.deepcopy(model), dict(model.named_parameters())
        xs = [torch.randn(n, D) for n in (9, 4)]    # uneven tokens
        whole_grads = [results(copy.deepcopy(whole), x) for x in xs]
        got = results(lina.swap(model, mesh), xs[rank])
        assert_agree(got[:2], whole_grads[rank][:2])
        names = [name for name, _ in whole.named_parameters()]
        total = dict(zip(names, (a + b for a, b in zip(whole_grads[0][2:], whole_grads[1][2:], strict=True)),
                         strict=True))
        local = EXPERTS // 2
        for name, p in model.named_parameters():
            if name.startswith("stacked."):
                want = total[name].narrow(0, rank * local, local)
            elif "experts." in name:                # local number to global
                _, _, e, rest = name.split(".", 3)
                want = total[f"block.experts.{int(e) + rank * local}.{rest}"]
            else:
                want = total[name]
                dist.all_reduce(p.grad)             # dense: each rank has its own tokens' share
            assert agree(p.grad, want), name
        mine = {name for name in names if "experts." in name and int(name.split(".")[2]) < local}
        assert {name for name in model.state_dict() if "experts." in name} == mine
        assert model.stacked.down_proj.shape[0] == local == model.stacked.local
        assert model.stacked.count == EXPERTS and model.stacked.mesh == mesh
        spread = {e.name for e in lina.parallel.expert_parameters(model)}
        assert spread == mine | {n for n in names if n.startswith("stacked.")}
        assert all("3 of 6 here" in e.reason for e in lina.swap_report(lina.swap(model, mesh)))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        lina.unswap(model)
        for name, p in model.named_parameters():
            assert p is first[name]
            assert torch.equal(p, 2 * dict(whole.named_parameters())[name]), name
        assert type(model.block) is Block and type(model.stacked) is Stacked

    odd = nn.Sequential(Model(), Stacked(False))
    odd[1].gate_up_proj, odd[1].down_proj = (nn.Parameter(torch.randn(5, *p.shape[1:]))
                                             for p in (odd[1].gate_up_proj, odd[1].down_proj))
    with pytest.raises(ValueError, match=r"swap: 1 has 5 experts, not divisible by the mesh's ep=2"):
        lina.swap(odd, mesh)
    assert not any(entry.swapped for entry in lina.swap_report(odd))
    with pytest.raises(ValueError, match="swapped before with another mesh"):
        lina.swap(lina.swap(Model()), mesh)
    dist.destroy_process_group()


@pytest.mark.multi
def test_two_ranks(tmp_path):
    """Forward, every gradient, who holds what, and the way back, over gloo."""
    mp.start_processes(_two_ranks, (str(tmp_path / "store"),), nprocs=2, start_method="spawn")
