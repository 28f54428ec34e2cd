"""The long form of mixed_cross_entropy.py: many passes over the corpus, with the paper's rivals.

For each seed all losses go on from one warm-up of cross-entropy. A run leaves its state in the folder of the results
every ten minutes and when it is stopped, from which the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint, save_checkpoint
from data import PAD, Batch
from experiment import COLUMNS, Experiment, told
from frame import Run, differences, key, run_all, save_figure, table
from options import Config, make_config
from student import Student
from trainer import Interruption, Trainer, alpha_at, as_baseline, warm_up_ends

import fusedloss as fl

#: The names of the runs: the loss of the translation example that it is or extends, and what else decides it.
LOSSES: dict[str, tuple[str, dict[str, float]]] = {
    "CE": ("ce", {}),
    "mixed CE": ("mixed", {}),
    "label smoothing": ("ce", {"label_smoothing": 0.1}),
    "dual skew": ("ce", {"alpha": 0.99, "beta": 0.8}),
    "self-distillation": ("ce", {"soft": 0.5, "temperature": 1.0}),
    "mixed CE, top 2": ("mixed", {"top_k": 2}),
}
FIRST = ("CE", "mixed CE")  # of all seeds before the rivals of any
MEASURED = ("BLEU", "chrF", *COLUMNS[1:])
CURVE_SENTENCES = 200  # greedily translated at each point of the curves
CHECKPOINT_SECONDS = 600


class Rival(Trainer):
    """Has another loss than the translation example's."""

    def __init__(self, *arguments: Any, name: str, knobs: dict[str, Any]) -> None:
        super().__init__(*arguments)
        self._name, self._knobs = name, knobs

    def loss(self, batch: Batch) -> torch.Tensor:
        rows = (self.model(batch.source, batch.target_in), self.model.output_weight, batch.target_out)
        shared: dict[str, Any] = {"ignore_index": PAD, "impl": self.impl}
        if self._name == "label smoothing":
            return fl.linear_cross_entropy(*rows, **self._knobs, **shared)
        if self._name == "dual skew":
            return fl.linear_flex_loss(*rows, partial(dual_skew, **self._knobs), **shared)
        return fl.linear_mixed_cross_entropy(*rows, alpha=alpha_at(self.config, self.step), **self._knobs, **shared)


def dual_skew(s: Any, alpha: float, beta: float) -> torch.Tensor:
    """Li et al. 2019: beta KL(y | alpha p + (1 - alpha) y) + (1 - beta) KL(p | alpha y + (1 - alpha) p)."""
    forward = -torch.log1p(-alpha * s.q)
    reverse = -s.p * (s.ce + torch.log1p((alpha - 1) * s.q)) - s.q * math.log1p(-alpha)
    return beta * forward + (1 - beta) * reverse


