"""`lina profile` on several ranks: one model for all, the slowest rank's times, the command."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import lina
from lina import cli
from lina.parallel import CostModel, ExpertShape, Settings, settings
from lina.profile import command, exchange, exchanges, layers, register, registered, unregister
from lina.train import launch

from ranks import Run, each_scenario, needs_gpus, torchrun

SIZES = (4096, 16384, 65536)
TINY = ["--dim=16", "--ffn-dim=16", "--experts=4"]      # passes and products that take no time


# ---- on each of two ranks; scenarios of ranks.py ----


@contextlib.contextmanager
def only(operation, prepare, available=exchanges):
    """`prepare` as the transport "fake", and profile's arguments to measure that alone."""
    register(operation, "fake", prepare, available)
    try:
        yield dict(budget_s=1, sizes=SIZES, shapes=[], transports=["fake"])
    finally:
        unregister(operation, "fake")


def one_model(device):
    """Everything that is measured here by default, on small shapes; the same on both ranks."""
    mesh = lina.mesh(ep=2, tokens=7)
    model = lina.profile(mesh, budget_s=1, sizes=SIZES, shapes=[ExpertShape(16, 16, 2)])
    said = [None, None]
    dist.all_gather_object(said, model.as_json())
    assert said[0] == said[1] and CostModel.from_json(said[0]) == model
    assert (model.world, model.ep, model.device) == (2, 2, device.type) and model.notes == ()
    experts = ["experts_fwd", "experts_bwd", "experts_dw"]
    assert [row[0] for row in model.rows()] == \
        ["a2a", "allreduce", *experts, "gemm", "copy", "layer_fwd", "layer_bwd"]
    for op, _, _, line in model.rows():
        assert len(line.points) >= 3 and -1e-12 <= line.r2 <= 1
        assert all(p.low_s <= p.time_s <= p.high_s for p in line.points)
        times = line.whole_s if op.startswith("layer") else [p.low_s for p in line.points]
        assert all(s > 0 for s in times)
    assert settings(mesh) == Settings(tokens=7), "as they were"
    assert model.top_k == 2 and "layers of 2 experts a token" in model.describe()
    replicas = lina.profile(lina.mesh(ep=1), budget_s=1, sizes=SIZES, shapes=[])
    assert list(replicas.links) == [("allreduce", "c10d")] and replicas.ep == 1


def slowest(device):
    """Rank 1 takes 3 ms for everything, rank 0 no time at all."""
    wait_s = 3e-3 * dist.get_rank()
    with only("a2a", lambda ranks, n: lambda: time.sleep(wait_s)) as given:
        model = lina.profile(device=device.type, **given)
    assert all(p.low_s >= 3e-3 for p in model.line("a2a").points)


def refusals(device):
    with pytest.raises(ValueError, match="profile: the ranks' arguments differ; here: "):
        lina.profile(budget_s=1 + dist.get_rank())
    with pytest.raises(ValueError, match="budget_s is -1"):
        lina.profile(budget_s=-1)
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k is {top_k}, must be from 1 to the layer's 4 experts"):
            lina.profile(shapes=[ExpertShape(16, 16, 2)], top_k=top_k)

    def prepare(ranks, n):
        if dist.get_rank() == 1:
            raise RuntimeError("no peer access\nand more")
        return lambda: None

    with only("a2a", prepare) as given:
        assert lina.profile(**given).notes == ("a2a fake: rank 1: RuntimeError: no peer access",)
    with only("a2a", prepare, lambda ranks: False) as given:
        assert lina.profile(**given).notes == ("a2a fake: not available here",)


def transports(device):
    """A transport of lina.parallel's kind: made once, every byte arrives, none goes to its own rank."""
    made = []

    class Transport:
        def __init__(self, group):
            made.append(self)
            self.group = group

        def start(self, label, out, inp, out_splits, in_splits):
            assert in_splits[dist.get_rank()] == 0 and sum(in_splits) == inp.numel() in SIZES
            self.out, self.inp = out, inp
            return dist.all_to_all_single(out, inp, out_splits, in_splits, group=self.group, async_op=True)

    with only("a2a", exchange(Transport)) as given:
        model = lina.profile(**given)
    assert len(made) == 1 and [p.n for p in model.line("a2a").points] == list(SIZES)
    said = [None, None]
    dist.all_gather_object(said, made[0].inp)
    assert torch.equal(made[0].out, said[1 - dist.get_rank()])
    assert ("a2a", "fake") not in registered()


