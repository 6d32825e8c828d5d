"""Layers in several passes, over gloo (and, on two GPUs, NCCL): equal to the plain way."""

from __future__ import annotations

import pytest
import torch

from lina.parallel.tokens.dispatch import pack, unpack

from ranks import Run, each_scenario

RUNS = {
    "spread4": Run("spread_worker", ["degrees:4", "degrees:2", "kinds", "repeats", "leaves_sms", "refusals",
                                     "passed", "delays:2:12", "delays:4:8"], 4),
    "graph4": Run("graph_worker", ["padded_rows"], 4),
    "train4": Run("parallel_worker", [*(f"parity:{ep}:deepseek:lina" for ep in (1, 2, 4)),
                                      "parity:2:topk:lina:c10d", "accumulation:2:lina", "unused:2:find:lina",
                                      "unused:2:static:lina", "low_precision:lina"], 4),
    "ways4": Run("exchange_worker", [*(f"same_as_plain:{how}:lina" for how in
                                       ("checkpoint", "reentrant", "trace", "compile")),
                                     "agreement:ddp", "agreement:fsdp", "carried", "known_dead"], 4),
    "degree4": Run("degree_worker", ["defaults", "told", "others", "auto"], 4),
    "gpu-degree2": Run("degree_worker", ["measured", "auto"], 2, "nccl"),
    "gpu-spread2": Run("spread_worker", [
        f"{name}:{transport}" for transport in ("c10d", "nccl")
        for name in ("degrees:2", "kinds", "repeats", "leaves_sms", "refusals", "delays:2:5")], 2, "nccl"),
    "gpu-graph2": Run("graph_worker", ["padded_rows", "graph:nccl", "graph:c10d"], 2, "nccl"),
    "gpu-train2": Run("parallel_worker", [f"parity:{ep}:deepseek:lina:{transport}" for ep in (1, 2)
                                          for transport in ("c10d", "nccl")], 2, "nccl"),
}


@each_scenario(RUNS)
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


@pytest.mark.parametrize("D,K,offset", [(4, 3, 1), (4, 3, 2), (3, 2, 1), (4, 2, 0)])
def test_rows_are_packed_from_anywhere(D: int, K: int, offset: int) -> None:
    """Also tokens of 16 bits that begin in the middle of a word, whole words (D even) or not."""
    x_TD = torch.arange(5 * D + offset, dtype=torch.bfloat16)[offset:].view(5, D)
    weight_TK = torch.rand(5, K)
    packed = pack(x_TD, weight_TK)
    assert packed.shape[1] * packed.element_size() % 16 == 0, "rows that NCCL copies byte by byte"
    for views in (False, True):
        found = unpack(packed, (D, K), (x_TD.dtype, weight_TK.dtype), views=views)
        assert all(map(torch.equal, found, (x_TD, weight_TK)))
        assert views or all(part.is_contiguous() for part in found)


def test_rows_of_any_dtype_are_packed() -> None:
    """Wide ones beside narrow ones, and none at all; float64 need not lie aligned between them."""
    parts = torch.rand(3, 5), torch.rand(3, 3).double(), torch.rand(3, 0), torch.arange(3)[:, None]
    widths, dtypes = tuple(p.shape[1] for p in parts), tuple(p.dtype for p in parts)
    for rows in (3, 1, 0):
        given = [p[:rows] for p in parts]
        for views in (False, True):
            assert all(map(torch.equal, unpack(pack(*given), widths, dtypes, views=views), given))
