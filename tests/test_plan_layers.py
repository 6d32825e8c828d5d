"""The plan's pipelines and expert packing, against an event simulation and enumeration."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from lina import _C

# ---- pipeline ----


def simulated(a2a, dispatch_bytes, return_bytes, expert, own_rows, remote_rows, degree, late=(0, 0)):
    """(seconds, busy spans of the network) by events: tasks that wait for others and for a stream.

    A task is (name, stream, seconds, names it waits for); each stream runs its tasks in order.
    """

    def time(link, n):
        return link[0] + n * link[1] if n else 0.0

    chunks = max(1, degree - 2)
    out_s, back_s = time(a2a, dispatch_bytes / chunks), time(a2a, return_bytes / chunks)
    part = time(expert, remote_rows / chunks)
    after = min(part, time(late, remote_rows / chunks))
    one = time(expert, own_rows + remote_rows)
    one_after = min(one, time(late, own_rows + remote_rows))
    half = time(expert, own_rows / 2)
    computing = {
        1: [("pass 0", one - one_after, ["out 0"]), ("late 0", one_after, [])],
        2: [("own", time(expert, own_rows), []), ("pass 0", part - after, ["out 0"]),
            ("late 0", after, [])],
    }.get(
        degree,
        [
            ("first", half, []),
            *[task for c in range(chunks)
              for task in ((f"pass {c}", part - after, [f"out {c}"]), (f"late {c}", after, []))],
            ("second", half, []),
        ],
    )
    queues = {
        "compute": computing,
        "network": [
            *[(f"out {c}", out_s, []) for c in range(chunks)],
            *[(f"back {c}", back_s, [f"pass {c}"]) for c in range(chunks)],
        ],
    }
    now, done, spans = 0.0, set(), []
    running: dict[str, tuple[float, str]] = {}
    while any(queues.values()) or running:
        for stream, queue in queues.items():
            if stream not in running and queue and done.issuperset(queue[0][2]):
                name, seconds, _ = queue.pop(0)
                running[stream] = (now + seconds, name)
                if stream == "network" and seconds:
                    spans.append((now, now + seconds))
        stream = min(running, key=lambda s: running[s])
        now, name = running.pop(stream)
        done.add(name)
    return now, spans


def random_model(rng):
    return dict(
        a2a=(rng.choice([0.0, 1e-5, 1e-3]), rng.choice([0.0, 1e-10, 1e-9])),
        dispatch_bytes=rng.choice([0.0, rng.uniform(1e5, 1e8)]),
        return_bytes=rng.choice([0.0, rng.uniform(1e5, 1e8)]),
        expert=(rng.choice([0.0, 5e-5]), rng.uniform(1e-8, 1e-6)),
        own_rows=rng.choice([0.0, rng.uniform(1, 1e5)]),
        remote_rows=rng.choice([0.0, rng.uniform(1, 1e5)]),
        late=rng.choice([(0.0, 0.0), (rng.choice([0.0, 5e-5]), rng.uniform(1e-8, 1e-6))]),
    )


@pytest.mark.parametrize("degree", range(1, 10))
def test_pipeline_is_the_event_simulation(degree):
    rng = random.Random(degree)
    for _ in range(100):
        model = random_model(rng)
        plan = _C.pipeline(**model, degree=degree)
        seconds, spans = simulated(**model, degree=degree)
        # Both add at most 4 * degree times; each sum rounds once.
        limit = 8 * degree * 2.3e-16 * seconds
        assert plan["degree"] == degree
        assert plan["seconds"] == pytest.approx(seconds, abs=limit, rel=0)
        busy = sum(end - start for start, end in spans)
        assert plan["a2a_s"] == pytest.approx(busy, abs=limit, rel=0)
        ends = [0.0, *(end for _, end in spans)]
        starts = [*(start for start, _ in spans), seconds]
        idle = [(a, b) for a, b in zip(ends, starts, strict=True) if b - a > 1e-10 * seconds]
        gaps = [gap for gap in plan["gaps"] if gap[1] - gap[0] > 1e-10 * seconds]
        assert len(gaps) == len(idle)
        for gap, span in zip(gaps, idle, strict=True):
            assert gap == pytest.approx(span, abs=limit, rel=0)
        assert plan["exposed_s"] == pytest.approx(seconds - plan["compute_s"], abs=2 * limit, rel=0)


def test_pipeline_by_hand():
    """1 s a byte and a row: dispatch 4, return 2, own rows 4, remote rows 4."""
    model = dict(a2a=(0, 1), dispatch_bytes=4, return_bytes=2, expert=(0, 1), own_rows=4, remote_rows=4)
    # 0-4 dispatch, 4-12 everything, 12-14 return
    one = _C.pipeline(**model, degree=1)
    assert (one["seconds"], one["exposed_s"], one["gaps"]) == (14, 6, [(4, 12)])
    # own rows 0-4 hide the dispatch, remote rows 4-8, return 8-10
    two = _C.pipeline(**model, degree=2)
    assert (two["seconds"], two["exposed_s"], two["gaps"]) == (10, 2, [(4, 8)])
    # own 0-2, wait for the dispatch, remote 4-8, own 8-10 hides the return
    three = _C.pipeline(**model, degree=3)
    assert (three["seconds"], three["exposed_s"], three["gaps"]) == (10, 2, [(4, 8)])
    # own 0-2, remote 2-4 and 4-6, own 6-8; returns 4-5 and 6-7
    four = _C.pipeline(**model, degree=4)
    assert (four["seconds"], four["exposed_s"]) == (8, 0)
    assert four["gaps"] == [(5, 6), (7, 8)] and four["idle_s"] == 2
    assert _C.pipeline(**model)["degree"] == 4
    # half of a pass is late: 0-4 dispatch, 4-8 results, 8-12 the late half hides the return 8-10
    one = _C.pipeline(**model, degree=1, late=(0, 0.5))
    assert (one["seconds"], one["exposed_s"], one["gaps"]) == (12, 4, [(4, 8), (10, 12)])
    # own rows 0-4 hide the dispatch, remote rows 4-8, return 6-8
    two = _C.pipeline(**model, degree=2, late=(0, 0.5))
    assert (two["seconds"], two["exposed_s"], two["gaps"]) == (8, 0, [(4, 6)])


def test_best_degree_is_the_lowest_of_the_fastest():
    rng = random.Random(0)
    for _ in range(200):
        model, most = random_model(rng), rng.randint(1, 12)
        seconds = [_C.pipeline(**model, degree=d)["seconds"] for d in range(1, most + 1)]
        best = _C.pipeline(**model, max_degree=most)
        equal = [s <= min(seconds) * (1 + 1e-11) for s in seconds]  # as far as rounding goes
        assert best["degree"] == 1 + equal.index(True)
        assert best["seconds"] == seconds[best["degree"] - 1]


# ---- packing ----

LINK = (0.0, 1.0)
WAY = (1.0, 1.0, (0.0, 0.0), 0.0)
PACKING = dict(
    world=1, node=1, layers=1, experts=1, top_k=1, tokens=1.0,
    a2a_near=LINK, a2a_far=LINK, reduce_near=LINK, reduce_far=LINK, forward=WAY, backward=WAY,
    expert_params=0.0, gradient_bytes=2.0, state_bytes=16.0, move_bytes=12.0, max_degree=1,
)  # fmt: skip


def packing(**changed):
    found = _C.packing(**{**PACKING, **changed})
    return found["ep"], {row["ep"]: row for row in found["rows"]}


@pytest.mark.parametrize("E,K,world", [(4, 1, 4), (6, 2, 6), (8, 3, 4), (8, 8, 8), (6, 4, 12), (9, 2, 3)])
def test_copies_by_enumeration(E, K, world):
    """Every choice of K of E experts, once: the other ranks that it needs."""
    _, rows = packing(world=world, node=world, experts=E, top_k=K)
    assert sorted(rows) == [ep for ep in range(1, E + 1) if world % ep == 0 and E % ep == 0]
    for ep, row in rows.items():
        choices = list(itertools.combinations(range(E), K))
        # the token's own rank is any of ep: rank 0's share is everybody's
        needed = sum(len({e // (E // ep) for e in choice} - {0}) for choice in choices)
        assert row["copies"] == pytest.approx(needed / len(choices), rel=1e-13)
        # out and back, forward and backward, one byte each at one second a byte
        assert row["a2a_s"] == pytest.approx(4 * needed / len(choices), rel=1e-13)


@pytest.mark.parametrize("world,node", [(8, 4), (6, 2), (6, 3), (12, 4)])
def test_two_links(world, node):
    """At K = E every token goes to every other rank: peers by counting them one by one."""
    near_s, far_s = 0.5, 3.0
    _, rows = packing(
        world=world, node=node, experts=world, top_k=world, tokens=10.0,
        a2a_near=(0.0, near_s), a2a_far=(0.0, far_s),
    )  # fmt: skip
    for ep, row in rows.items():
        worst = 0.0
        for rank in range(world):
            group = range(rank // ep * ep, rank // ep * ep + ep)
            near = sum(peer != rank and peer // node == rank // node for peer in group)
            far = sum(peer // node != rank // node for peer in group)
            worst = max(worst, 10 * near * near_s, 10 * far * far_s)
        assert row["a2a_s"] == pytest.approx(4 * worst, rel=1e-12)


def test_reduction_memory_and_step():
    way = (2.0, 1.0, (0.5, 0.25), 0.125)
    _, rows = packing(
        world=8, node=4, layers=3, experts=8, top_k=2, tokens=64.0, forward=way, backward=way,
        expert_params=1000.0, reduce_near=(5.0, 1.0), reduce_far=(7.0, 2.0), slack_s=100.0,
        a2a_near=(1.0, 0.01), a2a_far=(2.0, 0.02), max_degree=6,
    )  # fmt: skip
    assert sorted(rows) == [1, 2, 4, 8]
    for ep, row in rows.items():
        m, replicas = 8 // ep, 8 // ep
        sent = 2 * (replicas - 1) / replicas * m * 1000 * 2
        assert row["reduce_s"] == (pytest.approx(7 + 2 * sent) if replicas > 1 else 0)
        assert row["memory_bytes"] == 3 * m * 1000 * 16
        bytes_far = 64 * row["copies"] * max(0, ep - 4) / max(1, ep - 1)
        bytes_near = 64 * row["copies"] - bytes_far
        near, far = 1 + 0.02 * bytes_near, 2 + 0.04 * bytes_far
        link = (2.0, 0.02 * bytes_far) if bytes_far and far > near else (1.0, 0.01 * bytes_near)
        plan = _C.pipeline(
            a2a=(link[0], link[1] / (64 * row["copies"] or 1)),
            dispatch_bytes=64 * row["copies"] * 2, return_bytes=64 * row["copies"],
            expert=(0.5 + m * 0.125, 0.25), own_rows=128 / ep, remote_rows=128 - 128 / ep, max_degree=6,
        )  # fmt: skip
        assert row["forward_s"] == row["backward_s"] == pytest.approx(plan["seconds"])
        assert row["forward_degree"] == row["backward_degree"] == plan["degree"]
        assert row["exposed_s"] == pytest.approx(max(0, row["reduce_s"] - 100 - plan["idle_s"]))
        assert row["step_s"] == pytest.approx(3 * (2 * plan["seconds"] + row["exposed_s"]))


@pytest.mark.parametrize("world,experts,now", [(8, 8, 8), (8, 16, 2), (12, 12, 6), (12, 24, 4), (4, 8, 1)])
def test_move_by_sets(world, experts, now):
    """What the rank that lacks most must fetch, from the sets of experts that each rank holds."""
    _, rows = packing(world=world, node=world, layers=5, experts=experts, expert_params=10.0, ep_now=now)

    def held(rank, ep):
        m = experts // ep
        return set(range(rank % ep * m, rank % ep * m + m))

    for ep, row in rows.items():
        most = max(len(held(rank, ep) - held(rank, now)) for rank in range(world))
        assert row["move_s"] == pytest.approx(5 * most * 10 * 12)


def test_choice_weighs_step_memory_and_move():
    # a2a of a second a byte against free compute and reduction: the fewer ranks, the better
    slow = dict(world=4, node=4, experts=4, top_k=2, reduce_near=(0.0, 0.0), expert_params=1.0)
    assert packing(**slow)[0] == 1
    assert packing(**slow, memory_bytes=2 * 16.0)[0] == 2  # two experts' state fit, not four
    _, rows = packing(**slow, memory_bytes=2 * 16.0)
    assert [rows[e]["fits"] for e in (1, 2, 4)] == [False, True, True]
    # moving 3 experts' 12 bytes takes 36 s and saves 6 s a step: it pays after 6 steps
    rows = packing(**slow, ep_now=4)[1]
    assert (rows[1]["move_s"], rows[4]["step_s"] - rows[1]["step_s"]) == (36, 6)
    assert packing(**slow, ep_now=4, steps=5.9)[0] == 4
    assert packing(**slow, ep_now=4, steps=6.1)[0] == 1
    assert packing(**slow, ep_now=4)[0] == 1
    # replicas' reduction counted: dear gradients keep experts spread
    assert packing(**{**slow, "reduce_near": (0.0, 100.0)})[0] == 4
    with pytest.raises(ValueError, match=r"memory_bytes=15, but ep=4 needs 16"):
        packing(**slow, memory_bytes=15.0)


# ---- errors ----

PIPELINE = dict(a2a=LINK, dispatch_bytes=1, return_bytes=1, expert=LINK, own_rows=1, remote_rows=1)
NAN = math.nan


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda: _C.fit([1], [1]), "fit: 1 points, at least 2"),
        (lambda: _C.fit([1, 2], [1]), "fit: t has 1 items, 2 needed"),
        (lambda: _C.fit([1, 1], [1, 2]), "fit: all n are 1"),
        (lambda: _C.fit([-1, 1], [1, 2]), r"fit: n\[0\]=-1"),
        (lambda: _C.fit([1, NAN], [1, 2]), r"fit: n\[1\]=nan"),
        (lambda: _C.fit([1, 2], [1, 0]), r"fit: t\[1\]=0 seconds"),
        (lambda: _C.fit([1, 2], [1, NAN]), r"fit: t\[1\]=nan seconds"),
        (lambda: _C.fit([1, 2], [math.inf, 1]), r"fit: t\[0\]=inf seconds"),
        (lambda: _C.Policy((NAN, 1), 1), "policy: reduce has alpha=nan"),
        (lambda: _C.Policy((1, -1), 1), "policy: reduce has .*beta=-1"),
        (lambda: _C.Policy(LINK, 0), "policy: micro_op_s=0"),
        (lambda: _C.Policy(LINK, 1, 0), "policy: unit=0 bytes"),
        (lambda: _C.fill(LINK, [1, 2], [1]), "fill: ready has 1 items, 2 needed"),
        (lambda: _C.fill(LINK, [-1], [1]), r"fill: slack_s\[0\]=-1"),
        (lambda: _C.fill(LINK, [1, 1], [1, -1]), r"fill: ready\[1\]=-1 bytes"),
        (lambda: _C.pipeline(**{**PIPELINE, "expert": (-1, 0)}), "pipeline: pass has alpha=-1"),
        (lambda: _C.pipeline(**{**PIPELINE, "own_rows": NAN}), "pipeline: own_rows=nan"),
        (lambda: _C.pipeline(**PIPELINE, degree=65), "pipeline: degree=65, limit 1..64"),
        (lambda: _C.pipeline(**PIPELINE, degree=-1), "pipeline: degree=-1, limit 1..64"),
        (lambda: _C.pipeline(**PIPELINE, max_degree=0), "pipeline: max_degree=0, limit 1..64"),
        (lambda: packing(world=6, node=4), "packing: node=4 does not divide world=6"),
        (lambda: packing(world=0), "packing: world=0, limit 1.."),
        (lambda: packing(top_k=2), "packing: top_k=2, limit 1..1"),
        (lambda: packing(experts=1025), "packing: experts=1025, limit 1..1024"),
        (lambda: packing(world=4, node=2, experts=4, ep_now=3), "packing: ep_now=3 divides not both"),
        (lambda: packing(slack_s=-1.0), "packing: slack_s=-1"),
        (lambda: packing(steps=0.0), "packing: steps=0"),
        (lambda: packing(a2a_far=(0.0, math.inf)), "packing: a2a_far has alpha=0, beta=inf"),
    ],
)
def test_errors_name_the_argument(call, text):
    with pytest.raises(ValueError, match=f"^lina: {text}"):
        call()
