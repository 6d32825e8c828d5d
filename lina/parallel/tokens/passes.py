"""The traffic of a spread layer: who gets what, and the passes between rows out and rows back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from lina import ops, tracing
from lina.parallel.plan.observe import saw_rows
from lina.parallel.tokens.carveout import carveout
from lina.parallel.tokens.dispatch import raw
from lina.parallel.tokens.header import FIRST, check, said
from lina.parallel.tokens.layout import Layout, layout
from lina.parallel.transport.base import Pending, Transport


class Job(NamedTuple):
    transport: Transport
    experts: int
    degree: tuple[int, int]
    options: tuple
    needs: list[bool]              # gradients of x, weight, w_up, b_up, w_down, b_down

    @property
    def ranks(self) -> tuple[int, int]:
        """This rank of the group, and their number."""
        return self.transport.rank, self.transport.size


@torch.no_grad()
def plan(expert_TK: Tensor, facts: tuple[int, ...], job: Job, save: bool) -> Callable[[], list[Layout]]:
    """The layouts forward and, to ``save``, backward; the function returned waits for the counts.
    ``facts``: what all ranks must agree on (header.py)."""
    me, ep = job.ranks
    forward, backward = job.degree
    found = ops.dispatch_layout(expert_TK, said(facts), job.experts, ep, me, forward, backward if save else 0)
    read = job.transport.counts("dispatch counts", found.header)

    def known() -> list[Layout]:
        mine, theirs = read().tolist()
        check(theirs)

        def direction(i: int, token_R: Tensor, row_TR: Tensor) -> Layout:
            own = slice(FIRST + i * ops.COLUMNS, FIRST + (i + 1) * ops.COLUMNS)
            here, there = ([line[own] for line in lines] for lines in (mine, theirs))
            return layout(job.degree[i], token_R, row_TR, here, there, me)

        made = [direction(0, found.token_R, found.row_TR)]
        if save:
            made.append(made[0] if backward == forward else
                        direction(1, found.token_back_R, found.row_back_TR))
        first = slice(FIRST + ops.CHUNKS, FIRST + ops.COLUMNS)
        pairs = sum(mine[me][first]), sum(sum(theirs[r][first]) for r in range(ep) if r != me)
        sent, received = ([sum(n) for n in zip(*chunks, strict=True)]
                          for chunks in (made[0].sent, made[0].received))
        saw_rows(sent, received, me, pairs)
        return made
    return known


def run(job: Job, lay: Layout, labels: tuple[str, str], outgoing: Tensor, width: int, back: Tensor | None,
         compute: Callable[[int, Tensor | None], Tensor | None],
         after: Callable[[int], object] | None = None) -> None:
    """The passes of one direction: ``outgoing`` [T, width] by chunk to other ranks' ``compute(i, rows)``,
    whose results come back into ``back`` [S, ...], if there is any; ``after(i)`` while they travel."""
    def label(name: str, c: int) -> str:
        return name if lay.chunks == 1 else f"{name} {c + 1}/{lay.chunks}"

    def start(name: str, c: int, out: Tensor, inp: Tensor, arriving: list[int],
              leaving: list[int]) -> Pending:
        size = out.shape[1] * out.element_size()
        return job.transport.start(label(name, c), raw(out), raw(inp), [n * size for n in arriving],
                                   [n * size for n in leaving])

    coming: list[tuple[Pending, Tensor]] = []
    for c in range(lay.chunks):
        rows = outgoing.index_select(0, lay.token_S[lay.sent_rows(c)])
        got = rows.new_empty(sum(lay.received[c]), width)
        coming.append((start(labels[0], c, got, rows, lay.received[c], lay.sent[c]), got))
    going: list[Pending] = []
    left = lay.chunks                      # of them to come

    def beside() -> AbstractContextManager[None]:
        return carveout(job.transport.sms if left or going else 0)

    for i, part in enumerate(lay.parts):
        arrived = None
        if part.chunk:
            pending, arrived = coming[part.chunk[0]]
            pending.wait()
            left -= 1
        name = "experts backward" if "backward" in labels[0] else "experts"
        with tracing.span("compute", name), beside():
            result = compute(i, arrived)
        if part.chunk and back is not None and result is not None:
            c = part.chunk[0]
            going.append(start(labels[1], c, back[lay.sent_rows(c)], result, lay.sent[c], lay.received[c]))
        if after is not None:
            with tracing.span("compute", "weights' gradients"), beside():
                after(i)
    for pending in going:
        pending.wait()


def add_up(total: list[Tensor | None], parts: Sequence[Tensor], wanted: Sequence[bool]) -> None:
    """Adds a pass's gradients of weights to those of the passes before, in the weights' dtype."""
    for i, part in enumerate(parts):
        so_far = total[i]
        if wanted[i]:
            total[i] = part if so_far is None else so_far.add_(part)
