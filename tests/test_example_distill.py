"""The distillation of the translation example on a corpus of a few hundred synthetic pairs."""

import json

import pytest
from example_modules import imported

TINY = "--seeds 1 --steps 4 --d-model 16 --heads 2 --layers 1 --vocab-size 60 --batch-tokens 128 --beam 1"
TINY += " --max-length 64 --held-out 0.2 --bleu-sentences 3 --threads 1 --dtype fp32"

for name in ("sentencepiece", "sacrebleu", "tqdm"):
    pytest.importorskip(name, reason="the example needs the extra [demo]")
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


def test_it_trains_teachers_and_students_of_either_width(corpus, tmp_path, capsys):
    with imported(
        "distill", "train experiment frame data model optimizer options checkpoint evaluate trainer student"
    ) as example:
        options = example.train.parse_arguments([*TINY.split(), "--data", str(corpus), "--out", str(tmp_path)])
        example.train.compare(options)
    runs = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    names = [f"{loss}, {width} wide" for width in (16, 8) for loss in ("CE", "mixed CE", "KD")]
    assert {run["settings"]["loss"] for run in runs} == {"teacher (CE), 16 wide", *names}
    assert len({json.dumps(run["measured"]) for run in runs}) == len(runs) == 7
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and all(f"| {name} |" in table for name in names)
