"""What lina.swap did to each MoE layer of a model, and why."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One MoE-like module: its name in the model, its (original) class, and what became of it."""

    name: str
    kind: str
    swapped: bool
    reason: str


class Report(list[Entry]):
    """A list of :class:`Entry` that prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no MoE-like modules found"
        head = ("module", "class", "swapped", "reason")
        lines = [head]
        lines += [(e.name or "(the model)", e.kind, "yes" if e.swapped else "no", e.reason) for e in self]
        width = [max(len(line[i]) for line in lines) for i in range(3)]
        return "\n".join("  ".join([*map(str.ljust, line[:3], width), line[3]]) for line in lines)
