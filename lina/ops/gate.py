"""Top-k gating and its losses. Contract: csrc/ops/gate.h.

T tokens, E experts, K experts chosen for each token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lina.ops.devices import check_devices
from lina.ops.dtypes import check_float, sum_dtype
from lina.ops.once import needs_grad, once
from lina.ops.sort import MAX_EXPERTS

SCORES = {"softmax": 0, "topk_softmax": 1, "sigmoid": 2}  # enum lina_score
GROUP_SCORES = {"top2": 2, "max": 1}  # group_top
BALANCE_FORMS = ("switch", "gshard")
MAX_TOP_K, MAX_ELEMENTS = 32, 2**31 - 1


class Routing(NamedTuple):
    """What the gate decided for each token.

    Attributes:
        weight_TK: weights of the chosen experts; float32 (float64 for float64 logits), differentiable.
        expert_TK: their ids, int32, best first.
        load_2E: int32 counts of each expert's choices: all, and first choices only. None without ``stats``.
        prob_E: each expert's probability summed over the tokens, differentiable. None without ``stats``.
        z: sum over the tokens of logsumexp(logits)^2, a scalar, differentiable; divide by T for the z-loss of
            Zoph et al. 2022, arXiv:2202.08906, eq. 5. None without ``stats``.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    load_2E: Tensor | None = None
    prob_E: Tensor | None = None
    z: Tensor | None = None


def gate(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int | None = None,
    group_score: str = "top2",
    stats: bool = False,
) -> Routing:
    """Each token's ``top_k`` best experts and their weights.

    Args:
        logits_TE: [T, E] router logits: float32, bfloat16, float16 or, on the CPU, float64. 1 <= E <= 1024.
        top_k: K, 1 to 32 and at most E.
        score: ``"softmax"`` over all experts, ``"topk_softmax"`` over the chosen ones, or ``"sigmoid"``.
        renormalize: divide each token's weights by their sum.
        scale: multiplies every weight.
        bias_E: [E] added to the scores for the choice alone (DeepSeek-V3); the weights do not see it, and
            it has no gradient. Any float dtype; used in the weights' dtype.
        groups: experts form this many runs of equal length; a divisor of E.
        top_groups: only this many groups take part, those of the best ``group_score``; None: all.
        group_score: ``"top2"``, the sum of a group's two best scores, or ``"max"``, its best.
        stats: also return load, probabilities and z for the losses and the bias update.

    Equal scores go to the lower id; NaN ranks last. Ids are in [0, E) and distinct whatever the logits;
    weights follow IEEE arithmetic. Sums run in a fixed order: results repeat bitwise.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument outside its limits.

    Source: Shazeer et al. 2017, arXiv:1701.06538; DeepSeek-V3, arXiv:2412.19437, eq. 12-16.
    """
    _check(logits_TE, top_k, score, bias_E, groups, top_groups, group_score)
    if bias_E is not None:
        bias_E = bias_E.detach().to(sum_dtype(logits_TE.dtype))
    arguments = (
        logits_TE,
        bias_E,
        top_k,
        SCORES[score],
        bool(renormalize),
        float(scale),
        groups,
        groups if top_groups is None else top_groups,
        GROUP_SCORES[group_score],
        bool(stats),
    )
    routing = _Gate.apply(*arguments) if needs_grad(logits_TE) else _forward(*arguments)
    return Routing(*routing) if stats else Routing(*routing[:2])


