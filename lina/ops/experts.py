"""The experts' feed-forward networks over ragged rows. Contract: csrc/ops/experts.h.

T tokens, K experts for each, E experts, D model width, F expert width, U = 2F (gated activation) or F,
N = T*K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lina.ops.devices import check_devices
from lina.ops.dtypes import check_float, sum_dtype
from lina.ops.once import needs_grad, once
from lina.ops.sort import MAX_EXPERTS, Rows

GATED = ("swiglu", "geglu", "swiglu_clamped")
ACTIVATIONS = {
    name: number
    for number, name in enumerate(  # enum lina_activation
        (*GATED, "gelu", "relu", "relu2", "silu")
    )
}
NEED_DX, NEED_DWEIGHT, NEED_DW_UP, NEED_DB_UP, NEED_DW_DOWN, NEED_DB_DOWN, NEED_KEPT = (
    1 << i for i in range(7)
)


def experts(
    x_TD: Tensor,
    rows: Rows,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Each row's token through its expert: ``activation(x @ w_up[e].T + b_up[e]) @ w_down[e].T + b_down[e]``.

    Args:
        x_TD: [T, D] tokens: float32, bfloat16, float16 or, on the CPU, float64.
        rows: which token and expert each row is, from :func:`lina.ops.sort`.
        w_up: [E, U, D] in x's dtype. Views of [E, D, U] storage are taken as they are; layouts with no stride
            of 1 in the last two dimensions are copied.
        w_down: [E, D, F] likewise.
        b_up: [E, U] or None.
        b_down: [E, D] or None.
        activation: gated, U = 2F: ``"swiglu"``, ``"geglu"``, ``"swiglu_clamped"``; plain, U = F: ``"gelu"``,
            ``"relu"``, ``"relu2"``, ``"silu"``.
        interleaved: gate and up values alternate in U; else all gate values come first.
        alpha: slope of the sigmoid of ``"swiglu_clamped"``.
        limit: its clamp, at least 0.

    Returns:
        y_ND: [N, D] in x's dtype, rows in order of their expert. Rows from ``rows.offset_E1[E]`` on (pairs
        without an expert) hold unspecified values, which :func:`combine` never reads.

    Differentiable, once, in x, weights and biases; frozen ones cost nothing. Gradients of the weights have
    their layout. Products accumulate in float32 (float64) and round once to x's dtype. Under autocast x,
    weights and biases are cast to its dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, device or option outside its limits; E is 1 to 1024.

    Source: Shazeer 2020, arXiv:2002.05202 (gated forms); So et al. 2021, arXiv:2109.08668 (relu squared);
    gpt-oss model card, arXiv:2508.10925 (clamped form).
    """
    x_TD, w_up, w_down, b_up, b_down = autocast("experts", x_TD, w_up, w_down, b_up, b_down)
    check("experts", x_TD, w_up, w_down, b_up, b_down, activation, limit)
    E, T = w_up.shape[0], x_TD.shape[0]
    if rows.offset_E1.shape != (E + 1,):
        raise ValueError(f"experts: rows were sorted for {rows.offset_E1.shape[0] - 1} experts, w_up has {E}")
    if rows.pair_row_TK.shape[0] != T:
        raise ValueError(f"experts: rows are of {rows.pair_row_TK.shape[0]} tokens, x_TD has {T}")
    check_rows("experts", rows, x_TD)
    options = ACTIVATIONS[activation], bool(interleaved), float(alpha), float(limit)
    if needs_grad(x_TD, w_up, w_down, b_up, b_down):
        return _Experts.apply(x_TD, *rows, w_up, b_up, w_down, b_down, options)
    return torch.ops.lina.experts_fwd(
        x_TD,
        rows.offset_E1,
        rows.row_pair_N,
        w_up,
        b_up,
        w_down,
        b_down,
        rows.pair_row_TK.shape[1],
        *options,
        False,
    )[0]


def autocast(op: str, x_TD: Tensor, *others: Tensor | None) -> tuple:
    """Under autocast, the arguments in its dtype (float64 stays, as in torch); else as they are."""
    if not isinstance(x_TD, Tensor):
        raise TypeError(f"{op}: x_TD is a {type(x_TD).__name__}, must be a Tensor")
    kind = x_TD.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta has no autocast to ask for
        return x_TD, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x_TD, *others)
    )


