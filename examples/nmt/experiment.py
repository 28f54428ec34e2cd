"""The translation model trained with several losses, and measured alike: what experiments on losses share."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
from typing import Any

from data import DataError, Vocabulary, all_batches, encode_pairs, fingerprint, load_pairs, split_by_file
from evaluate import bleu, chrf, held_out, translate
from model import autocast
from options import Config
from tqdm import tqdm
from trainer import Trainer, warming_up

COLUMNS = ("BLEU", "held-out CE", "accuracy in %")
SPLIT = 1  # the seed of the split, the same for all runs


class Experiment:
    """The corpus, and the runs on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        pairs = load_pairs(options.data)
        train, held = split_by_file(pairs, options.held_out, SPLIT)
        self.fingerprint = fingerprint(pairs)
        self.vocabulary = Vocabulary.train(train, options.vocab_size)
        self.train, self._held = (encode_pairs(side, self.vocabulary, options.max_length) for side in (train, held))
        if not self.train or not self._held:
            raise DataError(f"no sentence is within --max-length {options.max_length} pieces")
        self._translated = random.Random(SPLIT).sample(held, min(options.bleu_sentences or len(held), len(held)))
        self._warm: dict[str, Any] | None = None

    def __str__(self) -> str:
        return (
            f"{len(self.train):,} pairs to train on and {len(self._held):,} to test, of which "
            f"{len(self._translated):,} are translated; {len(self.vocabulary):,} BPE pieces"
        )

    def finish(self, trainer: Trainer, name: str) -> None:
        """Train to the last update."""
        config = trainer.config
        for _ in tqdm(range(trainer.step, config.steps), name, unit="update", leave=False, disable=None):
            trainer.update()

    def measure(self, trainer: Trainer, beam: int, sentences: int | None = None) -> dict[str, float]:
        """The columns of a trained network, and chrF. `sentences`: how many of those to translate, else all."""
        with autocast(trainer.config.dtype):
            ce, accuracy = held_out(trainer.model, all_batches(self._held, 4096))
        chosen = self._translated[:sentences]
        sources, references = ([getattr(pair, side) for pair in chosen] for side in ("source", "target"))
        translations = translate(trainer.model, self.vocabulary, sources, beam)
        columns = dict(zip(COLUMNS, (bleu(translations, references), ce, 100 * accuracy), strict=True))
        return columns | {"chrF": chrf(translations, references)}

    def warmed_up(self, config: Config) -> dict[str, Any]:
        """The state after the warm-up. Until then all losses are cross-entropy: successive runs of a seed share it."""
        config = dataclasses.replace(config, loss="ce")
        if self._warm is None or self._warm["config"] != dataclasses.asdict(config):
            trainer = Trainer(config, self.train, self.vocabulary, None)
            while warming_up(config, trainer.step):
                trainer.update()
            self._warm = trainer.state()
        return copy.deepcopy(self._warm)


def told(settings: dict[str, Any], measured: dict[str, float]) -> str:
    """A line of a run's figures."""
    values = ", ".join(f"{column} {measured[column]:.2f}" for column in COLUMNS)
    return f"{settings['loss']}, seed {settings['config']['seed']}: {values}"
