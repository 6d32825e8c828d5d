"""lina.swap: give the MoE layers of an existing model lina's computation, in place.

What is recognised, and what is left alone, is described in ``docs/swap.md``.
"""

from lina.swap.registry import swap, swap_report, unswap
from lina.swap.report import Entry, Report

__all__ = ["Entry", "Report", "swap", "swap_report", "unswap"]
