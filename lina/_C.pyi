"""The compiled module. Importing it registers torch.ops.lina.*."""

from collections.abc import Sequence
from typing import Any

CUDA: bool
"""Whether the GPU kernels were built."""

# ---- comm: GPUs over NCCL (csrc/module_comm.c) ----

A2A_RAISE: int
A2A_LOWER: int

class Communicator:
    def __init__(self, id: bytes, rank: int, size: int, device: int, name: str, timeout_s: float,
                 max_ctas: int = 0) -> None: ...
    def all_to_all(self, send: int, send_bytes: Sequence[int], receive: int, receive_bytes: Sequence[int],
                   how: int, stream: int, /) -> None: ...
    def all_reduce(self, data: int, count: int, dtype: int, mean: bool, gently: bool, stream: int,
                   /) -> None: ...
    def reduce_scatter(self, parts: int, out: int, count: int, scratch: int, scratch_bytes: int, dtype: int,
                       mean: bool, gently: bool, stream: int, /) -> None: ...
    def set_policy(self, alpha_s: float, beta_s: float, micro_op_s: float, unit: int, /) -> int: ...
    def check(self) -> None: ...
    def close(self) -> None:
        """Aborts what is in flight; calls that other threads are in raise RuntimeError."""

def nccl_id() -> bytes: ...
def set_priority(device: int, raised: bool, stream: int, /) -> None: ...
def read_priority(device: int, /) -> tuple[bool, int]: ...
def priority_off() -> str | None: ...

# ---- plan: csrc/plan, by csrc/module_plan.c ----
# A link is (alpha_s, beta_s): t = alpha_s + n * beta_s seconds for n bytes, rows or operations.
# Every function raises ValueError, naming the argument and its limit.

_Link = tuple[float, float]

def fit(n: Sequence[float], t: Sequence[float]) -> tuple[float, float, float]:
    """(alpha_s, beta_s, r2) of the line through seconds ``t`` at sizes ``n``. Contract: csrc/plan/link.h."""

def fill(reduce: _Link, slack_s: Sequence[float], ready: Sequence[int]) -> tuple[list[int], int]:
    """Bytes that each gap takes, and those that none does. Contract: csrc/plan/policy.h."""

class Policy:
    """Which gradient micro-op may start now. One thread at a time. Contract: csrc/plan/policy.h.

    ``reduce`` is the link of the reduction over its bytes, ``micro_op_s`` the seconds that one
    micro-op should take, ``unit`` the bytes of which every cut is a multiple.
    """

    def __init__(self, reduce: _Link, micro_op_s: float, unit: int = 1) -> None: ...
    @property
    def size(self) -> int:
        """Bytes of a full micro-op."""
    @property
    def outstanding(self) -> int:
        """All-to-alls queued, running or imminent."""
    @property
    def pending(self) -> int:
        """Buckets that have not finished."""
    @property
    def pending_bytes(self) -> int:
        """Bytes that no micro-op has taken yet."""
    @property
    def started(self) -> int:
        """Micro-ops since the beginning."""
    @property
    def running(self) -> bool:
        """Whether a micro-op runs."""
    def a2a(self, delta: int, /) -> None:
        """So many more all-to-alls are outstanding: +1 when one is imminent, -1 when it is done."""
    def submit(self, bytes: int, /) -> int:
        """Queues a bucket; its id, counted from 0."""
    def next(self) -> tuple[int, int, int, bool] | None:
        """(id, offset, bytes, last) of the micro-op that starts now, or None if none may."""
    def finished(self) -> None:
        """The running micro-op ended."""
    def cut(self, left: int, /) -> int:
        """Bytes of the next micro-op of a bucket with ``left`` bytes to go."""

def pipeline(
    *,
    a2a: _Link,
    dispatch_bytes: float,
    return_bytes: float,
    expert: _Link,
    own_rows: float,
    remote_rows: float,
    degree: int = 0,
    max_degree: int = 8,
    late: _Link = ...,
) -> dict[str, Any]:
    """One layer in ``degree`` expert passes, 0: the best of 1 .. ``max_degree``. Contract:
    csrc/plan/pipeline.h.

    ``expert`` is the link of a pass over its rows, ``late`` that of its part after its results (by
    default there is none). Gives degree, seconds, compute_s, a2a_s,
    exposed_s, idle_s and gaps, a list of (start_s, end_s).
    """

