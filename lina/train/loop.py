"""A whole run on one rank: steps, checkpoints, measurements, and the report at its end."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lina import tracing

from . import data, report
from .checkpoint import replace
from .model import parameter_counts
from .options import Options
from .trainer import Trainer

TRACED = 20             # steps of a run whose a2a and allreduce are timed
WARM_UP = 3             # steps before the first traced one and before the clock of tokens/s


def run(o: Options, device: torch.device, started: float) -> Callable[[], dict[str, Any]] | None:
    """Trains as `o` says and writes ``o.out``. Rank 0 gets what draws the pictures and returns the
    summary, which needs no other rank; the others get None.

    Needs the default process group; every rank of it calls. `started` is the
    launch's ``time.time()``.
    """
    trainer = Trainer(o, device)
    if o.resume is not None:
        trainer.resume()
    log = _Log(Path(o.out) / "metrics.jsonl", trainer) if trainer.rank == 0 else None
    steps = _Steps(trainer, log)
    steps.run()
    bits = trainer.heldout_bits()
    text = trainer.sample()
    a2a, allreduce, waiting = trainer.mean(*steps.shares())
    if log is None:
        return None
    log.close()
    return lambda: _summary(steps, bits, text, (a2a, allreduce, waiting), started)


def _summary(steps: _Steps, bits: float, text: str, shares: tuple[float, float, float],
             started: float) -> dict[str, Any]:
    trainer, o = steps.trainer, steps.trainer.o
    a2a, allreduce, waiting = shares
    total, active = parameter_counts(trainer.net, o)
    summary = {
        "held_out_bits_per_byte": bits, "tokens_per_s": steps.tokens_per_s, "a2a_share": a2a,
        "allreduce_share": allreduce, "waiting_share": waiting, "traced_steps": steps.traced,
        "steps": trainer.step, "ranks": trainer.world, "ep": o.ep,
        "schedule": o.schedule, "plan": str(trainer.model.plan).splitlines() if trainer.model.plan else None,
        "device": report.device_name(trainer.device), "precision": o.precision, "dense": o.dense,
        "unigram_bits_per_byte": data.unigram_bits(trainer.corpus.train, trainer.corpus.heldout),
        "dense_baseline": None if o.dense else report.stored_baseline(o, trainer.corpus.digest),
        "parameters": total, "active_parameters": active,
        "expert_load_max_over_mean": report.imbalance(steps.load), "seconds": time.time() - started,
        "train_bytes": len(trainer.corpus.train), "held_out_bytes": len(trainer.corpus.heldout),
        "text": trainer.corpus.source, "text_digest": trainer.corpus.digest, "sample": text,
    }
    report.pictures(Path(o.out), summary, steps.load)
    return summary


class _Steps:
    """Runs the training steps and keeps what is to be reported of them."""

    def __init__(self, trainer: Trainer, log: _Log | None) -> None:
        self.trainer, self.log = trainer, log
        self.first, self.last = trainer.step, trainer.o.stop or trainer.o.steps
        self.tokens_per_s: float | None = None      # None: no step after the warm-up yet
        self.busy = [0.0, 0.0, 0.0, 0.0]        # traced seconds: a2a, allreduce, waiting, all
        self.traced = 0
        self.load: Any = None                   # [L, E] choices of the run's second half
        self._clocked, self._clock = 0, 0.0     # steps and seconds of tokens_per_s
        self._losses: list[Tensor] = []

    def run(self) -> None:
        trainer, o = self.trainer, self.trainer.o
        tqdm.set_lock(threading.RLock())        # its own is shared by processes, and must be given back
        bar = tqdm(total=self.last, initial=self.first, unit="step", dynamic_ncols=True,
                   disable=o.quiet or trainer.rank != 0)
        while trainer.step < self.last:
            start, warm = time.perf_counter(), trainer.step - self.first >= WARM_UP
            loss, norm = self._traced_step() if self._trace_now() else trainer.train_step()
            self._losses.append(loss)
            saves = trainer.step % (o.save_every or 1) == 0 or trainer.step == self.last
            logs = trainer.step % max(1, o.steps // 100) == 0 or saves
            if logs or not warm:
                _finish(trainer.device)         # on CUDA the steps since the last line have only now run
            if warm:
                self._clock += time.perf_counter() - start
                self._clocked += 1
            if logs:
                bar.set_postfix_str(self._line(norm), refresh=False)
            bar.update(1)
            if saves:                           # after _line, which stops a run gone wrong
                trainer.save()
        bar.close()

    def shares(self) -> list[float]:
        """This rank's a2a, allreduce and waiting time over the traced steps' time."""
        return [seconds / self.busy[3] if self.traced else 0.0 for seconds in self.busy[:3]]

    def _trace_now(self) -> bool:
        done, steps = self.trainer.step - self.first, self.last - self.first
        return done % max(1, steps // TRACED) == 0 and (done >= WARM_UP or steps <= WARM_UP)

    def _traced_step(self) -> tuple[Tensor, Tensor]:
        """Each one replaces step.json, which so shows a step late in the run."""
        trainer = self.trainer
        path = Path(trainer.o.out) / "step.json"
        with tracing.trace(path, model=trainer.net, device=trainer.device) as recorder:
            result = trainer.train_step()
        totals = recorder.totals()
        now = (totals["a2a"], totals["allreduce"], recorder.waiting(), recorder.seconds())
        self.busy = [a + b for a, b in zip(self.busy, now, strict=True)]
        self.traced += 1
        return result

    def _line(self, norm: Tensor) -> str:
        """The progress bar's text; the same into metrics.jsonl. A collective."""
        trainer, o = self.trainer, self.trainer.o
        load_LE = trainer.balance()
        fresh = self.load is None or trainer.step <= (self.first + self.last) // 2
        self.load = load_LE if fresh else self.load + load_LE
        loss, norm_value = trainer.mean(torch.stack(self._losses).mean(), norm)
        self._losses.clear()
        if not math.isfinite(loss) or (o.precision != "fp16" and not math.isfinite(norm_value)):
            raise RuntimeError(f"step {trainer.step}: the loss is {loss}, the gradient's norm {norm_value}; "
                               "try a smaller --lr")
        self.tokens_per_s = self._clocked * o.batch * o.seq / self._clock if self._clocked else None
        bits = loss / math.log(2)
        if self.log is not None:
            self.log.write(step=trainer.step, bits_per_byte=bits, tokens_per_s=self.tokens_per_s,
                           lr=trainer.lr(trainer.step - 1), grad_norm=norm_value,
                           expert_load_max_over_mean=report.imbalance(load_LE))
        return f"loss {bits:.3f} bits/byte, {report.speed(self.tokens_per_s)}"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Log:
    """metrics.jsonl. A resumed run keeps the lines up to its first step."""

    def __init__(self, path: Path, trainer: Trainer) -> None:
        old = ""
        if trainer.step and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            old = "".join(line + "\n" for line in lines if json.loads(line)["step"] <= trainer.step)
        replace(path, lambda file: file.write(old.encode()))
        self.file = open(path, "a", encoding="utf-8")      # noqa: SIM115, closed by close()

    def write(self, **row: Any) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
