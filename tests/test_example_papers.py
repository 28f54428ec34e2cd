"""The papers' experiments on made-up data: each script once."""

import itertools
import json
import random
import signal
from types import SimpleNamespace

import pytest
import torch
from example_modules import imported

OWN = "scores frame bilstm texts tags networks calibration encoder dice_encoder dice contrastive"
SHARED = "data model training experiment report options"  # of examples/fewshot
TRANSLATION = "mixed_cross_entropy mixed_long"  # and the modules of examples/nmt
TRANSLATION += " experiment data model optimizer options checkpoint evaluate trainer student"
KEYS = {"spam": "win", "ham": "home"}
NAMES = {"PER": ("ana", "bob"), "LOC": ("oslo", "rome")}
TINY = "--seeds 1 --epochs 20 --width 8 --hidden 8 --lr 0.02 --batch 8 --dropout 0.1 --threads 1"

for name in ("matplotlib", "transformers", "tqdm"):
    pytest.importorskip(name, reason="the examples need the extra [demo]")


@pytest.fixture(scope="module")
def papers():
    with imported("papers", f"{OWN} {SHARED}") as modules:
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


def _results(folder, script: str) -> list[dict]:
    assert (folder / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_calibration(papers, texts, tmp_path, monkeypatch, capsys):
    """And a stopped run goes on where it was."""
    own = ["--gammas", "3", "--smoothings", "0.2", "--bins", "5", "--texts", str(texts), "--out", str(tmp_path)]
    options = papers.calibration.parse_arguments([*TINY.split(), *own])
    papers.calibration.compare(options)
    results = _results(tmp_path, "calibration")
    assert [r["settings"]["loss"] for r in results] == [
        "CE",
        "CE, temperature",
        "CE, smoothing 0.2",
        "focal, gamma 3",
    ]
    measured = [r["measured"] for r in results]
    assert all(m["accuracy"] > 0.85 and m["F1"] > 0.6 for m in measured)
    assert measured[0]["confidence"] > max(m["confidence"] for m in measured[2:])  # what the rivals are for
    for m in measured:
        count, confidence, accuracy = torch.tensor(m["diagram"], dtype=torch.float64)
        assert (count * (confidence - accuracy).abs()).sum() / 12 == pytest.approx(m["ECE"], rel=1e-5)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out

    path = tmp_path / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])  # stopped while it wrote
    measure, ran = papers.calibration.measure, []
    monkeypatch.setattr(papers.calibration, "measure", lambda *own: ran.append(own[-1]["loss"]) or measure(*own))
    papers.calibration.compare(options)
    assert ran == ["focal, gamma 3"] and (tmp_path / "table.md").read_text() == table


def test_calibration_with_an_encoder(papers, texts, encoder, tmp_path, capsys):
    """A temperature changes no class, and gamma is chosen on the texts held out alone."""
    own = "--seeds 2 --limit 0 --epochs 2 --gammas 5 --smoothings 0.2 --held-out 0.2 --lr 0.01 --threads 1"
    files = [f"--encoder={encoder}", "--texts", str(texts), "--out", str(tmp_path)]
    papers.calibration.compare(papers.calibration.parse_arguments([*own.split(), *files]))
    assert "38 texts to train on, 10 held out and 12 to test" in capsys.readouterr().out
    results = _results(tmp_path, "calibration")
    runs = [papers.frame.Run(r["settings"], r["measured"]) for r in results]
    plain, scaled, smooth, focal = runs[:4]
    assert plain.measured["accuracy"] == scaled.measured["accuracy"] and plain.measured["temperature"] == 1
    assert len({run.measured["confidence"] for run in (plain, scaled, smooth, focal)}) == 4
    focal.measured["ECE held out"], focal.measured["ECE"] = -1.0, 9.0
    assert [run.measured is focal.measured for run in papers.calibration.chosen(runs)] == [True, False]
    train, test = papers.networks.hold_out(papers.texts.load(str(texts)), 30)[:2]
    assert len(test) == 30 and len({text.label for text in train}) == 2 and not {*train} & {*test}


