"""Trains a small Transformer from English to German with a fused loss, and measures it. README.md tells the options."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import compare
import torch
from data import (
    PAD,
    DataError,
    Example,
    TrainingBatches,
    Vocabulary,
    collate,
    encode_pairs,
    fingerprint,
    length_buckets,
    load_pairs,
    split_by_file,
)
from evaluate import bleu, held_out, translate
from model import Size, Transformer, autocast
from optimizer import MuonAdamW, schedule
from options import Config, make_config, parse_arguments
from torch import Tensor
from tqdm import tqdm

import fusedloss as fl


def alpha_at(config: Config, step: int) -> float:
    """The weight of the model's own choice in the mixed loss: it counts from the first update, the warm-up's too."""
    if config.loss != "mixed" or step < config.ce_warmup * config.steps:
        return 0.0
    return fl.alpha_schedule(step, config.steps)


def training_loss(config: Config, step: int, logits: Tensor, target: Tensor, impl: str | None) -> Tensor:
    """logits (B, T, V), target (B, T) -> 0-d loss: plain cross-entropy first, then the loss that was asked for.

    The gradient takes the memory of the logits: the backward of F.linear, which made them, does not read them.
    """
    shared: dict[str, Any] = {"ignore_index": PAD, "inplace_backward": True, "impl": impl}
    smoothing = config.label_smoothing
    if config.loss == "ce" or step < config.ce_warmup * config.steps:
        return fl.cross_entropy(logits, target, label_smoothing=smoothing, **shared)
    if config.loss == "focal":
        return fl.focal_loss(logits, target, gamma=config.gamma, label_smoothing=smoothing, **shared)
    if config.loss == "dsc":
        return fl.dsc_loss(logits, target, **shared)
    return fl.mixed_cross_entropy(logits, target, alpha=alpha_at(config, step), label_smoothing=smoothing, **shared)


class Trainer:
    """The model and all that its training goes on from: `state` holds it, and `load` takes it up at the same update."""

    def __init__(self, config: Config, examples: list[Example], vocabulary: Vocabulary, impl: str | None) -> None:
        torch.manual_seed(config.seed)
        self.config, self.examples, self.vocabulary, self.impl = config, examples, vocabulary, impl
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
        self.optimizer = MuonAdamW(self.model, config.lr, config.dtype)
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
            logits = self.model(batch.source, batch.target_in)
        loss = training_loss(self.config, self.step, logits, batch.target_out, self.impl)
        loss.backward()
        self.optimizer.step(schedule(self.step, self.config.steps))
        self.step += 1
        self.pieces += int((batch.target_out != PAD).sum())
        self.recent.append(loss.item())
        self.seconds += time.perf_counter() - start
        return self.recent[-1]

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


class CheckpointError(Exception):
    """A checkpoint that this run cannot go on from; the message says what to do."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: an interruption leaves the checkpoint before."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    way_out = "--fresh starts anew in this folder, --out names another one"
    try:
        state = torch.load(path, weights_only=True)
        saved = state["config"]
    except Exception as error:  # whatever a damaged file makes the unpickler say
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); {way_out}") from None
    wanted = dataclasses.asdict(config)
    differing = [
        f"{name.replace('_', '-')} is {saved.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differing:
        raise CheckpointError(f"{path} is of another run: {', '.join(differing)}; {way_out}")
    return state


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


def run_training(trainer: Trainer, held: list[Example], interval: int, checkpoint: Path) -> int | None:
    """Trains to the end, or to a signal, whose number it returns. Either way the checkpoint holds the last update."""
    config = trainer.config
    batches = [collate([held[i] for i in b]) for b in length_buckets(held, 4096, None)]
    started, pieces = trainer.seconds, trainer.pieces
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=config.steps,
        initial=trainer.step,
        unit="update",
        mininterval=0.2 if terminal else 15,
        ncols=100,
    )
    with Interruption() as interruption, bar:
        while trainer.step < config.steps and interruption.signal is None:
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
                    f"update {trainer.step:5d}   train loss {point['train_loss']:.3f}   alpha {point['alpha']:.2f}   "
                    f"held-out: cross-entropy {measured.loss:.3f}, token accuracy {measured.accuracy:.1%}",
                    file=sys.stdout,
                )
                sys.stdout.flush()
                save_checkpoint(checkpoint, trainer.state())
        if interruption.signal is not None:
            save_checkpoint(checkpoint, trainer.state())
        return interruption.signal


