"""`lina doctor`: what this machine can do, which paths lina takes on it, and why."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

import torch
import torch.distributed as dist

MIN_DRIVER = 580        # first driver branch that runs the CUDA 13 runtime linked into lina._C
LEVELS = {              # the x86-64 levels that the CPU kernels are built for, widest first
    "x86-64-v4 (AVX-512)": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3 (AVX2)": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}
SHOWN = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def examine() -> dict[str, Any]:
    """Everything the command prints, as one JSON-able object. Never fails for want of a GPU."""
    import lina

    gpus = _gpus()
    cuda_built = bool(getattr(_extension(), "CUDA", False))
    driver = _driver()
    found: dict[str, Any] = {
        "lina": lina.__version__, "python": platform.python_version(), "system": platform.platform(),
        "torch": torch.__version__, "torch_cuda": torch.version.cuda,
        "cuda_driver_api": _driver_api(), "driver": driver, "driver_needed": MIN_DRIVER,
        "nccl": _nccl(), "backends": _backends(), "cpu": _cpu(),
        "gpus": gpus, "links": _links(len(gpus)), "cuda_kernels_built": cuda_built,
        "operators": _operators(cuda_built), "priority_off": getattr(_extension(), "priority_off", str)(),
        "profile": _profile(len(gpus)),
    }
    found["transports"] = _transports(found)
    found["paths"] = _paths(found)
    return found


def _extension() -> Any:
    try:
        from lina import _C
    except ImportError:
        return None
    return _C


def _cpu() -> dict[str, Any]:
    from lina.parallel import machine_facts

    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    flags.update(line.split(":", 1)[1].split())
                    break
    except OSError:
        pass
    level = next((name for name, needs in LEVELS.items() if needs <= flags), "plain " + platform.machine())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": machine_facts()["cpu"], "cores": os.cpu_count(), "usable_cores": usable,
            "threads": torch.get_num_threads(), "features": [f for f in SHOWN if f in flags], "level": level}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append({"name": p.name, "capability": f"{p.major}.{p.minor}",
                     "memory_gib": p.total_memory / 2**30, "sms": p.multi_processor_count})
    return gpus


def _links(count: int) -> list[dict[str, Any]]:
    """Every pair of GPUs: whether one can map the other's memory, and over how many NVLinks."""
    return [{"from": a, "to": b, "peer_access": torch.cuda.can_device_access_peer(a, b),
             "nvlinks": _nvlinks(a, b)} for a in range(count) for b in range(count) if a != b]


def _nvlinks(a: int, b: int) -> int | None:
    """Active NVLinks of GPU `a` that lead to `b` or to a switch; None where it cannot be told."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(i).uuid}")
                   for i in (a, b)]
        target = pynvml.nvmlDeviceGetPciInfo(handles[1]).busId
        count = 0
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            try:
                if not pynvml.nvmlDeviceGetNvLinkState(handles[0], link):
                    continue
                remote = pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handles[0], link).busId
                kind = pynvml.nvmlDeviceGetNvLinkRemoteDeviceType(handles[0], link)
            except pynvml.NVMLError:
                continue
            count += remote == target or kind == 2          # NVML_NVLINK_DEVICE_TYPE_SWITCH
        return count
    except Exception:       # an optional package over an optional driver; torch's answer stands alone
        return None


def _driver() -> str | None:
    """The NVIDIA driver's version, e.g. "580.65.06"."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((w for w in words if w[0].isdigit() and "." in w), None)


def _driver_api() -> str | None:
    """The newest CUDA version that the driver takes, e.g. "13.0"."""
    try:
        cuda, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _nccl() -> str | None:
    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:       # built with NCCL, and its library is not there
        return None


def _backends() -> dict[str, bool]:
    if not dist.is_available():
        return {"gloo": False, "nccl": False}
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}


def _operators(cuda_built: bool) -> dict[str, dict[str, bool]]:
    """By operator, the devices with a kernel. lina registers both keys, so that a build without
    CUDA can say so; its CUDA key is then no kernel."""
    names = sorted({str(name).split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                    if str(name).startswith("lina::")})
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name: {"cpu": has(f"lina::{name}", "CPU"), "cuda": cuda_built and has(f"lina::{name}", "CUDA")}
            for name in names}


def _transports(found: dict[str, Any]) -> dict[str, str | None]:
    """By transport of ``lina.mesh(ep, transport=...)``, why it does not work here; None: it does."""
    gpus, nccl = len(found["gpus"]), found["nccl"]
    missing = "no GPU" if not gpus else None if found["cuda_kernels_built"] else "lina is built without CUDA"
    old = "torch has no NCCL" if nccl is None else \
        f"NCCL {nccl} is older than 2.18" if tuple(map(int, nccl.split(".")))[:2] < (2, 18) else None
    apart = [f"{p['from']}-{p['to']}" for p in found["links"] if not p["peer_access"]]
    alone = "a single GPU" if gpus < 2 else \
        f"no peer access between GPUs {', '.join(apart)}" if apart else None
    return {"c10d": None if any(found["backends"].values()) else "torch has no backend",
            "nccl": missing or old, "p2p": missing or alone}


