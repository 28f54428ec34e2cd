"""The translation example on a corpus of a few hundred synthetic pairs."""

import json
import math
import os
import random
import signal

import pytest
import torch
from example_modules import imported

import fusedloss as fl

TINY = (
    "--steps 12 --evaluate-every 4 --d-model 16 --heads 2 --layers 1 --vocab-size 60 --batch-tokens 128 --dropout 0.1"
)
TINY += " --max-length 64 --held-out 0.2 --bleu-sentences 5 --beam 2 --samples 1 --compare-updates 0 --threads 1"

pytest.importorskip("sentencepiece", reason="the example needs the extra [demo]")
pytest.importorskip("sacrebleu", reason="the example needs the extra [demo]")
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


@pytest.fixture(scope="module")
def nmt():
    with imported("nmt", "data model optimizer options checkpoint evaluate trainer compare train") as modules:
        yield modules


def test_the_split_goes_by_file(nmt):
    pairs = [nmt.data.Pair(f"source {i % 290}", f"target {i}", f"file {i // 10}") for i in range(300)]
    for seed in (10, 1):  # of the first, a file is held out of which another repeats the sources
        train, held = nmt.data.split_by_file(pairs, 0.2, seed)
        assert not {p.file for p in train} & {p.file for p in held}
        assert not {p.source for p in train} & {p.source for p in held}
        assert 40 <= len(held) <= 60 and len(train) == 240
    assert (train, held) == nmt.data.split_by_file(pairs, 0.2, seed=1)
    assert held != nmt.data.split_by_file(pairs, 0.2, seed=2)[1]


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


def test_a_checkpoint_of_another_run_is_refused(nmt, corpus, tmp_path):
    assert _run(nmt, corpus, tmp_path) == 0
    with pytest.raises(nmt.checkpoint.CheckpointError, match="loss is 'mixed' there and 'focal' here; --fresh"):
        _run(nmt, corpus, tmp_path, "--loss", "focal")
    other = tmp_path / "other.tsv"
    other.write_text(corpus.read_text(encoding="utf-8") + "seven\tsieben\n", encoding="utf-8")
    with pytest.raises(nmt.checkpoint.CheckpointError, match="corpus is"):
        _run(nmt, other, tmp_path)


@pytest.mark.parametrize("loss", ["ce", "focal", "dsc"])
def test_every_loss_trains(nmt, corpus, tmp_path, loss):
    assert _run(nmt, corpus, tmp_path, "--loss", loss) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["curves"][-1]["held_out_loss"] < metrics["curves"][0]["held_out_loss"]
    assert all(point["alpha"] == 0 for point in metrics["curves"])


def test_the_eager_loss_is_the_fused_one(nmt):
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 50, requires_grad=True)
    target = torch.randint(1, 50, (3, 7))
    target[1, 4:] = nmt.data.PAD
    eager = nmt.compare.eager_mixed_cross_entropy(logits, target, 0.3, 0.1, nmt.data.PAD)
    fused = fl.mixed_cross_entropy(logits, target, alpha=0.3, label_smoothing=0.1, ignore_index=nmt.data.PAD)
    torch.testing.assert_close(eager, fused)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (eager, fused)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_bleu_by_hand(nmt):
    """Every n-gram is in the reference, which is half as long again."""
    assert nmt.evaluate.bleu(["a b c d"], ["a b c d e f"]) == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_the_output_layer_is_tied_to_the_embedding(nmt):
    model = nmt.model.Transformer(nmt.model.Size(30, 16, 2, 2, 0.0, 20), nmt.data.PAD)
    assert model.output_weight is model.embedding.weight


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
