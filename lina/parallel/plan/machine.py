"""The machine that costs are measured on: what tells it from others, and where its file is kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

# Of NCCL's settings, those that change nothing but what it prints.
_SILENT = ("NCCL_DEBUG",)


def machine_facts() -> dict[str, Any]:
    """What costs depend on: processor, usable cores, GPUs, and NCCL's settings in the environment
    (NCCL_P2P_DISABLE=1, say, makes another machine). No host name: containers change theirs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] \
        if torch.cuda.is_available() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    settings = {k: v for k, v in os.environ.items() if k.startswith("NCCL_") and not k.startswith(_SILENT)}
    return {"cpu": _cpu(), "cores": cores, "gpus": gpus, **dict(sorted(settings.items()))}


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def default_path(device: str, world: int) -> Path:
    """Where the cost model of ``world`` ranks on ``device`` ("cpu" or "cuda") is kept: $LINA_PROFILE,
    or a file of this machine's own in the user's cache folder ($XDG_CACHE_HOME/lina on Linux)."""
    if os.environ.get("LINA_PROFILE"):
        return Path(os.environ["LINA_PROFILE"])
    digest = hashlib.sha256(json.dumps(machine_facts(), sort_keys=True).encode()).hexdigest()[:12]
    return _cache() / "lina" / f"profile-{digest}-{device}-{world}.json"


def _cache() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def overwrite(path: Path, text: str) -> None:
    """``text`` into the file at ``path``, which is replaced at once or not at all."""
    target = Path(os.path.realpath(path))       # a link stays one
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
