"""`lina train`: what it writes, keeps and refuses, and what its last lines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lina import cli, tracefile
from lina.train import checkpoint, data, folders, launch, options, report, trainer

from ranks import environment

# As test_train.TINY; three steps are all warm-up, so that there is no speed to measure.
TINY = ["--dim=16", "--layers=2", "--heads=2", "--ffn-dim=16", "--experts=4", "--seq=32", "--batch=4",
        "--heldout-kib=2", "--steps=3", "--device=cpu", "--quiet"]


# ---- whole runs ----


@pytest.mark.multi
def test_last_line_json_and_balance_without_its_loss(main, tmp_path, text):
    out = tmp_path / "out"
    code, said, err = main("train", *TINY, "--data", text, "--out", str(out), "--json", str(out / "r.json"),
                           "--balance-coef=0", "--sample=0")
    assert code == 0 and err == ""
    result = json.loads((out / "r.json").read_text())
    assert result == json.loads((out / "summary.json").read_text())
    assert said.splitlines()[-1] == f"held-out {result['held_out_bits_per_byte']:.3f} bits per byte"
    assert result["tokens_per_s"] is None and "n/a tokens/s" in said
    assert result["sample"] == "def "                                   # the prompt alone
    assert len(result["expert_load_max_over_mean"]) == 1 and 1 <= result["expert_load_max_over_mean"][0] <= 4
    (spans, *_), _ = tracefile.read(out / "step.json").values()
    assert "gradient norm" in {span.name for span in spans if span.track == "allreduce"}


@pytest.mark.multi
def test_dense_twice_into_one_folder(main, tmp_path, text):
    """No load and so no picture of it; the first checkpoint stays beside the second."""
    argv = [*TINY, "--dense", "--data", text, "--out", str(tmp_path), "--ranks=1", "--sample=0"]
    (tmp_path / "balance.png").write_bytes(b"a former run's")
    code, said, _ = main("train", *argv)
    assert code == 0 and not (tmp_path / "balance.png").exists() and "balance.png" not in said
    assert "balance     n/a" in said
    stored = json.loads((tmp_path / "dense.json").read_text())
    for word in ("lina train --dense", "--dim 16", "--steps 3", "--ranks 1", f"--data {text}"):
        assert word in stored["command"]
    assert "--experts" in stored["command"] and "--out" not in stored["command"]
    first = checkpoint.manifest(tmp_path / "checkpoint")
    code, said, _ = main("train", *argv)
    assert code == 0
    assert said.startswith(f"a former run's checkpoint was moved to {tmp_path}/checkpoint.old\n")
    assert checkpoint.manifest(tmp_path / "checkpoint.old") == first
    assert checkpoint.manifest(tmp_path / "checkpoint")["shards"] != first["shards"]


@pytest.mark.multi
def test_joins_torchrun(tmp_path, text):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "lina.cli", "train", *TINY, "--sample=4", "--data", text, "--out", str(tmp_path / "out")]
    run = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("held-out ") == 1 and run.stdout.endswith(" bits per byte\n")
    assert len(checkpoint.manifest(tmp_path / "out" / "checkpoint")["shards"]) == 2


def _leaves_badly(rank, *args):
    """Rank 1 aborts as soon as its work is done; rank 0 is slow to report."""
    from lina.train import loop

    real_run, real_tell = loop.run, launch._tell

    def run(*args):
        result = real_run(*args)
        if rank == 1:
            dist.barrier = os.abort
        return result

    def tell(*args):
        time.sleep(1)
        real_tell(*args)

    loop.run, launch._tell = run, tell
    launch._local_rank(rank, *args)


@pytest.mark.multi
def test_a_rank_that_aborts_after_its_work_loses_nothing(main, monkeypatch, tmp_path, text):
    monkeypatch.setattr(launch, "_local_rank", _leaves_badly)
    code, said, _ = main("train", *TINY, "--data", text, "--out", str(tmp_path / "out"), "--sample=0")
    assert code == 0 and said.splitlines()[-1].startswith("held-out ")
    assert (tmp_path / "out" / "summary.json").is_file()


def _refuses(rank, *args):
    raise options.OptionError("--data: gone, cannot be read")


@pytest.mark.multi
def test_an_option_error_of_a_rank_is_its_text_alone(main, monkeypatch, tmp_path, text):
    monkeypatch.setattr(launch, "_local_rank", _refuses)
    code, _, err = main("train", *TINY, "--data", text, "--out", str(tmp_path / "out"), "--ranks=1")
    assert (code, err) == (cli.BAD_OPTION, "lina train: error: --data: gone, cannot be read\n")


# ---- folders ----


def _options(folder, **given):
    return options.Options(out=str(folder), checkpoint=str(folder / "checkpoint"), **given)


def _former(folder, step=7):
    """A former run's checkpoint, as far as names go."""
    shard = f"step-{step:08d}-0123abcd.rank0.pt"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / shard).write_text("weights")
    saved = dict(format=1, step=step, text_digest=0, options={}, shards=[shard])
    (folder / "manifest.json").write_text(json.dumps(saved))


