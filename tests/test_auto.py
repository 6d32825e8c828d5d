"""``schedule="auto"``: known answers from made-up cost models, and over gloo one plan on all ranks."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lina.parallel import (
    CostModel,
    ExpertPass,
    ExpertShape,
    LayerLine,
    LayerLoad,
    Line,
    Plan,
    Workload,
    predict,
)
from lina.parallel.plan.decide import decide
from lina.parallel.plan.packing import State
from lina.parallel.plan.predict import best_degree, calibrate, copies

from ranks import Run, each_scenario

SCENARIOS = [*(f"chosen:{kind}" for kind in ("slow", "free", "started", "gentle")), "left:slow",
             "left:gentle", "left_transport",
             # seconds measured, plain steps taking 90; what ran for each, and what holds
             "next_best:20:nccl,nccl", "next_best:80,50:nccl,c10d,c10d", "next_best:80,85:nccl,c10d,nccl",
             "next_best:100,120:nccl,c10d,back", "moved::False",
             "moved:80:True", "moved:95:True", "counted", "apart", "failing", "refused"]


@each_scenario({"gloo": Run("auto_worker", SCENARIOS, 2),
                "nccl": Run("auto_worker", ["on_gpus:nccl", "on_gpus:p2p"], 2, "nccl")})
def test_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


# ---- the decision alone ----

MB = 1 << 20
GB_S = Line(0.0, 1e-9, 1.0)                    # 1 GB/s
LAYER = LayerLoad("moe", experts=8, top_k=1, dim=1024, ffn_dim=1024, local=2, dtype="float32",
                  activation="swiglu", tokens=1000, rows=1000, own_pairs=500, remote_pairs=500,
                  expert_bytes=0, expert_params=3 * MB)


def cost(a2a: Line = GB_S, reduce: Line = GB_S, row_s: float = 1e-6, start_s: float = 0.0) -> CostModel:
    line = Line(start_s, row_s, 1.0)
    shape = ExpertShape(1024, 1024, 2)
    return CostModel({}, "cpu", 4, 4, {("a2a", "c10d"): a2a, ("allreduce", "c10d"): reduce,
                                       ("a2a", "nccl"): dataclasses.replace(a2a, beta_s=a2a.beta_s / 4)},
                     (ExpertPass(shape, line, line),), date="2026-01-01")


def load(dense_grads: int = 0, forward_s: float = 0.1, backward_s: float = 0.2, layers: int = 4) -> Workload:
    grads = ((dense_grads,) if dense_grads else (),) * (layers + 1)
    return Workload(4, 4, "cpu", (LAYER,) * layers, grads, forward_s, backward_s, 0.01, bucket_bytes=MB,
                    first_bucket_bytes=MB)


def test_dense_time_explains_the_observed_step():
    """Exchanges of 4.1 MB, twice each way and layer, and 1 ms of experts: known by hand."""
    made = calibrate(load(), cost(), "c10d")
    out, back = 1000 * (4096 + 8) * 1e-9, 1000 * 4096 * 1e-9
    assert made.dense_s[0] == pytest.approx(0.1 - 4 * (out + back + 1e-3), rel=1e-9)
    out, back = 1000 * 4096 * 1e-9, 1000 * (4096 + 4) * 1e-9
    assert made.dense_s[1] == pytest.approx(0.2 - 4 * (out + back + 1e-3), rel=1e-3)
    assert predict(made, cost()) == pytest.approx(made.step_s, rel=1e-3)


def test_reductions_count_as_far_as_nothing_hides_them():
    """Every gradient is ready long before the end but the first layer's, which nothing hides."""
    made = calibrate(load(MB, backward_s=1.0), cost(), "c10d")
    hidden = 4 * (2 * 4.098e-3 + 1e-3)
    exposed = MB * 1e-9
    assert 1.0 - hidden - 8 * exposed < made.dense_s[1] < 1.0 - hidden
    assert predict(made, cost()) == pytest.approx(made.step_s, rel=1e-3)


@pytest.mark.parametrize("given,degree", [
    # own rows take 5 ms and an exchange 4.1: half of each beside half of the other is enough
    (dict(row_s=1e-5), (4, 4)),
    (dict(row_s=2e-5), (3, 3)),                            # and here half of the own rows beside all of it
    (dict(row_s=1e-5, start_s=0.1), (1, 1)),               # a pass more costs more than all exchanges
    (dict(a2a=Line(0.0, 0.0, 1.0), start_s=1e-5), (1, 1)),   # nothing to hide
    (dict(row_s=0.0, start_s=1e-6), (1, 1)),               # nothing to hide it behind
])
def test_degree(given, degree):
    assert best_degree(load(), cost(**given), "c10d", 8) == degree
    plan = decide(load(), cost(**given), transports=("c10d",))
    assert plan.degree == degree and plan.schedule == "plain"      # there are no gradients


