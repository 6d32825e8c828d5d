"""Cost models: synthetic links are recovered, files are of one machine. Ranks: test_profile_ranks.py."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os

import pytest
import torch

import lina
from lina.parallel import (
    CostModel,
    ExpertPass,
    ExpertShape,
    LayerLine,
    Line,
    Point,
    default_path,
    machine_facts,
)
from lina.profile import measure, register, unregister
from lina.profile import run as running

# Seconds and seconds a byte: sizes whose times go from mostly alpha to mostly beta.
ALPHA, BETA = 2e-4, 5e-8
SIZES = (1000, 4000, 16000, 64000)
LINKS = dict(device="cpu", transports=["fake"], shapes=[])


class Fake:
    """A transport on a clock of its own, which only its calls advance: by their time exactly, or
    ``late[i % len(late)]`` seconds more in call i of a size. By size, ``calls`` counts them; sizes
    of ``room`` bytes and more cannot be prepared. A call does the operation ``each`` times."""

    def __init__(self, alpha=ALPHA, beta=BETA, late=(0.0,), room=math.inf, each=1):
        self.alpha, self.beta, self.late, self.room, self.each = alpha, beta, late, room, each
        self.now, self.calls = 0.0, {}

    def perf_counter(self):
        return self.now

    def prepare(self, ranks, n):
        if n >= self.room:
            raise MemoryError(f"no room for {n}")
        self.calls[n] = 0

        def run():
            self.now += self.each * (self.alpha + n * self.beta) + self.late[self.calls[n] % len(self.late)]
            self.calls[n] += 1
        return run

    def profile(self, monkeypatch, **given):
        """The model of it alone."""
        for module in (measure, running):
            monkeypatch.setattr(module, "time", self)
        with registered_as("a2a", "fake", self.prepare, each=self.each):
            return lina.profile(**{**LINKS, **given})


@contextlib.contextmanager
def registered_as(operation, transport, prepare, available=lambda ranks: True, each=1):
    register(operation, transport, prepare, available, each)
    try:
        yield
    finally:
        unregister(operation, transport)


# ---- the fit ----


@pytest.mark.parametrize("each", [1, 2])
def test_a_synthetic_link_is_recovered(each, monkeypatch):
    model = Fake(each=each).profile(monkeypatch, budget_s=3, sizes=SIZES)
    line = model.line("a2a")
    assert [p.n for p in line.points] == list(SIZES)
    for p in line.points:                   # sums of a few hundred terms on the clock
        assert p.low_s == pytest.approx(ALPHA + p.n * BETA, rel=1e-9)
        assert p.high_s == pytest.approx(p.time_s, rel=1e-9) == pytest.approx(p.low_s, rel=1e-9)
    assert line.alpha_s == pytest.approx(ALPHA, rel=1e-6) and line.beta_s == pytest.approx(BETA, rel=1e-6)
    assert line.r2 == pytest.approx(1) and model.time("a2a", 64000) == line.time(64000)


def test_calls_that_the_system_delayed_do_not_move_the_line(monkeypatch):
    """One call in seven is 3 ms late: some batches are, and the medians are not."""
    fake = Fake(late=(0.0,) * 6 + (3e-3,), alpha=2e-3)          # a batch is one call or two
    line = fake.profile(monkeypatch, budget_s=10, sizes=SIZES).line("a2a")
    assert any(p.high_s > 2e-3 + p.n * BETA + 1e-3 for p in line.points)
    assert line.alpha_s == pytest.approx(2e-3, rel=1e-6) and line.beta_s == pytest.approx(BETA, rel=1e-6)


def test_sizes_that_would_take_too_long_are_left_out(monkeypatch):
    fake = Fake(alpha=1e-4, beta=1e-6)                  # 64 ms at 64000 B, 10 s at 10 MB
    model = fake.profile(monkeypatch, budget_s=1.5, sizes=(*SIZES, 10_000_000))
    assert [p.n for p in model.line("a2a").points][:3] == list(SIZES[:3])
    assert 10_000_000 not in fake.calls and fake.now < 1.6 and model.seconds == fake.now


def test_repeats_stop_once_times_are_steady(monkeypatch):
    ranks = measure.Ranks(None, None, torch.device("cpu"))
    took = iter([1.0, 1.0, *[1.0] * measure.ROUND, *[9.0] * 1000])      # two to choose how many
    monkeypatch.setattr(measure, "_timed_cpu", lambda ranks, run, calls: next(took))
    assert measure.times(ranks, lambda: None, 1000.0) == [1.0] * measure.ROUND
    wild = iter([1.0, 1.0, *[1.0, 2.0] * 1000])
    monkeypatch.setattr(measure, "_timed_cpu", lambda ranks, run, calls: next(wild))
    assert len(measure.times(ranks, lambda: None, 1000.0)) == measure.MOST
    assert len(measure.times(ranks, lambda: None, 0.0)) == measure.ROUND


def test_what_cannot_be_prepared_is_a_note(monkeypatch):
    model = Fake(room=0).profile(monkeypatch, sizes=SIZES)
    assert model.links == {} and model.notes == ("a2a fake: MemoryError: no room for 1000",)
    assert "not measured: a2a fake" in model.describe()
    model = Fake(room=16000).profile(monkeypatch, sizes=SIZES)
    assert [p.n for p in model.line("a2a").points] == [1000, 4000] and model.notes == ()


@pytest.mark.parametrize("given,message", [
    (dict(budget_s=0), "budget_s is 0, must be above 0"),
    (dict(budget_s=math.nan), "budget_s is nan"),
    (dict(sizes=[64]), r"sizes is \[64\], must be two or more"),
    (dict(sizes=[0, 64]), r"sizes is \[0, 64\]"),
    (dict(transports=["pigeon"]), "transports has 'pigeon', must be of c10d, nccl"),
    (dict(device="tpu"), "device is 'tpu'"),
])
def test_arguments_outside_their_limits(given, message):
    with pytest.raises(ValueError, match=f"profile: {message}"):
        lina.profile(**{"device": "cpu", **given})
    with pytest.raises(ValueError, match="operation is 'a2b', must be one of a2a, allreduce"):
        register("a2b", "c10d", Fake().prepare)


# ---- the model and its file ----


def model_of(**changes):
    """Made up, with everything in it."""
    points = tuple(Point(n, 1e-4 + n * 1e-9, 1e-4, 1.0) for n in (1e4, 1e5, 1e6))
    line = Line.fit(points)
    slow = dataclasses.replace(line, alpha_s=1e-6, beta_s=1e-8)
    shape = ExpertShape(64, 32, 4)
    return CostModel(**{**dict(
        machine=machine_facts(), device="cpu", world=2, ep=2,
        links={("a2a", "c10d"): line, ("a2a", "p2p"): slow, ("allreduce", "c10d"): line},
        experts=(ExpertPass(shape, line, slow, line),), gemm=line, copy=line, versions={"torch": "2.13"},
        date="2026-01-01T00:00:00+00:00", seconds=1.5, notes=("a2a nccl: not available here",),
        layers={"c10d": (LayerLine(1e-3, 1e-9, 0.5, points, ((1e4, 4e-4), (1e6, 0.0)),
                                   (2e-3, 3e-3, 4e-3)),
                         LayerLine(2e-3, 0.0, 1.0))}), **changes})


def test_line_from_points():
    line = model_of().gemm
    assert line.alpha_s == pytest.approx(1e-4, rel=1e-9) and line.beta_s == pytest.approx(1e-9, rel=1e-9)
    assert line.r2 == pytest.approx(1) and line.off < 1e-9
    assert line.time(0) == 0 and line.units(line.alpha_s / 2) == 0
    assert line.units(line.time(12345)) == pytest.approx(12345)
    assert Line(1e-6, 0.0, 1.0).units(1) == math.inf


def test_time_is_the_fastest_transports_unless_one_is_named():
    model = model_of()
    assert model.time("a2a", 100) == model.time("a2a", 100, "p2p") < model.time("a2a", 100, "c10d")
    assert model.time("a2a", 1e9) == model.time("a2a", 1e9, "c10d") < model.time("a2a", 1e9, "p2p")
    assert model.line("allreduce") is model.line("allreduce", "c10d")
    with pytest.raises(ValueError, match="a2a was measured by c10d, p2p, transport is None"):
        model.line("a2a")
    with pytest.raises(ValueError, match="transport is 'nccl'"):
        model.time("a2a", 1, "nccl")
    with pytest.raises(ValueError, match="'attention' was not measured; there are a2a, allreduce, copy"):
        model.time("attention", 1)


def test_passes_of_other_shapes_are_scaled():
    model = model_of()
    (measured,) = model.experts
    assert model.expert_pass(ExpertShape(64, 32, 4)) is measured
    wider = model.expert_pass(ExpertShape(64, 96, 4)).forward
    assert wider.beta_s == pytest.approx(3 * measured.forward.beta_s)
    assert wider.alpha_s == pytest.approx(3 * measured.forward.alpha_s) and wider.points == ()
    more = model.expert_pass(ExpertShape(64, 32, 8)).backward
    assert more.beta_s == pytest.approx(measured.backward.beta_s)
    assert more.alpha_s == pytest.approx(2 * measured.backward.alpha_s)
    assert model.expert_pass(ExpertShape(64, 32, 8)).late.alpha_s == pytest.approx(2 * measured.late.alpha_s)
    with pytest.raises(ValueError, match="no expert pass in bfloat16 was measured; there are float32"):
        model.expert_pass(ExpertShape(64, 32, 4, "bfloat16"))
    for bad in ((0, 32, 4), (64, 32, 1025), (64, 1.5, 4), (64, 32, 4, "int8")):
        with pytest.raises(ValueError, match="ExpertShape: "):
            ExpertShape(*bad)


def test_file_round_trip(tmp_path, monkeypatch):
    monkeypatch.delenv("LINA_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = model_of()
    path = model.save()
    assert path == default_path("cpu", 2) and path.parent == tmp_path / "lina"
    assert CostModel.load(world=2, device="cpu") == model
    assert default_path("cpu", 4) != path != default_path("cuda", 2)
    monkeypatch.setenv("LINA_PROFILE", str(tmp_path / "mine.json"))
    assert model.save() == tmp_path / "mine.json"
    assert CostModel.load(world=2, device="cpu") == model
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lina", "mine.json"]
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file; run `lina profile`"):
        CostModel.load(tmp_path / "none.json")


@pytest.mark.parametrize("change,asked,message", [
    ({"cpu": "Another"}, {}, "cpu there Another, here "),
    ({"cores": 4096}, {}, "cores there 4096, here "),
    ({"gpus": ["H1000"]}, {}, r"gpus there \['H1000'\], here "),
    ({"NCCL_P2P_LEVEL": "LOC"}, {}, "NCCL_P2P_LEVEL there LOC, here unset"),
    ({}, {"world": 3}, "ranks there 2, here 3"),
    ({}, {"device": "cuda"}, "device there cpu, here cuda"),
])
def test_another_machines_file_is_refused(tmp_path, change, asked, message):
    path = model_of(machine={**machine_facts(), **change}).save(tmp_path / "model.json")
    with pytest.raises(ValueError, match=f"model.json was measured elsewhere: {message}"):
        CostModel.load(path, **{"world": 2, "device": "cpu", **asked})
    assert CostModel.load(path, foreign=True).world == 2


def test_nccls_settings_make_another_machine(tmp_path, monkeypatch):
    path = model_of().save(tmp_path / "model.json")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")                # only prints
    usual = default_path("cpu", 2)
    CostModel.load(path, world=2)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert default_path("cpu", 2) != usual or "LINA_PROFILE" in os.environ
    with pytest.raises(ValueError, match="NCCL_P2P_DISABLE there unset, here 1"):
        CostModel.load(path, world=2)


@pytest.mark.parametrize("damage", [lambda v: v.pop("links"), lambda v: v.update(kind="trace"),
                                    lambda v: v.update(format=3), lambda v: v["gemm"].update(beta_s=-1.0),
                                    lambda v: v["layers"][0]["forward"].update(passes=[[1.0, -1.0]]),
                                    lambda v: v["layers"][0]["backward"].update(passes=[[1.0]]),
                                    lambda v: v["layers"][0]["forward"].update(passes=[[1.0, 0], [1.0, 1]]),
                                    lambda v: v["layers"][0]["forward"].update(whole_s=[]),
                                    lambda v: v["experts"][0]["shape"].update(local=0)])
def test_what_is_no_model_is_refused(tmp_path, damage):
    value = model_of().as_json()
    damage(value)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"model\.json: not a cost model written by lina"):
        CostModel.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"CostModel: .*model\.json: "):
        CostModel.load(path)


def test_a_file_of_an_earlier_lina_says_what_to_do(tmp_path):
    value = model_of().as_json()
    value["format"] = 2
    del value["experts"][0]["late"]
    path = tmp_path / "model.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"format 2; here 'lina cost model', 4: run `lina profile` again"):
        CostModel.load(path)
