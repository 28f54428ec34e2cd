"""Trains a small Transformer from English to German with a fused loss, and measures it. README.md tells the options."""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import compare
import torch
from checkpoint import CheckpointError, load_checkpoint
from data import DataError, Pair, TrainingBatches, Vocabulary, encode_pairs, fingerprint, load_pairs, split_by_file
from evaluate import bleu, translate
from options import make_config, parse_arguments
from trainer import Trainer, alpha_at, run_training


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

    curves, figures = options.out / "curves.png", options.out / "metrics.json"
    draw_curves(trainer, curves)
    metrics = report(trainer, held_pairs, options)
    figures.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if options.compare_updates:
        stream = iter(TrainingBatches(train, config.batch_tokens, config.seed))
        batches = [next(stream) for _ in range(compare.WARMUP + options.compare_updates)]
        metrics["comparison"] = compare.compare(
            trainer.model.size, batches, config.lr, config.dtype, config.seed, options.threads, options.impl
        )
        figures.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"\ncurves: {curves}   figures: {figures}")
    return 0


def report(trainer: Trainer, held_pairs: list[Pair], options: argparse.Namespace) -> dict[str, Any]:
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
    last = trainer.curves[-1]
    print(f"held-out cross-entropy {last['held_out_loss']:.3f}, token accuracy {last['accuracy']:.1%}")
    print(f"BLEU {score:.1f} on {len(chosen)} held-out sentences ({how}, {seconds:.0f} s)")
    speed = trainer.pieces / trainer.seconds
    print(f"training: {trainer.pieces:,} target tokens in {trainer.seconds:.0f} s, {speed:,.0f} tokens/s")
    return {
        "config": dataclasses.asdict(config),
        "bleu": score,
        "beam": options.beam,
        "bleu_sentences": len(chosen),
        "training_seconds": trainer.seconds,
        "target_tokens": trainer.pieces,
        "curves": trainer.curves,
    }


def draw_curves(trainer: Trainer, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves, steps = trainer.curves, [point["step"] for point in trainer.curves]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in (("train_loss", "training objective"), ("held_out_loss", "held-out cross-entropy")):
        left.plot(steps, [point[name] for point in curves], marker=".", label=label)
    right.plot(steps, [point["accuracy"] for point in curves], marker=".", label="held-out token accuracy")
    # Of every update: between two points it may jump, where the warm-up ends.
    right.plot([alpha_at(trainer.config, update) for update in range(trainer.step)], label="alpha")
    left.set_ylabel("nats per token")
    for axes in (left, right):
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log shows each line when it is due
    try:
        sys.exit(main())
    except (DataError, CheckpointError, compare.ComparisonError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
