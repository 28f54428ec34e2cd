"""The translation example on a corpus of a few hundred synthetic pairs."""

import json
import os
import signal

import pytest
import torch
from example_modules import imported

TINY = (
    "--steps 12 --evaluate-every 4 --d-model 16 --heads 2 --layers 1 --vocab-size 60 --batch-tokens 128 --dropout 0.1"
)
TINY += " --max-length 64 --held-out 0.2 --bleu-sentences 5 --beam 2 --samples 1 --compare-updates 0 --threads 1"

SAME = ("curves", "bleu", "target_tokens")

pytest.importorskip("sentencepiece", reason="the example needs the extra [demo]")
pytest.importorskip("sacrebleu", reason="the example needs the extra [demo]")
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


@pytest.fixture
def nmt():
    with imported("nmt", "data model optimizer options checkpoint evaluate trainer compare train") as modules:
        yield modules


def test_it_trains_and_a_resumed_run_is_the_uninterrupted_one(nmt, corpus, tmp_path, monkeypatch, capsys):
    def run(name: str, *more: str) -> int:
        return nmt.train.main([*TINY.split(), "--data", str(corpus), "--out", str(tmp_path / name), *more])

    assert run("whole") == 0
    update = nmt.trainer.Trainer.update

    def interrupted(trainer):
        if trainer.step == 6:  # between two points of the curves, in the second half of the schedule
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(nmt.trainer.Trainer, "update", interrupted)
        assert run("parts") == 128 + signal.SIGTERM
    assert not (tmp_path / "parts" / "metrics.json").exists()
    assert run("parts") == 0
    out, error = capsys.readouterr()
    assert "going on from update 7 of 12" in out and error == ""  # no bar where the output is no terminal
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    plain, again = whole.pop("baseline"), parts.pop("baseline")
    assert all(ours[name] == theirs[name] for ours, theirs in ((whole, parts), (plain, again)) for name in SAME)
    assert run("alone", "--loss", "ce") == 0
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert "baseline" not in alone and all(alone[name] == plain[name] for name in SAME)
    assert plain["curves"][0] == whole["curves"][0] and plain["curves"][-1] != whole["curves"][-1]  # one warm-up
    assert [point["alpha"] for point in whole["curves"]] == [0.0, 0.5 * 7 / 12, 0.5 * 11 / 12]
    assert whole["curves"][-1]["held_out_loss"] < whole["curves"][0]["held_out_loss"]
    models = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "parts")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    with pytest.raises(nmt.checkpoint.CheckpointError, match="loss is 'mixed' there and 'focal' here; --fresh"):
        run("whole", "--loss", "focal")