class Long:
    """The runs of a folder."""

    def __init__(self, experiment: Experiment, out: Path) -> None:
        self._experiment, self._out = experiment, out

    def path(self, what: dict[str, Any]) -> Path:
        """Where the state of a run of these settings is kept."""
        return self._out / f"{hashlib.sha256(key(what).encode()).hexdigest()[:12]}.pt"

    def run(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A network, trained and measured."""
        trainer, seconds = self._trained(settings)
        start = time.process_time()
        measured = self._experiment.measure(trainer, settings["beam"])
        seconds += time.process_time() - start
        return {**measured, "curves": trainer.curves, "processor seconds": round(seconds, 1)}

    def _trained(self, settings: dict[str, Any]) -> tuple[Trainer, float]:
        """The trained network, and the processor time that it took after the warm-up."""
        trainer = self._trainer(settings)
        path, curves = self.path(settings), settings["curves"]
        if not path.exists():
            trainer.load(self._warmed_up(trainer.config, curves))
        return trainer, self._go_on(trainer, trainer.config.steps, path, **curves)

    def _trainer(self, settings: dict[str, Any]) -> Trainer:
        name, knobs = settings["loss"], settings["knobs"]
        arguments = (Config(**settings["config"]), self._experiment.train, self._experiment.vocabulary, None)
        if name == "self-distillation":
            teacher = self._trained({**settings, "loss": "CE", "knobs": {}})[0]
            return Student(*arguments, teacher=teacher.model, **knobs)
        return Rival(*arguments, name=name, knobs=knobs) if knobs else Trainer(*arguments)

    def _warmed_up(self, config: Config, curves: dict[str, int]) -> dict[str, Any]:
        """The state after the warm-up, which a seed's runs share."""
        config = as_baseline(config)
        trainer = Trainer(config, self._experiment.train, self._experiment.vocabulary, None)
        path = self.path({"warm-up": dataclasses.asdict(config), "curves": curves})
        self._go_on(trainer, warm_up_ends(config), path, **curves)
        return trainer.state()

    def _go_on(self, trainer: Trainer, end: int, path: Path, points: int, sentences: int) -> float:
        """Train to an update, from the state in `path` where there is one; the processor time from its beginning.

        One process does, and others that want the same wait for it.
        """
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = 0.0
            if path.exists():
                state = load_checkpoint(path, trainer.config)
                trainer.load(state)
                before = state["processor"]
            start, saved = time.process_time(), time.monotonic()

            def save() -> float:
                seconds = before + time.process_time() - start
                save_checkpoint(path, {**trainer.state(), "processor": seconds})
                return seconds

            with Interruption() as interruption:
                while trainer.step < end:
                    trainer.update()
                    if trainer.step % max(1, trainer.config.steps // points) == 0:
                        self._add_point(trainer, sentences)
                    if interruption.signal is not None:
                        save()
                        sys.exit(128 + interruption.signal)
                    if time.monotonic() - saved > CHECKPOINT_SECONDS:
                        save()
                        saved = time.monotonic()
            return save()

    def _add_point(self, trainer: Trainer, sentences: int) -> None:
        measured = self._experiment.measure(trainer, beam=1, sentences=sentences)
        loss = sum(trainer.recent) / len(trainer.recent)
        trainer.curves.append({"step": trainer.step, "train loss": loss, **measured})
        trainer.recent = []
        print(f"seed {trainer.config.seed}, update {trainer.step}: BLEU {measured['BLEU']:.2f}, greedy")


def make_plan(options: argparse.Namespace, fingerprint: str) -> list[dict[str, Any]]:
    def settings(name: str, seed: int) -> dict[str, Any]:
        loss, knobs = LOSSES[name]
        own = argparse.Namespace(**{**vars(options), "loss": loss, "gamma": 0.0, "seed": seed})
        return {
            "loss": name,
            "knobs": knobs,
            "beam": options.beam,
            "bleu_sentences": options.bleu_sentences,
            "curves": {"points": options.points, "sentences": CURVE_SENTENCES},
            "config": dataclasses.asdict(make_config(own, fingerprint)),
        }

    seeds = range(options.seed, options.seed + options.seeds)
    parts = ([name for name in options.losses if (name in FIRST) == first] for first in (True, False))
    return [settings(name, seed) for part in parts for seed in seeds for name in part]


def compare(options: argparse.Namespace) -> None:
    experiment = Experiment(options)
    print(experiment)
    plan = make_plan(options, experiment.fingerprint)
    long = Long(experiment, options.out)
    if options.fresh:
        for path in options.out.glob("*.pt"):
            path.unlink()

    def kept(settings: dict[str, Any]) -> None:
        if settings["loss"] != "CE":  # which teaches
            long.path(settings).unlink(missing_ok=True)

    runs = run_all(plan, long.run, lambda run: told(*run), options.out, options.fresh, kept)
    written = table(runs, "loss", dict.fromkeys(MEASURED, 1), ".2f")
    if "CE" in options.losses and len(options.losses) > 1:
        pairs = {name: (name, "CE") for name in options.losses if name != "CE"}
        written += "\n" + differences(runs, "- CE", pairs, MEASURED)
    hours = sum(run.measured["processor seconds"] for run in runs) / 3600
    print(f"\nmean and standard deviation over {options.seeds} seed(s); {hours:.1f} h of processor time\n\n{written}")
    (options.out / "table.md").write_text(written, encoding="utf-8")
    with save_figure(options.out / "mixed_long.png", 1, 2) as (panels,):
        for panel, column in zip(panels, ("BLEU", "held-out CE"), strict=True):
            draw_curves(panel, [run for run in runs if run.settings["loss"] in FIRST] or runs, column)
    print(f"table, plot and results: {options.out}")


def draw_curves(panel: Any, runs: list[Run], column: str) -> None:
    """What was measured in the training, against the updates: a line for each run, in the colour of its loss."""
    for i, loss in enumerate(dict.fromkeys(run.settings["loss"] for run in runs)):
        for number, run in enumerate(run for run in runs if run.settings["loss"] == loss):
            points = run.measured["curves"]
            label = None if number else loss
            panel.plot([p["step"] for p in points], [p[column] for p in points], f"C{i}", linewidth=1, label=label)
    panel.set(title=column, xlabel="updates")
    panel.legend()