def _tagged(path, names: dict[str, tuple[str, str]], sentences: int):
    """Sentences with a name of one or two words in each, which tell its kind."""
    order, lines = random.Random(0), []
    kinds = list(names)
    for number in range(sentences):
        kind = kinds[number % 2]
        name = [f"{names[kind][i]}\t{'BI'[i]}-{kind}\n" for i in range(1 + number % 3 % 2)]
        words = [f"w{order.randrange(9)}\tO\n" for _ in range(order.randint(2, 8))]
        place = order.randint(0, len(words))
        lines += [*words[:place], *name, *words[place:], "\n"]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_dice(papers, texts, tmp_path):
    tagged = _tagged(tmp_path / "sentences.tsv", NAMES, 40)
    own = ["--tagged", str(tagged), "--questions", str(texts), "--out", str(tmp_path)]
    papers.dice.compare(papers.dice.parse_arguments([*TINY.split(), *own]))
    results = _results(tmp_path, "dice")
    assert [r["settings"]["loss"] for r in results] == [*papers.dice.LOSSES] * 2
    assert all(r["measured"]["F1"] > 0.6 for r in results[:4])
    scores = papers.scores.entity_scores([["B-X", "O"], ["B-X", "I-X"]], [["B-X", "B-Y"], ["B-X", "O"]])
    assert scores == {"precision": 1 / 2, "recall": 1 / 3, "F1": 2 / 5}


def test_dice_with_an_encoder(papers, encoder, tmp_path):
    """Settings are chosen on the validation part, each loss is tested with those, and what is done is not repeated."""
    tagged = _tagged(tmp_path / "sentences.tsv", {"win": ("who", "many"), "home": ("where", "w19")}, 160)
    own = "--encoder --seeds 2 --sizes 20 50 --epochs 20 --question-epochs 2 --lrs 1e-9 0.01 --head-rate 3 --frozen 0"
    own += " --test 40 --validation 40 --threads 1 --dtype fp32 --losses CE DSC"
    files = ["--folder", str(encoder), "--tagged", str(tagged), "--out", str(tmp_path)]
    options = papers.dice.parse_arguments([*own.split(), *files])
    papers.dice.compare(options)
    results = _results(tmp_path, "dice-encoder")
    assert len(results) == 2 * (2 + 4 + 2 * 2 * 2)
    for form in ("tags", "questions"):
        own = [r for r in results if r["settings"]["form"] == form]
        tuning, tested = ([r for r in own if r["settings"]["part"] == part] for part in ("validation", "test"))
        for loss in ("CE", "DSC"):
            best = max((r for r in tuning if r["settings"]["loss"] == loss), key=lambda r: r["measured"]["F1"])
            chosen = {(r["settings"]["lr"], r["settings"]["own"]) for r in tested if r["settings"]["loss"] == loss}
            assert chosen == {(best["settings"]["lr"], best["settings"]["own"])}
    large = [r for r in results if r["settings"]["form"] == "tags" and r["settings"]["sentences"] == 50]
    assert all(r["measured"]["F1"] > 0.6 and set(r["measured"]["kinds"]) == {"home", "win"} for r in large)
    table = (tmp_path / "table.md").read_text()
    papers.dice.compare(options)
    assert len(_results(tmp_path, "dice-encoder")) == len(results) and (tmp_path / "table.md").read_text() == table

    options.sizes = [500]
    with pytest.raises(papers.frame.DataError, match="--sizes 500 is more than the 60"):
        papers.dice.compare(options)


def test_tags_and_questions_tell_the_same_entities(papers):
    sentence = papers.tags.marked(
        'Choose <span class="menuitem"><span class="menuitem">Edit</span> - Find</span>, or &lt;press&gt; '
        '<span class="keycode">F<span class="other">1</span></span><span class="keycode">\u200bEsc</span>.'
    )
    kinds = {"Edit": "B-menuitem", "-": "B-menuitem", "Find": "I-menuitem", "F1": "B-keycode", "Esc": "B-keycode"}
    words = ["Choose", "Edit", "-", "Find", ",", "or", "<", "press", ">", "F1", "Esc", "."]
    assert sentence == [(word, kinds.get(word, "O")) for word in words]
    spans = papers.scores.entities([tag for _, tag in sentence])
    for form in (papers.encoder.Tags(papers.tags.MARKS), papers.encoder.Questions(papers.tags.MARKS)):
        assert form.spans([torch.tensor(target) for _, target in form.texts(sentence)]) == spans
    ends_nowhere = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0]])
    assert papers.encoder.Questions(["X"]).spans([ends_nowhere]) == {("X", 1, 2)}