def test_a_degree_between():
    """One start more costs 0.2 ms, and 4 ms of exchange and as much of computing can overlap."""
    forward, backward = best_degree(load(), cost(row_s=4e-6, start_s=2e-4), "c10d", 8)
    assert 2 < forward < 8 and 2 < backward < 8


def test_all_to_alls_first_where_gradients_hold_them_up():
    """Gradients enough to fill the link through backward: beside them each all-to-all takes twice as long,
    and there are gaps that take them later."""
    slow = load(8 * MB, backward_s=0.4)
    plan = decide(slow, cost(), transports=("c10d",))
    assert plan.schedule == "lina" and plan.micro_op_bytes > 0 and plan.link == (0.0, 1e-9)
    assert plan.chosen is not None and plan.chosen.step_s < 0.99 * plan.trials[0].step_s
    alone = decide(load(0), cost(row_s=0.0), transports=("c10d",))       # nothing to let pass, or to hide
    assert alone.schedule == "plain" and alone.degree == (1, 1) and alone.micro_op_bytes == 0


def test_given_settings_are_kept():
    plan = decide(load(8 * MB), cost(row_s=1e-5), transports=("c10d",), degree=(2, 3), micro_op_s=3e-3)
    assert plan.degree == (2, 3)
    assert {t.degree for t in plan.trials} == {(1, 1), (2, 3)}         # the plain order is there to compare
    assert {t.micro_op_s for t in plan.trials} == {3e-3}


def test_the_faster_transport_is_taken():
    plan = decide(load(), cost(), transports=("c10d", "nccl"))
    assert plan.transport == "nccl"
    assert decide(load(), cost(), transports=("c10d",)).transport == "c10d"
    with pytest.raises(ValueError, match="a2a was measured by c10d, nccl, transport is 'p2p'"):
        decide(load(), cost(), transports=("p2p",))


def test_what_was_seen_outside_layers_is_dense():
    """The cost model has the exchanges of the transport in use four times too long: that touches no other's
    prediction, and is said."""
    seen = dataclasses.replace(load(), seen_dense_s=(0.08, 0.15))
    assert calibrate(seen, cost(), "c10d").dense_s == (0.08, 0.15)
    exchanges, rest = 2 * 4 * (4.104e-3 + 4.096e-3), 0.08 + 0.15 + 0.01 + 2 * 4 * 1e-3
    plan = decide(seen, cost(a2a=Line(0.0, 4e-9, 1.0)), transports=("c10d", "nccl"))
    steps = {t.transport: t.step_s for t in plan.trials if (t.schedule, t.degree) == ("plain", (1, 1))}
    assert steps["c10d"] == pytest.approx(4 * exchanges + rest, rel=1e-3)
    assert steps["nccl"] == pytest.approx(exchanges + rest, rel=1e-3)
    over = (4 * exchanges + rest) / seen.step_s
    text = f"the cost model would have the observed step take {over:.2f} x as long"
    assert text in plan.reasons
    # the same links: the simpler one, until it is seen to take longer than the other promises
    links = {op: GB_S for op in (("a2a", "c10d"), ("a2a", "nccl"), ("allreduce", "c10d"))}
    alike = decide(dataclasses.replace(seen, forward_s=0.2), dataclasses.replace(cost(), links=links),
                   transports=("c10d", "nccl"), degree=(1, 1))
    assert (alike.transport, alike.schedule) == ("c10d", "plain")
    slow, as_promised = alike.ran(1.1 * alike.chosen.step_s), alike.ran(alike.chosen.step_s)
    assert slow.promising((1, 1), 0.02).transport == "nccl" and as_promised.promising((1, 1), 0.02) is None
    over_nccl = alike.taking(next(t for t in alike.trials if t.transport == "nccl"), cost(), "").ran(0.405)
    assert over_nccl.promising((1, 1), 0.02).label == "c10d lina 1/1, ep 4", "the plain order was seen"
    right = dataclasses.replace(seen, forward_s=exchanges + rest - 0.21, backward_s=0.2)
    assert not any("would have" in reason for reason in decide(right, cost(), transports=("c10d",)).reasons)


