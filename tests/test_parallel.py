"""Several ranks over gloo (and, on two GPUs, NCCL): what is spread equals what is whole."""

from __future__ import annotations

from ranks import Run, each_scenario

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


GPU_COMPILE = ["same_as_plain:compile", "same_as_plain:compile:lina"]


RUNS = {
    "train4": Run("parallel_worker", training(LAYOUTS), 4),
    "train2": Run("parallel_worker", [f"parity:{ep}:deepseek" for ep in (1, 2)], 2),
    "compile2": Run("exchange_worker", ["same_as_plain:compile"], 2),
    "exchange4": Run("exchange_worker", exchange(), 4),
    "gpu-train2": Run("parallel_worker", training((1, 2)), 2, "nccl"),
    "gpu-exchange2": Run("exchange_worker", exchange(), 2, "nccl"),
    "gpu-compile2": Run("exchange_worker", GPU_COMPILE, 2, "nccl"),
}


@each_scenario(RUNS)
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)
