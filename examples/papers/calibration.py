"""Focal loss and calibration: a BiLSTM on imbalanced classes of text, with cross-entropy and with focal loss.

After Wang et al. 2022, "Calibrating Imbalanced Classifiers with Focal Loss: An Empirical Study". With each loss and
seed it trains the same network on the same batches, and measures accuracy, F1 and calibration on the test part.
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
from arguments import count, parse, positive
from bilstm import Classifier, logits_of, trained
from frame import TRAINING, Run, add_training, main, make_parser, run_all, save_figure, write_tables
from scores import f1
from texts import Task, encode, load

QUICK = {"seeds": 2, "epochs": 4, "limit": 1000, "gammas": [1.0, 5.0]}
COLUMNS = ("accuracy", "F1", "confidence", "ECE", "MCE")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("calibration", "Focal loss and calibration: a BiLSTM on imbalanced classes of text.")
    add = parser.add_argument_group("comparison").add_argument
    add("--texts", nargs="+", default=["R52", "SMS"], help="R52, SMS, or a file: label TAB text, one a line, UTF-8")
    add("--gammas", type=positive, nargs="+", default=[1.0, 3.0, 5.0, 10.0], help="of the focal loss, beside CE")
    add("--bins", type=count(1), default=15, help="of the calibration errors and the diagrams")
    add_training(parser, limit=0, epochs=10, lr=4e-3)
    return parse(parser, QUICK, arguments)


def run(task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """A network, trained and measured."""
    gamma = settings["gamma"]
    loss = fl.nn.CrossEntropyLoss() if gamma is None else fl.nn.FocalLoss(gamma=gamma)
    model = trained(Classifier, task.train, task.words, len(task.labels), loss, settings)
    target = torch.tensor([example.target for example in task.test])
    _, stats = fl.cross_entropy(torch.stack(logits_of(model, task.test)), target, return_stats=True)
    return measure(stats, target, len(task.labels), settings["bins"])


def measure(stats: fl.RowStats, target: torch.Tensor, classes: int, bins: int) -> dict[str, Any]:
    diagram = fl.calibration_bins(stats, target, bins=bins)
    return {
        "accuracy": (stats.argmax == target).double().mean().item(),
        "F1": f1(stats.argmax, target, classes),
        "confidence": stats.argmax_log_prob.double().exp().mean().item(),
        "ECE": fl.calibration_error(stats, target, bins=bins).item(),
        "MCE": fl.calibration_error(stats, target, bins=bins, norm="max").item(),
        "diagram": [column.nan_to_num().tolist() for column in diagram],
    }


def compare(options: argparse.Namespace) -> None:
    tasks = {name: encode(load(name), options.limit, options.max_length, options.least) for name in options.texts}
    print(*tasks.values(), sep="\n")
    fingerprints = {name: task.fingerprint for name, task in tasks.items()}
    seeds = range(options.seed, options.seed + options.seeds)
    training = {name: getattr(options, name) for name in TRAINING}
    plan = [
        {
            "texts": name,
            "fingerprint": fingerprints[name],
            "loss": "CE" if gamma is None else f"focal, gamma {gamma:g}",
            "gamma": gamma,
            "seed": seed,
            "bins": options.bins,
            **training,
        }
        for name, seed, gamma in itertools.product(options.texts, seeds, (None, *options.gammas))
    ]
    runs = run_all(plan, lambda settings: run(tasks[settings["texts"]], settings), told, options.out, options.fresh)
    write_tables(runs, dict.fromkeys(options.texts, COLUMNS), options.out)
    draw_diagrams(runs, options.out / "calibration.png")
    print(f"table, plot and results: {options.out}")


def told(run: Run) -> str:
    values = ", ".join(f"{name} {run.measured[name]:.1%}" for name in COLUMNS)
    return f"{run.settings['texts']}, {run.settings['loss']}, seed {run.settings['seed']}: {values}"


def draw_diagrams(runs: Sequence[Run], path: Path) -> None:
    """Reliability diagrams, a row for each set of texts and a column for each loss; the rows of all seeds together."""
    names = list(dict.fromkeys(run.settings["texts"] for run in runs))
    losses = list(dict.fromkeys(run.settings["loss"] for run in runs))
    with save_figure(path, len(names), len(losses)) as panels:
        for (row, name), (column, loss) in itertools.product(enumerate(names), enumerate(losses)):
            diagrams = torch.tensor(
                [r.measured["diagram"] for r in runs if (r.settings["texts"], r.settings["loss"]) == (name, loss)],
                dtype=torch.float64,
            )  # (seeds, 3, bins)
            count = diagrams[:, 0]
            total = count.sum(0)
            confidence, accuracy = ((count * diagrams[:, i]).sum(0) / total for i in (1, 2))
            bins = len(total)
            left = [i / bins for i in range(bins)]
            shown = {"width": 1 / bins, "align": "edge"}
            panel = panels[row][column]
            panel.bar(left, accuracy.nan_to_num().tolist(), edgecolor="white", label="accuracy", **shown)
            panel.bar(left, (total / total.sum()).tolist(), color="C1", alpha=0.6, label="share of texts", **shown)
            panel.plot([0, 1], [0, 1], color="gray", linewidth=1)
            panel.plot(confidence.tolist(), accuracy.tolist(), "k.", markersize=3, label="mean confidence of a bin")
            panel.set(title=f"{name}, {loss}", xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
        handles = panels[0][0].get_legend_handles_labels()
        panels[0][0].figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]))


if __name__ == "__main__":
    main(parse_arguments, compare)
