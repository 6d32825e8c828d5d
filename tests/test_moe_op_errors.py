"""Every error that moe documents: raised in Python, before anything runs."""

from __future__ import annotations

import pytest
import torch

from moe_case import Case

GOOD = dict(T=4, D=8, F=8, E=4, K=2)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=None), TypeError, "x_TD is a NoneType"),
        (dict(x=torch.zeros(4, 8, dtype=torch.int32)), TypeError, "x_TD is of torch.int32"),
        (dict(x=torch.zeros(4, 8, 1)), ValueError, "x_TD has 3 dimensions"),
        (dict(x=torch.zeros(5, 8)), ValueError, "expert_TK has 4 tokens, x_TD has 5"),
        (dict(x=torch.zeros(4, 9)), ValueError, r"w_up has shape \(4, 16, 8\), must be \(4, 16, 9\)"),
        (
            dict(w_up=torch.zeros(4, 16, 8).double()),
            TypeError,
            "w_up is of torch.float64 but x_TD of torch.float32",
        ),
        (dict(w_up=torch.zeros(4, 16)), ValueError, "w_up has 2"),
        (
            dict(w_up=torch.zeros(1025, 16, 8), w_down=torch.zeros(1025, 8, 8)),
            ValueError,
            "1025 experts, limit 1..1024",
        ),
        (dict(w_down="w"), TypeError, "w_down is a str"),
        (dict(w_down=torch.zeros(4, 8, 0)), ValueError, "F=0, must be at least 1"),
        (
            dict(w_down=torch.zeros(4, 8, 9)),
            ValueError,
            r"w_up has shape \(4, 16, 8\), must be \(4, 18, 8\) for swiglu",
        ),
        (dict(w_down=torch.zeros(3, 8, 8)), ValueError, r"w_down has shape \(3, 8, 8\)"),
        (dict(b_up=torch.zeros(4, 8)), ValueError, r"b_up has shape \(4, 8\), must be \(4, 16\)"),
        (dict(b_down=torch.zeros(4, 8).half()), TypeError, "b_down is of torch.float16"),
        (dict(b_down=torch.zeros(4, 8, device="meta")), ValueError, "b_down lies on meta"),
        (dict(weight=None), TypeError, "weight_TK is None"),
        (dict(weight=torch.zeros(4, 3)), ValueError, r"weight_TK has shape \(4, 3\), must be \(4, 2\)"),
        (dict(weight=torch.zeros(4, 2).double()), TypeError, "weight_TK is of torch.float64"),
        (dict(weight=torch.zeros(4, 2, device="meta")), ValueError, "weight_TK lies on meta"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else None,
)
def test_errors(change, error, text):
    case = Case(**GOOD)
    with pytest.raises(error, match=text):
        case.run(**change)


@pytest.mark.parametrize(
    "option, text",
    [
        (dict(activation="tanh"), "activation='tanh', must be one of swiglu"),
        (dict(limit=-1.0), "limit=-1.0, must be at least 0"),
        (dict(limit=float("nan")), "limit=nan"),
    ],
)
def test_option_errors(option, text):
    case = Case(**GOOD)
    case.options |= option
    with pytest.raises(ValueError, match=text):
        case.run()


def test_expert_errors():
    case = Case(**GOOD)
    for expert, error in ((case.expert.float(), TypeError), (case.expert[0], ValueError)):
        case.expert = expert
        with pytest.raises(error, match="moe: expert_TK"):
            case.run()
