"""csrc/plan from Python: each closed form against a slower, independent way to the same number."""

from __future__ import annotations

import itertools
import random
import sys

import numpy as np
import pytest

from lina import _C

EPS = sys.float_info.epsilon

# ---- fit ----

SIZES = [2.0**k for k in range(10, 27, 2)]  # five decades, as `lina profile` measures them


def relative_errors(link, n, t):
    return 1 - (link[0] + np.asarray(n) * link[1]) / np.asarray(t)


@pytest.mark.parametrize(
    "alpha,beta",
    [
        (3e-5, 1 / 23e9),  # a network
        (1e-5, 1 / 380e9),  # NVLink: latency is most of most sizes
        (2e-4, 0.0),  # latency alone
        (0.0, 1e-9),  # bytes alone
    ],
)
def test_fit_recovers_a_line(alpha, beta):
    t = [alpha + n * beta for n in SIZES]
    fitted = _C.fit(SIZES, t)
    # Each of `count` terms of the sums is rounded a few times, and the sums are well conditioned:
    # sizes far below and far above alpha / beta tell the two terms apart.
    limit = 16 * len(SIZES) * EPS
    assert np.abs(relative_errors(fitted, SIZES, t)).max() <= limit
    assert fitted[0] == pytest.approx(alpha, rel=limit, abs=limit * min(t))
    assert fitted[1] == pytest.approx(beta, rel=limit, abs=limit * min(t) / SIZES[-1])
    assert 1 - fitted[2] <= limit


def weighted(n, t):
    """The free least squares of relative errors, by numpy's QR."""
    n, t = np.asarray(n), np.asarray(t)
    line, *_ = np.linalg.lstsq(np.stack([1 / t, n / t], 1), np.ones_like(t), rcond=None)
    return line


@pytest.mark.parametrize("seed", range(20))
def test_fit_of_noisy_times(seed):
    rng = np.random.default_rng(seed)
    t = (2e-5 + np.array(SIZES) / 50e9) * rng.uniform(0.8, 1.25, len(SIZES))
    alpha, beta, r2 = _C.fit(SIZES, t)
    line = weighted(SIZES, t)
    assert (line >= 0).all(), "choose noise that leaves the free minimum inside"
    assert (alpha, beta) == pytest.approx(tuple(line), rel=1e-9)
    constant = np.sum(1 / t) / np.sum(1 / t**2)
    explained = np.sum(relative_errors((alpha, beta), SIZES, t) ** 2)
    total = np.sum((1 - constant / t) ** 2)
    assert r2 == pytest.approx(1 - explained / total, rel=1e-9)
    assert 0.5 < r2 < 1


@pytest.mark.parametrize(
    "n,t,zero",
    [
        ([1, 2, 4], [2.0, 2.0, 1.0], 1),  # falling: beta 0, and a constant explains nothing
        ([1, 2, 4], [1.0, 3.0, 9.0], 0),  # bent upwards: alpha 0
    ],
)
def test_fit_never_goes_negative(n, t, zero):
    link = _C.fit(n, t)
    assert link[zero] == 0 and link[1 - zero] > 0
    assert weighted(n, t)[zero] < 0
    here = np.sum(relative_errors(link, n, t) ** 2)
    a, b = np.meshgrid(np.linspace(0, 3, 301), np.linspace(0, 3, 301))
    best = sum((1 - (a + x * b) / y) ** 2 for x, y in zip(n, t, strict=True)).min()
    assert here <= best * (1 + 1e-9)
    assert (link[2] == 0) == (zero == 1)


# ---- policy ----


def test_micro_ops_are_sized_in_time():
    policy = _C.Policy((1e-4, 1e-9), 5e-4, 16)
    assert policy.size == 400_000  # (500 us - 100 us) at 1 GB/s, a multiple of 16
    assert policy.cut(400_001) == 400_001  # a byte does not travel alone
    assert policy.cut(599_999) == 599_999  # nor less than half a micro-op
    assert policy.cut(600_000) == 400_000
    assert policy.cut(0) == policy.cut(-1) == 0
    assert _C.Policy((1e-4, 1e-9), 5e-4, 4096).size == 97 * 4096
    assert _C.Policy((1e-4, 1e-9), 1e-5).size in (99_999, 100_000)  # as long as 2 alpha
    assert _C.Policy((0.0, 1.0), 1e-3, 16).size == 16  # at least one unit
    assert _C.Policy((1e-4, 0.0), 1e-3).cut(2**60) == 2**60  # a link without limit: never cut