def test_a_save_deletes_only_what_saves_wrote(alone, tmp_path):
    others = ["step-notes.pt", "step-1.rank0.pt", ".draft.partial", "step-00000001-0123abcd.rank0.pt.bak"]
    stale = ["step-00000001-0123abcd.rank0.pt", ".step-00000001-0123abcd.rank3.pt.partial",
             ".manifest.json.partial"]
    for name in others + stale:
        (tmp_path / name).write_text(name)
    checkpoint.save(options.Options(checkpoint=str(tmp_path)), 2, 7, {"value": 2})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "manifest.json", *checkpoint.manifest(tmp_path)["shards"]}


def test_two_runs_on_one_folder(tmp_path):
    o = _options(tmp_path)
    with folders.prepared(o):
        with pytest.raises(options.OptionError, match=r"--checkpoint: .*, another lina train is running"):
            with folders.prepared(o):
                pass
    with folders.prepared(o):       # the first has ended
        pass


def test_former_checkpoint_is_moved_aside_unless_resumed(tmp_path, capsys):
    now, old = tmp_path / "checkpoint", tmp_path / "checkpoint.old"
    _former(now, 7)
    with folders.prepared(_options(tmp_path, resume=str(now))):
        assert checkpoint.manifest(now)["step"] == 7 and capsys.readouterr().out == ""
    for step in (7, 8):                                     # the second replaces the first
        with folders.prepared(_options(tmp_path)):
            assert checkpoint.manifest(old)["step"] == step and not (now / "manifest.json").exists()
            with pytest.raises(options.OptionError, match="another lina train is running"):
                with folders.prepared(_options(tmp_path)):
                    pass
        assert capsys.readouterr().out == f"a former run's checkpoint was moved to {old}\n"
        if step == 7:
            (now / ".lock").unlink()
            now.rmdir()
            _former(now, 8)
    (now / ".lock").unlink()
    now.rmdir()
    _former(now, 9)
    with pytest.raises(options.OptionError, match=r"--resume: .*\.old, is where the checkpoint in"):
        with folders.prepared(_options(tmp_path, resume=str(old))):
            pass
    (old / "mine.txt").write_text("not lina's")
    with pytest.raises(options.OptionError, match=r"mine\.txt is not of lina train; pass another --out"):
        with folders.prepared(_options(tmp_path)):
            pass
    assert checkpoint.manifest(now)["step"] == 9 and checkpoint.manifest(old)["step"] == 8


