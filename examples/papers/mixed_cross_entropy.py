"""Mixed cross-entropy in translation: a small Transformer trained with it and with cross-entropy, English to German.

After Li et al. 2021, "Mixed Cross Entropy Loss for Neural Machine Translation": by teacher forcing, and by scheduled
sampling, in which the decoder reads some of its own choices. It is examples/nmt, trained four times from each seed.
"""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import copy
import dataclasses
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fusedloss as fl

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
sys.path.append(str(Path(__file__).resolve().parents[1] / "nmt"))
from arguments import share
from data import PAD, Batch, DataError, Vocabulary, all_batches, encode_pairs, fingerprint, load_pairs, split_by_file
from evaluate import bleu, held_out, translate
from frame import Run, draw_scores, main, make_parser, parse, run_all, save_figure, table
from model import autocast
from options import Config, add_options, check, make_config
from tables import interval, spread
from trainer import Trainer, training_loss, warming_up

#: The names of the runs: the loss, and whether its scheduled sampling follows the warm-up.
LOSSES = {
    "CE": ("ce", False),
    "mixed CE": ("mixed", False),
    "CE, sampled": ("ce", True),
    "mixed CE, sampled": ("mixed", True),
}
COLUMNS = ("BLEU", "held-out CE", "accuracy in %")
SPLIT = 1  # the seed of the split, the same for all runs
QUICK = {"seeds": 2, "steps": 100, "d_model": 96, "vocab_size": 2000, "bleu_sentences": 60}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("mixed_cross_entropy", "Mixed cross-entropy in translation: a small Transformer.")
    add = parser.add_argument_group("comparison").add_argument
    add("--gold", type=share, default=0.8, help="share of the reference in what a sampled run reads at its end")
    add_options(parser)
    parser.set_defaults(bleu_sentences=0)
    options = parse(parser, QUICK, arguments)
    check(parser, options)
    return options


