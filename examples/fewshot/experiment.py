"""Encoder and questions, and the runs on them."""

from __future__ import annotations

from typing import Any

from data import DataError, Question, draw, load_questions, mislabel, split
from model import Encoded, encode, encoder_folder, load_encoder
from torch import Tensor
from training import Settings, accuracy, loss_of, predict, train, updates


class Experiment:
    """`options`: those of `add_options`, settled."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.settings = Settings(*(getattr(options, name) for name in Settings._fields))
        questions, repeated = load_questions(options.data)
        self.parts = split(questions, options.held_out, options.validation)
        self.labels = sorted({question.label for question in questions})
        for size in options.sizes:
            draw(self.parts.pool, size, options.seed)  # raises now rather than after hours
        self.encoder, self.tokenizer = load_encoder(options.encoder or encoder_folder())
        longest = getattr(self.encoder.config, "max_position_embeddings", options.max_length)
        if options.max_length > longest:
            raise DataError(f"--max-length {options.max_length} is more than the encoder's {longest} positions")
        self.bf16 = options.dtype == "bf16"
        print(
            f"{len(questions):,} questions in {len(self.labels)} classes ({repeated:,} repetitions left out): "
            f"{len(self.parts.pool):,} to draw from, {len(self.parts.validation):,} to choose settings by, "
            f"{len(self.parts.test):,} to test; {self.encoder.num_parameters() / 1e6:.1f} M parameters, "
            f"{options.dtype}, {options.threads} threads"
        )

    def encoded(self, questions: list[Question]) -> Encoded:
        return encode(questions, self.labels, self.tokenizer, self.options.max_length)

    def updates(self, size: int) -> int:
        return updates(size, self.options.epochs[size], self.settings.batch)

    def run(
        self, loss: str, size: int, seed: int, settings: Settings, measured: Encoded, bar: Any, noise: float = 0
    ) -> tuple[float, Tensor]:
        """The accuracy on the questions `measured`, and their features; `noise`: the share of wrong labels."""
        bar.set_description(f"{size} labelled, seed {seed}, {loss}")
        drawn = self.encoded(mislabel(draw(self.parts.pool, size, seed), noise, seed))
        epochs = self.options.epochs[size]
        function = loss_of(loss, settings)
        model = train(
            self.encoder, drawn, len(self.labels), function, epochs, settings, seed, self.bf16, progress=bar.update
        )
        classes, features = predict(model, measured)
        return accuracy(classes, measured), features