def whole_layers(device):
    """Rank 1 sleeps 4 ms in each layer forward: both ranks say so. A rank that cannot is a note."""
    real = layers.moe

    routed = []

    def late(*args, **options):
        routed.append(args[2])
        time.sleep(4e-3 * dist.get_rank())
        return real(*args, **options)

    given = dict(budget_s=1, sizes=SIZES, shapes=[ExpertShape(16, 16, 2)], device="cpu")
    with mock.patch.object(layers, "moe", late):
        model = lina.profile(**given, top_k=3)             # over all ranks, without a mesh
    assert model.top_k == 3 and {ids.shape[1] for ids in routed} == {3}
    forward, backward = model.layers["c10d"]
    assert all(s >= 4e-3 for s in forward.whole_s) and min(backward.whole_s) < 4e-3 + forward.alpha_s

    def broken(*args, **options):
        if settings(options["mesh"]).degree == (2, 2):
            raise RuntimeError("no room for passes")
        return real(*args, **options)

    with mock.patch.object(layers, "moe", broken):
        model = lina.profile(**given)
    assert model.notes == ("layer c10d: 2 passes of 256 tokens: rank 0: RuntimeError: no room for passes",)
    assert len(model.layers["c10d"][0].points) == 2 and model.layers["c10d"][0].passes == ()


SCENARIOS = ("one_model", "slowest", "refusals", "transports", "whole_layers")


@each_scenario(Run("test_profile_ranks", SCENARIOS, 2))
def test_two_ranks(run: Run, scenario: str) -> None:
    run.check(scenario)


# ---- the command ----


