"""Cross-entropy with a contrastive loss beside it: an encoder fine-tuned on few labels, of which some are wrong.

After Gunel et al. 2021, "Supervised Contrastive Learning for Pre-trained Language Model Fine-tuning". It is
examples/fewshot with a share of the training labels replaced by those of other classes.
"""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import hashlib
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
sys.path.append(str(Path(__file__).resolve().parents[1] / "fewshot"))
from arguments import share_or_all
from experiment import Experiment
from frame import Run, main, make_parser, parse, run_all, save_figure
from options import add_options, settle
from report import table
from training import LOSSES

QUICK = {"seeds": 2, "sizes": [20, 100], "noise": [0.0, 0.3]}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("contrastive", "Few labels, of which some are wrong: CE against CE + SupCon.")
    parser.set_defaults(seeds=5)
    add = parser.add_argument_group("comparison").add_argument
    add("--noise", type=share_or_all, nargs="+", default=[0.0, 0.1, 0.3, 0.5], help="shares of wrong training labels")
    add_options(parser)
    options = parse(parser, QUICK, arguments)
    settle(parser, options)
    return options


def compare(options: argparse.Namespace) -> None:
    experiment = Experiment(options)
    test = experiment.encoded(experiment.parts.test)
    shared = {
        "fingerprint": fingerprint(experiment),
        "max_length": options.max_length,
        "dtype": options.dtype,
        **experiment.settings._asdict(),
    }
    seeds = range(options.seed, options.seed + options.seeds)
    plan = [
        {"labelled": size, "noise": noise, "loss": loss, "seed": seed, "epochs": options.epochs[size], **shared}
        for seed, size, noise, loss in itertools.product(seeds, options.sizes, options.noise, LOSSES)
    ]

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        size = settings["labelled"]
        with tqdm(total=experiment.updates(size), unit="update", leave=False, disable=None) as bar:
            accuracy, _ = experiment.run(
                settings["loss"], size, settings["seed"], experiment.settings, test, bar, settings["noise"]
            )
        return {"accuracy": accuracy}

    runs = run_all(plan, run, told, options.out, options.fresh)
    written = table([{**run.settings, **run.measured} for run in runs], by=("labelled", "noise"))
    print(f"\naccuracy in %, mean and standard deviation over {len(seeds)} seed(s)\n\n{written}")
    (options.out / "table.md").write_text(written, encoding="utf-8")
    draw_accuracies(runs, options.out / "contrastive.png")
    print(f"table, plot and results: {options.out}")


def fingerprint(experiment: Experiment) -> str:
    """Of the questions, the pieces they are cut into, and the encoder."""
    parts = [(part, experiment.encoded(part).pieces) for part in (experiment.parts.pool, experiment.parts.test)]
    digest = hashlib.sha256(repr(parts).encode())
    for weight in experiment.encoder.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()[:16]


def told(run: Run) -> str:
    size, noise, loss, seed = (run.settings[name] for name in ("labelled", "noise", "loss", "seed"))
    return f"{size} labelled, noise {noise}, {loss}, seed {seed}: {run.measured['accuracy']:.1%}"


def draw_accuracies(runs: Sequence[Run], path: Path) -> None:
    """Accuracy against noise, a panel for each number of labels: a point for each seed, a line through their means."""
    sizes = list(dict.fromkeys(run.settings["labelled"] for run in runs))
    with save_figure(path, 1, len(sizes)) as (panels,):
        for (panel, size), (i, loss) in itertools.product(zip(panels, sizes, strict=True), enumerate(LOSSES)):
            scores: dict[float, list[float]] = {}
            for run in runs:
                if (run.settings["labelled"], run.settings["loss"]) == (size, loss):
                    scores.setdefault(run.settings["noise"], []).append(100 * run.measured["accuracy"])
            for noise, own in scores.items():
                panel.plot([noise] * len(own), own, f"C{i}.", markersize=4)
            panel.plot(scores.keys(), [statistics.mean(own) for own in scores.values()], f"C{i}", label=loss)
            panel.set(title=f"{size} labelled: accuracy in %", xlabel="share of wrong labels")
        panels[0].legend()


if __name__ == "__main__":
    main(parse_arguments, compare)
