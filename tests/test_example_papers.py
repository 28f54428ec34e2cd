"""The papers' experiments on made-up data."""

import itertools
import json
import random

import pytest
import torch
from example_modules import imported

OWN = "scores frame bilstm texts tags calibration dice contrastive"
SHARED = "data model training experiment report options"  # of examples/fewshot
TRANSLATION = "mixed_cross_entropy data model optimizer options checkpoint evaluate trainer"  # of examples/nmt
KEYS = {"spam": "win", "ham": "home"}
TINY = "--seeds 2 --epochs 20 --width 8 --hidden 8 --lr 0.02 --batch 8 --dropout 0.1 --threads 1"

for name in ("matplotlib", "transformers", "tqdm"):
    pytest.importorskip(name, reason="the examples need the extra [demo]")


@pytest.fixture(scope="module")
def papers():
    with imported("papers", f"{OWN} {SHARED}") as modules:
        yield modules


@pytest.fixture(scope="module")
def translation(papers):
    """The script that goes by examples/nmt, whose modules have the names of others."""
    for name in ("sentencepiece", "sacrebleu"):
        pytest.importorskip(name, reason="the example needs the extra [demo]")
    with imported("papers", TRANSLATION) as modules:
        yield modules


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """60 texts in two classes, one in five of the rarer; a word tells the class."""
    order = random.Random(0)
    lines = []
    for number in range(60):
        label = "spam" if number % 5 == 0 else "ham"
        words = [KEYS[label], f"w{number}", *order.choices([f"w{i}" for i in range(12)], k=order.randint(1, 9))]
        lines.append(f"{label}\t{' '.join(words)}!\n")
    path = tmp_path_factory.mktemp("texts") / "texts.tsv"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_losses_are_compared_and_a_stopped_run_goes_on(papers, texts, tmp_path, monkeypatch, capsys):
    own = ["--seeds", "1", "--gammas", "3", "--bins", "5", "--texts", str(texts), "--out", str(tmp_path)]
    options = papers.calibration.parse_arguments([*TINY.split(), *own])
    papers.calibration.compare(options)
    results = _results(tmp_path)
    assert [r["settings"]["loss"] for r in results] == ["CE", "focal, gamma 3"]
    measured = [r["measured"] for r in results]
    assert all(m["accuracy"] > 0.85 and m["F1"] > 0.6 for m in measured)
    assert measured[0]["confidence"] > measured[1]["confidence"]  # what gamma is for
    for m in measured:
        count, confidence, accuracy = torch.tensor(m["diagram"], dtype=torch.float64)
        assert count.sum() == 12  # a fifth of the texts
        assert (count * accuracy).sum() / 12 == pytest.approx(m["accuracy"])
        assert (count * (confidence - accuracy).abs()).sum() / 12 == pytest.approx(m["ECE"], rel=1e-5)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")

    path = tmp_path / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:40])  # stopped while it wrote
    run, ran = papers.calibration.run, []
    monkeypatch.setattr(papers.calibration, "run", lambda task, s: ran.append(s["seed"]) or run(task, s))
    papers.calibration.compare(options)
    assert ran == [1] and (tmp_path / "table.md").read_text() == table
    assert [{**r, "seconds": 0} for r in _results(tmp_path)] == [{**r, "seconds": 0} for r in results]
    papers.calibration.compare(papers.calibration.parse_arguments([*TINY.split(), *own, "--epochs", "1"]))
    assert len(ran) == 3  # other settings are other runs


def test_of_a_seed_all_losses_see_the_same(papers, texts):
    """So that the focal loss of gamma 0 is cross-entropy, to the last bit of each row."""
    calibration = papers.calibration
    options = calibration.parse_arguments([*TINY.split(), "--texts", str(texts), "--epochs", "2"])
    task = papers.texts.encode(papers.texts.load(str(texts)), 0, 128, 2)
    settings = {**vars(options), "seed": 1}
    runs = [calibration.run(task, {**settings, "gamma": gamma}) for gamma in (None, 0.0, 3.0)]
    assert runs[0] == runs[1] != runs[2]


# dice

NAMES = {"PER": ("ana", "bob"), "LOC": ("oslo", "rome")}


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """40 sentences in which capital words, so to speak, are names of one or two tokens."""
    order = random.Random(0)
    lines = []
    for number in range(40):
        kind = ("PER", "LOC")[number % 2]
        name = [f"{NAMES[kind][i]}\t{'BI'[i]}-{kind}\n" for i in range(1 + number % 3 % 2)]
        words = [f"w{order.randrange(9)}\tO\n" for _ in range(order.randint(2, 8))]
        place = order.randint(0, len(words))
        lines += [*words[:place], *name, *words[place:], "\n"]
    path = tmp_path_factory.mktemp("tagged") / "sentences.tsv"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_losses_of_tags_and_questions_are_compared(papers, texts, tagged, tmp_path, capsys):
    own = ["--seeds", "1", "--tagged", str(tagged), "--questions", str(texts), "--out", str(tmp_path)]
    papers.dice.compare(papers.dice.parse_arguments([*TINY.split(), *own]))
    results = _results(tmp_path)
    assert [r["settings"]["loss"] for r in results] == [*papers.dice.LOSSES] * 2
    first = {r["settings"]["loss"]: r["measured"] for r in results[:4]}
    assert all(set(m) == {"accuracy", "precision", "recall", "F1"} and m["F1"] > 0.6 for m in first.values())
    shared = [r["settings"] | {"loss": None, "gamma": None, "alpha": None} for r in results[:4]]
    assert all(other == shared[0] for other in shared)
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "dice.png").read_bytes().startswith(b"\x89PNG")