class SampledTrainer(Trainer):
    """Scheduled sampling, once the warm-up is over: two passes of the decoder.

    The first reads the reference. The second reads its choices in place of a growing share of the pieces, and has the
    loss, whose prediction is what the first pass chose there.
    """

    def __init__(self, *arguments: Any, gold: float) -> None:
        super().__init__(*arguments)
        self._gold = gold

    def loss(self, batch: Batch) -> torch.Tensor:
        if warming_up(self.config, self.step):
            return super().loss(batch)
        memory, weight = self.model.encode(batch.source), self.model.output_weight
        with torch.no_grad():
            hidden, _ = self.model.decode(batch.target_in, memory)
            shared = {"ignore_index": PAD, "reduction": "sum", "return_stats": True, "impl": self.impl}
            chosen = fl.linear_cross_entropy(hidden, weight, batch.target_out, **shared)[1].argmax  # (B, T)
        hidden, _ = self.model.decode(self.replaced(batch.target_in, chosen), memory)
        return training_loss(self.config, self.step, hidden, weight, batch.target_out, self.impl, chosen)

    def replaced(self, target_in: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """target_in (B, T) with some of its pieces as the position before would have them; BOS and padding stay."""
        share = 1 - self._gold ** (self.step / self.config.steps)
        before = torch.cat((target_in[:, :1], chosen[:, :-1]), dim=1)
        return torch.where((torch.rand(target_in.shape) < share) & (target_in != PAD), before, target_in)


class Experiment:
    """The corpus, and the runs on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        pairs = load_pairs(options.data)
        train, held = split_by_file(pairs, options.held_out, SPLIT)
        self.fingerprint = fingerprint(pairs)
        self._vocabulary = Vocabulary.train(train, options.vocab_size)
        self._train, self._held = (encode_pairs(side, self._vocabulary, options.max_length) for side in (train, held))
        if not self._train or not self._held:
            raise DataError(f"no sentence is within --max-length {options.max_length} pieces")
        self._translated = random.Random(SPLIT).sample(held, min(options.bleu_sentences or len(held), len(held)))
        self._warm: dict[str, Any] | None = None

    def __str__(self) -> str:
        return (
            f"{len(self._train):,} pairs to train on and {len(self._held):,} to test, of which "
            f"{len(self._translated):,} are translated; {len(self._vocabulary):,} BPE pieces"
        )

    def run(self, settings: dict[str, Any]) -> dict[str, float]:
        """A network, trained and measured."""
        config = Config(**settings["config"])
        trainer = self._trainer(config, settings["gold"])
        trainer.load(self._warmed_up(config))
        for _ in tqdm(range(trainer.step, config.steps), settings["loss"], unit="update", leave=False, disable=None):
            trainer.update()
        with autocast(config.dtype):
            ce, accuracy = held_out(trainer.model, all_batches(self._held, 4096))
        sources, references = ([getattr(pair, side) for pair in self._translated] for side in ("source", "target"))
        score = bleu(translate(trainer.model, self._vocabulary, sources, settings["beam"]), references)
        return dict(zip(COLUMNS, (score, ce, 100 * accuracy), strict=True))

    def _trainer(self, config: Config, gold: float | None) -> Trainer:
        arguments = (config, self._train, self._vocabulary, None)
        return Trainer(*arguments) if gold is None else SampledTrainer(*arguments, gold=gold)

    def _warmed_up(self, config: Config) -> dict[str, Any]:
        """What a run goes on from: until the warm-up is over all losses are one, and a seed has one of it."""
        config = dataclasses.replace(config, loss="ce")
        if self._warm is None or self._warm["config"] != dataclasses.asdict(config):
            trainer = self._trainer(config, None)
            while warming_up(config, trainer.step):
                trainer.update()
            self._warm = trainer.state()
        return copy.deepcopy(self._warm)


def compare(options: argparse.Namespace) -> None:
    experiment = Experiment(options)
    print(experiment)
    plan = []
    for seed in range(options.seed, options.seed + options.seeds):
        for name, (loss, sampled) in LOSSES.items():
            own = argparse.Namespace(**{**vars(options), "loss": loss, "gamma": 0.0, "seed": seed})
            plan.append(
                {
                    "loss": name,
                    "gold": options.gold if sampled else None,
                    "beam": options.beam,
                    "bleu_sentences": options.bleu_sentences,
                    "config": dataclasses.asdict(make_config(own, experiment.fingerprint)),
                }
            )
    runs = run_all(plan, experiment.run, told, options.out, options.fresh)
    written = f"{table(runs, 'loss', dict.fromkeys(COLUMNS, 1), '.2f')}\n{differences(runs)}"
    print(f"\nmean and standard deviation over {options.seeds} seed(s)\n\n{written}")
    (options.out / "table.md").write_text(written, encoding="utf-8")
    with save_figure(options.out / "mixed_cross_entropy.png", 1, len(COLUMNS)) as (panels,):
        for panel, column in zip(panels, COLUMNS, strict=True):
            draw_scores(panel, {name.replace(" ", "\n"): scores(runs, name, column) for name in LOSSES})
            panel.set(title=column)
    print(f"table, plot and results: {options.out}")


def told(run: Run) -> str:
    values = ", ".join(f"{column} {run.measured[column]:.2f}" for column in COLUMNS)
    return f"{run.settings['loss']}, seed {run.settings['config']['seed']}: {values}"


def scores(runs: Sequence[Run], loss: str, column: str) -> list[float]:
    """Of the runs of a loss, a number for each seed."""
    return [run.measured[column] for run in runs if run.settings["loss"] == loss]


def differences(runs: Sequence[Run]) -> str:
    """In Markdown, what mixed cross-entropy adds to the columns, seed by seed."""
    lines = ["| mixed CE - CE | mean | 95 % interval | of each seed |", "|---|---:|---:|---:|"]
    for ending, forcing in (("", "teacher forcing"), (", sampled", "scheduled sampling")):
        for column in COLUMNS:
            both = (scores(runs, name + ending, column) for name in ("mixed CE", "CE"))
            own = [mixed - plain for mixed, plain in zip(*both, strict=True)]
            each = ", ".join(f"{value:+.2f}" for value in own)
            lines.append(f"| {forcing}, {column} | {spread(own, '+.2f')} | {interval(own, '+.2f')} | {each} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(parse_arguments, compare)