@pytest.mark.parametrize("frozen", [0, 1])
def test_training_begins_at_the_states_of_the_frozen_layers(papers, encoder, frozen):
    """Of a network that is not trained yet, the states are those of the whole encoder."""
    whole, tokenizer = papers.dice_encoder.load_encoder(encoder)
    reader = papers.encoder.Reader(whole, tokenizer, frozen, 5, False)
    form = papers.encoder.Tags(["X"])
    sentences = [[("who", "O"), ("w1", "B-X"), ("w2", "O")], [(f"w{i}", "O") for i in range(9)]]
    texts = reader.read(form, map(reader.cut, sentences))
    assert [len(text.pieces) for text in texts] == [3, 5]
    network = papers.encoder.Network(reader, form).eval()
    expected = [whole(input_ids=torch.tensor([text.pieces])).last_hidden_state[0] for text in texts]
    torch.testing.assert_close(network(texts, reader.states(texts))[:, 0], network.head(torch.cat(expected)))
    with pytest.raises(papers.frame.DataError, match="--frozen 2 of 1 layers"):
        papers.encoder.Reader(whole, tokenizer, 2, 5, False)


def test_contrastive(papers, texts, encoder, tmp_path):
    """The joint loss without its contrastive part is cross-entropy, to the last text: both see the same labels."""
    own = "--seeds 1 --sizes 8 20 --epochs 12 --noise 0 1 --lam 0 --lr 0.01 --head-lr 0.05 --threads 1 --dtype fp32"
    files = ["--data", str(texts), "--encoder", str(encoder), "--out", str(tmp_path)]
    papers.contrastive.compare(papers.contrastive.parse_arguments([*own.split(), *files]))
    results = [r["settings"] | r["measured"] for r in _results(tmp_path, "contrastive")]
    assert [(r["labelled"], r["noise"], r["loss"]) for r in results] == [
        *itertools.product((8, 20), (0, 1), ("CE", "CE + SupCon"))
    ]
    assert [r["accuracy"] for r in results[::2]] == [r["accuracy"] for r in results[1::2]]
    assert all(r["accuracy"] < 0.4 if r["noise"] else r["accuracy"] > 0.6 for r in results if r["labelled"] == 20)


