"""The distillation of the translation example on a corpus of a few hundred synthetic pairs."""

import json

import pytest
import torch
from example_modules import imported

TINY = "--seeds 3 --steps 4 --d-model 16 --heads 2 --layers 1 --vocab-size 60 --batch-tokens 128 --beam 1"
TINY += " --max-length 64 --held-out 0.2 --bleu-sentences 3 --threads 1 --dtype fp32"

for name in ("sentencepiece", "sacrebleu", "tqdm"):
    pytest.importorskip(name, reason="the example needs the extra [demo]")
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


@pytest.fixture
def example():
    with imported(
        "distill", "train experiment frame data model optimizer options checkpoint evaluate trainer student"
    ) as modules:
        yield modules


def test_it_trains_teachers_and_students_of_either_width(example, corpus, tmp_path, capsys):
    options = example.train.parse_arguments([*TINY.split(), "--data", str(corpus), "--out", str(tmp_path)])
    example.train.compare(options)
    runs = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    names = [f"{loss}, {width} wide" for width in (16, 8) for loss in ("CE", "mixed CE", "KD")]
    assert [run["settings"]["loss"] for run in runs] == ["teacher (CE), 16 wide", *names]
    assert len({json.dumps(run["measured"]) for run in runs}) == 7
    for run in runs:
        distilled, seed = run["settings"]["loss"].startswith("KD"), run["settings"]["config"]["seed"]
        assert bool(run["settings"]["distillation"]) is distilled
        if distilled:
            teacher = run["settings"]["teacher"]
            assert teacher["d_model"] == 16 and teacher["seed"] == example.train.TEACHER_SEED + seed
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[3:9]] == [f"| {name}" for name in names]
    assert "KD - CE, 8 wide" in table


def test_a_students_loss_is_the_share_of_the_divergence_and_the_rest_of_cross_entropy(example, corpus):
    options = example.train.parse_arguments([*TINY.split(), "--data", str(corpus)])
    experiment = example.experiment.Experiment(options)
    configs = []
    for width in (16, 8):
        options.loss, options.gamma, options.d_model, options.seed = "ce", 0.0, width, width
        configs.append(example.options.make_config(options, experiment.fingerprint))
    teacher = example.train.Trainer(configs[0], experiment.train, experiment.vocabulary, None).model
    shared = (configs[1], experiment.train, experiment.vocabulary, None)
    student = example.train.Student(*shared, teacher=teacher, soft=0.3, temperature=2.0)
    batch = next(iter(student.sampler))
    student.loss(batch).backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    keep = batch.target_out != example.data.PAD
    rows = [m.logits(m(batch.source, batch.target_in))[keep].double() for m in (student.model, teacher)]
    log_p, log_y = ((x / 2).log_softmax(-1) for x in rows)
    divergence = 4 * (log_y.exp() * (log_y - log_p)).sum(-1).mean()
    dense = 0.3 * divergence + 0.7 * torch.nn.functional.cross_entropy(rows[0], batch.target_out[keep])
    torch.testing.assert_close(student.loss(batch).double(), dense, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--soft 0", "--soft must be above 0, got 0.0"),
        ("--d-model 12", "half of --d-model 12 must be a multiple of twice --heads 2"),
        ("--temperature 0", "must be above 0, got 0"),
    ],
)
def test_wrong_options(example, wrong, message, capsys):
    with pytest.raises(SystemExit):
        example.train.parse_arguments([*TINY.split(), *wrong.split()])
    assert message in capsys.readouterr().err
