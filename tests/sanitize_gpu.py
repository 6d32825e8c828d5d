"""Every kernel once on small shapes, for compute-sanitizer: run by `make sanitize`, not by pytest.

Results are checked by the tests; here only the sanitizer's verdict counts. Shapes are those where
an index goes wrong: no token, one token, no multiple of a block, every expert's limit, empty experts.
With --general all widths are odd, so that lina's own grouped kernels run and none of torch's: under
racecheck torch's (CUTLASS) end in an internal error of the sanitizer.
"""

from __future__ import annotations

import itertools
import sys

import torch

import lina
from lina import ops

SHAPES = [  # T, E, K, D, F
    (0, 4, 2, 16, 16),
    (1, 1, 1, 8, 8),
    (33, 5, 2, 24, 40),
    (70, 128, 8, 32, 16),
    (9, 1024, 32, 8, 8),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(T: int, E: int, K: int, D: int, F: int, dtype: torch.dtype, activation: str) -> None:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)

    gated = activation in ("swiglu", "geglu", "swiglu_clamped")
    U = 2 * F if gated else F
    x_TD, logits_TE = tensor(T, D), tensor(T, E)
    w_up, w_down, b_up, b_down = tensor(E, U, D), tensor(E, D, F), tensor(E, U), tensor(E, D)
    routing = ops.gate(logits_TE, K, stats=True)
    biases = {"b_up": b_up, "b_down": b_down}
    out_TD = ops.moe(
        x_TD, routing.weight_TK, routing.expert_TK, w_up, w_down, activation=activation, **biases
    )
    rows = ops.sort(routing.expert_TK, E)
    for ep, me in ((E, E // 2), (1, -1)):
        ops.dispatch_layout(routing.expert_TK, torch.arange(8), E, ep, me, 8, 3)
    y_ND = ops.experts(x_TD, rows, w_up, w_down, activation=activation)
    (out_TD.float().sum() + ops.combine(y_ND, rows, routing.weight_TK).float().sum()).backward()
    torch.cuda.synchronize()


def main() -> None:
    torch.manual_seed(0)
    odd = 1 if "--general" in sys.argv[1:] else 0
    shapes = [(T, E, K, D + odd, F + odd) for T, E, K, D, F in SHAPES]
    for shape, dtype in itertools.product(shapes, DTYPES):
        for activation in ("swiglu", "gelu"):
            layer(*shape, dtype, activation)
    for activation in ("geglu", "swiglu_clamped", "relu", "relu2", "silu"):
        layer(33, 5, 2, 24, 40, torch.float32, activation)
    for score, groups in itertools.product(("softmax", "topk_softmax", "sigmoid"), (1, 4)):
        logits_TE = torch.randn(37, 16, device="cuda", requires_grad=True)
        bias_E = torch.randn(16, device="cuda")
        routing = ops.gate(
            logits_TE, 2, score=score, bias_E=bias_E, groups=groups, top_groups=min(groups, 2), stats=True
        )
        routing.weight_TK.sum().backward()
    torch.cuda.synchronize()
    print(f"lina {lina.__version__}: every kernel ran on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