def test_interrupted_names_only_this_run_s_checkpoint(capsys, monkeypatch, tmp_path, text):
    def interrupted(o, started):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_launch", interrupted)
    where = tmp_path / "a place" / "checkpoint"
    _former(where)
    argv = ["train", *TINY, "--data", text, "--out", str(where.parent)]
    assert cli.main(argv) == cli.INTERRUPTED
    assert capsys.readouterr().err == "\nlina train: interrupted; no checkpoint yet\n"
    monkeypatch.setattr(launch, "_launch", lambda o, started: (_former(where / "x"), interrupted(o, started)))
    assert cli.main([*argv, "--checkpoint", str(where / "x")]) == cli.INTERRUPTED
    assert f"step 7 with: lina train --resume '{where}/x' --out '{where.parent}' --checkpoint" in \
        capsys.readouterr().err


@pytest.mark.parametrize("name", ["out", "checkpoint"])
def test_folders_that_cannot_be_made(capsys, monkeypatch, tmp_path, text, name):
    monkeypatch.setattr(launch.mp, "start_processes", lambda *a, **k: pytest.fail("a process was started"))
    where = Path(text) / "below a file"
    assert cli.main(["train", *TINY, "--data", text, "--out", str(tmp_path), f"--{name}", str(where)]) == 2
    err = capsys.readouterr().err
    assert f"--{name}: {where}, cannot be written to: Not a directory" in err and err.count("\n") == 1


# ---- text ----


def test_a_folder_of_text_without_what_the_run_writes(tmp_path):
    for name in ("a.txt", "b.txt", "run/summary.json", "run/checkpoint.old/x", "deep/ckpt/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name * 100)
    o = options.Options(data=str(tmp_path), out=str(tmp_path / "run"), checkpoint=str(tmp_path / "deep/ckpt"),
                        seq=8)
    found = data.load(o)
    assert bytes(found.train.tolist()) + bytes(found.heldout.tolist()) == b"a.txt" * 100 + b"b.txt" * 100
    o.out = str(tmp_path)
    with pytest.raises(options.OptionError, match=r"--out: .*, is the folder of --data"):
        data.load(o)


def test_a_copy_of_a_file_is_not_held_out(tmp_path):
    for name, content in (("a.txt", b"one" * 100), ("b.txt", b"two" * 100), ("c.txt", b"one" * 100)):
        (tmp_path / name).write_bytes(content)
    found = data.load(options.Options(data=str(tmp_path), seq=8))
    assert bytes(found.train.tolist()) == b"one" * 100 and bytes(found.heldout.tolist()) == b"two" * 100


# ---- the baseline and the load ----


def test_stored_baseline_is_that_of_the_defaults():
    """Whoever changes a default runs `lina train --dense` again and copies its dense.json."""
    given = dict(device="cpu", precision="float32")
    digest = json.loads((Path(report.__file__).parent / "dense.json").read_text())["text_digest"]
    stored = report.stored_baseline(options.Options(**given), digest)
    assert 1 < stored["held_out_bits_per_byte"] < 3 and stored["command"] == "lina train --dense"
    assert stored["date"] and stored["machine"] and stored["same_text"]
    assert not report.stored_baseline(options.Options(**given), digest + 1)["same_text"]
    for change in (dict(dim=64), dict(data="other.txt"), dict(stop=10), dict(steps=10), dict(seed=1),
                   dict(precision="bf16"), dict(clip=2.0), dict(lr=1e-3), dict(batch=8)):
        assert report.stored_baseline(options.Options(**{**given, **change}), digest) is None, change
    assert report.stored_baseline(options.Options(**given, stop=900), digest)      # the last step anyway


def test_load_without_the_loss_is_that_with_it(alone, text):
    """Seen before the first step, whose gradients differ."""
    loads = []
    for coef in (0.0, 0.5):
        o = options.Options(dim=16, layers=2, heads=2, ffn_dim=16, experts=4, seq=32, batch=4, ranks=1, ep=1,
                            precision="float32", data=text, balance_coef=coef)
        t = trainer.Trainer(o, torch.device("cpu"))
        t.train_step()
        t.heldout_bits()                # held-out text is no part of it
        loads.append(t.balance())
    assert torch.equal(*loads) and loads[0].sum() == 4 * 32 * 2
