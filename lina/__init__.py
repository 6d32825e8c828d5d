"""lina: fast mixture-of-experts layers for PyTorch, on one GPU or CPU and across many.

Swap the MoE layers of a model (:func:`swap`) or build with :class:`MoE`; spread experts over
ranks with :func:`mesh` and train with :func:`ddp`. Operators are in ``lina.ops`` and
``torch.ops.lina``, their definitions in plain PyTorch in ``lina.reference``.
"""

import torch  # noqa: F401  libtorch must be loaded before the extension looks it up

try:
    from lina import _C  # noqa: F401  registers torch.ops.lina
except ModuleNotFoundError as error:
    raise ImportError("lina's extension lina._C is not built; run `pip install .` in lina's "
                      "source folder") from error

from lina import nn, ops
from lina.nn import MoE, aux_loss, update_bias
from lina.parallel import (
    GradScaler,
    HookState,
    allreduce_hook,
    clip_grad_norm_,
    ddp,
    fsdp,
    gathered_state_dict,
    mesh,
    regroup,
)
from lina.profile import profile
from lina.swap import swap, swap_report, unswap
from lina.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "GradScaler", "HookState", "MoE", "allreduce_hook", "aux_loss", "clip_grad_norm_", "ddp",
    "fsdp", "gathered_state_dict", "mesh", "nn", "ops", "profile", "regroup", "swap", "swap_report",
    "trace", "unswap", "update_bias",
]