_Way = tuple[float, float, _Link, float]  # out_bytes, back_bytes, link of a pass, expert_s

def packing(
    *,
    world: int,
    node: int,
    layers: int,
    experts: int,
    top_k: int,
    tokens: float,
    a2a_near: _Link,
    a2a_far: _Link,
    reduce_near: _Link,
    reduce_far: _Link,
    forward: _Way,
    backward: _Way,
    expert_params: float,
    gradient_bytes: float,
    state_bytes: float,
    move_bytes: float,
    memory_bytes: float = ...,
    slack_s: float = 0.0,
    ep_now: int = 0,
    steps: float = ...,
    max_degree: int = 8,
) -> dict[str, Any]:
    """The step at every expert-parallel degree. Contract: csrc/plan/packing.h.

    ``memory_bytes`` and ``steps`` are infinite if not given. Gives ep, the best degree, and rows,
    a list of dicts with the fields of lina_packing_row.
    """

# ---- simulate: the simulator of csrc/plan, by csrc/module_simulate.c ----

def simulate(
    layers: tuple[tuple[Any, ...], ...],
    tensor_bytes: tuple[int, ...],
    ranks: int,
    ep: int,
    node: int,
    a2a: tuple[_Link, _Link],
    reduce: tuple[_Link, _Link],
    share: float,
    gated: bool,
    micro_op_s: float,
    micro_op_bytes: int,
    unit: int,
    degree: tuple[int, int],
    max_degree: int,
    bucket_bytes: int,
    first_bucket_bytes: int,
    experts_last: bool,
    optimizer_s: float,
    straggle_s: float,
    seed: int,
    fault: int,
    watch: tuple[int, ...],
) -> dict[str, Any]:
    """One training step on many ranks. Contract: csrc/plan/simulate.h.

    A layer is (dense_s, moe, glue_s, pass forward, pass backward, late, own_rows, remote_rows,
    dispatch_bytes, return_bytes, expert_bytes, tensors), with pairs as (forward, backward).
    ``lina.simulate.step`` is the public form.
    """

# ---- peers: csrc/comm/peers.h. `peers` is a capsule; tensors are addresses; for lina/parallel ----
# Calls from several threads take turns, without the GIL. A capsule that is dropped before
# peers_close leaves its memory, and what was launched over it, as they are.

def peers_make(
    rank: int, ep: int, out_bytes: int, back_bytes: int, tokens: int, timeout_s: float, sms: int,
    beside: bool, like: object | None,
) -> object: ...  # fmt: skip
def peers_export(peers: object, /) -> bytes: ...
def peers_open(peers: object, ep: int, exports: bytes) -> None: ...
def peers_rows(peers: object, /) -> int: ...
def peers_dispatch(
    peers: object, stream: int, tag: int, priority: bool, T: int, C: int, K: int, E: int, row_bytes: int,
    x: int | None, expert: int | None, weight: int | None, slot: int | None, count: int | None,
    x_out: int | None, weight_out: int | None, expert_out: int | None,
) -> None: ...  # fmt: skip
def peers_collect(
    peers: object, stream: int, tag: int, priority: bool, T: int, C: int, K: int, E: int, D: int, dtype: int,
    y: int | None, pair_row: int | None, weight: int | None, dweight: int | None, slot: int | None,
    count: int | None, expert: int | None, out: int | None, dweight_out: int | None,
) -> None: ...  # fmt: skip
def peers_reduce_make(
    rank: int, ep: int, blocks: int, tile_bytes: int, scatter: bool, timeout_s: float, /
) -> object: ...
def peers_reduce(
    peers: object, stream: int, blocks: int, tile_bytes: int, scatter: bool, data: int, count: int,
    dtype: int, mean: bool, gently: bool, /
) -> None: ...  # fmt: skip
def peers_check(peers: object, /) -> None: ...
def peers_lost(peers: object, /) -> bool: ...
def peers_stop(peers: object, stream: int, overflow: bool) -> None: ...
def peers_abort(peers: object, /) -> None: ...
def peers_close(peers: object, /) -> None: ...