# Seconds forward and backward beside exchanges and experts, at 4096 bytes a token and more a pass.
NCCL = (LayerLine(1e-3, 1e-9, 1.0, passes=((1.0, 2e-4),)), LayerLine(5e-4, 2e-9, 1.0, passes=((1.0, 3e-4),)))
C10D = tuple(dataclasses.replace(line, alpha_s=line.alpha_s + 1e-3) for line in NCCL)
BYTES = 1000 * 4096


def test_what_is_around_a_layer_is_not_dense_time():
    layers = {"nccl": NCCL, "c10d": C10D}
    found = dataclasses.replace(cost(), layers=layers)
    made, without = calibrate(load(), found, "c10d"), calibrate(load(), cost(), "c10d")
    for way in range(2):
        around = C10D[way].alpha_s + BYTES * C10D[way].beta_s
        assert without.dense_s[way] - made.dense_s[way] == pytest.approx(4 * around, rel=1e-3)
    assert predict(made, found) == pytest.approx(made.step_s, rel=1e-3)
    # 4 layers: forward and backward 1 ms less over nccl, and the exchanges' difference as ever
    far = predict(without, cost()) - predict(without, cost(), transport="nccl")
    near = predict(made, found) - predict(made, found, transport="nccl")
    assert near - far == pytest.approx(4 * 2 * 1e-3, rel=1e-3)
    passes = predict(made, found, degree=(3, 2)) - predict(made, cost(), degree=(3, 2))
    alone = predict(made, found) - predict(made, cost())
    assert passes - alone == pytest.approx(4 * (2 * 2e-4 + 3e-4), rel=1e-3)
    # one that was not measured is no better than the slowest one that was
    assert predict(made, dataclasses.replace(found, layers={"c10d": C10D}), transport="nccl") == \
        pytest.approx(predict(made, found, transport="nccl") + 8e-3, rel=1e-6)
    whole = dataclasses.replace(made, ep=1)    # there nothing is exchanged
    assert predict(whole, found) == predict(whole, cost())


def test_weights_gradients_hide_what_goes_back_where_they_can():
    """1 ms of experts backward, half of it late: over NCCL it hides that much of four returns of 1 ms."""
    late = cost()
    late = dataclasses.replace(late, experts=(dataclasses.replace(
        late.experts[0], late=Line(0.0, 0.5e-6, 1.0)),))
    made = calibrate(load(), cost(), "c10d")
    for transport, degree, less in (("c10d", (1, 1), 0.0), ("nccl", (1, 1), 4 * 0.5e-3)):
        before, after = (predict(made, model, transport=transport, degree=degree) for model in (cost(), late))
        assert before - after == pytest.approx(less, rel=1e-9, abs=1e-12), transport
    assert predict(made, late, degree=(2, 2)) < predict(made, cost(), degree=(2, 2))


def test_experts_gradients_are_reduced_beside_backward():
    """Of two replicas: with all-to-alls first every layer's are hidden by the dense part after it, in the
    plain order none is."""
    made = dataclasses.replace(load(backward_s=1.0), world=8, layers=tuple(
        dataclasses.replace(layer, expert_bytes=10 * MB) for layer in load().layers), dense_s=(0.1, 0.8))
    plain, lina = (predict(made, cost(), schedule=schedule) for schedule in ("plain", "lina"))
    one = 10 * MB * 1e-9 / 1.75                       # of two replicas, by a line over the world's ring of 8
    assert plain - lina == pytest.approx(4 * one, rel=1e-6)


def test_passes_that_cost_more_than_they_hide():
    """By row_s=1e-5 four passes hide 4.1 ms each way: known from test_degree."""
    def costing(*pass_s: float) -> CostModel:
        lines = tuple(dataclasses.replace(line, passes=((1.0, s),))
                      for line, s in zip(NCCL, pass_s, strict=True))
        return dataclasses.replace(cost(row_s=1e-5), layers={"c10d": lines})

    assert best_degree(load(), costing(0.0, 0.0), "c10d", 8) == (4, 4)
    assert best_degree(load(), costing(1e-2, 0.0), "c10d", 8) == (1, 4)
    assert best_degree(load(), costing(0.0, 1e-2), "c10d", 8) == (4, 1)
    plan = decide(load(), costing(1e-2, 1e-2), transports=("c10d",))
    assert plan.degree == (1, 1)
    assert any("what is around them take" in reason for reason in plan.reasons)
    assert not any("no whole layer" in reason for reason in plan.reasons)


