"""gate where inputs are odd: NaN, infinities, ties, foreign ids, and every documented error."""

from __future__ import annotations

import pytest
import torch

from lina import ops, reference

from gate_case import OPTIONS, doubled, name, prepared
from helpers import assert_within_rounding, twin

inf, nan = float("inf"), float("nan")

ODD_ROWS = torch.tensor(
    [
        [nan, 1, 2, 0, -1, 3, 0.5, -2],
        [inf, 1, 2, 0, -1, 3, 0.5, -2],
        [-inf, 1, 2, 0, -1, 3, 0, -2],
        [nan] * 8,
        [inf] * 8,
        [-inf] * 8,
        [inf, nan, -inf, 0, 1, 2, inf, nan],
        [-inf, nan, -inf, nan, -inf, nan, -inf, 1],
        [nan, -inf, nan, -inf, 5, nan, nan, 4],
        [0.0, -0.0, 0.0, -0.0, 0, 0, 0, 0],
        [3e38, -3e38, 1, 2, 3e38, 0, 0, 0],
        [-inf, -inf, inf, -inf, nan, nan, nan, nan],
    ]
)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("width", [8, 40])  # ranked whole, and through candidates
def test_nan_and_infinity(device, options, width):
    values = (
        ODD_ROWS if width == 8 else torch.cat([ODD_ROWS, ODD_ROWS.flip(1), ODD_ROWS, ODD_ROWS, ODD_ROWS], 1)
    )
    x, ref = twin(values, torch.float32, device, requires_grad=False)
    options = prepared(options, width, 4, device)
    got = ops.gate(x, 4, stats=True, **options)
    want = reference.gate(ref, 4, stats=True, **doubled(options))
    single = reference.gate(x, 4, stats=True, **options)  # float32 keys tie where float64's do not
    assert torch.equal(got.expert_TK, single.expert_TK)
    assert ((got.expert_TK >= 0) & (got.expert_TK < width)).all()
    assert all(len(set(row)) == 4 for row in got.expert_TK.tolist())
    same = (got.expert_TK == want.expert_TK).all(-1)
    assert same.sum() >= len(same) - 1
    assert_within_rounding(got.weight_TK[same], want.weight_TK[same], width / 16 + 12)
    for t in range(len(values)):
        row = ops.gate(x[t : t + 1], 4, stats=True, **options)
        row_want = reference.gate(x[t : t + 1].double(), 4, stats=True, **doubled(options))
        assert_within_rounding(row.prob_E, row_want.prob_E, width / 16 + 12)
        # 3e38 squared overflows float32 alone
        z = row_want.z.float().double() if row_want.z.isfinite() else row_want.z
        assert_within_rounding(row.z, z, width / 16 + 12)


def test_ids_stay_in_range_in_the_backward(device):
    """Foreign ids given to the raw op are no wild writes on the CPU (nor on the GPU)."""
    logits = torch.randn(5, 8, device=device)
    expert = torch.tensor(
        [[-1, 8], [2**31 - 1, -(2**31)], [0, 1], [2, 3], [100, 5]], dtype=torch.int32, device=device
    )
    dweight = torch.ones(5, 2, device=device)
    for score in range(3):
        out = torch.ops.lina.gate_bwd(logits, expert, dweight, None, score, True, 1.0)
        alone = torch.ops.lina.gate_bwd(logits[2:4], expert[2:4], dweight[2:4], None, score, True, 1.0)
        assert torch.equal(out[2:4], alone)


@pytest.mark.parametrize("E,K", [(8, 3), (40, 5), (300, 32), (1024, 32)])
def test_ties_go_to_the_lower_id(device, E, K):
    first = torch.arange(K, dtype=torch.int32, device=device).expand(3, K)
    assert torch.equal(ops.gate(torch.full((3, E), 0.25, device=device), K).expert_TK, first)
    steps = torch.arange(E, device=device).remainder(3).float().expand(3, E)  # a third of all are largest
    want = reference.gate(steps, K).expert_TK
    assert torch.equal(ops.gate(steps, K).expert_TK, want)
    zeros = torch.zeros(3, E, device=device)
    zeros[:, 1::2] = -0.0
    assert torch.equal(ops.gate(zeros, K).expert_TK, first)


def test_groups_without_enough_finite_keys_are_filled_by_id(device):
    logits = torch.full((1, 8), -inf, device=device)
    logits[0, 6] = 1.0
    got = ops.gate(
        logits,
        3,
        score="sigmoid",
        groups=4,
        top_groups=2,
        group_score="max",
        bias_E=torch.tensor([-inf] * 6 + [0.0, -inf], device=device),
    )
    assert got.expert_TK.tolist() == [[6, 0, 1]]


