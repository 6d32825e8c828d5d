"""The simulator: steps computed by hand, sharing, levels of links, delays, faults."""

from __future__ import annotations

import dataclasses
import random

import pytest

from lina import simulate
from lina.simulate import Experts, Layer, Links

ZERO = (0.0, 0.0)
KIB_S = 2.0**-10                        # seconds a byte: sums of these are exact


def links(node, a2a_near=ZERO, a2a_far=ZERO, reduce_near=ZERO, reduce_far=ZERO):
    return Links(node, (a2a_near, a2a_far), (reduce_near, reduce_far))


def exactly(got, want):
    """Equal up to the rounding of some hundred additions of numbers up to `want`."""
    assert got == pytest.approx(want, rel=100 * 2**-52, abs=0)


# ---- by hand ----

ONE = Layer("one", (1.0, 2.0), (10,), Experts(
    pass_s=((0.5, 0.1), (1.0, 0.2)), own_rows=4, remote_rows=6, dispatch_bytes=(20.0, 30.0),
    return_bytes=(40.0, 50.0), grad_bytes=999, gate_s=(0.25, 0.5)))
ONE_LINKS = links(2, a2a_near=(0.1, 0.01), reduce_near=(0.2, 0.02))


def test_one_layer_on_two_ranks():
    r = simulate.step([ONE], 2, 2, ONE_LINKS, "plain", optimizer_s=0.05, watch=[1])
    # dense, gate, dispatch, pass over 10 rows, return
    forward = 1 + 0.25 + (0.1 + 0.2) + (0.5 + 1.0) + (0.1 + 0.4)
    backward = 0.5 + (0.1 + 0.3) + (1.0 + 2.0) + (0.1 + 0.5) + 2
    reduce = 0.2 + 10 * 0.02            # 2 (n-1)/n = 1; the experts have no replica
    exactly(r.step_s, forward + backward + reduce + 0.05)
    exactly(r.first_s, r.step_s)
    exactly(r.compute_s, 1 + 0.25 + 1.5 + 0.5 + 3.0 + 2 + 0.05)
    exactly(r.a2a_s, 0.3 + 0.5 + 0.4 + 0.6)
    exactly(r.reduce_s, reduce)
    exactly(r.exposed_a2a_s, r.a2a_s)
    exactly(r.link_idle, 1 - (r.a2a_s + reduce) / r.step_s)
    assert (r.a2a_count, r.reduce_count, r.reduced_bytes, r.degrees) == (4, 1, 2 * 10, (1, 1))
    assert (r.a2a_hidden, r.reduce_hidden, r.behind) == (0, 0, 0)
    exactly(r.slowdown, 1)
    assert [(s.stream, s.name) for s in r.spans] == [
        ("compute", "one dense"), ("compute", "one gate"), ("a2a", "one dispatch"),
        ("compute", "one experts"), ("a2a", "one return"),
        ("compute", "one gate backward"), ("a2a", "one dispatch backward"),
        ("compute", "one experts backward"), ("a2a", "one return backward"),
        ("compute", "one dense backward"), ("reduce", "bucket 0"), ("compute", "optimizer")]
    assert {s.rank for s in r.spans} == {1}
    assert [s.nbytes for s in r.spans if s.stream == "a2a"] == [20, 40, 30, 50]
    exactly(r.spans[2].start, 1.25)
    exactly(r.spans[2].stop, 1.55)


def test_own_rows_hide_the_exchanges():
    """Degree 2: own rows beside the dispatch. Degree 3: halves of them beside both exchanges."""
    for degree, forward, passes in [
            # gate ends at 1.25; dispatch until 1.55, own rows (0.9) until 2.15, remote (1.1), return 0.5
            (2, 2.15 + 1.1 + 0.5, 2),
            # half of the own rows (0.7) until 1.95, remote until 3.05; return until 3.55, other half 3.75
            (3, 3.75, 3)]:
        layer = Layer("one", (1.0, 0.0), (), ONE.experts)
        r = simulate.step([layer], 2, 2, ONE_LINKS, "lina", degrees=(degree, 1), watch=[0])
        exactly(max(s.stop for s in r.spans if "backward" not in s.name), forward)
        assert sum(s.name == "one experts" for s in r.spans) == passes