def test_policy_waits_for_a2a():
    policy = _C.Policy((0.0, 2.0**-30), 1000 * 2.0**-30)  # exactly 1000 bytes
    assert policy.next() is None
    assert policy.submit(2500) == 0 and policy.submit(0) == 1
    policy.a2a(2)
    policy.a2a(-1)
    assert policy.next() is None  # one of two is still there
    policy.a2a(-1)
    assert policy.next() == (0, 0, 1000, False)
    assert policy.next() is None  # one at a time
    policy.a2a(1)
    policy.finished()
    assert policy.next() is None  # the a2a waited for one micro-op and goes first
    policy.a2a(-1)
    assert policy.next() == (0, 1000, 1000, False)
    policy.finished()
    assert (policy.pending, policy.pending_bytes, policy.started) == (2, 500, 2)
    assert policy.next() == (0, 2000, 500, True)
    assert policy.running and policy.pending == 2
    policy.finished()
    assert policy.next() == (1, 0, 0, True)
    policy.finished()
    assert (policy.pending, policy.next()) == (0, None)


def test_policy_refuses_without_change():
    policy = _C.Policy((0.0, 1e-9), 1e-6)
    policy.submit(10)
    for call in (
        lambda: policy.a2a(-1),
        lambda: policy.submit(-1),
        lambda: policy.submit(2**63 - 10),  # the sum of bytes would not fit
        lambda: policy.finished(),
    ):
        with pytest.raises(ValueError, match=r"^lina: policy: "):
            call()
    assert (policy.outstanding, policy.pending, policy.pending_bytes) == (0, 1, 10)
    assert policy.next() == (0, 0, 10, True)


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_once_and_in_order(seed):
    """25,000 random operations each against a plain list of what was submitted."""
    rng = random.Random(seed)
    policy = _C.Policy((1e-5, 1e-9), rng.choice([1e-6, 1e-4, 1e-3]), rng.choice([1, 16, 4096]))
    buckets, taken, finished, outstanding, running = [], [], [], 0, None
    for _ in range(25_000):
        what = rng.random()
        if what < 0.3:
            delta = -1 if outstanding and rng.random() < 0.6 else 1
            policy.a2a(delta)
            outstanding += delta
        elif what < 0.4:
            buckets.append(rng.choice([0, 1, rng.randrange(2_000_000)]))
            assert policy.submit(buckets[-1]) == len(buckets) - 1
        elif what < 0.7:
            op = policy.next()
            unfinished = len(finished) < len(buckets)
            may = running is None and outstanding == 0 and unfinished
            assert (op is not None) == may
            if op:
                taken.append(op)
                running = op
        elif running:
            policy.finished()
            if running[3]:
                finished.append(running[0])
            running = None
        assert policy.pending == len(buckets) - len(finished)
        assert policy.outstanding == outstanding and policy.running == (running is not None)
    policy.a2a(-outstanding)
    if running:
        policy.finished()
    while op := policy.next():
        taken.append(op)
        policy.finished()
    assert policy.pending == policy.pending_bytes == 0
    pieces = [(i, list(ops)) for i, ops in itertools.groupby(taken, lambda op: op[0])]
    assert [i for i, _ in pieces] == list(range(len(buckets)))  # first in, first out
    for (_, ops), size in zip(pieces, buckets, strict=True):
        ends = list(itertools.accumulate(op[2] for op in ops))
        assert [op[1] for op in ops] == [0, *ends[:-1]] and ends[-1] == size
        assert [op[3] for op in ops] == [False] * (len(ends) - 1) + [True]


# ---- fill ----


@pytest.mark.parametrize("seed", range(20))
def test_fill_takes_what_hides(seed):
    """Against a search, byte count by byte count, for the most that a gap hides."""
    rng = random.Random(seed)
    reduce = (rng.choice([0.0, 10.0]), rng.choice([0.25, 1.0, 3.0]))  # exact in floating point
    slack_s = [float(rng.randrange(0, 200)) for _ in range(8)]
    ready = [rng.choice([0, rng.randrange(0, 120)]) for _ in range(8)]
    take, left = _C.fill(reduce, slack_s, ready)
    waiting, want = 0, []
    for s, r in zip(slack_s, ready, strict=True):
        waiting += r
        hidden = [n for n in range(waiting + 1) if n == 0 or reduce[0] + n * reduce[1] <= s]
        want.append(hidden[-1])
        waiting -= want[-1]
    assert (take, left) == (want, waiting)
