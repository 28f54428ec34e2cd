"""Distils a small translation model into one of the same width and one of half the width, and measures both.

README.md tells the options. The data, the model and the training are those of examples/nmt.
"""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
sys.path.append(str(Path(__file__).resolve().parents[1] / "papers"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "nmt"))
from arguments import count, cpus, parse, positive, share_or_all
from experiment import COLUMNS, Experiment, told
from frame import differences, main, run_all, table
from options import Config, add_options, check, make_config
from student import Student
from trainer import Trainer

TEACHER_SEED = 1000  # is added to a seed's: a teacher has weights and batches that none of its students has


QUICK = {
    "out": Path("runs/distill-quick"),
    "threads": 1,  # two that sleep while they wait for each other take longer on models this small
    "steps": 60,
    "d_model": 64,
    "vocab_size": 2000,
    "beam": 1,
    "bleu_sentences": 50,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Distils a small translation model, and measures it beside cross-entropy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("runs").add_argument
    add("--out", type=Path, default=Path("runs/distill"), help="folder of the results and the table")
    add("--fresh", action="store_true", help="forget the runs that --out holds")
    add("--seeds", type=int, nargs="+", default=[0], help="of the weights and the batches: a teacher each")
    add("--threads", type=count(1), default=cpus(), help="CPU threads")
    add = parser.add_argument_group("distillation").add_argument
    add("--soft", type=share_or_all, default=0.5, help="share of the divergence in the loss; CE has the rest")
    add("--temperature", type=positive, default=1.0, help="of the divergence")
    add_options(parser)
    parser.set_defaults(d_model=128, vocab_size=4000, steps=500)
    options = parse(parser, QUICK, arguments)
    check(parser, options)
    if options.d_model % (4 * options.heads):
        parser.error(f"half of --d-model {options.d_model} must be a multiple of twice --heads {options.heads}")
    if not options.soft:
        parser.error(
            f"--soft must be above 0, got {options.soft}: without a teacher the loss is CE, which is trained anyway"
        )
    return options


def train(experiment: Experiment, config: Config) -> Trainer:
    """A network without a teacher."""
    trainer = Trainer(config, experiment.train, experiment.vocabulary, None)
    trainer.load(experiment.warmed_up(config))
    experiment.finish(trainer, config.loss)
    return trainer


def run(experiment: Experiment, trained: Callable[[Config], Trainer], settings: dict[str, Any]) -> dict[str, float]:
    """A network, trained and measured."""
    config = Config(**settings["config"])
    if settings["distillation"] is None:
        trainer = trained(config)
    else:
        teacher = trained(Config(**settings["teacher"])).model
        arguments = (config, experiment.train, experiment.vocabulary, None)
        trainer = Student(*arguments, teacher=teacher, **settings["distillation"])
        experiment.finish(trainer, settings["loss"])
    return experiment.measure(trainer, settings["beam"])


def compare(options: argparse.Namespace) -> None:
    experiment = Experiment(options)
    print(f"{experiment}; {options.threads} threads")
    widths = (options.d_model, options.d_model // 2)

    def settings(name: str, loss: str, width: int, seed: int, teacher: dict[str, Any] | None) -> dict[str, Any]:
        own = {"loss": loss, "d_model": width, "seed": seed, "gamma": 0.0}
        config = make_config(argparse.Namespace(**{**vars(options), **own}), experiment.fingerprint)
        distillation = {"soft": options.soft, "temperature": options.temperature} if teacher else None
        return {
            "loss": f"{name}, {width} wide",
            "beam": options.beam,
            "bleu_sentences": options.bleu_sentences,
            "config": dataclasses.asdict(config),
            "teacher": teacher,
            "distillation": distillation,
        }

    plan = []
    for seed in options.seeds:
        teacher = settings("teacher (CE)", "ce", widths[0], TEACHER_SEED + seed, None)
        plan.append(teacher)
        for width in widths:
            plan.append(settings("CE", "ce", width, seed, None))
            plan.append(settings("mixed CE", "mixed", width, seed, None))
            plan.append(settings("KD", "ce", width, seed, teacher["config"]))
    trained = functools.cache(functools.partial(train, experiment))
    one = functools.partial(run, experiment, trained)
    runs = run_all(plan, one, lambda run: told(*run), options.out, options.fresh)
    pairs = {
        f"{name} - CE, {width} wide": (f"{name}, {width} wide", f"CE, {width} wide")
        for width in widths
        for name in ("mixed CE", "KD")
    }
    added = differences(runs, "of one seed", pairs, COLUMNS)
    written = f"{table(runs, 'loss', dict.fromkeys(COLUMNS, 1), '.2f')}\n{added}"
    print(f"\nmean and standard deviation over {len(options.seeds)} seed(s)\n\n{written}")
    (options.out / "table.md").write_text(written, encoding="utf-8")
    print(f"table and results: {options.out}")


if __name__ == "__main__":
    main(parse_arguments, compare)