def test_late_work_hides_what_goes_back():
    """Half a row's backward is late, and half the start: the return starts when the rest is done."""
    layer = Layer("one", (0.0, 0.0), (), dataclasses.replace(ONE.experts, late_s=(0.5, 0.1)))
    plain, lina = (simulate.step([layer], 2, 2, ONE_LINKS, schedule, degrees=(1, 1), watch=[0])
                   for schedule in ("plain", "lina"))
    returned = [next(s for s in r.spans if s.name == "one return backward") for r in (plain, lina)]
    exactly(returned[0].start - returned[1].start, 0.5 + 10 * 0.1)
    exactly(plain.step_s - lina.step_s, 0.1 + 0.5)              # the return, which is shorter
    exactly(plain.compute_s, lina.compute_s)
    assert [s.name for s in lina.spans].count("one experts backward") == 2


def test_best_degree_is_the_fastest():
    layer = Layer("one", (1.0, 2.0), (), ONE.experts)
    steps = {d: simulate.step([layer], 2, 2, ONE_LINKS, "lina", degrees=d).step_s
             for d in [(f, b) for f in range(1, 9) for b in range(1, 9)]}
    best = simulate.step([layer], 2, 2, ONE_LINKS, "lina")
    exactly(best.step_s, min(steps.values()))
    exactly(steps[tuple(int(d) for d in best.degrees)], best.step_s)


# Backward: layer "late" computes for 1 s and has 4 s of gradients, then "early" exchanges.
EARLY = Layer("early", (0.0, 0.5), (), Experts(
    pass_s=((0.0, 0.0), (1.25, 0.0)), own_rows=0, remote_rows=1, dispatch_bytes=(0.0, 1024.0),
    return_bytes=(0.0, 1536.0), grad_bytes=0))
LATE = Layer("late", (0.0, 1.0), (4096,))
SHARING = dict(layers=[EARLY, LATE], ranks=2, ep=2, bucket_bytes=1, first_bucket_bytes=1,
               links=links(2, a2a_near=(0.0, KIB_S), reduce_near=(0.0, KIB_S)))


def test_sharing_by_hand():
    # 1: allreduce (4 s) and dispatch (1 s) start, at half pace. 3: dispatch ends, allreduce has 3 left;
    # 4.25: pass ends, 1.75 left; return (1.5 s) until 7.25, 0.25 left; dense until 7.75, allreduce 7.5.
    r = simulate.step(**SHARING, schedule="plain")
    assert (r.step_s, r.a2a_s, r.reduce_s) == (7.75, 2 + 3, 6.5)
    assert (r.slowdown, r.stretch_s) == (2, 1.5)
    assert r.exposed_a2a_s == 5 and r.reduce_hidden == (1.25 + 0.25) / 6.5


def test_priority_by_hand():
    # Micro-ops of 1 s. The first was taken at 1, before the dispatch was imminent: both until 3. Second until
    # 4, third: 0.25 alone, then beside the return, until 5.75; the return has 0.75 left, until 6.5.
    # The fourth waits for that, until 7.5. The last pass of compute ends at 7.
    r = simulate.step(**SHARING, schedule="lina", degrees=(1, 1), micro_op_s=1.0, unit=1, watch=[0])
    assert (r.step_s, r.a2a_s, r.stretch_s) == (7.5, 2 + 2.25, 1)
    micro_ops = [(s.start, s.stop) for s in r.spans if s.stream == "reduce"]
    assert micro_ops == [(1, 3), (3, 4), (4, 5.75), (6.5, 7.5)]
    assert r.behind == 0 and r.waited_s == 0 and r.reduce_count == 4


def test_a_slow_pace_beside_another():
    # share 1/4: dispatch (1 s) until 5, allreduce has 3 left; pass until 6.25, 1.75 left; beside the return
    # (1.5 s, until 12.25) it gets 1.5 done; 0.25 left, until 12.5; dense until 12.75.
    slow = dict(SHARING, links=Links(2, SHARING["links"].a2a, SHARING["links"].reduce, share=0.25))
    assert simulate.step(**slow, schedule="plain").step_s == 12.75