def test_contrastive_grid(papers, texts, encoder, tmp_path, monkeypatch):
    """A share of 0 is cross-entropy, whatever the temperature: nothing is gained there."""
    monkeypatch.setattr(papers.contrastive, "LAMS", (0.0, 0.5))
    monkeypatch.setattr(papers.contrastive, "TEMPERATURES", (0.1, 0.3))
    own = "--grid --seeds 1 --sizes 8 --epochs 2 --lr 0.01 --head-lr 0.05 --threads 1 --dtype fp32"
    files = ["--data", str(texts), "--encoder", str(encoder), "--out", str(tmp_path)]
    papers.contrastive.compare(papers.contrastive.parse_arguments([*own.split(), *files]))
    lines = (tmp_path / "grid.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| 8", "0.0"], ["| 8", "0.5"]]
    assert lines[2].count("+0.0") == 2 and len((tmp_path / "results.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_contrastive_tsne(papers, texts, encoder, tmp_path):
    """What is measured is kept, so that the picture is drawn again without a run."""
    pytest.importorskip("sklearn", reason="the picture needs the extra [demo]")
    own = "--tsne --seeds 2 --sizes 8 --epochs 2 --lr 0.01 --head-lr 0.05 --threads 1 --dtype fp32"
    files = ["--data", str(texts), "--encoder", str(encoder), "--out", str(tmp_path)]
    options = papers.contrastive.parse_arguments([*own.split(), *files])
    for _ in range(2):
        papers.contrastive.compare(options)
        assert (tmp_path / "tsne.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "tsne.png").unlink()
    measured = [json.loads(line)["measured"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [len(m.get("points", [])) for m in measured] == [12, 12, 0, 0]
    assert all(-1 <= m["silhouette"] <= 1 for m in measured)
    with pytest.raises(SystemExit):
        papers.contrastive.parse_arguments(["--grid", "--tsne"])


@pytest.fixture
def translation(papers):
    """The script with sizes for a few hundred synthetic pairs, whose modules have the names of others."""
    for name in ("sentencepiece", "sacrebleu"):
        pytest.importorskip(name, reason="the example needs the extra [demo]")
    with imported("papers", TRANSLATION) as modules:
        yield modules


SMALL = "--seeds 1 --steps 8 --d-model 16 --heads 2 --layers 1 --vocab-size 60 --batch-tokens 128 --beam 2"
SMALL += " --max-length 64 --dropout 0.1 --held-out 0.2 --bleu-sentences 5 --threads 1"


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_mixed_cross_entropy(translation, corpus, tmp_path):
    script = translation.mixed_cross_entropy
    script.compare(script.parse_arguments([*SMALL.split(), "--data", str(corpus), "--out", str(tmp_path)]))
    results = _results(tmp_path, "mixed_cross_entropy")
    assert [r["settings"]["loss"] for r in results] == [*script.LOSSES]
    assert len({json.dumps(r["measured"]) for r in results}) == 4
    table = (tmp_path / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == [f"| {name}" for name in script.LOSSES]


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_mixed_cross_entropy_long(translation, corpus, tmp_path, monkeypatch):
    """One warm-up for all losses of a seed; and runs that are stopped in the midst go on to the same results."""
    script, losses = translation.mixed_cross_entropy, [*translation.mixed_long.LOSSES]

    def compare(name: str, *more: str) -> list[dict]:
        own = ["--long", "--points", "4", "--data", str(corpus), "--out", str(tmp_path / name), *more]
        script.compare(script.parse_arguments([*SMALL.split(), *own]))
        return _results(tmp_path / name, "mixed_long")

    whole = compare("whole")
    assert [r["settings"]["loss"] for r in whole] == losses
    curves = [r["measured"]["curves"] for r in whole]
    assert all([point["step"] for point in curve] == [2, 4, 6, 8] for curve in curves)
    assert all(curve[0] == curves[0][0] for curve in curves)  # where the warm-up ends
    assert len({json.dumps(curve[1:]) for curve in curves}) == len(losses)
    assert len([*(tmp_path / "whole").glob("*.pt")]) == 2  # the warm-up, and CE's network, which teaches
    table = (tmp_path / "whole" / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:8]] == [f"| {name}" for name in losses]

    update, made = translation.trainer.Trainer.update, itertools.count(1)

    def stopped(trainer):
        if next(made) % 9 == 0:
            signal.raise_signal(signal.SIGTERM)
        return update(trainer)

    monkeypatch.setattr(translation.trainer.Trainer, "update", stopped)
    for _ in range(4):  # 38 updates in all
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            compare("parts")
    parts = compare("parts")
    for run in (*whole, *parts):
        del run["seconds"], run["processor_seconds"], run["measured"]["processor seconds"]
    assert parts == whole


def test_dual_skew_is_the_two_divergences(translation):
    p = torch.rand(3, 7, dtype=torch.float64).softmax(-1)
    y = torch.eye(7, dtype=torch.float64)[[0, 3, 6]]
    p_y = (p * y).sum(-1)

    def skew(a, b):
        return (torch.special.xlogy(b, b) - torch.special.xlogy(b, 0.99 * a + 0.01 * b)).sum(-1)

    row = SimpleNamespace(p=p_y, q=1 - p_y, ce=-p_y.log())
    both = 0.8 * skew(p, y) + 0.2 * skew(y, p)
    torch.testing.assert_close(
        translation.mixed_long.dual_skew(row, **translation.mixed_long.LOSSES["dual skew"][1]), both
    )


def test_results_of_scripts_at_once(papers, tmp_path):
    """Each keeps what the others have written, and cuts off what one of them left unfinished."""
    plan = [{"loss": name} for name in "abc"]

    def run(settings: dict) -> dict:
        if settings["loss"] == "b":  # meanwhile another one has ended, and a third was stopped
            with (tmp_path / "results.jsonl").open("a") as file:
                file.write('{"settings": {"loss": "d"}, "measured": {"x": 4}, "seconds": 1}\n{"settings": {"lo')
        return {"x": 1}

    papers.frame.run_all(plan, run, str, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["settings"]["loss"] for line in lines] == ["a", "d", "b", "c"]