BAD = [(["--ranks", "0"], "--ranks: 0, at least 1"),
       (["--ranks", "4", "--ep", "3"], "--ep: 3, must divide --ranks = 4"),
       (["--ep", "0"], "--ep: 0, must divide --ranks = 2"),
       (["--budget", "0.5"], "--budget: 0.5, at least 1"),
       (["--budget", "nan"], "--budget: nan"),
       (["--transports", "c10d,pigeon"], "--transports: 'pigeon', must be of c10d"),
       (["--dim", "0"], "--dim: 0, at least 1"),
       (["--experts", "3"], "--experts: 3, a multiple of --ep = 2"),
       (["--experts", "2048"], "--experts: 2048, at most 1024"),
       (["--experts", "4", "--top-k", "5"], "--top-k: 5, from 1 to --experts = 4"),
       (["--top-k", "0"], "--top-k: 0, from 1 to --experts = 8"),
       (["--activation", "tanh"], "--activation: invalid choice: 'tanh'"),
       (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
       (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
       (["--rank", "2"], "unrecognized arguments: --rank"),      # no abbreviations
       (["--out", "/no/such/folder/m"], "--out: /no/such/folder/m, cannot be written: No such file"),
       (["--json", "/tmp"], "--json: /tmp, is a folder"),
       (["--png", "/dev/null/x.png"], "--png: /dev/null/x.png, cannot be written")]


@pytest.mark.parametrize("argv,message", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_option_is_one_line_before_any_process(main, monkeypatch, tmp_path, argv, message):
    monkeypatch.setattr(launch.mp, "start_processes", lambda *a, **k: pytest.fail("a process was started"))
    monkeypatch.setenv("LINA_PROFILE", str(tmp_path / "m.json"))
    code, out, err = main("profile", "--device=cpu", *argv)
    assert code == cli.BAD_OPTION and out == "" and list(tmp_path.iterdir()) == []
    assert message in err and err.startswith("lina") and ": error: " in err and err.count("\n") == 1


def test_a_cache_folder_that_cannot_be_made(main, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("LINA_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, err = main("profile", "--device=cpu")
    assert code == cli.BAD_OPTION and "its folder cannot be made: Not a directory" in err


def _check_files(tmp_path, said, world=2):
    model = CostModel.load(tmp_path / "m.json", device="cpu", world=world)
    assert {key for key in model.links} == {("a2a", "c10d"), ("allreduce", "c10d")}
    assert model.experts[0].shape == ExpertShape(16, 16, 4 // world)
    assert model.describe() in said and said.endswith(f"saved       {tmp_path}/m.json\n")
    return model


@pytest.mark.multi
def test_command_writes_what_it_promises(main, monkeypatch, tmp_path):
    monkeypatch.setenv("LINA_PROFILE", str(tmp_path / "m.json"))
    start = time.perf_counter()
    code, out, err = main("profile", "--ranks=2", "--device=cpu", "--budget=1", *TINY,
                           f"--json={tmp_path}/j.json", f"--png={tmp_path}/p.png")
    assert code == 0 and err == "", err
    assert out.startswith("measuring a2a c10d ...\n") and "measuring gemm" in out
    model = _check_files(tmp_path, out)
    assert CostModel.from_json(json.loads((tmp_path / "j.json").read_text())) == model
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert model.seconds < time.perf_counter() - start
    bad = [row for row in model.rows() if row[3].r2 < 0.99 and not row[0].startswith("layer_")]
    assert out.count("warning: ") == len(bad)


@pytest.mark.multi
def test_command_joins_ranks_that_torchrun_started(tmp_path):
    command = [sys.executable, "-m", "lina.cli", "profile", "--device=cpu", "--budget=1", "--quiet", *TINY]
    (out, _), (silent, _) = torchrun([*command, f"--out={tmp_path}/m.json"])
    assert silent == ""
    _check_files(tmp_path, out)


def _breaks(rank, *args):
    if rank == 1:
        raise OSError("the link is down")
    time.sleep(60)


@pytest.mark.multi
def test_a_rank_that_fails_is_one_line(main, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_local_rank", _breaks)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, out, err = main("profile", "--ranks=2", "--device=cpu", f"--out={tmp_path}/m.json")
    (log,) = tmp_path.glob("lina-profile-*.txt")
    assert (code, out) == (cli.FAILED, "")
    assert err == f"lina profile: error: rank 1: OSError: the link is down (traceback in {log})\n"
    assert "Traceback" in log.read_text() and not (tmp_path / "m.json").exists()


# ---- GPUs ----


@pytest.mark.gpu
def test_one_gpu():
    model = lina.profile(device="cuda", budget_s=3, shapes=[ExpertShape(256, 256, 8, "bfloat16")])
    assert [row[0] for row in model.rows()] == ["experts_fwd", "experts_bwd", "experts_dw", "gemm", "copy"]
    assert all(line.alpha_s + line.beta_s > 0 for _, _, _, line in model.rows())
    assert model.copy.beta_s < 1e-10                    # no GPU that lina runs on copies below 10 GB/s
    assert dataclasses.replace(model, notes=()) == model


@pytest.mark.gpu
@pytest.mark.multi
def test_two_gpus(main, tmp_path):
    needs_gpus(2)
    code, out, err = main("profile", "--ranks=2", "--device=cuda", "--budget=12", f"--out={tmp_path}/m.json")
    assert code == 0, err
    model = CostModel.load(tmp_path / "m.json", device="cuda", world=2)
    assert {(op, t) for op in ("a2a", "allreduce") for t in ("c10d", "nccl")} <= set(model.links), out
    assert ("a2a", "p2p") in model.links, out
    for line in model.links.values():
        assert len(line.points) == 6 and line.beta_s < 1e-9, out     # 1 GB/s: any link between GPUs
    assert set(model.layers) == {"c10d", "nccl", "p2p"} and model.seconds < 20, out
    for lines in model.layers.values():
        assert all(len(line.points) >= 2 and line.alpha_s < 0.02 for line in lines), out
