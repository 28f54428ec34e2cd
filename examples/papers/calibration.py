"""Focal loss and calibration, on imbalanced classes of text: cross-entropy, focal loss, and what else calibrates.

After Wang et al. 2022, "Calibrating Imbalanced Classifiers with Focal Loss: An Empirical Study". With each loss and
seed it trains the same network on the same batches, and measures accuracy, F1 and calibration on the test part. The
rivals of focal loss are label smoothing, and cross-entropy with a temperature that is fitted on texts held out.
"""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fusedloss as fl

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from arguments import count, parse, positive, share
from frame import Run, add_training, main, make_parser, run_all, save_figure, scores, table
from networks import BiLSTM, Encoder
from scores import f1
from tables import interval
from texts import load

QUICK = {"seeds": 1, "epochs": 4, "limit": 1000, "gammas": [1.0, 5.0], "smoothings": [0.1]}

#: What --encoder changes of the defaults.
ENCODER = {
    "out": Path("runs/papers/calibration-encoder"),
    "held_out": 0.5,
    "limit": 100,
    "epochs": 16,
    "batch": 16,
    "lr": 2e-4,
    "max_length": 32,
}
QUICK_ENCODER = {**QUICK, "texts": ["R52"], "limit": 50, "gammas": [3.0]}

COLUMNS = ("accuracy", "F1", "confidence", "confidence in errors", "ECE", "MCE")
CHOSEN = "focal, gamma chosen"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("calibration", "Focal loss and calibration, on imbalanced classes of text.")
    add = parser.add_argument_group("comparison").add_argument
    add("--texts", nargs="+", default=["R52", "SMS"], help="R52, SMS, or a file: label TAB text, one a line, UTF-8")
    words = "fine-tune an encoder in place of a BiLSTM: a folder that transformers can load, else MiniLM-L6"
    add("--encoder", nargs="?", const="", metavar="FOLDER", help=f"{words}; it changes other defaults")
    add("--gammas", type=positive, nargs="+", default=[1.0, 3.0, 5.0, 10.0], help="of the focal loss, beside CE")
    add("--smoothings", type=share, nargs="+", default=[0.05, 0.1], help="of the labels, for CE")
    words = "texts held out to fit a temperature and to choose gamma by, as a share of those to train on"
    add("--held-out", type=share, default=0.1, help=words)
    add("--bins", type=count(1), default=15, help="of the calibration errors and the diagrams")
    add_training(parser, limit=0, epochs=10, lr=4e-3)
    given = sys.argv[1:] if arguments is None else arguments
    encoder = any(word.split("=")[0] == "--encoder" for word in given)
    parser.set_defaults(**(ENCODER if encoder else {}))
    return parse(parser, QUICK_ENCODER if encoder else QUICK, arguments)


