"""The few-shot example on made-up questions and a tiny encoder with random weights."""

import json
import random
from collections import Counter

import pytest
import torch
from example_modules import imported

KEYS = {"NUM": "many", "HUM": "who", "LOC": "where"}
FILLERS = [f"w{i}" for i in range(20)]
TINY = "--sizes 6 30 --seeds 2 --epochs 16 --lr 0.01 --head-lr 0.05 --batch 8 --threads 1 --dtype fp32"

pytest.importorskip("transformers", reason="the example needs the extra [demo]")
pytest.importorskip("tqdm", reason="the example needs the extra [demo]")


@pytest.fixture(scope="module")
def fewshot():
    with imported("fewshot", "data model training experiment report options train") as modules:
        yield modules


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """90 questions in three classes, of which a word tells the class, and one that is repeated."""
    order = random.Random(0)
    lines = []
    for number in range(90):
        label = sorted(KEYS)[number % 3]
        words = [KEYS[label], f"w{number % 20}", *order.choices(FILLERS, k=4), FILLERS[number // 20]]
        lines.append(f"{label}\t{' '.join(words)} ?\n")
    path = tmp_path_factory.mktemp("questions") / "questions.tsv"
    path.write_text("".join([*lines, lines[7].replace("w", "W")]), encoding="utf-8")
    return path


@pytest.fixture
def run(fewshot, questions, encoder, tmp_path):
    def run(*more: str) -> dict:
        arguments = [*TINY.split(), "--data", str(questions), "--encoder", str(encoder), "--out", str(tmp_path), *more]
        assert fewshot.train.main(arguments) == 0
        return json.loads((tmp_path / "metrics.json").read_text()) if "--tune" not in more else {}

    return run


def test_a_question_counts_once_and_has_one_label(fewshot, tmp_path):
    enough = "".join(f"{label}\t{label} {i}\n" for label in "ab" for i in range(4))
    path = tmp_path / "questions.tsv"
    path.write_text(f"{enough}a\tA  3 ?\nb\t???\nb\t!!\nb\t???\n", encoding="utf-8")
    found, repeated = fewshot.data.load_questions(path)
    assert [question.text for question in found] == [*(f"{x} {i}" for x in "ab" for i in range(4)), "???", "!!"]
    assert repeated == 2
    path.write_text(f"{enough}b\tA 1?\n", encoding="utf-8")
    with pytest.raises(fewshot.data.DataError, match=r"line 9: the label is 'b', but 'a' in line 2: 'A 1\?'"):
        fewshot.data.load_questions(path)


def _made_up(fewshot, **counts: int) -> list:
    return [fewshot.data.Question(f"{label} {i}", label) for label, n in counts.items() for i in range(n)]


def test_the_parts_are_disjoint_and_hold_every_class(fewshot):
    questions = _made_up(fewshot, a=100, b=50, c=4)
    parts = fewshot.data.split(questions, 0.2, 0.1)
    assert sorted([*parts.pool, *parts.validation, *parts.test]) == sorted(questions)
    counts = [Counter(question.label for question in part) for part in parts]
    assert counts == [{"a": 70, "b": 35, "c": 2}, {"a": 10, "b": 5, "c": 1}, {"a": 20, "b": 10, "c": 1}]
    assert parts == fewshot.data.split(questions, 0.2, 0.1)


def test_padding_changes_nothing(fewshot, encoder):
    model = fewshot.model.Classifier(fewshot.model.load_encoder(encoder)[0], 3, bf16=False).eval()
    rows = [[3, 7, 8, 2], [4, 9, 10, 11, 12, 13, 14, 15, 16, 2], [5, 2]]
    together = model(rows)
    for i, row in enumerate(rows):
        for one, whole in zip(model([row]), together, strict=True):
            torch.testing.assert_close(one[0], whole[i])


def test_a_run_learns_and_writes_its_table_and_plot(run, tmp_path, capsys):
    metrics = run()
    results = metrics["results"]
    assert [(r["labelled"], r["seed"], r["loss"]) for r in results] == [
        (size, seed, loss) for size in (6, 30) for seed in (1, 2) for loss in ("CE", "CE + SupCon")
    ]
    assert all(r["accuracy"] > 0.6 for r in results if r["labelled"] == 30)
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "embeddings.png").read_bytes().startswith(b"\x89PNG")
    assert run()["results"] == results


def test_both_losses_see_the_same_head_batches_and_dropout(run):
    """So that the joint loss without its contrastive part is cross-entropy, to the last question."""
    results = run("--lam", "0", "--epochs", "2")["results"]
    assert [r["accuracy"] for r in results[::2]] == [r["accuracy"] for r in results[1::2]]


class _Untouchable(list):
    def __iter__(self):
        raise AssertionError("this part must not be looked at")


@pytest.mark.parametrize(("more", "untouchable"), [((), "validation"), (("--tune",), "test")])
def test_settings_are_chosen_without_the_test_part(fewshot, run, tmp_path, monkeypatch, capsys, more, untouchable):
    split = fewshot.data.split

    def guarded(*arguments):
        parts = split(*arguments)
        return parts._replace(**{untouchable: _Untouchable(getattr(parts, untouchable))})

    monkeypatch.setattr(fewshot.experiment, "split", guarded)
    run(*more, "--epochs", "1", "--lrs", "0.01", "1e-6", "--lams", "0.5", "--temperatures", "0.1", "0.2")
    if more:
        lines = (tmp_path / "tuning.md").read_text().splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        best, chosen = (max(some, key=lambda row: float(row[-1])) for some in (rows[2:4], rows[4:]))
        assert f"part: --lr {best[1]} --lam 0.5 --temperature {chosen[3]}\n" in capsys.readouterr().out


def test_differences_are_paired_by_seed(fewshot):
    scores = {"CE": (0.5, 0.6, 0.7), "CE + SupCon": (0.52, 0.61, 0.67)}
    results = [
        {"labelled": 20, "seed": seed, "loss": loss, "accuracy": of_loss[seed]}
        for loss, of_loss in scores.items()
        for seed in (2, 0, 1)
    ]
    (row,) = fewshot.report.table(results).splitlines()[2:]
    assert row == "| 20 | 60.0 ± 10.0 | 60.0 ± 7.5 | +0.0 ± 2.6 | -6.6 to +6.6 | 2 of 3 |"
    (row,) = fewshot.report.table(results[:1] + results[3:4]).splitlines()[2:]
    assert row == "| 20 | 70.0 | 67.0 | -3.0 |  | 0 of 1 |"
