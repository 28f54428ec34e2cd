"""The papers' experiments on made-up data: each script once in each of its ways."""

import json
import random

import pytest
from example_modules import imported

OWN = "frame bilstm texts tags networks scores calibration encoder dice_encoder dice contrastive"
OWN += " data model training experiment report options"  # of examples/fewshot
TRANSLATION = (
    "mixed_cross_entropy mixed_long experiment data model optimizer options checkpoint evaluate trainer student"
)
KEYS = {"spam": "win", "ham": "home"}
NAMES = {"win": ("who", "many"), "home": ("where", "w19")}

for name in ("matplotlib", "transformers", "tqdm"):
    pytest.importorskip(name, reason="the examples need the extra [demo]")
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


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


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """160 sentences with a name of one or two words in each, which tell its kind."""
    order, lines = random.Random(0), []
    for number in range(160):
        kind = [*NAMES][number % 2]
        name = [f"{NAMES[kind][i]}\t{'BI'[i]}-{kind}\n" for i in range(1 + number % 3 % 2)]
        words = [f"w{order.randrange(9)}\tO\n" for _ in range(order.randint(2, 8))]
        place = order.randint(0, len(words))
        lines += [*words[:place], *name, *words[place:], "\n"]
    path = tmp_path_factory.mktemp("tagged") / "sentences.tsv"
    path.write_text("".join(lines), encoding="utf-8")
    return path


BILSTM = "--seeds 1 --epochs 20 --width 8 --hidden 8 --lr 0.02 --batch 8 --dropout 0.1 --threads 1"
FEWSHOT = "--data {texts} --encoder {encoder} --lr 0.01 --head-lr 0.05 --threads 1 --dtype fp32"
NMT = (
    "--data {corpus} --seeds 1 --steps 8 --d-model 16 --heads 2 --layers 1 --vocab-size 60 --batch-tokens 128 --beam 2"
)
NMT += " --max-length 64 --dropout 0.1 --held-out 0.2 --bleu-sentences 5 --threads 1"
#: The script with its options, what it draws and writes, the number of its runs, and what all of them reach.
WAYS = {
    "calibration": (
        f"calibration {BILSTM} --texts {{texts}} --gammas 3 --smoothings 0.2 --bins 5",
        "calibration.png table.md", 4, {"accuracy": 0.85, "F1": 0.6},
    ),
    "calibration of an encoder": (
        "calibration --encoder={encoder} --texts {texts} --seeds 2 --limit 0 --epochs 2 --gammas 5 --smoothings 0.2"
        " --held-out 0.2 --lr 0.01 --threads 1",
        "calibration.png table.md", 8, {},
    ),
    "dice": (f"dice {BILSTM} --epochs 3 --tagged {{tagged}} --questions {{texts}}", "dice.png table.md", 8, {}),
    "dice of an encoder": (
        "dice --encoder --folder {encoder} --tagged {tagged} --seeds 1 --sizes 50 --epochs 4 --question-epochs 1"
        " --lrs 0.01 --question-lrs 0.01 --head-rate 3 --frozen 0 --test 40 --validation 40 --threads 1 --dtype fp32"
        " --losses CE DSC",
        "dice-encoder.png table.md", 10, {},
    ),
    "contrastive": (
        f"contrastive {FEWSHOT} --seeds 1 --sizes 20 --epochs 12 --noise 0",
        "contrastive.png table.md", 2, {"accuracy": 0.6},
    ),
    "contrastive, a grid": (
        f"contrastive {FEWSHOT} --grid --seeds 1 --sizes 8 --epochs 1", "grid.png grid.md", 13, {},
    ),
    "contrastive, embeddings": (
        f"contrastive {FEWSHOT} --tsne --seeds 2 --sizes 8 --epochs 2", "tsne.png tsne.md", 4, {},
    ),
    "mixed cross-entropy": (f"mixed_cross_entropy {NMT}", "mixed_cross_entropy.png table.md", 4, {}),
    "mixed cross-entropy, long": (f"mixed_cross_entropy {NMT} --long --points 4", "mixed_long.png table.md", 6, {}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_script_runs_and_goes_on_where_it_was_stopped(way, texts, tagged, encoder, corpus, tmp_path, monkeypatch):
    command, written, count, least = WAYS[way]
    name, *options = command.format(texts=texts, tagged=tagged, encoder=encoder, corpus=corpus).split()
    needed = {"mixed_cross_entropy": ("sentencepiece", "sacrebleu"), "contrastive": ("sklearn",)}
    for package in needed.get(name, ()):
        pytest.importorskip(package, reason="the example needs the extra [demo]")
    with imported("papers", TRANSLATION if name == "mixed_cross_entropy" else OWN) as modules:
        script = getattr(modules, name)
        options = script.parse_arguments([*options, "--out", str(tmp_path)])
        script.compare(options)
        picture, table = (tmp_path / file for file in written.split())
        results = tmp_path / "results.jsonl"
        runs = [json.loads(line) for line in results.read_text().splitlines()]
        assert len(runs) == count and picture.read_bytes().startswith(b"\x89PNG")
        assert all(run["measured"][what] > value for run in runs for what, value in least.items())
        before, lines = table.read_text(), results.read_bytes().splitlines(keepends=True)
        results.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])  # stopped while it wrote
        table.unlink()
        script.compare(options)
        assert len(results.read_bytes().splitlines()) == count and table.read_text() == before


def test_entities_count_where_kind_and_ends_are_right():
    with imported("papers", OWN) as papers:
        scores = papers.scores.entity_scores([["B-X", "O"], ["B-X", "I-X"]], [["B-X", "B-Y"], ["B-X", "O"]])
    assert scores == {"precision": 1 / 2, "recall": 1 / 3, "F1": 2 / 5}
