"""``lina train --schedule auto``: it says what was planned, and refuses what cannot be before it starts."""

from __future__ import annotations

import json

import pytest

from lina.parallel import CostModel, ExpertPass, ExpertShape, Line, machine_facts
from lina.train import launch as train
from lina.train import options
from lina.train.resolve import resolve

# As test_train.TINY; the plan holds from the eleventh step on.
TINY = dict(dim=16, layers=2, heads=2, ffn_dim=16, experts=4, seq=32, batch=4, steps=12, heldout_kib=2,
            sample=0, ranks=2, device="cpu", quiet=True, precision="float32")


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """A free link and passes that cost something: one pass, gradients at once."""
    link, experts = Line(0.0, 0.0, 1.0), Line(1e-4, 1e-6, 1.0)
    found = CostModel(machine_facts(), "cpu", 2, 2, {("a2a", "c10d"): link, ("allreduce", "c10d"): link},
                      (ExpertPass(ExpertShape(16, 16, 2), experts, experts),))
    monkeypatch.setenv("LINA_PROFILE", str(tmp_path / "profile.json"))
    return found.save()


@pytest.mark.multi
def test_train_says_what_was_planned(tmp_path, text, profile):
    out = tmp_path / "out"
    train.launch(resolve(dict(TINY, data=text, out=str(out), schedule="auto")))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schedule"] == "auto"
    assert summary["plan"][0] == "schedule plain, 1/1 passes over c10d, ep 2"
    assert any("c10d lina 1/1" in line for line in summary["plan"])


def test_train_refuses_before_it_starts(tmp_path, monkeypatch, text, profile):
    given = dict(TINY, data=text, out=str(tmp_path / "out"))
    for change, said in ((dict(transport="nccl"), "--transport: nccl, needs --device cuda"),
                         (dict(degree="3"), "--degree: 3, two numbers from 1 to 8, as in 3,3"),
                         (dict(degree="3,9"), "--degree: 3,9, two"),
                         (dict(degree="a,1"), "--degree: a,1, two"),
                         (dict(schedule="auto", ranks=4), "--schedule: auto, .*ranks there 2, here 4")):
        with pytest.raises(options.OptionError, match=said):
            resolve({**given, **change})
    assert options.passes(resolve({**given, "degree": "2,3", "schedule": "lina"})) == (2, 3)
    monkeypatch.setenv("LINA_PROFILE", str(tmp_path / "none.json"))
    with pytest.raises(options.OptionError, match=r"--schedule: auto, .*no such file; run `lina profile`"):
        resolve({**given, "schedule": "auto"})
