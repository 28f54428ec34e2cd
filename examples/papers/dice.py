"""Dice loss on imbalanced tags: a BiLSTM that finds names, trained with cross-entropy, focal, dice and DSC loss.

After Li et al. 2020, "Dice Loss for Data-imbalanced NLP Tasks". Names are judged by F1, as entities; beside them TREC's
questions, judged by accuracy, for which the paper finds that dice brings nothing.
"""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fusedloss as fl

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
import dice_encoder
import tags
import texts
from arguments import parse, positive
from bilstm import Classifier, Tagger, logits_of, trained
from frame import TRAINING, Run, add_training, draw_scores, main, make_parser, run_all, save_figure, write_tables
from scores import entity_scores, f1

LOSSES = ("CE", "focal", "dice", "DSC")
COLUMNS = {"names": ("F1", "precision", "recall", "accuracy"), "TREC": ("accuracy", "F1")}
QUICK = {"seeds": 1, "epochs": 4, "limit": 1500}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("dice", "Dice loss on imbalanced tags: a BiLSTM that finds names.")
    add = parser.add_argument_group("comparison").add_argument
    add("--tagged", type=Path, help="your own: token TAB tag lines and a blank line after each sentence, UTF-8")
    add("--encoder", action="store_true", help="fine-tune MiniLM in its place; --encoder --help tells its options")
    if "--encoder" in (sys.argv[1:] if arguments is None else arguments):
        dice_encoder.add_options(parser)
        options = parse(parser, dice_encoder.QUICK, arguments)
        dice_encoder.settle(parser, options)
        return options
    add("--questions", type=Path, help="your own: label TAB text, one a line, UTF-8; else the TREC questions")
    add("--gamma", type=positive, default=2.0, help="of the focal loss")
    add("--alpha", type=positive, default=0.01, help="of the DSC loss")
    add_training(parser, limit=8000, epochs=10, lr=4e-3)
    return parse(parser, QUICK, arguments)


def make_loss(settings: dict[str, Any]) -> torch.nn.Module:
    if settings["loss"] == "focal":
        return fl.nn.FocalLoss(gamma=settings["gamma"])
    if settings["loss"] == "DSC":
        return fl.nn.DSCLoss(alpha=settings["alpha"])
    return {"CE": fl.nn.CrossEntropyLoss, "dice": fl.nn.DiceLoss}[settings["loss"]]()


def run(task: texts.Task, settings: dict[str, Any]) -> dict[str, Any]:
    """A network, trained and measured."""
    tagger = isinstance(task.train[0].target, list)
    kind = Tagger if tagger else Classifier
    model = trained(kind, task.train, task.words, len(task.labels), make_loss(settings), settings)
    predicted = [row.argmax(-1) for row in logits_of(model, task.test)]
    gold = [torch.tensor(example.target) for example in task.test]
    said, there = torch.hstack(predicted), torch.hstack(gold)
    accuracy = (said == there).double().mean().item()
    if not tagger:
        return {"accuracy": accuracy, "F1": f1(said, there, len(task.labels))}
    named = ([[task.labels[i] for i in row.tolist()] for row in rows] for rows in (predicted, gold))
    return {"accuracy": accuracy, **entity_scores(*named)}


def compare(options: argparse.Namespace) -> None:
    if options.encoder:
        dice_encoder.compare(options)
        return
    sizes = (options.limit, options.max_length, options.least)
    tasks = {
        "names": tags.encode(tags.load(options.tagged), "names", *sizes),
        "TREC": texts.encode(texts.load(str(options.questions or "TREC")), *sizes),
    }
    print(*tasks.values(), sep="\n")
    counts = torch.bincount(torch.tensor([tag for example in tasks["names"].train for tag in example.target]))
    print(f"{counts[tasks['names'].labels.index(tags.OUTSIDE)] / counts.sum():.1%} of the tags are {tags.OUTSIDE}")
    fingerprints = {name: task.fingerprint for name, task in tasks.items()}
    seeds = range(options.seed, options.seed + options.seeds)
    training = {name: getattr(options, name) for name in TRAINING}
    plan = [
        {
            "texts": name,
            "fingerprint": fingerprints[name],
            "loss": loss,
            "gamma": options.gamma if loss == "focal" else None,
            "alpha": options.alpha if loss == "DSC" else None,
            "seed": seed,
            **training,
        }
        for name, seed, loss in itertools.product(tasks, seeds, LOSSES)
    ]
    runs = run_all(plan, lambda settings: run(tasks[settings["texts"]], settings), told, options.out, options.fresh)
    write_tables(runs, COLUMNS, options.out)
    draw(runs, options.out / "dice.png")
    print(f"table, plot and results: {options.out}")


def told(run: Run) -> str:
    name = run.settings["texts"]
    values = ", ".join(f"{column} {run.measured[column]:.1%}" for column in COLUMNS[name])
    return f"{name}, {run.settings['loss']}, seed {run.settings['seed']}: {values}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """What the texts are judged by."""
    with save_figure(path, 1, len(COLUMNS)) as (panels,):
        for panel, (name, columns) in zip(panels, COLUMNS.items(), strict=True):
            scores: dict[str, list[float]] = {loss: [] for loss in LOSSES}
            for run in runs:
                if run.settings["texts"] == name:
                    scores[run.settings["loss"]].append(100 * run.measured[columns[0]])
            draw_scores(panel, scores)
            panel.set(title=f"{name}: {columns[0]} in %")


if __name__ == "__main__":
    main(parse_arguments, compare)