X = torch.zeros(4, 12)
ERRORS = [
    (dict(logits_TE=[[1.0]]), TypeError, "logits_TE is a list"),
    (dict(logits_TE=X.int()), TypeError, "logits_TE is of torch.int32"),
    (dict(logits_TE=X[0]), ValueError, "logits_TE has 1 dimensions"),
    (dict(logits_TE=X[:, :0]), ValueError, "0 experts, limit 1..1024"),
    (dict(logits_TE=torch.zeros(1, 1025)), ValueError, "1025 experts, limit 1..1024"),
    (dict(logits_TE=torch.empty(2**31 // 8, 8, device="meta")), ValueError, "limit 2147483647"),
    (dict(top_k=0), ValueError, r"top_k=0, limit 1..12"),
    (dict(top_k=13), ValueError, r"top_k=13, limit 1..12"),
    (dict(logits_TE=torch.zeros(1, 64), top_k=33), ValueError, "top_k=33, limit 1..32"),
    (dict(top_k=2.0), TypeError, "top_k is a float"),
    (dict(score="tanh"), ValueError, "score='tanh', must be one of softmax"),
    (dict(group_score="sum"), ValueError, "group_score='sum', must be one of top2"),
    (dict(groups=5), ValueError, "groups=5, must divide the 12"),
    (dict(groups=0), ValueError, "groups=0, must divide"),
    (dict(groups=2.0), TypeError, "groups is a float"),
    (dict(groups=4, top_groups=5), ValueError, "top_groups=5, limit 1..groups=4"),
    (dict(groups=4, top_groups=0), ValueError, "top_groups=0, limit"),
    (dict(groups=6, top_groups=1, top_k=3), ValueError, "fewer than top_k=3"),
    (dict(bias_E=[0.0] * 12), TypeError, "bias_E is list"),
    (dict(bias_E=torch.zeros(12, dtype=torch.int32)), TypeError, "bias_E is torch.int32"),
    (dict(bias_E=torch.zeros(11)), ValueError, r"bias_E has shape \(11,\)"),
    (dict(bias_E=torch.zeros(12, device="meta")), ValueError, "bias_E lies on meta"),
]


@pytest.mark.parametrize("change,kind,text", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(change, kind, text):
    with pytest.raises(kind, match=r"^gate: .*" + text):
        ops.gate(**(dict(logits_TE=X, top_k=2) | change))


RAW = dict(
    logits=X,
    bias=None,
    k=2,
    score=0,
    renorm=False,
    scale=1.0,
    groups=1,
    top_groups=1,
    group_top=2,
    stats=False,
)
RAW_ERRORS = [
    (dict(logits=X.int()), "int32"),
    (dict(logits=X[0]), "dimensions"),
    (dict(k=0), "top_k=0"),
    (dict(logits=torch.zeros(2, 1025)), "1025"),
    (dict(k=33), "top_k=33"),
    (dict(score=3), "score=3"),
    (dict(score=-1), "score=-1"),
    (dict(groups=5), "groups=5"),
    (dict(top_groups=2), "top_groups=2"),
    (dict(groups=12, top_groups=1), "fewer than top_k=2"),
    (dict(group_top=3), "group_top=3"),
    (dict(bias=torch.zeros(3)), "bias"),
    (dict(bias=torch.zeros(12).double()), "bias is of float64"),
    (dict(bias=torch.zeros(12, device="meta")), "bias lies on meta, must lie on cpu"),
    (dict(logits=X.to("meta"), bias=torch.zeros(12)), "bias lies on cpu, must lie on meta"),
    (dict(logits=torch.zeros(1, 1).expand(2**21, 1024)), r"T\*E=2097152\*1024 elements, limit 2\^31-1"),
]


@pytest.mark.parametrize("change,text", RAW_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_raw_operator_checks_for_itself(change, text):
    with pytest.raises(RuntimeError, match="gate: .*" + text):
        torch.ops.lina.gate_fwd(*(RAW | change).values())


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(expert=torch.zeros(4, 2)), "expert is of float32"),
        (dict(expert=torch.zeros(3, 2).int()), "expert"),
        (dict(dweight=torch.zeros(4, 3)), "dweight"),
        (dict(dweight=torch.zeros(4, 2).double()), "dweight is of float64"),
        (dict(dstat=torch.zeros(12)), "dstat"),
        (dict(score=5), "score=5"),
        (dict(logits=torch.zeros(1, 1).expand(2**21, 1024)), r"T\*E=2097152\*1024 elements"),
        *((dict.fromkeys([n], t.to("meta")), f"{n} lies on meta, must lie on cpu") for n, t in (
            ("expert", torch.zeros(4, 2).int()), ("dweight", torch.zeros(4, 2)), ("dstat", torch.zeros(13)))),
    ],
)
def test_raw_backward_checks_for_itself(change, text):
    args = dict(
        logits=X, expert=torch.zeros(4, 2).int(), dweight=None, dstat=None, score=0, renorm=False, scale=1.0
    )
    with pytest.raises(RuntimeError, match="gate: .*" + text):
        torch.ops.lina.gate_bwd(*(args | change).values())
