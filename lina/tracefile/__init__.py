"""The trace file: what ``lina.trace`` writes, ``lina trace FILE`` reads, sums up and draws."""

from lina.tracefile.chrome import RankTrace, events, read, write_json
from lina.tracefile.draw import draw
from lina.tracefile.intervals import TRACKS, Interval, Span, busy, length, subtract, union
from lina.tracefile.summary import lines, summary, volume

__all__ = ["TRACKS", "Interval", "RankTrace", "Span", "busy", "draw", "events", "length", "lines", "read",
           "subtract", "summary", "union", "volume", "write_json"]
