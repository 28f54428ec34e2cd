"""The networks of calibration.py: a BiLSTM from nothing, or a pretrained encoder that is fine-tuned.

Each is trained on a part of the texts, and gives the logits of those held out and of those to test on.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bilstm import Classifier, logits_of, trained
from texts import Texts
from texts import encode as encode_words
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "fewshot"))
from data import Parts
from model import encode, encoder_folder, load_encoder
from options import settled_dtype
from training import Settings, predict, train

HEAD_LR = 1e-2  # of the encoder's linear layer, as in examples/fewshot

Loss = Callable[[Tensor, Tensor], Tensor]


def hold_out(texts: Texts, size: int) -> Parts:
    """The texts, of which so many to train on are held out, by chance, but never the last one of its class."""
    left = Counter(text.label for text in texts.train)
    parts = Parts([], [], texts.test)
    for text in random.Random(0).sample(texts.train, len(texts.train)):
        if len(parts.validation) < size and left[text.label] > 1:
            left[text.label] -= 1
            parts.validation.append(text)
        else:
            parts.pool.append(text)
    return parts


class _Network:
    """A network's texts: those it is trained on are its own; of those it is measured on, the first are held out."""

    def __init__(self, texts: Texts, options: argparse.Namespace) -> None:
        self.parts = hold_out(texts, round(options.held_out * (options.limit or len(texts.train))))
        self.measured = self.parts.validation + self.parts.test
        self.texts = Texts(texts.name, self.parts.pool, self.measured)
        self.held_out, self.labels = len(self.parts.validation), self.texts.labels
        self.target = torch.tensor([self.labels.index(text.label) for text in self.measured])
        self.size = min(options.limit or len(self.parts.pool), len(self.parts.pool))
        shared = {name: getattr(options, name) for name in ("limit", "epochs", "batch", "lr", "max_length")}
        self.settings: dict[str, Any] = {"held_out": self.held_out, **shared}

    def __str__(self) -> str:
        return (
            f"{self.texts.name}: {self.size:,} texts to train on, {self.held_out:,} held out and "
            f"{len(self.parts.test):,} to test, {len(self.labels)} classes"
        )


class BiLSTM(_Network):
    def __init__(self, texts: Texts, options: argparse.Namespace) -> None:
        super().__init__(texts, options)
        self.task = encode_words(self.texts, options.limit, options.max_length, options.least)
        own = {name: getattr(options, name) for name in ("width", "hidden", "dropout", "least")}
        self.settings |= {"network": "BiLSTM", "fingerprint": self.task.fingerprint, **own}

    def logits(self, loss: Loss, settings: dict[str, Any]) -> Tensor:
        """Of the texts that it is measured on (N, C), after it was trained with the loss."""
        model = trained(Classifier, self.task.train, self.task.words, len(self.labels), loss, settings)
        return torch.stack(logits_of(model, self.task.test))


class Encoder(_Network):
    def __init__(self, texts: Texts, options: argparse.Namespace) -> None:
        super().__init__(texts, options)
        self.encoder, tokenizer = load_encoder(Path(options.encoder) if options.encoder else encoder_folder())
        self.train, self.test = (
            encode(part, self.labels, tokenizer, options.max_length)
            for part in (self.parts.pool[: self.size], self.measured)
        )
        digest = hashlib.sha256(
            repr([(part.pieces, part.labels.tolist()) for part in (self.train, self.test)]).encode()
        )
        for weight in self.encoder.state_dict().values():
            digest.update(weight.numpy().tobytes())
        own = {"head_lr": HEAD_LR, "dtype": settled_dtype("auto")}
        self.settings |= {"network": "encoder", "fingerprint": digest.hexdigest()[:16], **own}

    def logits(self, loss: Loss, settings: dict[str, Any]) -> Tensor:
        own = Settings(settings["lr"], settings["head_lr"], lam=0.0, temperature=1.0, batch=settings["batch"])
        model = train(
            self.encoder,
            self.train,
            len(self.labels),
            lambda logits, _, labels: loss(logits, labels),
            settings["epochs"],
            own,
            settings["seed"],
            settings["dtype"] == "bf16",
            progress=lambda: None,
        )
        return model.head(predict(model, self.test)[1]).detach()