def test_levels_of_links():
    """4 ranks in nodes of 2: a2a over all leaves the node with 2/3 of its bytes, at worst."""
    layer = Layer("x", ZERO, (3072,), Experts(((0.0, 0.0),) * 2, 1, 3, (3072.0, 0.0), ZERO, 6144))
    near, far = (0.0, KIB_S), (0.5, 4 * KIB_S)
    both = links(2, near, far, near, far)
    r = simulate.step([layer], 4, 4, both, "plain")
    exactly(r.a2a_s, 0.5 + 2048 * 4 * KIB_S)
    # over 4: alpha + 2 * 3/4 * bytes * beta / 2, for two ranks a node each move half
    exactly(r.reduce_s, 0.5 + 1.5 * 3072 * 4 * KIB_S / 2)
    r = simulate.step([layer], 4, 2, both, "plain", watch=[0])
    exactly(r.a2a_s, 3072 * KIB_S)                     # inside a node
    sizes = {s.name: s.stop - s.start for s in r.spans if s.stream == "reduce"}
    exactly(sizes["x experts' gradients"], 0.5 + 6144 * 4 * KIB_S)  # 2 replicas, one a node
    assert r.reduced_bytes == 4 * (3072 + 6144)


def test_collectives_on_different_levels_do_not_share():
    """The layers of test_sharing_by_hand, replicas between nodes: the a2a keeps its pace."""
    apart = dict(SHARING, ranks=4, links=links(2, (0.0, KIB_S), ZERO, ZERO, (0.0, 4 / 3 * KIB_S)))
    r = simulate.step(**apart, schedule="plain")
    assert r.slowdown == 1
    exactly(r.reduce_s, 4)                             # 4096 bytes, 3/2 of them, by 2 ranks a node


