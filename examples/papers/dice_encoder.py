"""`dice.py --encoder`: losses for imbalanced tags, on an encoder fine-tuned with settings chosen for each loss.

The entities of LibreOffice's help are found by tags, and by questions for each kind as in Li et al. 2020. For each loss
the learning rate and its own setting are those with the best F1 on a validation part.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import fusedloss as fl

sys.path.append(str(Path(__file__).resolve().parents[1] / "fewshot"))
import tags
from arguments import count, positive
from encoder import Questions, Reader, Tags, Words, predict, targets, train
from frame import Run, differences, draw_scores, run_all, save_figure, table
from model import encoder_folder, load_encoder
from options import epochs_of, settled_dtype
from packages import DataError
from scores import entities, span_scores

#: Of each loss: the values of its own setting, and what makes it from one of them and the shares of the classes.
LOSSES: dict[str, tuple[tuple[Any, ...], Callable[[Any, Tensor], Callable[[Tensor, Tensor], Tensor]]]] = {
    "CE": ((None,), lambda _, shares: fl.nn.CrossEntropyLoss()),
    # rarer classes count more: by the inverse of their shares to this power
    "weighted CE": ((0.25, 0.5), lambda power, shares: fl.nn.CrossEntropyLoss(weight=(shares.max() / shares) ** power)),
    "focal": ((1.0, 2.0), lambda gamma, shares: fl.nn.FocalLoss(gamma=gamma)),
    "dice": ((0.1, 1.0), lambda smooth, shares: fl.nn.DiceLoss(smooth=smooth)),
    "DSC": ((0.1, 1.0), lambda alpha, shares: fl.nn.DSCLoss(alpha=alpha)),
    "DSC of classes": ((0.01, 1.0), lambda alpha, shares: fl.nn.DSCLoss(alpha=alpha, level="class")),
    "CE + dice": (("example", "class"), lambda level, shares: _sum(level)),
}
FORMS = {"tags": Tags, "questions": Questions}
COLUMNS = ("F1", "precision", "recall")
QUICK = {
    "losses": ["CE", "DSC", "CE + dice"],
    "seeds": 1, "sizes": [50], "epochs": [4], "question_epochs": [1], "lrs": [1e-3], "question_lrs": [1e-3],
    "test": 50, "validation": 30, "out": Path("runs/papers/dice-encoder-quick"),
}  # fmt: skip
TUNING_SEED = 0


def _sum(level: Any) -> Callable[[Tensor, Tensor], Tensor]:
    ce, dice = fl.nn.CrossEntropyLoss(), fl.nn.DiceLoss(level=level)
    return lambda logits, target: ce(logits, target) + dice(logits, target)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(seeds=5, out=Path("runs/papers/dice-encoder"))
    add = parser.add_argument_group("comparison, with --encoder").add_argument
    add("--folder", type=Path, help="of a BERT that transformers can load; else MiniLM-L6")
    add("--forms", choices=[*FORMS], nargs="+", default=[*FORMS], help="what an entity is found by")
    add("--losses", choices=[*LOSSES], nargs="+", default=[*LOSSES], help="which to compare")
    add("--sizes", type=count(1), nargs="+", default=[500, 3000], help="sentences to train on; the first to tune")
    add("--test", type=count(1), default=2000, help="sentences at least")
    add("--validation", type=count(1), default=1000, help="sentences at least, to choose the settings by")
    add("--lrs", type=positive, nargs="+", default=[3e-4, 1e-3, 3e-3], help="learning rates to choose from")
    add("--question-lrs", type=positive, nargs="+", default=[1e-4, 3e-4, 1e-3], help="the same for questions")
    add = parser.add_argument_group("training, with --encoder").add_argument
    add("--epochs", type=count(1), nargs="+", help="one number, or one for each size; else 180 / sqrt(size)")
    add("--question-epochs", type=count(1), nargs="+", help="the same for questions; else 60 / sqrt(size)")
    add("--batch", type=count(1), default=8, help="texts an update")
    add("--head-rate", type=positive, default=10.0, help="learning rate of the new layers over that of the encoder's")
    add("--frozen", type=count(0), default=4, help="lowest layers that are not trained")
    add("--max-pieces", type=count(1), default=48, help="of a sentence; what follows is cut")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 where the CPU computes in it")


def settle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    sizes = list(dict.fromkeys(options.sizes))
    options.epochs = {
        "tags": epochs_of(parser, "--epochs", options.epochs, sizes, 180),
        "questions": epochs_of(parser, "--question-epochs", options.question_epochs, sizes, 60),
    }
    options.lrs = {"tags": options.lrs, "questions": options.question_lrs}
    options.dtype = settled_dtype(options.dtype)


class Experiment:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        encoder, tokenizer = load_encoder(options.folder or encoder_folder())
        self.reader = Reader(encoder, tokenizer, options.frozen, options.max_pieces, options.dtype == "bf16")
        whole = tags.load_parts(options.tagged, options.test, options.validation)
        self.parts = tags.Parts(*([self.reader.cut(sentence) for sentence in part] for part in whole))
        if max(options.sizes) > len(self.parts.train):
            raise DataError(
                f"--sizes {max(options.sizes)} is more than the {len(self.parts.train)} sentences to train on"
            )
        found = {tag for part in self.parts for sentence in part for _, tag in sentence}
        kinds = sorted({tag.partition("-")[2] for tag in found} - {""})
        self.forms = {name: FORMS[name](kinds) for name in options.forms}
        outside = [tag == tags.OUTSIDE for sentence in self.parts.train for _, tag in sentence]
        print(
            f"{len(self.parts.train):,} sentences to draw from, {len(self.parts.validation):,} to choose settings by, "
            f"{len(self.parts.test):,} to test; {sum(outside) / len(outside):.1%} of the words are {tags.OUTSIDE}, "
            f"the others {', '.join(kinds)}; {options.dtype}"
        )
        shared = ("batch", "frozen", "max_pieces", "test", "validation", "dtype")
        self.shared = {name: getattr(options, name) for name in shared}
        self.shared["fingerprint"] = whole.fingerprint
        self._read: dict[str, tuple[Any, list[Words], list[Tensor]]] = {}

    def read(self, name: str, what: str, sentences: Sequence[tags.Sentence]) -> tuple[list[Words], list[Tensor]]:
        """The texts of sentences with their states, which are kept until others are asked for in the same place."""
        key = (name, len(sentences), sentences[0])
        if self._read.get(what, (None,))[0] != key:
            texts = self.reader.read(self.forms[name], sentences)
            self._read[what] = (key, texts, self.reader.states(texts))
        return self._read[what][1:]

    def run(self, settings: dict[str, Any]) -> dict[str, Any]:
        form = self.forms[settings["form"]]
        pool = self.parts.train
        # a larger draw of a seed holds a smaller
        drawn = random.Random(settings["seed"]).sample(pool, len(pool))[: settings["sentences"]]
        texts, states = self.read(settings["form"], "train", drawn)
        counts = targets(texts).flatten().bincount(minlength=form.classes).clamp(min=1)
        loss = LOSSES[settings["loss"]][1](settings["own"], counts / counts.sum())
        network = train(self.reader, form, texts, states, loss, settings)
        measured_on = getattr(self.parts, settings["part"])
        texts, states = self.read(settings["form"], "measured", measured_on)
        predicted = predict(network, texts, states)
        each = len(texts) // len(measured_on)
        found = [form.spans(predicted[i : i + each]) for i in range(0, len(predicted), each)]
        gold = [entities([tag for _, tag in sentence]) for sentence in measured_on]
        kinds = sorted({kind for spans in gold for kind, _, _ in spans})
        by_kind = {
            kind: span_scores(*([{s for s in spans if s[0] == kind} for spans in both] for both in (found, gold)))["F1"]
            for kind in kinds
        }
        return {**span_scores(found, gold), "kinds": by_kind}

    def settings(self, name: str, size: int, loss: str, own: Any, lr: float, part: str, seed: int) -> dict[str, Any]:
        options = self.options
        head_lr = float(f"{lr * options.head_rate:.6g}")
        return {
            "form": name, "part": part, "sentences": size, "loss": loss, "own": own, "lr": lr, "head_lr": head_lr,
            "epochs": options.epochs[name][size], "seed": seed, **self.shared,
        }  # fmt: skip


def told(run: Run) -> str:
    names = ("form", "part", "sentences", "loss", "own", "lr", "seed")
    what = ", ".join(f"{name} {run.settings[name]}" for name in names)
    return f"{what}: {', '.join(f'{column} {run.measured[column]:.1%}' for column in COLUMNS)}"


def compare(options: argparse.Namespace) -> None:
    experiment = Experiment(options)
    if options.fresh:
        (options.out / "results.jsonl").unlink(missing_ok=True)

    def made(plan: list[dict[str, Any]]) -> list[Run]:
        return run_all(plan, experiment.run, told, options.out, recorded=not options.fresh)

    runs: list[Run] = []
    written = []
    for name in options.forms:
        plan = [
            experiment.settings(name, options.sizes[0], loss, own, lr, "validation", TUNING_SEED)
            for loss in options.losses
            for own, lr in itertools.product(LOSSES[loss][0], options.lrs[name])
        ]
        tuning = made(plan)
        best = {
            loss: max((run for run in tuning if run.settings["loss"] == loss), key=lambda run: run.measured["F1"])
            for loss in options.losses
        }
        written.append(f"{name}, chosen\n\n" + chosen(tuning, best))
        for size in options.sizes:
            plan = [
                experiment.settings(name, size, loss, run.settings["own"], run.settings["lr"], "test", seed)
                for seed, (loss, run) in itertools.product(
                    range(options.seed, options.seed + options.seeds), best.items()
                )
            ]
            own = made(plan)
            runs += own
            written.append(f"{name}, {size} sentences\n\n{table(own, 'loss', dict.fromkeys(COLUMNS, 100))}")
            in_percent = [Run(r.settings, {c: 100 * r.measured[c] for c in COLUMNS}) for r in own]
            if "CE" in best:
                pairs = {f"{loss} - CE": (loss, "CE") for loss in best if loss != "CE"}
                written.append(differences(in_percent, "difference", pairs, ["F1"]))
            (options.out / "table.md").write_text("\n".join(written), encoding="utf-8")
            draw(runs, options.out / "dice-encoder.png")
    print("\nin %, mean and standard deviation\n")
    print(*written, sep="\n")
    print(f"table, plot and results: {options.out}")


def chosen(tuning: Sequence[Run], best: dict[str, Run]) -> str:
    """In Markdown, the settings of each loss, their F1, and the least F1 of all that were tried."""
    lines = ["| loss | learning rate | own setting | F1 | least |", "|---|---:|---:|---:|---:|"]
    for loss, run in best.items():
        least = min(other.measured["F1"] for other in tuning if other.settings["loss"] == loss)
        own = "" if run.settings["own"] is None else run.settings["own"]
        lines.append(f"| {loss} | {run.settings['lr']:g} | {own} | {run.measured['F1']:.1%} | {least:.1%} |")
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], path: Path) -> None:
    """A panel for each form and size."""
    panels_of = list(dict.fromkeys((run.settings["form"], run.settings["sentences"]) for run in runs))
    with save_figure(path, 1, len(panels_of)) as (panels,):
        for panel, (name, size) in zip(panels, panels_of, strict=True):
            scores: dict[str, list[float]] = {}
            for run in runs:
                if (run.settings["form"], run.settings["sentences"]) == (name, size):
                    scores.setdefault(run.settings["loss"], []).append(100 * run.measured["F1"])
            draw_scores(panel, scores)
            panel.tick_params(axis="x", rotation=60)
            panel.set(title=f"{name}, {size}: F1 in %")
