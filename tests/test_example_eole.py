"""The example that trains by Eole, on a corpus of a few hundred synthetic pairs."""

import io
import json
import warnings

import pytest
from example_modules import imported

for name in ("sentencepiece", "sacrebleu"):
    pytest.importorskip(name, reason="the example needs the extra [demo]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels for GPUs that are not there
    pytest.importorskip("eole.train_single", reason="the example needs Eole, `make demo-eole`", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

TINY = "--updates 4 --rounds 2 --vocab-size 60 --d-model 16 --batch-tokens 64 --bleu-sentences 4 --threads 1"


def test_the_fused_losses_train_as_those_of_eole_and_of_plain_pytorch(corpus, tmp_path, monkeypatch):
    arguments, told = [*TINY.split(), "--data", str(corpus), "--out", str(tmp_path)], {}
    with imported("eole", "train data model optimizer evaluate") as modules:
        train = modules.train
        train.write_corpus(train.parse_arguments(arguments))
        for run in train.RUNS:
            answers = io.StringIO()
            monkeypatch.setattr("sys.stdin", io.StringIO("go\n" * 4))
            train.train(train.parse_arguments([*arguments, "--run", run]), answers)
            told[run] = [json.loads(line) for line in answers.getvalue().splitlines()]
    ends = [told[run][-1] for run in train.RUNS]
    assert ends[1] == pytest.approx(ends[0], rel=1e-4) and ends[3] == pytest.approx(ends[2], rel=1e-4)
    assert ends[0]["loss"] != pytest.approx(ends[2]["loss"], rel=1e-4)
    table = train.as_table({run: {**answers[2], **answers[-1]} for run, answers in told.items()})
    assert all(f"| {run} |" in table for run in train.RUNS)
