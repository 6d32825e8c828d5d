"""Published models through the simulator, what it refuses, and `lina simulate`."""

from __future__ import annotations

import json
import math
import time

import pytest

from lina import cli, simulate
from lina.simulate import Experts, Layer, Links, models, timeline

ZERO = (0.0, 0.0)
FREE = Links(2, (ZERO, ZERO), (ZERO, ZERO))
ONE = Layer("one", (1.0, 2.0), (10,),
            Experts(((0.5, 0.1), (1.0, 0.2)), 4, 6, (20.0, 30.0), (40.0, 50.0), 999))


def test_thousands_of_ranks():
    """Transformer-XL, 24 layers; the goal is 10 s."""
    machine = models.PRESETS["a100-100g"]
    built = models.build(models.MODELS["transformer-xl"], 4096, 4096, machine)
    started = time.perf_counter()
    r = simulate.step(built.layers, 4096, 4096, machine.links, "lina", optimizer_s=built.optimizer_s)
    assert time.perf_counter() - started < 10
    assert r.behind == 0 and r.decisions > 4096


# ---- models and presets ----

@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("preset", models.PRESETS)
def test_priority_costs_no_more_than_its_latencies(name, preset):
    """Without pipelining, a step is at most the plain one and its micro-ops' latencies."""
    machine, shape = models.PRESETS[preset], models.MODELS[name]
    ep = models.spread(shape, 16)
    built = models.build(shape, 16, ep, machine)
    plain, lina = (simulate.step(built.layers, 16, ep, machine.links, schedule, degrees=(1, 1),
                                 optimizer_s=built.optimizer_s) for schedule in ("plain", "lina"))
    alpha = max(line[0] for line in machine.links.reduce)
    assert lina.step_s <= plain.step_s + alpha * lina.reduce_count
    assert lina.stretch_s <= plain.stretch_s or lina.stretch_s < 5e-4 + 2 * alpha
    assert lina.reduced_bytes == plain.reduced_bytes and lina.a2a_count == plain.a2a_count
    pipelined = simulate.step(built.layers, 16, ep, machine.links, optimizer_s=built.optimizer_s)
    assert pipelined.step_s <= lina.step_s * 1.001 and pipelined.behind == 0


def test_parameters_of_the_published_models():
    """Whole models, in billions, as their authors give them."""
    for name, billions in [("mixtral-8x7b", 46.7), ("qwen3-30b-a3b", 30.5), ("deepseek-v3", 671)]:
        built = models.build(models.MODELS[name], 1, 1, models.PRESETS["h200-nvlink"])
        assert built.params / 1e9 == pytest.approx(billions, rel=0.005)      # norms and biases left out


def test_copies():
    assert models.copies(8, 2, 1) == 0
    assert models.copies(4, 1, 4) == 0.75                    # one expert, on another rank in 3 of 4
    # E = 4, K = 2 on 2 ranks: both experts here in 1 of 6 pairs, none in 1, so some elsewhere in 5
    assert models.copies(4, 2, 2) == pytest.approx(5 / 6)


# ---- errors ----