def losses(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of each row of the table."""
    plain = {"loss": "CE", "gamma": 0.0, "smoothing": 0.0, "scaled": False}
    return [
        plain,
        {**plain, "loss": "CE, temperature", "scaled": True},
        *({**plain, "loss": f"CE, smoothing {s:g}", "smoothing": s} for s in options.smoothings),
        *({**plain, "loss": f"focal, gamma {gamma:g}", "gamma": gamma} for gamma in options.gammas),
    ]


def compare(options: argparse.Namespace) -> None:
    tasks: dict[str, BiLSTM | Encoder] = {}
    for name in options.texts:
        tasks[name] = (BiLSTM if options.encoder is None else Encoder)(load(name), options)
        print(tasks[name])
    seeds = range(options.seed, options.seed + options.seeds)
    plan = [
        {"texts": name, "seed": seed, "bins": options.bins, **loss, **tasks[name].settings}
        for name, seed, loss in itertools.product(options.texts, seeds, losses(options))
    ]
    before: dict[str, torch.Tensor] = {}  # what a temperature scales: the logits of the last network

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        task = tasks[settings["texts"]]
        network = json.dumps({name: value for name, value in settings.items() if name not in ("loss", "scaled")})
        if network not in before:
            before.clear()
            before[network] = task.logits(loss_of(settings), settings)
        return measure(before[network], task.target, task.held_out, settings)

    runs = run_all(plan, run, told, options.out, options.fresh)
    draw_diagrams(runs, options.out / "calibration.png")
    write_table([*runs, *chosen(runs)], options.out / "table.md")
    print(f"table, plot and results: {options.out}")


def loss_of(settings: dict[str, Any]) -> torch.nn.Module:
    if settings["gamma"]:
        return fl.nn.FocalLoss(gamma=settings["gamma"])
    return fl.nn.CrossEntropyLoss(label_smoothing=settings["smoothing"])


def measure(logits: torch.Tensor, target: torch.Tensor, held_out: int, settings: dict[str, Any]) -> dict[str, Any]:
    """On all but the first texts, which are held out: a temperature is fitted to them, or a gamma is chosen by them."""
    bins = settings["bins"]
    temperature = 1.0
    if settings["scaled"]:
        temperature = fl.fit_temperature(logits[:held_out], target[:held_out]).temperature
    _, both = fl.cross_entropy(logits, target, temperature=temperature, return_stats=True)
    held, stats = (
        fl.RowStats(*[column if column is None else column[part] for column in both])
        for part in (slice(held_out), slice(held_out, None))
    )
    held_target, target = target[:held_out], target[held_out:]
    confidence, wrong = stats.argmax_log_prob.double().exp(), stats.argmax != target
    diagram = fl.calibration_bins(stats, target, bins=bins)
    return {
        "accuracy": 1 - wrong.double().mean().item(),
        "F1": f1(stats.argmax, target, logits.shape[1]),
        "confidence": confidence.mean().item(),
        "confidence in errors": confidence[wrong].mean().nan_to_num().item(),  # 0 where there are none
        "ECE": fl.calibration_error(stats, target, bins=bins).item(),
        "MCE": fl.calibration_error(stats, target, bins=bins, norm="max").item(),
        "ECE held out": fl.calibration_error(held, held_target, bins=bins).item(),
        "temperature": temperature,
        "diagram": [column.nan_to_num().tolist() for column in diagram],
    }


def told(run: Run) -> str:
    values = ", ".join(f"{name} {run.measured[name]:.1%}" for name in COLUMNS)
    scaled = f" {run.measured['temperature']:.2f}" if run.settings["scaled"] else ""
    return f"{run.settings['texts']}, {run.settings['loss']}{scaled}, seed {run.settings['seed']}: {values}"


def chosen(runs: Sequence[Run]) -> list[Run]:
    """Of each seed, CE or the focal loss with the least ECE on the texts held out."""
    candidates: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if not run.settings["scaled"] and not run.settings["smoothing"]:
            candidates.setdefault((run.settings["texts"], run.settings["seed"]), []).append(run)
    best = [min(own, key=lambda run: run.measured["ECE held out"]) for own in candidates.values()]
    return [Run({**run.settings, "loss": CHOSEN}, run.measured) for run in best]


def write_table(runs: Sequence[Run], path: Path) -> None:
    """For each set of texts a row for each loss, with the interval of what it adds to CE's ECE, seed by seed."""
    tables = []
    for name in dict.fromkeys(run.settings["texts"] for run in runs):
        own = [run for run in runs if run.settings["texts"] == name]
        more = [" ECE - CE's: 95 % interval |", "---:|"]
        for loss in dict.fromkeys(run.settings["loss"] for run in own):
            pairs = zip(scores(own, loss, "ECE"), scores(own, "CE", "ECE"), strict=True)
            more.append(f" {interval([100 * (ece - plain) for ece, plain in pairs]) if loss != 'CE' else ''} |")
        lines = table(own, "loss", dict.fromkeys(COLUMNS, 100)).splitlines()
        tables.append("\n".join([f"{name}\n", *(line + cell for line, cell in zip(lines, more, strict=True)), ""]))
    written = "\n".join(tables)
    print(
        f"\nin %, mean and standard deviation over {len({run.settings['seed'] for run in runs})} seed(s)\n\n{written}"
    )
    path.write_text(written, encoding="utf-8")


def draw_diagrams(runs: Sequence[Run], path: Path) -> None:
    """Reliability diagrams: two rows for each set of texts, a panel for each loss, the texts of all seeds together."""
    names = list(dict.fromkeys(run.settings["texts"] for run in runs))
    losses = list(dict.fromkeys(run.settings["loss"] for run in runs))
    width = -(-len(losses) // 2)
    with save_figure(path, 2 * len(names), width) as panels:
        for (i, name), (j, loss) in itertools.product(enumerate(names), enumerate(losses)):
            diagrams = torch.tensor(
                [r.measured["diagram"] for r in runs if (r.settings["texts"], r.settings["loss"]) == (name, loss)],
                dtype=torch.float64,
            )  # (seeds, 3, bins)
            total = diagrams[:, 0].sum(0)
            both = (diagrams[:, :1] * diagrams[:, 1:]).sum(0) / total  # NaN where a bin has no texts
            fl.plot_reliability(fl.CalibrationBins(total, *both), panels[2 * i + j // width][j % width])
            panels[2 * i + j // width][j % width].set_title(f"{name}, {loss}")


if __name__ == "__main__":
    main(parse_arguments, compare)
