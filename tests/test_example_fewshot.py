"""The few-shot example on made-up questions and a tiny encoder with random weights."""

import json
import random

import pytest
from example_modules import imported

KEYS = {"NUM": "many", "HUM": "who", "LOC": "where"}
FILLERS = [f"w{i}" for i in range(20)]
TINY = "--sizes 6 30 --seeds 2 --epochs 12 --lr 0.01 --head-lr 0.05 --batch 8 --threads 1 --dtype fp32"
TUNING = "--tune --epochs 1 --lrs 0.01 1e-6 --lams 0.5 --temperatures 0.1 0.2"

pytest.importorskip("transformers", reason="the example needs the extra [demo]")
pytest.importorskip("tqdm", reason="the example needs the extra [demo]")


class _Untouchable(list):
    def __iter__(self):
        raise AssertionError("this part must not be looked at")


def test_a_run_learns_and_tuning_does_not_look_at_the_test_part(encoder, tmp_path, monkeypatch, capsys):
    """Of a seed both losses see the same: without its contrastive part the joint one is cross-entropy."""
    order, lines = random.Random(0), []
    for number in range(90):
        label = sorted(KEYS)[number % 3]
        words = [KEYS[label], f"w{number % 20}", *order.choices(FILLERS, k=4), FILLERS[number // 20]]
        lines.append(f"{label}\t{' '.join(words)} ?\n")
    questions = tmp_path / "questions.tsv"
    questions.write_text("".join(lines), encoding="utf-8")
    files = ["--data", str(questions), "--encoder", str(encoder), "--out", str(tmp_path)]
    with imported("fewshot", "data model training experiment report options train") as fewshot:
        assert fewshot.train.main([*TINY.split(), *files, "--lam", "0"]) == 0
        results = json.loads((tmp_path / "metrics.json").read_text())["results"]
        assert [(r["labelled"], r["seed"], r["loss"]) for r in results] == [
            (size, seed, loss) for size in (6, 30) for seed in (1, 2) for loss in ("CE", "CE + SupCon")
        ]
        assert [r["accuracy"] for r in results[::2]] == [r["accuracy"] for r in results[1::2]]
        assert all(r["accuracy"] > 0.6 for r in results if r["labelled"] == 30)
        assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
        assert (tmp_path / "embeddings.png").read_bytes().startswith(b"\x89PNG")

        split = fewshot.data.split

        def guarded(*arguments):
            parts = split(*arguments)
            return parts._replace(test=_Untouchable(parts.test))

        monkeypatch.setattr(fewshot.experiment, "split", guarded)
        assert fewshot.train.main([*TINY.split(), *files, *TUNING.split()]) == 0
        assert (tmp_path / "tuning.md").read_text().count("\n") == 6
