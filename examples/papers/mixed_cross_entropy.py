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
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fusedloss as fl

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
sys.path.append(str(Path(__file__).resolve().parents[1] / "nmt"))
import mixed_long
from arguments import count, parse, share
from data import PAD, Batch
from experiment import COLUMNS, Experiment, told
from frame import differences, draw_scores, main, make_parser, run_all, save_figure, scores, table
from options import Config, add_options, check, make_config
from trainer import Trainer, training_loss, warming_up

#: The names of the runs: the loss, and whether its scheduled sampling follows the warm-up.
LOSSES = {
    "CE": ("ce", False),
    "mixed CE": ("mixed", False),
    "CE, sampled": ("ce", True),
    "mixed CE, sampled": ("mixed", True),
}
#: What --long changes: about 12 passes over the corpus, and no label smoothing, as the paper compares.
LONG = {
    "out": Path("runs/papers/mixed_long"),
    "steps": 9300,
    "ce_warmup": 0.2,
    "dropout": 0.1,
    "label_smoothing": 0.0,
}
QUICK = {"seeds": 1, "steps": 100, "d_model": 96, "vocab_size": 2000, "bleu_sentences": 60}
QUICK_LONG = {"out": Path("runs/papers/mixed_long-quick"), "steps": 50, "points": 2}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("mixed_cross_entropy", "Mixed cross-entropy in translation: a small Transformer.")
    add = parser.add_argument_group("comparison").add_argument
    add("--gold", type=share, default=0.8, help="share of the reference in what a sampled run reads at its end")
    add("--long", action="store_true", help="12 passes over the corpus, with the paper's rivals: half a day")
    names = [*mixed_long.LOSSES]
    add("--losses", nargs="+", choices=names, default=names, metavar="LOSS", help="of --long: some of %(default)s")
    add("--points", type=count(1), default=10, help="of --long: of the curve of a run, each some seconds long")
    add_options(parser)
    parser.set_defaults(bleu_sentences=0)
    long = "--long" in (sys.argv[1:] if arguments is None else arguments)
    parser.set_defaults(**LONG if long else {})
    options = parse(parser, QUICK | (QUICK_LONG if long else {}), arguments)
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


def run(experiment: Experiment, settings: dict[str, Any]) -> dict[str, float]:
    """A network, trained and measured."""
    config = Config(**settings["config"])
    arguments = (config, experiment.train, experiment.vocabulary, None)
    gold = settings["gold"]
    trainer = Trainer(*arguments) if gold is None else SampledTrainer(*arguments, gold=gold)
    trainer.load(experiment.warmed_up(config))
    experiment.finish(trainer, settings["loss"])
    return experiment.measure(trainer, settings["beam"])


def compare(options: argparse.Namespace) -> None:
    if options.long:
        mixed_long.compare(options)
        return
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
    runs = run_all(plan, partial(run, experiment), lambda run: told(*run), options.out, options.fresh)
    forcing = {"teacher forcing": "", "scheduled sampling": ", sampled"}
    pairs = {name: (f"mixed CE{ending}", f"CE{ending}") for name, ending in forcing.items()}
    added = differences(runs, "mixed CE - CE", pairs, COLUMNS)
    written = f"{table(runs, 'loss', dict.fromkeys(COLUMNS, 1), '.2f')}\n{added}"
    print(f"\nmean and standard deviation over {options.seeds} seed(s)\n\n{written}")
    (options.out / "table.md").write_text(written, encoding="utf-8")
    with save_figure(options.out / "mixed_cross_entropy.png", 1, len(COLUMNS)) as (panels,):
        for panel, column in zip(panels, COLUMNS, strict=True):
            draw_scores(panel, {name.replace(" ", "\n"): scores(runs, name, column) for name in LOSSES})
            panel.set(title=column)
    print(f"table, plot and results: {options.out}")


if __name__ == "__main__":
    main(parse_arguments, compare)
