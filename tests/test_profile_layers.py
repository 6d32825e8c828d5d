"""Whole spread layers: what they take beside exchanges and experts is found again, and shown."""

from __future__ import annotations

import pytest

from lina.parallel import (
    CostModel,
    ExpertPass,
    ExpertShape,
    LayerLine,
    LayerLoad,
    LayerTimes,
    Line,
    Point,
    layer_lines,
    machine_facts,
)
from lina.parallel.plan.predict import pipeline

LINK, PASS, LATE = Line(1e-4, 1e-9, 1.0), Line(1e-5, 1e-8, 1.0), Line(4e-6, 5e-9, 1.0)
MODEL = CostModel(machine_facts(), "cpu", 2, 2, {("a2a", "c10d"): LINK},
                  (ExpertPass(ExpertShape(64, 32, 4), PASS, PASS, LATE),),
                  layers={"c10d": (LayerLine(1e-3, 1e-9, 0.5, (), ((1.0, 4e-4), (2.0, 1e-4))),
                                   LayerLine(2e-3, 0.0, 1.0))})
# A layer's beside exchanges and experts; of each pass more, and of each byte in it
REST, MORE, BESIDE = Line(3e-4, 2e-9, 1.0), 1e-4, 3e-10


def layer_times(rest=REST, more=MORE, beside=BESIDE,
                cases=((64, 1), (64, 2), (64, 3), (1024, 1), (1024, 3), (8192, 1))):
    """A layer's by the cost model, and that; tokens of 64 floats."""
    model = MODEL
    found = []
    for tokens, degree in cases:
        layer = LayerLoad("layer", 8, 2, 64, 32, 4, "float32", "swiglu", tokens, 0, 0, 0, 0, 0).spread(2)
        n = 256.0 * tokens
        passes = (degree - 1) * (more + n * beside)
        took = [pipeline(layer, model, "c10d", way, degree) + (1 + way) * (rest.time(n) + passes)
                for way in range(2)]
        found.append(LayerTimes(layer, degree, *(Point(n, s, 0.9 * s, 1.1 * s) for s in took)))
    return model, found


def test_the_rest_of_a_synthetic_layer_is_recovered():
    model, found = layer_times()
    for way, line in enumerate(layer_lines(model, "c10d", found)):
        assert line.alpha_s == pytest.approx((1 + way) * REST.alpha_s, rel=1e-6)
        assert line.beta_s == pytest.approx((1 + way) * REST.beta_s, rel=1e-6)
        assert [n for n, _ in line.passes] == [256.0 * 64, 256.0 * 1024]
        for n, s in line.passes:
            assert s == pytest.approx((1 + way) * (MORE + n * BESIDE), rel=1e-6)
        assert line.r2 == pytest.approx(1) and line.off < 1e-9
        assert [p.n for p in line.points] == [256.0 * 64, 256.0 * 1024, 256.0 * 8192]
        for p, whole in zip(line.points, line.whole_s, strict=True):
            assert p.high_s - p.low_s == pytest.approx(0.2 * whole) and 0 < p.time_s < whole
        whole = REST.time(1e6) + 2 * (MORE + 1e6 * BESIDE)         # also beyond the sizes with passes
        assert line.rest(1e6, 3) == pytest.approx((1 + way) * whole, rel=1e-6)
        assert line.rest(1e6, 1) == pytest.approx((1 + way) * REST.time(1e6), rel=1e-6)


@pytest.mark.parametrize("rest,more,alpha,beta", [
    (Line(-1e-6, 0.0, 1.0), -1e-3, 0, 0),                  # faster than the model, and passes more so
    (Line(1e-4, -1e-13, 1.0), 0.0, 1e-4, 0),               # a constant but for rounding
    (Line(-1e-7, 1e-9, 1.0), 0.0, 0, 1e-9),
])
def test_no_term_of_the_rest_is_negative(rest, more, alpha, beta):
    model, found = layer_times(rest, more, 0.0)
    line = layer_lines(model, "c10d", found)[0]
    assert {s for _, s in line.passes} == {0.0} and line.alpha_s == pytest.approx(alpha, rel=0.01)
    assert line.beta_s == pytest.approx(beta, rel=0.01)


@pytest.mark.parametrize("several", [(), (3,), (2, 4)])
def test_passes_of_one_size_alone(several):
    """They cost as much in every size; nothing where none was measured, or in a size without one pass."""
    model, found = layer_times(cases=((64, 1), *((64, d) for d in several), (1024, 1), (8192, 2)))
    line, each = layer_lines(model, "c10d", found)[0], MORE + 256 * 64 * BESIDE
    assert line.passes == (((256.0 * 64, pytest.approx(each, rel=1e-6)),) if several else ())
    for n in (1.0, 256.0 * 64, 1e9):
        assert line.rest(n, 3) - line.rest(n, 1) == pytest.approx(2 * each if several else 0, rel=1e-6)


def test_layers_of_one_size_make_no_line():
    model, found = layer_times(cases=((64, 1), (64, 2)))
    with pytest.raises(ValueError, match="layers: 1 sizes in one pass, at least 2 needed"):
        layer_lines(model, "c10d", found)


def test_layers_are_shown():
    text = MODEL.describe()
    assert "layer_fwd   c10d +100..400 us a pass  " in text and "layer_bwd   c10d       " in text
    assert "warning: layer_fwd" not in text         # r2 is 0.5, but predictions follow its points


def test_the_rest_follows_its_points():
    """Also where it falls as tokens grow: the host's work shows for the few alone."""
    points = tuple(Point(n, s, s, s) for n, s in ((400.0, 3e-3), (100.0, 9e-3), (1600.0, -1e-3)))
    line = LayerLine(5e-3, 1e-6, 0.1, points, ((400.0, 1e-3), (100.0, 4e-3), (1600.0, 2e-3)), (1e-2,) * 3)
    each = {10: 4e-3, 100: 4e-3, 200: 3e-3, 400: 1e-3, 700: 1.25e-3, 1300: 1.75e-3, 1600: 2e-3}
    for n, want in ((10, 9e-3), (100, 9e-3), (200, 7e-3), (400, 3e-3), (700, 2e-3), (1300, 0), (1600, 0)):
        assert line.rest(n, 1) == pytest.approx(want), n
        assert line.rest(n, 3) == pytest.approx(want + 2 * each[n]), n
    assert line.rest(4000, 1) == 0                  # it fell to the last, and falls no further
    assert line.rest(4000, 2) == pytest.approx(4e-3)
    rises = LayerLine(1e-3, 0.0, 0.1, (*points, Point(3200.0, 1e-3, 0, 0)), (), (1e-2,) * 4)
    assert rises.rest(6400, 1) == pytest.approx(1e-3 + 3200 * 2e-3 / 1600) and rises.time(400) == 3e-3