def test_entities_of_tags(papers):
    def found(tags: str) -> list[tuple]:
        return sorted(papers.scores.entities(tags.split()))

    assert found("B-X I-X O B-Y") == [("X", 0, 2), ("Y", 3, 4)]
    assert found("B-X B-X I-X") == [("X", 0, 1), ("X", 1, 3)]
    assert found("I-X I-X I-Y O I-Y") == [("X", 0, 2), ("Y", 2, 3), ("Y", 4, 5)]
    assert found("O O") == found("") == []
    scores = papers.scores.entity_scores([["B-X", "O"], ["B-X", "I-X"]], [["B-X", "B-Y"], ["B-X", "O"]])
    assert scores == {"precision": 1 / 2, "recall": 1 / 3, "F1": 2 / 5}
    assert papers.scores.entity_scores([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "F1": 0}


# contrastive


def test_losses_are_compared_at_each_share_of_wrong_labels(papers, texts, encoder, tmp_path):
    """The joint loss without its contrastive part is cross-entropy, to the last text: both see the same labels."""
    own = "--seeds 2 --sizes 8 20 --epochs 12 --noise 0 1 --lam 0 --lr 0.01 --head-lr 0.05 --threads 1 --dtype fp32"
    files = ["--data", str(texts), "--encoder", str(encoder), "--out", str(tmp_path)]
    papers.contrastive.compare(papers.contrastive.parse_arguments([*own.split(), *files]))
    results = [r["settings"] | r["measured"] for r in _results(tmp_path)]
    assert [(r["seed"], r["labelled"], r["noise"], r["loss"]) for r in results] == [
        *itertools.product((1, 2), (8, 20), (0, 1), ("CE", "CE + SupCon"))
    ]
    assert [r["accuracy"] for r in results[::2]] == [r["accuracy"] for r in results[1::2]]
    for r in results:
        if r["labelled"] == 20:
            assert r["accuracy"] < 0.4 if r["noise"] else r["accuracy"] > 0.6
    assert (tmp_path / "contrastive.png").read_bytes().startswith(b"\x89PNG")


# mixed cross-entropy


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_losses_of_translation_are_compared(translation, corpus, tmp_path):
    script = translation.mixed_cross_entropy
    sizes = "--seeds 2 --steps 12 --d-model 16 --heads 2 --layers 1 --vocab-size 60 --batch-tokens 128 --max-length 64"
    sizes += " --dropout 0.1 --held-out 0.2 --bleu-sentences 5 --beam 2 --threads 1"
    script.compare(script.parse_arguments([*sizes.split(), "--data", str(corpus), "--out", str(tmp_path)]))
    results = _results(tmp_path)
    order = [(r["settings"]["config"]["seed"], r["settings"]["loss"]) for r in results]
    assert order == [*itertools.product((1, 2), script.LOSSES)]
    assert len({json.dumps(r["measured"]) for r in results}) == 8
    shared = [{**r["settings"]["config"], "loss": None, "seed": None} for r in results]
    assert all(other == shared[0] for other in shared)
    table = (tmp_path / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == [f"| {name}" for name in script.LOSSES]
    assert (tmp_path / "mixed_cross_entropy.png").read_bytes().startswith(b"\x89PNG")


# the network


def test_padding_and_company_change_nothing(papers):
    bilstm = papers.bilstm
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 9, 40, 3, 17]
    examples = [bilstm.Example(torch.randint(1, 20, (n,), generator=generator).tolist(), 0) for n in lengths]
    for kind, shape in ((bilstm.Classifier, lambda n: (3,)), (bilstm.Tagger, lambda n: (n, 3))):
        model = kind(20, 3, 8, 8, 0.5).eval()
        for n, example, row in zip(lengths, examples, bilstm.logits_of(model, examples), strict=True):
            assert row.shape == shape(n)
            torch.testing.assert_close(bilstm.logits_of(model, [example])[0], row)


def test_f1_is_that_of_torchmetrics(papers, generator):
    from torchmetrics.functional.classification import multiclass_f1_score

    predicted, target = torch.randint(5, (2, 200), generator=generator)
    theirs = multiclass_f1_score(predicted, target, 5, average="macro").item()
    assert papers.scores.f1(predicted, target, 5) == pytest.approx(theirs, rel=1e-5)
