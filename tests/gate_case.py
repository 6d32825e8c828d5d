"""Options, shapes and logits that the gate's tests share."""

from __future__ import annotations

import torch

from lina import ops

import helpers

SHAPES = [
    (0, 8, 2),  # empty: launches nothing
    (1, 1, 1),  # smallest
    (1, 7, 7),  # K = E, E odd and below a vector
    (33, 128, 8),  # T not a multiple of a chunk
    (70, 60, 6),  # E not a multiple of a vector; T a little over one chunk
    (200, 16, 2),  # several chunks, short rows ranked whole
    (9, 256, 17),  # K over half of a rank block
    (64, 1024, 32),
]  # both limits
OPTIONS = [
    dict(),
    dict(renormalize=True),
    dict(score="topk_softmax"),
    dict(score="topk_softmax", renormalize=True, scale=0.5),
    dict(score="sigmoid"),
    dict(score="sigmoid", renormalize=True, scale=2.5),
    dict(score="sigmoid", bias=True, renormalize=True),
    dict(bias=True),
    dict(score="topk_softmax", bias=True),
    dict(score="sigmoid", bias=True, groups=4, top_groups=2, renormalize=True, scale=2.5),
    dict(groups=4, top_groups=3, group_score="max"),
]


def name(options):
    return "-".join(str(k) if v is True else str(v) for k, v in options.items()) or "softmax"


def prepared(options, E, K, device):
    """The gate's arguments: groups only where they divide E and hold K, a bias that separates keys."""
    options = dict(options)
    if options.get("groups", 1) > 1 and (E % 4 or E // 4 * options["top_groups"] < K):
        options.update(groups=1, top_groups=1)
    if options.pop("bias", False):
        draw = helpers.generator(7)
        # With many experts random keys come closer than float32 resolves: there the bias alone decides.
        bias = torch.randn(E, generator=draw) * 0.3 if E <= 256 else 2.0 * torch.randperm(E, generator=draw)
        options["bias_E"] = bias.to(device)
    return options


def doubled(options):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def everything(x, **options):
    got = ops.gate(x, 6, stats=True, **options)
    return *got, *torch.autograd.grad((got.weight_TK.square().sum(), got.prob_E.square().sum(), got.z), x)
