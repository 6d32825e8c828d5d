"""What a run prints and draws."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lina.parallel import machine_facts

from .options import Options, command

# The fields that make a dense run the baseline of a run with experts.
SAME_RUN = ("dim", "layers", "heads", "top_k", "ffn_dim", "seq", "batch", "steps", "stop", "lr", "clip",
            "seed", "precision", "heldout_kib")


def device_name(device: torch.device) -> str:
    """E.g. "cpu (AMD EPYC, threads a rank: 1)" or "cuda (NVIDIA H200)"."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({machine_facts()['cpu']}, threads a rank: {torch.get_num_threads()})"


def as_baseline(summary: dict[str, Any], o: Options) -> dict[str, Any]:
    """A dense run as ``dense.json`` keeps it."""
    return {"held_out_bits_per_byte": summary["held_out_bits_per_byte"],
            "command": command(o), "date": datetime.date.today().isoformat(),
            "machine": f"{summary['ranks']} ranks on {summary['device']}, Python {platform.python_version()}",
            "text_digest": summary["text_digest"], "options": _settings(o)}


def _settings(o: Options) -> dict[str, Any]:
    """What decides a dense run's figure; the number of ranks does not."""
    return {**{name: getattr(o, name) for name in SAME_RUN}, "stop": o.stop or o.steps}


def stored_baseline(o: Options, digest: int) -> dict[str, Any] | None:
    """The shipped result of ``lina train --dense``, if `o` is that run but for its experts.

    Its "same_text" says whether the text is too: `digest` is that of `o`'s, and standard
    libraries differ from one Python to another.
    """
    stored = json.loads((Path(__file__).parent / "dense.json").read_text(encoding="utf-8"))
    if o.data is not None or _settings(o) != stored["options"]:
        return None
    return {**stored, "same_text": stored["text_digest"] == digest}


def speed(tokens_per_s: float | None) -> str:
    """For people; None is a run too short to measure."""
    return "n/a tokens/s" if tokens_per_s is None else f"{tokens_per_s:,.0f} tokens/s"


def imbalance(load_LE: Tensor | None) -> list[float]:
    """Per layer the busiest expert's load over the mean; 1 is balanced."""
    if load_LE is None or not load_LE.numel():
        return []
    load = load_LE.double()
    return (load.amax(1) / load.mean(1).clamp(min=1e-9)).tolist()


def lines(summary: dict[str, Any], o: Options) -> list[str]:
    """The summary; its last line is the figure of merit."""
    s = summary
    kind = "dense FFNs" if s["dense"] else f"{o.experts} experts, {o.top_k} a byte"
    sample = ["".join(c if c.isprintable() else "." for c in line) for line in s["sample"].split("\n")]
    out = [
        "", "sample:", *("  | " + line for line in sample), "",
        f"model       {s['parameters']:,} parameters, {s['active_parameters']:,} active ({kind})",
        f"text        {s['text']}: {s['train_bytes']:,} bytes to train on, {s['held_out_bytes']:,} held out",
        f"machine     {s['ranks']} ranks (ep {s['ep']}) on {s['device']}, {s['precision']}",
        f"speed       {speed(s['tokens_per_s'])}, {s['steps']} steps, {s['seconds']:.0f} s in all",
        f"network     a2a {s['a2a_share']:.1%} of a step, allreduce {s['allreduce_share']:.1%}, "
        f"waiting {s['waiting_share']:.1%} (measured on {s['traced_steps']} steps; "
        "waiting for slower ranks is included)",
    ]
    if s["expert_load_max_over_mean"]:
        worst = ", ".join(f"{x:.2f}" for x in s["expert_load_max_over_mean"])
        out.append(f"balance     busiest expert {worst} times the mean (by MoE layer)")
    else:
        out.append(f"balance     n/a ({'dense' if s['dense'] else 'not measured'})")
    balance = "balance.png " * bool(s["expert_load_max_over_mean"])
    out.append(f"files       {o.out}/ curve.png {balance}step.json metrics.jsonl summary.json; "
               f"checkpoint {o.checkpoint}")
    out.append(f"unigram     {s['unigram_bits_per_byte']:.3f} bits per byte (byte frequencies, this run)")
    dense = s["dense_baseline"]
    if dense is not None:
        out.append(f"dense       {dense['held_out_bits_per_byte']:.3f} bits per byte (equal active "
                   f"parameters{'' if dense['same_text'] else '; other text'}; stored: "
                   f"`{dense['command']}`, {dense['date']}, {dense['machine']})")
    elif not s["dense"]:
        out.append("dense       no stored figure for these options; run them with --dense for one")
    out.append(f"held-out {s['held_out_bits_per_byte']:.3f} bits per byte")
    return out


def pictures(out: Path, summary: dict[str, Any], load_LE: Tensor | None) -> None:
    """curve.png, and balance.png where there is a load."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in rows], [r["bits_per_byte"] for r in rows], color="#4477aa",
              label="training")
    marks = [("held-out", summary["held_out_bits_per_byte"], "#228833"),
             ("unigram", summary["unigram_bits_per_byte"], "#bbbbbb")]
    if summary["dense_baseline"] is not None:
        name = "dense, stored" if summary["dense_baseline"]["same_text"] else "dense, stored, other text"
        marks.append((name, summary["dense_baseline"]["held_out_bits_per_byte"], "#ccbb44"))
    for name, value, color in marks:
        axes.axhline(value, linestyle="--", color=color, label=f"{name} {value:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(0, 8.2)
    axes.legend()
    figure.savefig(out / "curve.png", dpi=110)
    pyplot.close(figure)

    if load_LE is None or not load_LE.numel():
        (out / "balance.png").unlink(missing_ok=True)       # a former run's would be taken for this one's
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    share_LE = load_LE.double() / load_LE.double().mean(1, keepdim=True).clamp(min=1e-9)
    width = 0.8 / len(share_LE)
    for layer, share_E in enumerate(share_LE.tolist()):
        axes.bar([e + (layer + 0.5) * width - 0.4 for e in range(len(share_E))], share_E, width,
                 label=f"MoE layer {layer + 1}")
    axes.axhline(1.0, linestyle="--", color="#bbbbbb")
    axes.legend()
    axes.set_xlabel("expert")
    axes.set_ylabel("load over the mean")
    figure.savefig(out / "balance.png", dpi=110)
    pyplot.close(figure)
