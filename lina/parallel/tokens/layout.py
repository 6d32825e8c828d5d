"""Which rows of a spread layer are computed where, in which pass.

T tokens here, K experts for each, ep ranks of the group, S rows sent, R rows received. A pass of
the experts takes a range of this rank's own tokens, which do not travel, or a range of every
other rank's tokens (a chunk), or both:

    degree 1      own tokens and all that arrive, in one pass
    degree 2      own tokens;  all that arrive
    degree r > 2  first half of the own tokens;  r - 2 chunks, in order;  second half

The i-th of n ranges of T tokens begins at token ceil(i * T / n). Rows of a chunk are ordered by
their rank, then by token; sent rows by chunk, destination, token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lina import ops


class Part(NamedTuple):
    """One pass: the ``own``-th of so many ranges of own tokens, the ``chunk``-th of so many chunks."""

    own: tuple[int, int] | None
    chunk: tuple[int, int] | None


def parts(degree: int) -> list[Part]:
    """The passes of a degree, in their order."""
    if degree == 1:
        return [Part((0, 1), (0, 1))]
    if degree == 2:
        return [Part((0, 1), None), Part(None, (0, 1))]
    chunks = [Part(None, (i, degree - 2)) for i in range(degree - 2)]
    return [Part((0, 2), None), *chunks, Part((1, 2), None)]


def span(which: tuple[int, int], T: int) -> tuple[int, int]:
    """First token of a range, and the first after it."""
    i, n = which
    return -(-i * T // n), -(-(i + 1) * T // n)


@dataclass
class Layout:
    """The rows of one direction (forward or backward), as this rank sees them."""

    parts: list[Part]
    me: int
    T: int
    token_S: Tensor                    # i32: the token of each sent row
    row_TR: Tensor                     # i32: the row of each token for each rank; -1: none. Rows from S
    #                                    on stand for this rank's own tokens, so this rank's column is S + t
    sent: list[list[int]]              # by chunk, by rank
    received: list[list[int]]
    pairs: list[int]                   # (token, expert) pairs of each part

    @property
    def chunks(self) -> int:
        return len(self.sent)

    @property
    def S(self) -> int:
        return sum(map(sum, self.sent))

    def sent_rows(self, chunk: int) -> slice:
        first = sum(map(sum, self.sent[:chunk]))
        return slice(first, first + sum(self.sent[chunk]))

    def own(self, part: Part) -> slice:
        return slice(*span(part.own, self.T)) if part.own else slice(0, 0)

    def rows(self, part: Part) -> Tensor:
        """i64: the part's rows, counted from own token 0 on through all received rows by rank and token."""
        own = self.own(part)
        blocks = [torch.arange(own.start, own.stop)]
        if part.chunk:
            chunk, first = part.chunk[0], self.T
            for rank in range(len(self.sent[0])):
                column = [n[rank] for n in self.received]
                start = first + sum(column[:chunk])
                blocks.append(torch.arange(start, start + column[chunk]))
                first += sum(column)
        return torch.cat(blocks)


def layout(degree: int, token_R: Tensor, row_TR: Tensor, mine: list[list[int]], theirs: list[list[int]],
           me: int) -> Layout:
    """From one direction's tables (ops.dispatch_layout) and the columns, of every rank, that were sent and
    that arrived."""
    T, ep = row_TR.shape
    order, chunks = parts(degree), max(1, degree - 2)
    sent = [[line[c] for line in mine] for c in range(chunks)]
    received = [[line[c] for line in theirs] for c in range(chunks)]
    pairs = []
    for part in order:
        n = mine[me][ops.CHUNKS + part.own[0]] if part.own else 0
        if part.chunk:
            n += sum(theirs[r][ops.CHUNKS + part.chunk[0]] for r in range(ep) if r != me)
        pairs.append(n)
    return Layout(order, me, T, token_R[:sum(map(sum, sent))], row_TR, sent, received, pairs)


def found_in(forward: Layout, backward: Layout) -> list[Tensor]:
    """For each part of ``backward``, where its rows lie among those of all parts of ``forward``, in order."""
    order = torch.cat([forward.rows(part) for part in forward.parts])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return [place[backward.rows(part)] for part in backward.parts]