def test_buckets_fill_from_the_back():
    """DDP's: 1 MiB first, then 25 MiB, whole tensors; the rest goes last."""
    mib = 1 << 20
    layers = [Layer(str(i), (0.0, 1.0), grads) for i, grads in
              enumerate([(3 * mib,), (20 * mib, 4 * mib), (30 * mib, mib // 2, mib // 2, 7)])]
    r = simulate.step(layers, 2, 1, links(2, reduce_near=(0.0, 1e-9)), "plain", watch=[0])
    buckets = [(s.name, s.nbytes) for s in r.spans if s.stream == "reduce"]
    assert buckets == [("bucket 0", mib + 7), ("bucket 1", 30 * mib), ("bucket 2", 27 * mib)]


def test_fixed_micro_ops():
    r = simulate.step([Layer("x", ZERO, (50_000_000,))], 2, 1, links(2, reduce_near=(0.0, 1e-9)), "fixed",
                      watch=[0], unit=1)
    assert [s.nbytes for s in r.spans] == [simulate.FIXED_BYTES, 20_000_000]


def test_one_rank_and_whole_replication():
    assert simulate.step([ONE], 1, 1, ONE_LINKS).reduced_bytes == 0
    r = simulate.step([ONE], 2, 1, ONE_LINKS)
    assert r.a2a_count == 0 and r.a2a_hidden is None and r.slowdown is None
    assert r.reduced_bytes == 2 * (10 + 999)
    early = simulate.step([ONE, ONE], 2, 1, ONE_LINKS, "plain", watch=[0])
    late = simulate.step([ONE, ONE], 2, 1, ONE_LINKS, "plain", watch=[0], experts_last=True)

    def names(r):
        return [s.name for s in r.spans if s.stream == "reduce"]

    assert names(early) == ["one experts' gradients", "one experts' gradients", "bucket 2"]
    assert names(late) == ["bucket 0", "one experts' gradients", "one experts' gradients"]


# ---- many ranks, delays, order ----

def _random_layers(rng, count):
    def pair(most):
        return rng.uniform(0, most), rng.uniform(0, most)

    def experts():
        return Experts((pair(1e-6), pair(1e-6)), rng.uniform(0, 999), rng.uniform(0, 999), pair(1e7),
                       pair(1e7), rng.randrange(1 << 24))

    return [Layer(str(i), pair(2e-3), tuple(rng.randrange(1 << 24) for _ in range(rng.randrange(4))),
                  experts() if rng.random() < 0.8 else None) for i in range(count)]


@pytest.mark.parametrize("schedule", simulate.SCHEDULES)
def test_every_gradient_once_whatever_the_delays(schedule):
    rng = random.Random(3)
    link = links(4, (1e-5, 1e-10), (3e-5, 1e-9), (1e-5, 1e-10), (3e-5, 1e-9))
    for _ in range(40):
        ranks, count = rng.choice([2, 4, 6, 12, 16]), rng.randrange(1, 7)
        ep = rng.choice([d for d in range(1, ranks + 1) if ranks % d == 0])
        layers = _random_layers(rng, count)
        r = simulate.step(layers, ranks, ep, link, schedule, straggle_s=rng.choice([0, 1e-4, 5e-2]),
                          seed=rng.randrange(2**64))
        moe = [layer.experts for layer in layers if layer.experts]
        nbytes = sum(sum(layer.dense_grads) for layer in layers)
        nbytes += sum(e.grad_bytes for e in moe) if ep < ranks else 0
        assert r.reduced_bytes == ranks * nbytes
        assert r.a2a_count >= (4 * len(moe) * ranks // ep if ep > 1 else 0)
        assert r.waited_s == 0 and (schedule == "plain" or r.behind == 0)


def test_delays_are_repeatable_and_cost_time():
    rng = random.Random(5)
    args = (_random_layers(rng, 4), 8, 4, links(8, (1e-5, 1e-10), ZERO, (1e-5, 1e-10)))
    one, again, other = (simulate.step(*args, straggle_s=1e-3, seed=seed) for seed in (1, 1, 2))
    assert one == again and one.step_s != other.step_s
    assert one.step_s > simulate.step(*args).step_s


def test_ungated_reductions_run_beside_an_a2a():
    """`behind` counts: the second bucket is ready while the a2a of the next layer runs."""
    early = Layer("early", EARLY.dense_s, (), Experts(((0.0, 0.0), (0.0, 0.0)), 0, 1, (0.0, 9216.0), ZERO, 0))
    layers = [early, Layer("late", (0.0, 1.0), (1024, 1024))]
    rest = {name: SHARING[name] for name in ("ranks", "ep", "links", "bucket_bytes", "first_bucket_bytes")}
    assert simulate.step(layers, schedule="plain", **rest).behind == 2     # one on each rank
    assert simulate.step(layers, schedule="lina", **rest, micro_op_s=9.0).behind == 0


def test_order_that_ranks_do_not_share_is_a_deadlock():
    layers = [Layer("x", (0.0, 1.0), (1 << 20, 1 << 20))]
    link = links(2, reduce_near=(0.0, 1e-9))
    assert simulate.step(layers, 2, 1, link, first_bucket_bytes=1, bucket_bytes=1).reduce_count > 0
    with pytest.raises(ValueError, match="deadlock after 1 s, 2 of 2 ranks left; rank 0 in the allreduce of "
                       "bucket 0 waits for rank 1; rank 1 in the allreduce of bucket 1 waits for rank 0"):
        simulate.step(layers, 2, 1, link, first_bucket_bytes=1, bucket_bytes=1, fault="swapped")


def test_one_collective_at_a_time_can_deadlock():
    """The hazard of a queue that is local to a rank: one holds an a2a, another an allreduce. Two
    communicators that run side by side never do."""
    layers = [Layer(str(i), (1e-3, 1e-3), (1 << 20,), Experts(
        ((0.0, 1e-6),) * 2, 100, 300, (1e6, 1e6), (1e6, 1e6), 1 << 20)) for i in range(4)]
    link = links(8, (1e-5, 1e-10), ZERO, (1e-5, 1e-10))
    stuck = 0
    for seed in range(30):
        assert simulate.step(layers, 8, 4, link, straggle_s=2e-3, seed=seed).behind == 0
        try:
            simulate.step(layers, 8, 4, link, straggle_s=2e-3, seed=seed, fault="one at a time")
        except ValueError as error:
            stuck += 1
            assert "deadlock" in str(error) and "in a2a" in str(error) and "in the allreduce" in str(error)
    assert stuck > 0
