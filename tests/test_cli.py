"""The console script: bad options, failing ranks, Ctrl-C, doctor, trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lina
from lina import cli, doctor, tracing
from lina.train import checkpoint, launch

from ranks import environment, spawned

TINY = ["--dim=16", "--layers=2", "--heads=2", "--ffn-dim=16", "--experts=4", "--seq=32", "--batch=4",
        "--heldout-kib=2", "--sample=8", "--device=cpu", "--quiet"]

BAD = [(["--dim", "0"], "--dim: 0, at least 2"),
       (["--dim", "30"], "--dim: 30, a multiple of 2 x --heads"),
       (["--dim", "many"], "--dim: invalid int value: 'many'"),
       (["--top-k", "9"], "--top-k: 9, at most 8"),
       (["--experts", "2000"], "--experts: 2000, at most 1024"),
       (["--layers", "1"], "--layers: 1, at least 2"),
       (["--ep", "3"], "--ranks: 2, a multiple of --ep = 3"),
       (["--ranks", "0"], "--ranks: 0, at least 1"),
       (["--ranks", "3", "--ep", "3"], "--experts: 8, a multiple of --ep = 3"),
       (["--batch", "3"], "--batch: 3, a multiple of --ranks = 2"),
       (["--lr", "nan"], "--lr: nan"),
       (["--lr", "-1"], "--lr: -1.0"),
       (["--precision", "int8"], "--precision: invalid choice: 'int8'"),
       (["--precision", "fp16"], "--precision: fp16, needs --device cuda"),
       (["--save-every", "0"], "--save-every: 0, from 1 to"),
       (["--data", "/no/such/text"], "--data: /no/such/text, no such file"),
       (["--resume", "/no/such/checkpoint"], "--resume: /no/such/checkpoint, no checkpoint there"),
       (["--json", "/no/such/folder/x.json"], "--json: /no/such/folder/x.json, its folder does not exist"),
       (["--json", "/tmp"], "--json: /tmp, is a folder"),
       (["--data", "/dev/null"], "--data: /dev/null, neither a file nor a folder"),
       (["--wide"], "--wide"),
       (["--step", "3"], "--step")]             # no abbreviations: a typo is not another option


@pytest.mark.parametrize("argv,message", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_option_is_one_line_before_any_process(main, monkeypatch, tmp_path, argv, message):
    monkeypatch.setattr(launch.mp, "start_processes", lambda *a, **k: pytest.fail("a process was started"))
    monkeypatch.chdir(tmp_path)
    code, out, err = main("train", "--device", "cpu", *argv)
    assert code == cli.BAD_OPTION and out == ""
    assert message in err and err.startswith("lina") and ": error: " in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_a_gpu(main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = main("train", "--device", "cuda")
    assert code == cli.BAD_OPTION and "--device: cuda, but torch finds no GPU" in err


def test_version_and_help(main):
    assert main("--version") == (0, f"lina {lina.__version__}\n", "")
    code, out, _ = main("--help")
    assert code == 0 and all(command in out for command in ("train", "doctor", "trace"))
    code, out, _ = main("train", "--help")
    assert code == 0 and "--top-k" in out and "(default: 2)" in out
    code, _, err = main()
    assert code == cli.BAD_OPTION and err.count("\n") == 1


def _start(tmp_path, *more, wait_for=None):
    """`lina train` for far more steps than it will be let do, in a process group of its own.

    Returns once there is a checkpoint, or `wait_for(run)` is true.
    """
    command = [sys.executable, "-m", "lina.cli", "train", *TINY, "--steps", "100000", "--save-every", "1",
               "--out", str(tmp_path / "out"), *more]
    run = subprocess.Popen(command, env=environment(), cwd=tmp_path, text=True,
                           start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (wait_for(run) if wait_for else (tmp_path / "out/checkpoint/manifest.json").is_file()):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.05)
    return run


def _gone(pids):
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{p}").exists() for p in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{p}").exists() for p in pids)


@pytest.mark.multi
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_rank_ends_the_launch_with_one_error(tmp_path):
    run = _start(tmp_path)
    ranks = spawned(run)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode == cli.FAILED and _gone(ranks)
    errors = [line for line in err.splitlines() if line.startswith("lina train: error: ")]
    assert len(errors) == 1 and "rank" in errors[0], err
    assert "Traceback" not in err
    folder = tmp_path / "out" / "checkpoint"            # killed at any moment: it loads
    for shard in checkpoint.manifest(folder)["shards"]:
        assert "model" in torch.load(folder / shard, weights_only=True)


@pytest.mark.multi
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_ends_cleanly_and_names_the_checkpoint(tmp_path):
    run = _start(tmp_path)
    ranks = spawned(run)
    os.killpg(run.pid, signal.SIGINT)                   # as a terminal does: everyone gets it
    _, err = run.communicate(timeout=60)
    assert run.returncode == cli.INTERRUPTED and _gone(ranks)
    assert "interrupted; go on from step" in err and "Traceback" not in err, err
    assert checkpoint.manifest(tmp_path / "out" / "checkpoint")["step"] >= 1


@pytest.mark.multi
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_launcher_killed_at_once_leaves_no_rank(tmp_path):
    """Before the ranks have asked the system to be told of it."""
    run = _start(tmp_path, wait_for=lambda run: len(spawned(run)) == 2)
    ranks = spawned(run)
    run.kill()
    run.wait()
    assert _gone(ranks)
    run.communicate()


@pytest.mark.multi
def test_an_error_in_a_rank_is_one_line(main, tmp_path):
    """A learning rate that no loss survives."""
    code, _, err = main("train", *TINY, "--steps", "40", "--lr", "1e30", "--clip", "1e30",
                        "--out", str(tmp_path / "out"))
    assert code == cli.FAILED
    assert "gradient's norm nan; try a smaller --lr" in err and err.strip().count("\n") == 0
    assert "Traceback" in (tmp_path / "out" / "error.txt").read_text()


def test_doctor(main, tmp_path):
    code, out, err = main("doctor", "--json", str(tmp_path / "d.json"))
    assert code == 0 and err == ""
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["torch"] == torch.__version__ and found["lina"] == lina.__version__
    assert found["backends"]["gloo"] and found["cpu"]["threads"] >= 1
    for name in ("combine_bwd", "combine_fwd", "experts_bwd", "experts_fwd", "gate_bwd", "gate_fwd", "sort"):
        assert found["operators"][name]["cpu"]
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert all(word in out for word in ("lina ", "torch ", "path ", "transport   c10d: works here"))
    bad = str(tmp_path / "none" / "d.json")
    code, again, err = main("doctor", "--json", bad)
    assert code == cli.BAD_OPTION and again == out
    assert err == f"lina doctor: error: --json: {bad}, cannot be written: No such file or directory\n"


GPU = {"name": "X", "capability": "9.0", "memory_gib": 1.0, "sms": 1}
HAS = dict(torch_cuda="13.0", cuda_kernels_built=True, driver="580.65.06", gpus=[GPU],
           links=[], backends={"gloo": True, "nccl": True}, nccl="2.28.9", priority_off=None)
PAIR = [{"from": 0, "to": 1, "peer_access": True, "nvlinks": 18}]


@pytest.mark.parametrize("change,line", [
    ({}, "cuda:0: lina's kernels, its sm_90a code"),
    ({"gpus": [{**GPU, "capability": "8.6"}]}, "cuda:0: lina's kernels, its sm_80 code"),
    ({"gpus": [{**GPU, "capability": "12.0"}]}, "sm_80 code compiled by the driver"),
    ({"gpus": [{**GPU, "capability": "7.5"}]}, "too old, compute capability 7.5, 8.0 needed"),
    ({"driver": "570.1"}, "driver 570.1 is older than 580"),
    ({"driver": None}, "its sm_90a code"),                              # unknown is not old
    ({"cuda_kernels_built": False}, "built without CUDA"),
    ({"gpus": [], "torch_cuda": None}, "CUDA tensors: none, torch is a CPU build"),
    ({"links": [{"from": 0, "to": 1, "peer_access": False, "nvlinks": 0}]},
     "no peer access between GPUs 0-1"),
    ({}, "give way to all-to-alls on the device"),
    ({"priority_off": "CUDA_DEVICE_MAX_CONNECTIONS=1"}, "give way to nothing, CUDA_DEVICE_MAX_CONNECTIONS=1"),
])
def test_doctor_says_which_path_and_why(change, line):
    cpu = {"level": "x86-64-v3 (AVX2)", "threads": 2}
    assert line in "\n".join(doctor._paths({**HAS, "cpu": cpu, **change}))


@pytest.mark.parametrize("change,nccl,p2p", [
    ({"gpus": [GPU, GPU], "links": PAIR}, None, None),
    ({}, None, "a single GPU"),
    ({"gpus": [GPU, GPU], "links": [{**PAIR[0], "peer_access": False}]}, None,
     "no peer access between GPUs 0-1"),
    ({"nccl": "2.17.1"}, "NCCL 2.17.1 is older than 2.18", "a single GPU"),
    ({"nccl": None}, "torch has no NCCL", "a single GPU"),
    ({"cuda_kernels_built": False}, "lina is built without CUDA", "lina is built without CUDA"),
    ({"gpus": []}, "no GPU", "no GPU"),
])
def test_doctor_says_which_transports_work(change, nccl, p2p):
    assert doctor._transports({**HAS, **change}) == {"c10d": None, "nccl": nccl, "p2p": p2p}


def test_trace_command(main, tmp_path):
    path = tmp_path / "step.json"
    with tracing.trace(path):
        with tracing.span("a2a", "dispatch"):
            time.sleep(0.01)
    code, out, err = main("trace", str(path), "--json", str(tmp_path / "t.json"))
    assert code == 0 and err == ""
    assert all(word in out for word in ("compute ", "a2a ", "allreduce ", "waiting ", "hidden "))
    assert (tmp_path / "step.json.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "t.json").read_text())["waiting"] > 0
    code, _, err = main("trace", str(tmp_path / "none.json"))
    assert code == cli.BAD_OPTION and "none.json" in err and err.count("\n") == 1
