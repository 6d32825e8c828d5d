"""`lina train`: a tiny run over two ranks and all it leaves, resuming, checkpoints, text."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections import Counter

import pytest
import torch

import lina
from lina import tracefile
from lina.train import checkpoint, data, launch, model, options, trainer
from lina.train.resolve import resolve

# Smallest that has everything: a dense and an MoE block, two experts a rank, several windows.
TINY = dict(dim=16, layers=2, heads=2, ffn_dim=16, experts=4, seq=32, batch=4, steps=6, save_every=3,
            heldout_kib=2, sample=8, ranks=2, device="cpu", quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """Three of six steps on two ranks, as the command line would ask for them."""
    folder = tmp_path_factory.mktemp("run")
    given = dict(TINY, data=text, stop=3, out=str(folder / "out"), json=str(folder / "result.json"))
    launch.launch(resolve(given))
    return folder


def _weights(folder):
    found = checkpoint.manifest(folder)
    return found, [torch.load(folder / shard, weights_only=True) for shard in found["shards"]]


@pytest.mark.multi
def test_run_writes_what_it_promises(run):
    result = json.loads((run / "result.json").read_text())
    assert {"held_out_bits_per_byte", "tokens_per_s", "a2a_share", "allreduce_share", "steps", "ranks",
            "device"} <= result.keys()
    assert (result["steps"], result["ranks"], result["ep"]) == (3, 2, 2)
    assert result["device"].startswith("cpu")
    assert 0 < result["held_out_bits_per_byte"] < 16
    assert 0 < result["a2a_share"] < 1 and 0 < result["allreduce_share"] < 1
    assert len(result["expert_load_max_over_mean"]) == 1 and 1 <= result["expert_load_max_over_mean"][0] <= 4
    for name in ("curve.png", "balance.png"):
        assert (run / "out" / name).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (run / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


@pytest.mark.multi
def test_trace_of_a_step_has_both_ranks_and_all_tracks(run):
    ranks = tracefile.read(run / "out" / "step.json")
    assert list(ranks) == [0, 1]
    for spans, (start, stop), _ in ranks.values():
        assert {span.track for span in spans} == {"compute", "a2a", "allreduce"}
        assert all(start <= span.start <= span.stop <= stop for span in spans)
    summary = tracefile.summary(ranks)
    assert 0 < summary["waiting"] <= summary["share"]["a2a"] + summary["share"]["allreduce"]
    assert summary["a2a_hidden"] < 0.01         # the plain schedule waits for every a2a


@pytest.mark.multi
def test_resume_is_bit_for_bit(run, text, tmp_path):
    """3 + 3 steps against 6: every weight, moment and random state of both ranks."""
    shutil.copytree(run / "out", tmp_path / "out")
    given = dict(quiet=True, sample=8, data=text, resume=str(tmp_path / "out" / "checkpoint"),
                 out=str(tmp_path / "out"))
    launch.launch(resolve(given))
    launch.launch(resolve(dict(TINY, data=text, out=str(tmp_path / "whole"))))
    (resumed, a), (whole, b) = (_weights(tmp_path / name / "checkpoint") for name in ("out", "whole"))
    assert resumed["step"] == whole["step"] == 6
    for rank in range(2):
        assert a[rank]["model"].keys() == b[rank]["model"].keys()
        for name, weight in a[rank]["model"].items():
            assert torch.equal(weight, b[rank]["model"][name]), name
        for i, state in a[rank]["optimizer"]["state"].items():
            assert all(torch.equal(v, b[rank]["optimizer"]["state"][i][k]) for k, v in state.items())
        assert torch.equal(a[rank]["rng"]["cpu"], b[rank]["rng"]["cpu"])
    experts = "blocks.1.ffn.experts.w_up"
    assert not torch.equal(a[0]["model"][experts], a[1]["model"][experts])      # each rank saved its own
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]


@pytest.mark.gpu
@pytest.mark.multi
@pytest.mark.parametrize("precision", options.PRECISIONS)
def test_run_on_a_gpu(text, tmp_path, precision):
    given = dict(TINY, ranks=1, device="cuda", precision=precision, data=text, out=str(tmp_path / "out"),
                 json=str(tmp_path / "result.json"))
    launch.launch(resolve(given))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["device"].startswith("cuda") and result["precision"] == precision
    assert 0 < result["held_out_bits_per_byte"] < 16
    (spans, (start, stop), _), = tracefile.read(tmp_path / "out" / "step.json").values()
    assert {"forward", "backward", "optimizer"} <= {span.name for span in spans if span.track == "compute"}
    assert all(start <= span.start <= span.stop <= stop for span in spans)


@pytest.mark.multi
def test_other_layout_or_text_is_refused(run, text, tmp_path):
    saved = dict(data=text, resume=str(run / "out" / "checkpoint"), out=str(tmp_path))
    for change, match in ((dict(ranks=1), r"--ranks: 1, but the checkpoint .* written with 2"),
                          (dict(ep=1), r"--ep: 1, but the checkpoint .* written with 2"),
                          (dict(dim=32), r"--dim: 32, but the checkpoint .* written with 16"),
                          (dict(stop=3), r"--stop: 3, but .* has done 3 already")):
        with pytest.raises(options.OptionError, match=match):
            resolve({**saved, **change})
    longer = tmp_path / "text.txt"
    longer.write_text("other text " * 1000)
    shutil.copytree(run / "out" / "checkpoint", tmp_path / "checkpoint")
    manifest = tmp_path / "checkpoint" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(text, str(longer)))
    with pytest.raises(options.OptionError, match="was trained on another text than"):
        resolve(dict(resume=str(tmp_path / "checkpoint"), out=str(tmp_path)))


class Killed(BaseException):
    """Stands for a kill: nothing after it runs, but for what the system has already done."""


def test_kill_at_any_point_of_a_save_keeps_a_whole_checkpoint(alone, tmp_path, monkeypatch):
    o = options.Options(checkpoint=str(tmp_path))
    checkpoint.save(o, 1, 7, {"value": 1})
    calls = {"left": 0}

    def failing(real):
        def call(*args, **options):
            if calls["left"] == 0:
                raise Killed
            calls["left"] -= 1
            return real(*args, **options)
        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    monkeypatch.setattr(checkpoint.Path, "unlink", failing(checkpoint.Path.unlink))
    steps_seen = []
    for point in range(100):
        calls["left"] = point
        try:
            checkpoint.save(o, 2 + point, 7, {"value": 2 + point})
            done = True
        except Killed:
            done = False
        calls["left"] = 10**9
        step, state = checkpoint.load(tmp_path)
        assert state["value"] == step
        steps_seen.append(step - point)
        if done:
            break
    assert done and steps_seen[-1] == 2             # the save that was not killed counts
    assert steps_seen[0] == 1                       # the first, killed at once, does not
    assert len(list(tmp_path.iterdir())) == 2       # nothing of the killed ones is left


def test_manifest_errors(tmp_path):
    with pytest.raises(OSError, match="no checkpoint there"):
        checkpoint.manifest(tmp_path)
    for content in ("", "[]", "{}", '{"format": 99}', '{"format": 1}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="not a checkpoint of lina train"):
            checkpoint.manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(
        '{"format": 1, "step": 1, "text_digest": 0, "options": {}, "shards": ["gone.pt"]}')
    with pytest.raises(OSError, match=r"shard gone\.pt is missing"):
        checkpoint.manifest(tmp_path)


def _options(**given):
    return options.Options(**{**TINY, "ranks": 1, "ep": 1, "precision": "float32", **given})


def test_heldout_bits_are_those_of_a_plain_loop(alone, text):
    """Windows, padding and masks against one window at a time."""
    t = trainer.Trainer(_options(data=text), torch.device("cpu"))
    bits, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(t.corpus.heldout) - 1, 32):
            piece = t.corpus.heldout[start : start + 33].long()
            logp = t.net.eval()(piece[None, :-1])[0].double().log_softmax(-1)
            bits -= logp.gather(1, piece[1:, None]).sum().item() / math.log(2)
            count += len(piece) - 1
    assert count == len(t.corpus.heldout) - 1
    # Logits of a few hundred float32 terms: about 1e-5 relative, averaged over 2048 bytes.
    assert t.heldout_bits() == pytest.approx(bits / count, rel=1e-5)


def test_a_few_steps_learn_and_a_seed_repeats(alone, text):
    def losses():
        t = trainer.Trainer(_options(data=text, steps=30, lr=1e-2), torch.device("cpu"))
        return [t.train_step()[0].item() for _ in range(30)]

    first = losses()
    assert first == losses()
    assert first[-1] < first[0] - 1.0       # from 8 bits to the text's few letters


def test_active_parameters_are_those_of_the_dense_baseline():
    mixture, dense = (model.Transformer(_options(dense=dense)) for dense in (False, True))
    total, active = model.parameter_counts(mixture, _options())
    router = sum(p.numel() for n, p in mixture.named_parameters() if "router" in n)
    assert total == sum(p.numel() for p in mixture.parameters())
    assert active - router == sum(p.numel() for p in dense.parameters())
    assert not any(isinstance(m, lina.MoE) for m in dense.modules())


def test_model_is_causal():
    net = model.Transformer(_options()).eval()
    byte_1S = torch.arange(32)[None]
    changed = byte_1S.clone()
    changed[0, 20:] = 99
    with torch.no_grad():
        a, b = net(byte_1S), net(changed)
    # A token's sums may be split otherwise when its neighbours go to other experts, so not bit for bit.
    assert (a - b)[:, :20].abs().max() < 1e-5 < 1e-2 < (a - b)[:, 20:].abs().amax(-1).min()


def test_default_text_is_split_by_whole_files():
    corpus = data.load(options.Options())
    assert len(corpus.train) > 10 * len(corpus.heldout) > 1e5
    again = data.load(options.Options())
    assert corpus.digest == again.digest and torch.equal(corpus.train, again.train)
    train = bytes(corpus.train.tolist())
    for start in range(0, len(corpus.heldout) - 4096, 20011):      # no long passage is in both
        assert bytes(corpus.heldout[start : start + 400].tolist()) not in train


def test_folder_and_file(tmp_path):
    for name in ("a.txt", "b.md", "sub/c.txt", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name * 100)
    (tmp_path / "picture.bin").write_bytes(b"\0" * 5000)
    both = data.load(_options(data=str(tmp_path)))
    assert all(zlib.crc32(name) % data.HELD_OUT_OF for name in (b"a.txt", b"b.md", b"sub/c.txt"))
    assert bytes(both.heldout.tolist()) == b"sub/c.txt" * 100           # no checksum chose one: the last
    assert len(both.train) + len(both.heldout) <= 100 * len("a.txtb.mdsub/c.txt") + 2
    one = data.load(_options(data=str(tmp_path / "sub" / "c.txt")))
    assert len(one.heldout) == 90 and len(one.train) == 810         # the last tenth
    with pytest.raises(options.OptionError, match="no such file or folder"):
        data.load(_options(data=str(tmp_path / "none")))
    with pytest.raises(options.OptionError, match=r"90 bytes of held-out text, at least 91 needed"):
        data.load(_options(data=str(tmp_path / "sub" / "c.txt"), seq=90))


@pytest.mark.parametrize("length,seq,ranks", [(33, 32, 1), (34, 32, 1), (100, 8, 2), (9, 8, 3)])
def test_windows_target_each_byte_once(length, seq, ranks):
    text = torch.arange(length).to(torch.uint8)
    byte_WS1, counts_WS = data.windows(text, seq, ranks)
    assert len(byte_WS1) % ranks == 0
    assert byte_WS1[:, 1:][counts_WS].tolist() == list(range(1, length))
    assert byte_WS1[:, :-1][counts_WS].tolist() == list(range(length - 1))


def test_batches_do_not_depend_on_the_ranks():
    text = torch.randint(256, (1000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = data.batch(text, _options(), 5, 0)
    halves = [data.batch(text, _options(ranks=2), 5, rank) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(halves)) and whole.shape == (4, 33)
    assert not torch.equal(whole, data.batch(text, _options(), 6, 0))


def test_unigram_is_the_entropy_of_the_counts():
    train, heldout = b"aab" * 50, b"xabba"
    count = Counter(train)
    want = -sum(math.log2((count[c] + 1) / (len(train) + 256)) for c in heldout[1:]) / 4
    tensors = [torch.tensor(list(t), dtype=torch.uint8) for t in (train, heldout)]
    assert data.unigram_bits(*tensors) == pytest.approx(want, rel=1e-12)