def _check(
    logits_TE: Tensor,
    top_k: int,
    score: str,
    bias_E: Tensor | None,
    groups: int,
    top_groups: int | None,
    group_score: str,
) -> None:
    check_float("gate", "logits_TE", logits_TE)
    if logits_TE.dim() != 2:
        raise ValueError(f"gate: logits_TE has {logits_TE.dim()} dimensions, must have 2: tokens, experts")
    E = logits_TE.shape[1]
    check_gate(E, top_k, score, groups, top_groups, group_score)
    if logits_TE.shape[0] > MAX_ELEMENTS // E:
        raise ValueError(f"gate: logits_TE has {logits_TE.shape[0]} * {E} elements, limit {MAX_ELEMENTS}")
    if bias_E is None:
        return
    if not isinstance(bias_E, Tensor) or not bias_E.is_floating_point():
        raise TypeError(
            f"gate: bias_E is {getattr(bias_E, 'dtype', type(bias_E).__name__)}, must be a float Tensor"
        )
    if bias_E.shape != (E,):
        raise ValueError(f"gate: bias_E has shape {tuple(bias_E.shape)}, must be ({E},)")
    if bias_E.device != logits_TE.device:
        raise ValueError(f"gate: bias_E lies on {bias_E.device}, must lie on {logits_TE.device}")