@pytest.mark.parametrize("change,message", [
    (dict(schedule="fast"), "schedule='fast', one of plain, lina, fixed"),
    (dict(fault="fire"), "fault='fire', one of none"),
    (dict(micro_op_s=0.0), "micro_op_s=0.0, over 0"),
    (dict(micro_op_s=math.nan), "micro_op_s=nan, over 0"),
    (dict(layers=[]), "layers=0, from 1 to 1024"),
    (dict(ranks=0), "ranks=0, from 1 to 8192"),
    (dict(ranks=8193, ep=1), "ranks=8193, from 1 to 8192"),
    (dict(ranks=4, ep=3), "ep=3, a divisor of ranks=4"),
    (dict(degrees=(9, 1)), "degree=9, from 0 to 8"),
    (dict(max_degree=65), "max_degree=65, from 1 to 64"),
    (dict(unit=0), "unit=0"),
    (dict(bucket_bytes=0), "bucket_bytes=0"),
    (dict(straggle_s=-1.0), "straggle_s=-1"),
    (dict(optimizer_s=math.inf), "optimizer_s=inf"),
    (dict(watch=[2]), "watch=2, from 0 to 1"),
    (dict(links=Links(0, (ZERO, ZERO), (ZERO, ZERO))), "node=0"),
    (dict(links=Links(1, (ZERO, ZERO), (ZERO, ZERO), share=0.0)), "share=0, over 0"),
    (dict(links=Links(1, (ZERO, (-1.0, 0.0)), (ZERO, ZERO))), "a2a has alpha=-1"),
    (dict(layers=[Layer("x", (0.0, -1.0))]), "layer 0: dense_s=-1, finite and at least 0"),
    (dict(layers=[Layer("x", ZERO, (-1,))]), "tensor_bytes=-1"),
    (dict(layers=[Layer("x", ZERO), Layer("y", ZERO, (), Experts((ZERO, ZERO), math.nan, 0, ZERO, ZERO, 0))]),
     "layer 1: own_rows=nan"),
], ids=lambda v: "" if isinstance(v, dict) else v)
def test_errors(change, message):
    with pytest.raises(ValueError, match="simulate") as error:
        simulate.step(**{**dict(layers=[ONE], ranks=2, ep=2, links=FREE), **change})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_types():
    with pytest.raises(TypeError):
        simulate.step([Layer("x", ZERO, ("many",))], 2, 2, FREE)
    with pytest.raises(OverflowError):
        simulate.step([Layer("x", ZERO, (1 << 70,))], 2, 2, FREE)


# ---- the command ----

def test_command(main, tmp_path):
    png, out = tmp_path / "x.png", tmp_path / "x.json"
    code, text, err = main("simulate", "--model", "gpt2", "--ranks", "4", "--straggle", "0.1",
                           "--png", str(png), "--json", str(out))
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["schedule", "plain", "lina", "fixed"]
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = json.loads(out.read_text())
    assert [s["schedule"] for s in found["schedules"]] == ["plain", "lina", "fixed"]
    assert found["schedules"][1]["behind"] == 0 and found["ranks"] == found["ep"] == 4
    code, text, _ = main("simulate", "--model", "mixtral-8x7b", "--schedule", "lina", "--link", "h200-nvlink")
    assert code == 0 and len(text.splitlines()) == 3 and "experts over 8" in text


@pytest.mark.parametrize("argv,message", [
    (["--model", "gpt9"], "argument --model: invalid choice: 'gpt9'"),
    (["--link", "string"], "argument --link: invalid choice: 'string'"),
    (["--schedule", "best"], "argument --schedule: invalid choice: 'best'"),
    (["--ranks", "0"], "--ranks: 0, at least 1"),
    (["--ranks", "9000"], "ranks=9000, from 1 to 8192"),
    (["--ranks", "1"], "ranks=1, at least 2 experts for transformer-xl"),
    (["--ep", "3"], "ep=3, a divisor of ranks=16"),
    (["--tokens", "0"], "--tokens: 0, at least 1"),
    (["--seed", "-1"], "--seed: -1, at least 0"),
    (["--straggle", "nan"], "--straggle: nan"),
    (["--micro-op", "0"], "--micro-op: 0.0, milliseconds over 0"),
    (["--png", "/no/such/folder/x.png"], "/no/such/folder/x.png"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_option_is_one_line(main, argv, message):
    code, _, err = main("simulate", *argv)
    assert code == cli.BAD_OPTION and message in err and err.count("\n") == 1


def test_picture_needs_spans(tmp_path):
    with pytest.raises(ValueError, match=r"plain has no spans; step\(\.\.\., watch=\[0\]\)"):
        timeline.draw([simulate.step([ONE], 2, 2, FREE, "plain")], tmp_path / "x.png")
