"""Several ranks over gloo (and, on two GPUs, NCCL): what is spread equals what is whole."""

from __future__ import annotations

import pytest
import torch

from ranks import launch, results

LAYOUTS = (1, 2, 4)                       # ep of a world of 4; dp = 4, 2, 1
DISAGREEMENTS = ("D", "K", "number of experts", "dtype of x", "dtype of weight", "need of gradients")
KINDS = ("random", "one", "none")         # ids; all tokens to one rank; none to any


def training(eps: tuple[int, ...]) -> list[str]:
    from parallel_worker import GATES

    return [*(f"parity:{ep}:{gate}" for gate in GATES for ep in eps),
            *(f"accumulation:{ep}" for ep in eps), *(f"unused:{ep}:find" for ep in eps),
            f"unused:{eps[1]}:static", *(f"norms:{ep}" for ep in eps), "low_precision",
            *(f"wrappers:{ep}" for ep in eps if ep > 1)]


def exchange() -> list[str]:
    return [*(f"routes:{kind}" for kind in KINDS), *(f"disagreement:{what}" for what in DISAGREEMENTS),
            "meshes", "refusals",
            *(f"same_as_plain:{how}" for how in ("checkpoint", "reentrant", "hook", "trace"))]


RUNS = {                                  # name -> (module, scenarios, ranks, backend)
    "train4": ("parallel_worker", training(LAYOUTS), 4, "gloo"),
    "train2": ("parallel_worker", [f"parity:{ep}:deepseek" for ep in (1, 2)], 2, "gloo"),
    "compile2": ("exchange_worker", ["same_as_plain:compile"], 2, "gloo"),
    "exchange4": ("exchange_worker", exchange(), 4, "gloo"),
    "gpu-train2": ("parallel_worker", training((1, 2)), 2, "nccl"),
    "gpu-exchange2": ("exchange_worker", exchange(), 2, "nccl"),
}
CASES = [pytest.param(run, name, id=f"{run}-{name}", marks=[pytest.mark.multi, *([pytest.mark.gpu] * gpu)])
         for run, (_, scenarios, _, backend) in RUNS.items() for name in [*scenarios, "exit"]
         for gpu in [backend == "nccl"]]
_done: dict[str, dict[str, str]] = {}     # one start of all ranks serves all scenarios of a run


@pytest.mark.parametrize("run,scenario", CASES)
def test_ranks(run: str, scenario: str) -> None:
    """``exit``: every rank ended by itself, with code 0."""
    module, scenarios, world, backend = RUNS[run]
    if backend == "nccl" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, there are {torch.cuda.device_count()}")
    if run not in _done:
        _done[run] = results(launch(module, scenarios, world, backend=backend))
    found = _done[run].get(scenario, "" if scenario == "exit" else "not reached: an earlier scenario failed")
    assert not found, found