def test_a_transport_is_not_taken_for_its_link_alone():
    """nccl's exchanges take a quarter; its layers take 10 ms more."""
    dear = tuple(dataclasses.replace(line, alpha_s=1e-2) for line in NCCL)
    found = dataclasses.replace(cost(), layers={"c10d": NCCL, "nccl": dear})
    assert decide(load(), found, transports=("c10d", "nccl")).transport == "c10d"
    plan = decide(load(), cost(), transports=("c10d", "nccl"))
    assert plan.transport == "nccl"
    assert any(r.startswith("no whole layer was measured over c10d, nccl: ") for r in plan.reasons)


def test_layers_of_other_experts_a_token_are_told():
    found = dataclasses.replace(cost(), layers={"c10d": NCCL}, top_k=2)
    (said,) = (r for r in decide(load(), found, transports=("c10d",)).reasons if "experts a token" in r)
    assert said.startswith("whole layers were measured with 2 experts a token, the model has 1: ")
    right = dataclasses.replace(found, top_k=1)
    assert not any("experts a token" in r for r in decide(load(), right, transports=("c10d",)).reasons)


def test_gradients_give_way_to_c10d_on_cpus_alone():
    """On GPUs the host is ahead, and they would all come last."""
    for device, schedules in (("cpu", {"plain", "lina"}), ("cuda", {"plain"})):
        made = dataclasses.replace(load(8 * MB), device=device)
        plan = decide(made, cost(row_s=1e-5), transports=("c10d", "nccl"))
        assert {t.schedule for t in plan.trials if t.transport == "c10d"} == schedules
        assert {t.schedule for t in plan.trials if t.transport == "nccl"} == {"plain", "lina"}
        alone = decide(made, cost(row_s=1e-5), transports=("c10d",))
        assert ("over c10d on GPUs gradients give way to nothing" in alone.reasons) == (device == "cuda")


def test_packing_moves_only_where_it_may():
    """What was measured is as was predicted."""
    state = State(4.0, 16.0, 12.0)

    def promise(cost: CostModel, state: State = state, may: bool = True, move: bool = True) -> int | None:
        plan = decide(load(), cost, transports=("c10d",), state=state, may_move=may)
        assert plan.ep == 4, "the best where experts are is first"
        trial = plan.ran(plan.chosen.step_s).promising(None, 0.01, move)
        return trial and trial.ep

    free = cost(reduce=Line(0.0, 0.0, 1.0))                # replicas cost nothing: no exchange is best
    kept = decide(load(), free, transports=("c10d",), state=state)
    assert kept.packed_ep == 1 and [row["ep"] for row in kept.packing] == [1, 2, 4]
    assert promise(free) == 1 and promise(free, may=False) is None and promise(free, move=False) is None
    given = decide(load(), free, transports=("c10d", "nccl"), degree=(3, 3), state=state, may_move=True)
    assert given.ran(given.chosen.step_s).promising((3, 3), 0.01, True).ep == 1, "where there are no passes"
    dear = cost(a2a=Line(0.0, 1e-12, 1.0))                 # 12 M parameters more to reduce, nothing to save
    assert promise(dear) is None
    tight = dataclasses.replace(state, memory=4 * 2 * 3 * MB * 16.0)     # for the experts that are here
    assert promise(free, tight) is None


def test_no_spread_layer_is_plain():
    alone = Workload(4, 1, "cpu", (), ((MB,),), 0.1, 0.2, 0.0)
    plan = decide(alone, cost(), transports=("c10d",))
    assert plan.schedule == "plain" and "nothing to overlap" in plan.reasons[-1]


def test_plan_through_json():
    plan = decide(load(MB), cost(row_s=1e-5), transports=("c10d", "nccl"), state=State(4.0, 16.0, 12.0, 1e12))
    for made in (plan, plan.ran(0.25), plan.ran(0.25).taking(plan.trials[0], cost(), "told"),
                 plan.ran(0.25).back("c10d", (1, 1))):
        assert Plan.from_json(json.loads(json.dumps(made.as_json()))) == made
    assert "schedule" in str(plan) and "packing" in str(plan)
    assert all(label in str(plan) for label in plan.predicted)
    for broken in ({}, {**plan.as_json(), "trials": 3}, []):
        with pytest.raises(ValueError, match="not a plan written by lina"):
            Plan.from_json(broken)


def test_copies_are_counted_once_a_rank():
    assert copies(8, 1, 4) == pytest.approx(3 / 4)         # one expert: it is elsewhere 3 times of 4
    assert copies(8, 8, 4) == 3                            # all experts: every other rank
    assert copies(8, 2, 1) == 0
