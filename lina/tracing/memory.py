"""The most memory in use during a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """On CUDA torch's allocator, elsewhere the process's resident memory, where Linux tells it.

    Peaks are counted from here on: torch.cuda's peak counters of the device, or the process's
    own high-water mark, begin anew.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        if device is not None:
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
            return
        try:
            _CLEAR.write_text("5")
            self._former = 0
        except OSError:                # not to be had here: then only a new high is known to be of now
            self._former = _resident().get("VmHWM", 0)
        self._start = _resident().get("VmRSS", 0)

    def stop(self) -> dict[str, Any] | None:
        """As RankTrace's facts have it; None where it is not known."""
        if self._device is not None:
            return {"kind": "cuda", "start_bytes": self._start,
                    "stop_bytes": torch.cuda.memory_allocated(self._device),
                    "peak_bytes": torch.cuda.max_memory_allocated(self._device),
                    "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device)}
        now = _resident()
        if not self._start or "VmRSS" not in now:
            return None
        high = now.get("VmHWM", 0)
        if high <= self._former:
            return None
        return {"kind": "rss", "start_bytes": self._start, "stop_bytes": now["VmRSS"],
                "peak_bytes": max(self._start, now["VmRSS"], high)}


def _resident() -> dict[str, int]:
    """VmRSS and VmHWM of this process in bytes; nothing where there is no /proc."""
    try:
        text = _STATUS.read_text(encoding="utf-8")
    except OSError:
        return {}
    fields = (line.split() for line in text.splitlines() if line.startswith(("VmRSS:", "VmHWM:")))
    return {name.rstrip(":"): 1024 * int(kilobytes) for name, kilobytes, *_ in fields}