def check_gate(
    experts: int, top_k: int, score: str, groups: int, top_groups: int | None, group_score: str
) -> None:
    """Raises the TypeError or ValueError with which :func:`gate` would refuse these options."""
    E = experts
    for name, value in (
        ("experts", experts),
        ("top_k", top_k),
        ("groups", groups),
        ("top_groups", top_groups),
    ):
        if (value is None and name == "top_groups") or isinstance(value, (int, torch.SymInt)):
            continue
        raise TypeError(f"gate: {name} is a {type(value).__name__}, must be an int")
    if not 1 <= E <= MAX_EXPERTS:
        raise ValueError(f"gate: {E} experts, limit 1..{MAX_EXPERTS}")
    if not 1 <= top_k <= min(E, MAX_TOP_K):
        raise ValueError(f"gate: top_k={top_k}, limit 1..{min(E, MAX_TOP_K)} for {E} experts")
    if score not in SCORES:
        raise ValueError(f"gate: score={score!r}, must be one of {', '.join(SCORES)}")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"gate: group_score={group_score!r}, must be one of {', '.join(GROUP_SCORES)}")
    if groups < 1 or E % groups:
        raise ValueError(f"gate: groups={groups}, must divide the {E} experts")
    if top_groups is not None and not 1 <= top_groups <= groups:
        raise ValueError(f"gate: top_groups={top_groups}, limit 1..groups={groups}")
    if top_groups is not None and top_groups * (E // groups) < top_k:
        raise ValueError(
            f"gate: top_groups={top_groups} of {E // groups} experts each hold fewer than top_k={top_k}"
        )


def _forward(*arguments):
    weight_TK, expert_TK, load_2E, stat = torch.ops.lina.gate_fwd(*arguments)
    if not arguments[-1]:
        return weight_TK, expert_TK, load_2E, None, None
    return weight_TK, expert_TK, load_2E, stat[:-1].clone(), stat[-1].clone()


class _Gate(torch.autograd.Function):
    """One node for the weights and both statistics; the scores are recomputed from the logits."""

    @staticmethod
    def forward(ctx, *arguments):
        logits_TE, _, _, score, renorm, scale = arguments[:6]
        routing = _forward(*arguments)
        ctx.save_for_backward(logits_TE, routing[1])
        ctx.mark_non_differentiable(*routing[1:3])
        ctx.set_materialize_grads(False)
        ctx.options = score, renorm, scale
        return routing

    @staticmethod
    @once
    def backward(ctx, saved, dweight_TK, _expert, _load, dprob_E, dz):
        logits_TE, expert_TK = saved
        dstat = None
        if dprob_E is not None or dz is not None:
            E = logits_TE.shape[1]
            some = dz if dprob_E is None else dprob_E
            dprob_E = some.new_zeros(E) if dprob_E is None else dprob_E
            dstat = torch.cat((dprob_E, some.new_zeros(1) if dz is None else dz.reshape(1)))
        dlogits_TE = torch.ops.lina.gate_bwd(logits_TE, expert_TK, dweight_TK, dstat, *ctx.options)
        return dlogits_TE, None, None, None, None, None, None, None, None, None


@torch.library.register_fake("lina::gate_fwd")
def _fake_fwd(logits, bias, k, score, renorm, scale, groups, top_groups, group_top, stats):
    check_devices("gate", logits, bias=bias)
    T, E = logits.shape
    acc = sum_dtype(logits.dtype)
    return (
        logits.new_empty((T, k), dtype=acc),
        logits.new_empty((T, k), dtype=torch.int32),
        logits.new_empty((2, E if stats else 0), dtype=torch.int32),
        logits.new_empty((E + 1 if stats else 0,), dtype=acc),
    )


@torch.library.register_fake("lina::gate_bwd")
def _fake_bwd(logits, expert, dweight, dstat, score, renorm, scale):
    check_devices("gate", logits, expert=expert, dweight=dweight, dstat=dstat)
    return logits.new_empty(logits.shape)


def balance_loss(load_2E: Tensor, prob_E: Tensor, form: str = "switch") -> Tensor:
    """Load-balancing loss of one batch, a scalar, from the gate's statistics.

    Args:
        load_2E: int [2, E], ``Routing.load_2E``: counts, no gradient. Sums over ranks or batches are fine.
        prob_E: float [E], ``Routing.prob_E`` over the same tokens; the loss is differentiable in it.
        form: ``"switch"``: E * sum_e f_e P_e with f_e the share of all choices that went to e and P_e its
            mean probability; 1 when balanced (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6). ``"gshard"``:
            mean_e (c_e / T) P_e with c_e the first choices; 1/E^2 when balanced (Lepikhin et al. 2020,
            arXiv:2006.16668, algorithm 1).

    An empty batch gives 0.

    Raises:
        ValueError: another form, or shapes that do not fit.
    """
    if form not in BALANCE_FORMS:
        raise ValueError(f"balance_loss: form={form!r}, must be one of {', '.join(BALANCE_FORMS)}")
    if prob_E.dim() != 1 or load_2E.shape != (2, prob_E.shape[0]):
        raise ValueError(
            f"balance_loss: load_2E has shape {tuple(load_2E.shape)} and prob_E "
            f"{tuple(prob_E.shape)}, must be (2, E) and (E,)"
        )
    E = prob_E.shape[0]
    load_E = load_2E[0 if form == "switch" else 1].to(prob_E.dtype)
    tokens = load_2E[1].sum().clamp(min=1).to(prob_E.dtype)
    product = (load_E / load_E.sum().clamp(min=1) * prob_E).sum() / tokens
    return product * E if form == "switch" else product / E


def jitter(x: Tensor, eps: float) -> Tensor:
    """``x`` times uniform noise in [1 - eps, 1 + eps], for exploration while training.

    Drawn in x's dtype from torch's default generator of x's device; 0 returns ``x`` itself. Whether the
    model is training is the caller's to know. Source: Fedus et al. 2021, arXiv:2101.03961, appendix A.

    Raises:
        ValueError: eps outside 0 <= eps < 1.
    """
    if not 0 <= eps < 1:
        raise ValueError(f"jitter: eps={eps}, limit 0 <= eps < 1")
    return x if eps == 0 else x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> None:
    """DeepSeek-V3's balancing without a loss, in place: bias += rate * sign(mean(load) - load).

    Args:
        bias_E: float [E], the gate's ``bias_E``; any float dtype.
        load_E: [E], choices of each expert since the last update (``Routing.load_2E[0]``, summed over ranks).
        rate: the step, 0.001 in the source.

    Raises:
        TypeError: bias_E is not of a float dtype.
        ValueError: shapes that differ, or a negative or NaN rate.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    if not bias_E.is_floating_point():
        raise TypeError(f"update_bias: bias_E is of {bias_E.dtype}, must be a float dtype")
    if bias_E.dim() != 1 or load_E.shape != bias_E.shape:
        raise ValueError(
            f"update_bias: bias_E has shape {tuple(bias_E.shape)} and load_E "
            f"{tuple(load_E.shape)}, must both be (E,)"
        )
    if not rate >= 0:
        raise ValueError(f"update_bias: rate={rate}, limit rate >= 0")
    load_E = load_E.double()  # counts are exact, so that a balanced expert stays put
    bias_E.add_((load_E.mean() - load_E).sign().to(bias_E.dtype), alpha=rate)