def _profile(gpus: int) -> dict[str, Any]:
    """Where ``lina profile`` keeps this machine's cost model, and whether it is there."""
    from lina import parallel

    path = parallel.default_path("cuda" if gpus else "cpu", gpus or 2)
    return {"path": str(path), "there": os.path.isfile(path)}


def _paths(found: dict[str, Any]) -> list[str]:
    """Which path a call takes, and why, one line each."""
    cpu, gpus = found["cpu"], found["gpus"]
    lines = [f"CPU tensors: lina's C kernels for {cpu['level']}, {cpu['threads']} threads; "
             "products by torch"]
    if not gpus:
        why = "torch is a CPU build" if found["torch_cuda"] is None else "torch finds no GPU"
        lines.append(f"CUDA tensors: none, {why}")
    elif not found["cuda_kernels_built"]:
        lines.append("CUDA tensors: refused, lina was built without CUDA; reinstall it with nvcc at hand "
                     "and without LINA_CUDA=0")
    elif _old_driver(found["driver"]):
        lines.append(f"CUDA tensors: will fail, driver {found['driver']} is older than {MIN_DRIVER}, which "
                     "the built-in CUDA 13 runtime needs; update the driver")
    else:
        for i, gpu in enumerate(gpus):
            major = int(gpu["capability"].split(".")[0])
            if major < 8:
                lines.append(f"cuda:{i}: too old, compute capability {gpu['capability']}, 8.0 needed")
                continue
            code = "its sm_90a code" if gpu["capability"] == "9.0" else \
                "its sm_80 code" if major == 8 else "sm_80 code compiled by the driver"
            lines.append(f"cuda:{i}: lina's kernels, {code}; products by torch's grouped product")
    backends = found["backends"]
    reason = "nccl on GPUs" if gpus and backends["nccl"] and found["cuda_kernels_built"] else \
        "c10d over NCCL on GPUs" if gpus and backends["nccl"] else \
        "c10d over gloo on the CPU" if backends["gloo"] else "c10d, of which torch has no backend"
    lines.append(f"several ranks: transport {reason}, unless lina.mesh is given another")
    if found["gpus"]:
        off = found["priority_off"]
        lines.append("gradients: " + (f"give way to nothing, {off}" if off else
                                      "give way to all-to-alls on the device, with transport nccl"))
    blocked = [f"{p['from']}-{p['to']}" for p in found["links"] if not p["peer_access"]]
    if blocked:
        lines.append(f"links: no peer access between GPUs {', '.join(blocked)}; "
                     "traffic goes through host memory")
    ranks = len(gpus) or 2
    where = "cuda, bf16" if gpus else "cpu, float32"
    lines.append(f"lina train: {ranks} rank{'s' * (ranks > 1)} on {where} by default")
    return lines


def _old_driver(version: str | None) -> bool:
    return version is not None and int(version.split(".")[0]) < MIN_DRIVER


def lines(found: dict[str, Any]) -> list[str]:
    """The report of ``examine()`` for people."""
    cpu = found["cpu"]
    out = [
        f"lina        {found['lina']}, CUDA kernels "
        f"{'built in' if found['cuda_kernels_built'] else 'not built'}",
        f"Python      {found['python']} on {found['system']}",
        f"torch       {found['torch']}, CUDA {found['torch_cuda'] or 'none (CPU build)'}, "
        f"NCCL {found['nccl'] or 'none'}",
        "ranks       " + ", ".join(f"{k} {'yes' if v else 'no'}" for k, v in found["backends"].items()),
        f"CPU         {cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, "
        f"{cpu['threads']} threads; {' '.join(cpu['features']) or 'no features found'}",
    ]
    if found["driver"] is None and found["cuda_driver_api"] is None:
        out.append("driver      none (NVIDIA)")
    else:
        verdict = "version unknown" if found["driver"] is None else \
            f"{'too old' if _old_driver(found['driver']) else 'new enough'} ({MIN_DRIVER} needed)"
        out.append(f"driver      {found['driver'] or '?'}, CUDA {found['cuda_driver_api'] or '?'}, {verdict}")
    for i, gpu in enumerate(found["gpus"]):
        out.append(f"GPU {i}       {gpu['name']}, capability {gpu['capability']}, {gpu['sms']} SMs, "
                   f"{gpu['memory_gib']:.0f} GiB")
    if not found["gpus"]:
        out.append("GPU         none")
    for pair in found["links"]:
        links = "NVLinks unknown" if pair["nvlinks"] is None else f"{pair['nvlinks']} NVLinks"
        peer = "peer access" if pair["peer_access"] else "no peer access"
        out.append(f"link {pair['from']}-{pair['to']}    {peer}, {links}")
    for name, why in found["transports"].items():
        out.append(f"transport   {name}: {why or 'works here'}")
    there = "" if found["profile"]["there"] else ", not there yet: run lina profile"
    out.append(f"profile     {found['profile']['path']}{there}")
    for name, on in found["operators"].items():
        kernels = [device.upper() for device in ("cpu", "cuda") if on[device]]
        out.append(f"operator    {name}: {' and '.join(kernels) or 'no kernel'}")
    if not found["operators"]:
        out.append("operator    none registered: lina._C is not built")
    return out + [f"path        {line}" for line in found["paths"]]
