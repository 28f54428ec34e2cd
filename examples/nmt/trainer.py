"""The losses and their schedule, the training loop, and what it needs to go on after an interruption."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from checkpoint import save_checkpoint
from data import PAD, Batch, Example, TrainingBatches, Vocabulary, all_batches
from evaluate import held_out
from model import Size, Transformer, autocast
from optimizer import MuonAdamW, schedule
from options import Config
from torch import Tensor
from tqdm import tqdm

import fusedloss as fl

NAMES = {"ce": "cross-entropy", "focal": "focal loss", "mixed": "mixed cross-entropy", "dsc": "DSC loss"}


def warming_up(config: Config, step: int) -> bool:
    """Whether an update is still of plain cross-entropy."""
    return step < config.ce_warmup * config.steps


def warm_up_ends(config: Config) -> int:
    """The number of updates of plain cross-entropy."""
    return next((step for step in range(config.steps) if not warming_up(config, step)), config.steps)


def as_baseline(config: Config) -> Config:
    """The same run with plain cross-entropy to the end."""
    return dataclasses.replace(config, loss="ce")


def alpha_at(config: Config, step: int) -> float:
    """The weight of the model's own choice in the mixed loss: it counts from the first update, the warm-up's too."""
    if config.loss != "mixed" or warming_up(config, step):
        return 0.0
    return fl.alpha_schedule(step, config.steps)


def training_loss(
    config: Config,
    step: int,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    impl: str | None,
    candidates: Tensor | None = None,
) -> Tensor:
    """hidden (B, T, D), weight (V, D), target (B, T) -> 0-d loss: plain cross-entropy first, then the one asked for.

    The logits are never stored, and those of padding never made. `candidates` (B, T): what the mixed loss takes for the
    model's own choice.
    """
    shared: dict[str, Any] = {"ignore_index": PAD, "impl": impl}
    smoothing = config.label_smoothing
    if config.loss == "ce" or warming_up(config, step):
        return fl.linear_cross_entropy(hidden, weight, target, label_smoothing=smoothing, **shared)
    if config.loss == "focal":
        return fl.linear_focal_loss(hidden, weight, target, gamma=config.gamma, label_smoothing=smoothing, **shared)
    if config.loss == "dsc":
        return fl.linear_dsc_loss(hidden, weight, target, **shared)
    alpha = alpha_at(config, step)
    return fl.linear_mixed_cross_entropy(
        hidden, weight, target, alpha=alpha, candidates=candidates, label_smoothing=smoothing, **shared
    )


class Trainer:
    """The model and all that its training goes on from: `state` holds it, and `load` takes it up at the same update."""

    def __init__(self, config: Config, examples: list[Example], vocabulary: Vocabulary, impl: str | None) -> None:
        torch.manual_seed(config.seed)
        self.config, self.vocabulary, self.impl = config, vocabulary, impl
        self.model = Transformer(
            Size(
                len(vocabulary),
                config.d_model,
                config.layers,
                config.heads,
                config.dropout,
                config.max_length,
            ),
            PAD,
        )
        self.optimizer = MuonAdamW(self.model, config.lr)
        self.sampler = TrainingBatches(examples, config.batch_tokens, config.seed)
        self._batches = iter(self.sampler)
        self.step = 0  # updates made; the learning rate and alpha follow from it
        self.pieces = 0  # target pieces seen
        self.seconds = 0.0
        self.recent: list[float] = []  # losses since the last point of the curves
        self.curves: list[dict[str, float]] = []

    def update(self) -> float:
        start = time.perf_counter()
        batch = next(self._batches)
        with autocast(self.config.dtype):
            loss = self.loss(batch)
        loss.backward()
        self.optimizer.step(schedule(self.step, self.config.steps))
        self.step += 1
        self.pieces += int((batch.target_out != PAD).sum())
        self.recent.append(loss.item())
        self.seconds += time.perf_counter() - start
        return self.recent[-1]

    def loss(self, batch: Batch) -> Tensor:
        hidden = self.model(batch.source, batch.target_in)
        return training_loss(self.config, self.step, hidden, self.model.output_weight, batch.target_out, self.impl)

    def state(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "vocabulary": self.vocabulary.model,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "sampler": (self.sampler.epoch, self.sampler.index),
            "progress": (self.step, self.pieces, self.seconds, self.recent, self.curves),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.sampler.epoch, self.sampler.index = state["sampler"]
        self.step, self.pieces, self.seconds, self.recent, self.curves = state["progress"]


class Interruption(AbstractContextManager["Interruption"]):
    """Makes the first Ctrl-C or SIGTERM a wish to stop after the update in hand; the second one acts at once."""

    signal: int | None = None

    def __enter__(self) -> Interruption:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.__exit__()


def run_training(
    trainer: Trainer, held: list[Example], interval: int, checkpoint: Path, warm_up: Path | None = None
) -> int | None:
    """Trains to the end, or to a signal, whose number it returns. Either way the checkpoint holds the last update.

    `warm_up`: where to keep the state in which plain cross-entropy ends, from which a run of another loss may go on.
    """
    config = trainer.config
    batches = all_batches(held, 4096)
    started, pieces = trainer.seconds, trainer.pieces
    bar = tqdm(
        total=config.steps,
        initial=trainer.step,
        unit="update",
        mininterval=0.2,
        ncols=100,
        disable=None,  # where the output is not a terminal
    )
    with Interruption() as interruption, bar:
        while trainer.step < config.steps and interruption.signal is None:
            if warm_up is not None and trainer.step == warm_up_ends(config):
                save_checkpoint(warm_up, {**trainer.state(), "config": dataclasses.asdict(as_baseline(config))})
            loss = trainer.update()
            speed = (trainer.pieces - pieces) / (trainer.seconds - started)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if trainer.step % interval == 0 or trainer.step == config.steps:
                with autocast(config.dtype):
                    measured = held_out(trainer.model, batches, trainer.impl)
                point = {
                    "step": trainer.step,
                    "train_loss": sum(trainer.recent) / len(trainer.recent),
                    "held_out_loss": measured.loss,
                    "accuracy": measured.accuracy,
                    "alpha": alpha_at(config, trainer.step - 1),
                }
                trainer.curves.append(point)
                trainer.recent = []
                bar.write(
                    f"{NAMES[config.loss]}, update {trainer.step:5d}   train loss {point['train_loss']:.3f}   "
                    f"alpha {point['alpha']:.2f}   held-out: cross-entropy {measured.loss:.3f}, "
                    f"token accuracy {measured.accuracy:.1%}",
                    file=sys.stdout,
                )
                save_checkpoint(checkpoint, trainer.state())
        if interruption.signal is not None:
            save_checkpoint(checkpoint, trainer.state())
        return interruption.signal