def draw_curves(curves: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [point["step"] for point in curves]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in (("train_loss", "training objective"), ("held_out_loss", "held-out cross-entropy")):
        left.plot(steps, [point[name] for point in curves], marker=".", label=label)
    for name, label in (("accuracy", "held-out token accuracy"), ("alpha", "alpha")):
        right.plot(steps, [point[name] for point in curves], marker=".", label=label)
    left.set_ylabel("nats per token")
    for axes in (left, right):
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    pairs = load_pairs(options.data)
    train_pairs, held_pairs = split_by_file(pairs, options.held_out, options.seed)
    config = make_config(options, fingerprint(pairs))
    checkpoint = options.out / "checkpoint.pt"
    options.out.mkdir(parents=True, exist_ok=True)
    state = load_checkpoint(checkpoint, config) if checkpoint.exists() and not options.fresh else None
    vocabulary = Vocabulary(state["vocabulary"]) if state else Vocabulary.train(train_pairs, config.vocab_size)

    train, held = (encode_pairs(side, vocabulary, config.max_length) for side in (train_pairs, held_pairs))
    if not train or not held:
        raise DataError(f"no sentence is within --max-length {config.max_length} pieces")
    trainer = Trainer(config, train, vocabulary, options.impl)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(
        f"{len(train):,} pairs to train on, {len(held):,} held out; {len(vocabulary):,} BPE pieces; "
        f"{parameters / 1e6:.1f} M parameters, {config.dtype}, {options.threads} threads"
    )
    if state:
        trainer.load(state)
        if trainer.step == config.steps:
            print(f"the run in {options.out} is finished: measuring it again (--fresh trains anew)")
        else:
            print(f"going on from update {trainer.step} of {config.steps} in {checkpoint}")
    if trainer.step < config.steps:
        number = run_training(trainer, held, options.evaluate_every, checkpoint)
        if number is not None:
            print(f"stopped after update {trainer.step}; the same command goes on from there")
            return 128 + number

    metrics = report(trainer, held_pairs, options)
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw_curves(trainer.curves, options.out / "curves.png")
    print(f"\ncurves: {options.out / 'curves.png'}   figures: {options.out / 'metrics.json'}")
    return 0


def report(trainer: Trainer, held_pairs: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    config = trainer.config
    chosen = list(held_pairs)
    random.Random(config.seed).shuffle(chosen)
    chosen = chosen[: options.bleu_sentences or None]
    start = time.perf_counter()
    translations = translate(trainer.model, trainer.vocabulary, [pair.source for pair in chosen], options.beam)
    seconds = time.perf_counter() - start
    score = bleu(translations, [pair.target for pair in chosen])
    print()
    for pair, translation in list(zip(chosen, translations, strict=True))[: options.samples]:
        print(f"  source       {pair.source}\n  reference    {pair.target}\n  translation  {translation}\n")
    how = "greedy" if options.beam == 1 else f"beam {options.beam}"
    print(f"BLEU {score:.1f} on {len(chosen)} held-out sentences ({how}, {seconds:.0f} s)")
    speed = trainer.pieces / trainer.seconds
    print(f"training: {trainer.pieces:,} target tokens in {trainer.seconds:.0f} s, {speed:,.0f} tokens/s")
    metrics: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "bleu": score,
        "beam": options.beam,
        "bleu_sentences": len(chosen),
        "training_seconds": trainer.seconds,
        "target_tokens": trainer.pieces,
        "curves": trainer.curves,
    }
    if options.compare_updates:
        stream = iter(TrainingBatches(trainer.examples, config.batch_tokens, config.seed))
        batches = [next(stream) for _ in range(compare.WARMUP + options.compare_updates)]
        metrics["comparison"] = compare.compare(
            trainer.model.size, batches, config.lr, config.dtype, config.seed, options.threads, options.impl
        )
    return metrics


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, CheckpointError, compare.ComparisonError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
