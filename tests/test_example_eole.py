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


@pytest.fixture
def train():
    with imported("eole", "train data model optimizer evaluate") as modules:
        yield modules.train


def test_the_fused_losses_train_as_those_of_eole_and_of_plain_pytorch(train, corpus, tmp_path, monkeypatch, capsys):
    arguments = [*TINY.split(), "--data", str(corpus), "--out", str(tmp_path)]
    train.write_corpus(train.parse_arguments(arguments))
    told = {}
    for run in train.RUNS:
        answers = io.StringIO()
        monkeypatch.setattr("sys.stdin", io.StringIO("go\n" * 4))
        train.train(train.parse_arguments([*arguments, "--run", run]), answers)
        told[run] = [json.loads(line) for line in answers.getvalue().splitlines()]
        assert [sorted(x) for x in told[run]] == [
            ["start_mib"],
            *[["peak_mib", "start_mib", "tokens_per_second"]] * 2,
            ["accuracy", "bleu", "loss"],
        ]
    ends = {run: answers[-1] for run, answers in told.items()}
    for own, fused in (train.RUNS[:2], train.RUNS[2:]):
        assert ends[fused] == pytest.approx(ends[own], rel=1e-4)
    assert ends[train.RUNS[0]]["loss"] != pytest.approx(ends[train.RUNS[2]]["loss"], rel=1e-4)
    results = {run: {**answers[2], **answers[-1]} for run, answers in told.items()}
    assert [line.split(" | ")[0] for line in train.as_table(results).splitlines()[2:]] == [f"| {x}" for x in train.RUNS]


def test_rounds_must_divide_the_updates(train, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--updates", "10", "--rounds", "3"])
    assert "--updates 10 must be a multiple of --rounds 3" in capsys.readouterr().err