def check(
    op: str,
    x_TD: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    limit: float,
) -> None:
    """Raises what ``experts`` and ``moe`` document."""
    check_float(op, "x_TD", x_TD)
    if x_TD.dim() != 2:
        raise ValueError(f"{op}: x_TD has {x_TD.dim()} dimensions, must have 2: tokens, width")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation={activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    if not limit >= 0:
        raise ValueError(f"{op}: limit={limit}, must be at least 0")
    for name, t in (("w_up", w_up), ("w_down", w_down), ("b_up", b_up), ("b_down", b_down)):
        if t is None and name.startswith("b"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, must be a Tensor")
        if t.dtype != x_TD.dtype:
            raise TypeError(
                f"{op}: {name} is of {t.dtype} but x_TD of {x_TD.dtype}; outside autocast they must be "
                "the same"
            )
        if t.device != x_TD.device:
            raise ValueError(f"{op}: {name} lies on {t.device}, must lie on {x_TD.device}")
    if w_up.dim() != 3 or w_down.dim() != 3:
        raise ValueError(
            f"{op}: w_up has {w_up.dim()} and w_down {w_down.dim()} dimensions, both must have 3: "
            "experts, outputs, inputs"
        )
    D, E, F = x_TD.shape[1], w_up.shape[0], w_down.shape[2]
    U = 2 * F if activation in GATED else F
    if not 1 <= E <= MAX_EXPERTS:
        raise ValueError(f"{op}: w_up has {E} experts, limit 1..{MAX_EXPERTS}")
    if D < 1 or F < 1:
        raise ValueError(f"{op}: widths D={D}, F={F}, must be at least 1")
    for name, t, shape in (
        ("w_up", w_up, (E, U, D)),
        ("w_down", w_down, (E, D, F)),
        ("b_up", b_up, (E, U)),
        ("b_down", b_down, (E, D)),
    ):
        if t is not None and t.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, must be {shape} for {activation}")


def check_rows(op: str, rows: Rows, like: Tensor) -> None:
    """The indices lie where the values do: with one on meta torch would run the shape-only kernel."""
    for name, index in zip(rows._fields, rows, strict=True):
        if index.device != like.device:
            raise ValueError(f"{op}: rows.{name} lies on {index.device}, must lie on {like.device}")


class _Experts(torch.autograd.Function):
    """Saves x and the pre-activation h; activations are recomputed."""

    @staticmethod
    def forward(ctx, x_TD, offset, row_pair, pair_row, w_up, b_up, w_down, b_down, options):
        y_ND, h_NU = torch.ops.lina.experts_fwd(
            x_TD, offset, row_pair, w_up, b_up, w_down, b_down, pair_row.shape[1], *options, True
        )
        ctx.save_for_backward(x_TD, h_NU, offset, row_pair, pair_row, w_up, w_down)
        ctx.options = options
        return y_ND

    @staticmethod
    @once
    def backward(ctx, saved, dy_ND):
        need = ctx.needs_input_grad
        mask = (
            NEED_DX * need[0]
            | NEED_DW_UP * need[4]
            | NEED_DB_UP * need[5]
            | NEED_DW_DOWN * need[6]
            | NEED_DB_DOWN * need[7]
        )
        x_TD, h_NU, offset, row_pair, pair_row, w_up, w_down = saved
        dx, _, *dw = torch.ops.lina.experts_bwd(
            dy_ND, None, x_TD, h_NU, offset, row_pair, pair_row, w_up, w_down, *[None] * 3, *ctx.options, mask
        )[:6]
        return wanted(need, (dx, None, None, None, *dw, None))


def wanted(need: tuple, gradients: tuple) -> tuple:
    """The gradients that were asked for; what was not computed is None."""
    return tuple(g if n else None for n, g in zip(need, gradients, strict=True))


@torch.library.register_fake("lina::experts_fwd")
def _fake_fwd(
    x, offset, row_pair, w_up, b_up, w_down, b_down, k, activation, interleaved, alpha, limit, save
):
    indices = dict(offset=offset, row_pair=row_pair)
    check_devices("experts", x, **indices, w_up=w_up, b_up=b_up, w_down=w_down, b_down=b_down)
    N = row_pair.shape[0]
    return x.new_empty((N, x.shape[1])), x.new_empty((N if save else 0, w_up.shape[1]))


@torch.library.register_fake("lina::experts_bwd")
def _fake_bwd(
    dy,
    weight,
    x,
    h,
    offset,
    row_pair,
    pair_row,
    w_up,
    w_down,
    b_down,
    dh,
    a,
    activation,
    interleaved,
    alpha,
    limit,
    need,
):
    indices = dict(offset=offset, row_pair=row_pair, pair_row=pair_row)
    values = dict(dy=dy, weight=weight, h=h, w_up=w_up, w_down=w_down, b_down=b_down, dh=dh, a=a)
    check_devices("experts_bwd", x, **indices, **values)
    acc = sum_dtype(x.dtype)
    E, U, D = w_up.shape

    def out(bit, size, dtype=x.dtype):
        return x.new_empty(size if need & bit else (0,), dtype=dtype)

    def like(bit, w):
        return w.new_empty_strided(w.shape, _gradient_strides(w)) if need & bit else w.new_empty(0)

    return (
        out(NEED_DX, x.shape),
        out(NEED_DWEIGHT, pair_row.shape, acc),
        like(NEED_DW_UP, w_up),
        out(NEED_DB_UP, (E, U)),
        like(NEED_DW_DOWN, w_down),
        out(NEED_DB_DOWN, (E, D)),
        out(NEED_KEPT, (row_pair.shape[0], U)),
        out(NEED_KEPT, (row_pair.shape[0], w_down.shape[2])),
    )


def _gradient_strides(w: Tensor) -> tuple:
    """``lina_gradient_strides`` of csrc/ops/experts.c: the weight's own if dense, else contiguous."""
    inner = 2 if w.stride(2) == 1 else 1
    outer = 3 - inner
    size = w.shape[1] * w.shape[2]
    if w.stride(inner) == 1 and w.stride(outer) == w.shape[inner] and w.stride(0) == size:
        return w.stride()
    return size, w.shape[2], 1
