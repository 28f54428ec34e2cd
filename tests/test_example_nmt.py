"""The translation example on a corpus of a few hundred synthetic pairs."""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedloss as fl

FOLDER = Path(__file__).parents[1] / "examples" / "nmt"
MODULES = ("data", "model", "optimizer", "options", "checkpoint", "evaluate", "trainer", "compare", "train")
TINY = (
    "--steps 12 --evaluate-every 4 --d-model 16 --heads 2 --layers 1 --vocab-size 60 --batch-tokens 128 --dropout 0.1"
)
TINY += " --max-length 64 --held-out 0.2 --bleu-sentences 5 --beam 2 --samples 1 --compare-updates 0 --threads 1"

pytest.importorskip("sentencepiece", reason="the example needs the extra [demo]")
pytest.importorskip("sacrebleu", reason="the example needs the extra [demo]")
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


@pytest.fixture(scope="module")
def nmt():
    """The example's modules. They import each other by bare names, which are taken back afterwards."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")  # as train.py would
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    torch.set_num_threads(threads)
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a b\tc d\nno tab here\n", "line 2: expected source TAB target, found 0 tabs: 'no tab here'"),
        (b"a\tb\n\na\tb\tc\n", "line 3: expected source TAB target, found 2 tabs"),
        (b"a\tb\n \tb\n", "line 2: the source is empty"),
        (b"a\tb\na\t\n", "line 2: the target is empty"),
        (b"a\tb\n\t\n", "line 2: the source and the target are empty"),
        (b"a\tb\nc\tgr\xfcn\n", "line 2: not UTF-8 (byte 0xfc at 4)"),
        (b"", "holds no pairs"),
        (b"\n\n", "holds no pairs"),
    ],
)
def test_a_bad_file_is_refused_by_line(nmt, tmp_path, content, message):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(nmt.data.DataError) as caught:
        nmt.data.read_tsv(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_or_a_folder_is_refused(nmt, tmp_path):
    for path in (tmp_path / "none.tsv", tmp_path):
        with pytest.raises(nmt.data.DataError, match="cannot read"):
            nmt.data.read_tsv(path)


def test_a_file_from_another_system_is_read(nmt, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffone  house\tein Haus\r\n\r\ntwo\u2028three\tzwei drei".encode())
    assert [(p.source, p.target) for p in nmt.data.read_tsv(path)] == [
        ("one house", "ein Haus"),
        ("two three", "zwei drei"),
    ]


def test_the_split_goes_by_file(nmt):
    pairs = [nmt.data.Pair(f"source {i % 290}", f"target {i}", f"file {i // 10}") for i in range(300)]
    train, held = nmt.data.split_by_file(pairs, 0.2, seed=1)
    assert not {p.file for p in train} & {p.file for p in held}
    assert not {p.source for p in train} & {p.source for p in held}
    assert 40 <= len(held) <= 60 and len(train) == 240
    assert (train, held) == nmt.data.split_by_file(pairs, 0.2, seed=1)
    assert held != nmt.data.split_by_file(pairs, 0.2, seed=2)[1]
    with pytest.raises(nmt.data.DataError, match="leave nothing to hold out"):
        nmt.data.split_by_file(pairs[:10], 0.2, seed=1)


def _write_help(root: Path) -> None:
    page = '<h1 id="t">{}</h1><p id="a" class="x">{}</p><p id="same">Basic code</p><p id="only{}">A lone text</p>'
    for language, texts in (
        ("en-US", ("Open a file", "Press <b>Enter</b> &amp; wait")),
        ("de", ("Eine Datei öffnen", "Die <i>Eingabetaste</i> drücken &amp; warten")),
    ):
        folder = root / "usr/share/libreoffice/help" / language / "text" / "swriter"
        folder.mkdir(parents=True)
        (folder / "a.html").write_text(page.format(*texts, language), encoding="utf-8")
    (root / "usr/share/libreoffice/help/en-US/text/swriter/untranslated.html").write_text(page, encoding="utf-8")


def test_paragraphs_are_paired_by_id(nmt, tmp_path):
    _write_help(tmp_path)
    pairs = nmt.data._help_pairs(tmp_path / nmt.data.HELP)
    assert pairs == [
        ("Open a file", "Eine Datei öffnen", "swriter/a.html"),
        ("Press Enter & wait", "Die Eingabetaste drücken & warten", "swriter/a.html"),
    ]


def test_a_fetch_that_fails_leaves_nothing_behind(nmt, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nmt.data, "HELP", Path("nowhere"))  # not even where this system has the help installed
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(nmt.data.DataError, match=r"apt-get install libreoffice-help-en-us .* or .* --data pairs.tsv"):
        nmt.data.load_pairs(None)
    assert list((tmp_path / "fusedloss").iterdir()) == []


def test_an_epoch_is_every_example_once_in_batches_within_the_bound(nmt):
    order = random.Random(0)
    examples = [nmt.data.Example([9] * order.randint(1, 40), [i + 4] * order.randint(1, 40)) for i in range(300)]
    sampler = nmt.data.TrainingBatches(examples, 100, seed=1)
    seen: list[int] = []
    for batch in sampler:
        assert max(batch.source.numel(), batch.target_out.numel()) <= 100
        follows = batch.target_in[:, 1:]
        assert torch.equal(follows, batch.target_out[:, :-1] * (follows != nmt.data.PAD))
        seen += (batch.target_out[:, 0] - 4).tolist()
        if len(seen) == len(examples):
            break
    assert sorted(seen) == list(range(300))

    stream = iter(sampler)
    position = sampler.epoch, sampler.index
    expected = [next(stream) for _ in range(70)]  # into the epoch after the next
    again = nmt.data.TrainingBatches(examples, 100, seed=1)
    again.epoch, again.index = position
    for batch, other in zip(expected, again, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def _run(nmt, corpus, out, *more: str) -> int:
    return nmt.train.main([*TINY.split(), "--data", str(corpus), "--out", str(out), *more])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_is_the_uninterrupted_one(nmt, corpus, tmp_path, monkeypatch, capsys, number):
    assert _run(nmt, corpus, tmp_path / "whole") == 0

    update = nmt.trainer.Trainer.update

    def interrupted(trainer):
        if trainer.step == 6:  # between two points of the curves, in the second half of the schedule
            os.kill(os.getpid(), number)
        return update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(nmt.trainer.Trainer, "update", interrupted)
        assert _run(nmt, corpus, tmp_path / "parts") == 128 + number
    assert "stopped after update 7" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "metrics.json").exists()
    assert _run(nmt, corpus, tmp_path / "parts") == 0
    assert "going on from update 7 of 12" in capsys.readouterr().out

    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert whole["curves"] == parts["curves"] and whole["bleu"] == parts["bleu"]
    assert [point["step"] for point in whole["curves"]] == [4, 8, 12]
    assert [point["alpha"] for point in whole["curves"]] == [0.0, 0.5 * 7 / 12, 0.5 * 11 / 12]
    assert whole["target_tokens"] == parts["target_tokens"]
    models = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "parts")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_the_curve_of_alpha_has_every_update(nmt, tmp_path, monkeypatch):
    """Alpha jumps where the warm-up ends: a line from point to point would be a ramp that never was."""
    pyplot, figures = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(pyplot, "close", figures.append)
    config = SimpleNamespace(loss="mixed", ce_warmup=0.5, steps=12)
    point = {"step": 4, "train_loss": 1.0, "held_out_loss": 1.0, "accuracy": 0.5}
    curves = [point, {**point, "step": 8}, {**point, "step": 12}]
    nmt.train.draw_curves(SimpleNamespace(config=config, curves=curves, step=12), tmp_path / "curves.png")
    (line,) = (line for line in figures[0].axes[1].lines if line.get_label() == "alpha")
    assert list(line.get_ydata()) == [0] * 6 + [0.5 * update / 12 for update in range(6, 12)]


def test_a_finished_run_is_measured_again(nmt, corpus, tmp_path, capsys):
    assert _run(nmt, corpus, tmp_path) == 0
    first = capsys.readouterr().out
    assert _run(nmt, corpus, tmp_path) == 0
    second = capsys.readouterr().out
    assert "is finished" in second and "--fresh" in second and "update     4" not in second
    assert next(line for line in first.splitlines() if line.startswith("BLEU")).split(",")[0] in second
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert _run(nmt, corpus, tmp_path, "--fresh") == 0
    assert "update     4" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_refused(nmt, corpus, tmp_path):
    assert _run(nmt, corpus, tmp_path) == 0
    with pytest.raises(nmt.checkpoint.CheckpointError, match="loss is 'mixed' there and 'focal' here; --fresh"):
        _run(nmt, corpus, tmp_path, "--loss", "focal")
    other = tmp_path / "other.tsv"
    other.write_text(corpus.read_text(encoding="utf-8") + "seven\tsieben\n", encoding="utf-8")
    with pytest.raises(nmt.checkpoint.CheckpointError, match="corpus is"):
        _run(nmt, other, tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(nmt.checkpoint.CheckpointError, match="cannot be read"):
        _run(nmt, corpus, tmp_path)


@pytest.mark.parametrize("loss", ["ce", "focal", "dsc"])
def test_every_loss_trains(nmt, corpus, tmp_path, loss):
    assert _run(nmt, corpus, tmp_path, "--loss", loss) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["curves"][-1]["held_out_loss"] < metrics["curves"][0]["held_out_loss"]
    assert all(point["alpha"] == 0 for point in metrics["curves"])


def test_a_vocabulary_too_large_for_the_corpus_is_refused(nmt, corpus, tmp_path):
    with pytest.raises(nmt.data.DataError, match="no BPE of --vocab-size 5000"):
        _run(nmt, corpus, tmp_path, "--vocab-size", "5000")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_eager_loss_is_the_fused_one(nmt, dtype):
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 50, dtype=dtype, requires_grad=True)
    target = torch.randint(1, 50, (3, 7))
    target[1, 4:] = nmt.data.PAD
    eager = nmt.compare.eager_mixed_cross_entropy(logits, target, 0.3, 0.1, nmt.data.PAD)
    fused = fl.mixed_cross_entropy(logits, target, alpha=0.3, label_smoothing=0.1, ignore_index=nmt.data.PAD)
    torch.testing.assert_close(eager, fused, check_dtype=False, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (eager, fused)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_decoding_with_the_past_is_decoding_without(nmt):
    torch.manual_seed(0)
    model = nmt.model.Transformer(nmt.model.Size(30, 16, 2, 2, 0.0, 20), nmt.data.PAD).eval()
    source = torch.randint(4, 30, (5, 8))
    source[3, 6:] = nmt.data.PAD
    with torch.no_grad():
        for row, target in zip(source, nmt.evaluate.beam_search(model, source, beam=1), strict=True):
            written = [nmt.data.BOS]
            row = row[row != nmt.data.PAD][None]
            while len(written) <= model.size.max_length:
                logits = model.logits(model(row, torch.tensor([written])))[0, -1]
                logits[[nmt.data.PAD, nmt.data.BOS]] = -torch.inf
                written.append(int(logits.argmax()))
                if written[-1] == nmt.data.EOS:
                    break
            assert target == [piece for piece in written[1:] if piece != nmt.data.EOS]


def test_a_wider_beam_finds_the_better_target(nmt):
    torch.manual_seed(0)
    model = nmt.model.Transformer(nmt.model.Size(12, 16, 1, 2, 0.0, 8), nmt.data.PAD).eval()
    source = torch.randint(4, 12, (20, 5))

    @torch.no_grad()
    def score(row, target):
        pieces = torch.tensor([*target, nmt.data.EOS][: model.size.max_length])
        inputs = torch.cat((torch.tensor([nmt.data.BOS]), pieces[:-1]))
        log_prob = model.logits(model(row[None], inputs[None]))[0].log_softmax(-1)
        return log_prob[torch.arange(len(pieces)), pieces].mean()

    greedy, wide = (nmt.evaluate.beam_search(model, source, beam) for beam in (1, 8))
    scores = torch.tensor([[score(row, a), score(row, b)] for row, a, b in zip(source, greedy, wide, strict=True)])
    assert scores[:, 1].mean() > scores[:, 0].mean()


@pytest.mark.slow
def test_the_comparison_measures_both_sides(nmt, corpus, tmp_path, capsys):
    assert _run(nmt, corpus, tmp_path, "--compare-updates", "10") == 0
    comparison = json.loads((tmp_path / "metrics.json").read_text())["comparison"]
    fused, eager = comparison["fused"], comparison["eager"]
    assert fused["final_loss"] == pytest.approx(eager["final_loss"], rel=0.02)
    for figures in (fused, eager):
        assert figures["tokens_per_second"] > 0 and figures["loss_ms"] > 0
        assert figures["peak_mib"] > figures["peak_above_start_mib"] >= 0
    assert "fused against eager" in capsys.readouterr().out
