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
from pathlib import Path
from typing import Any

import compare
import torch
from checkpoint import CheckpointError, load_checkpoint
from data import (
    DataError,
    Example,
    Pair,
    TrainingBatches,
    Vocabulary,
    encode_pairs,
    fingerprint,
    load_pairs,
    split_by_file,
)
from evaluate import bleu, translate
from options import make_config, parse_arguments
from trainer import NAMES, Trainer, alpha_at, as_baseline, run_training, warm_up_ends


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    pairs = load_pairs(options.data)
    train_pairs, held_pairs = split_by_file(pairs, options.held_out, options.seed)
    config = make_config(options, fingerprint(pairs))
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint, of_baseline, warm_up = (options.out / f"{n}.pt" for n in ("checkpoint", "checkpoint-ce", "warm-up"))
    if options.fresh:
        for path in (checkpoint, of_baseline, warm_up):
            path.unlink(missing_ok=True)
    saved = load_checkpoint(checkpoint, config) if checkpoint.exists() else None
    vocabulary = Vocabulary(saved["vocabulary"]) if saved else Vocabulary.train(train_pairs, config.vocab_size)
    train, held = (encode_pairs(side, vocabulary, config.max_length) for side in (train_pairs, held_pairs))
    if not train or not held:
        raise DataError(f"no sentence is within --max-length {config.max_length} pieces")

    runs = {config.loss: Trainer(config, train, vocabulary, options.impl)}
    parameters = sum(parameter.numel() for parameter in runs[config.loss].model.parameters())
    print(
        f"{len(train):,} pairs to train on, {len(held):,} held out; {len(vocabulary):,} BPE pieces; "
        f"{parameters / 1e6:.1f} M parameters, {config.dtype}, {options.threads} threads"
    )
    number = run(runs[config.loss], held, options, checkpoint, checkpoint, warm_up)
    if number is None and options.baseline and config.loss != "ce":
        plain = as_baseline(config)
        runs = {"ce": Trainer(plain, train, vocabulary, options.impl), **runs}
        print(f"now {NAMES['ce']} to the end, from the same warm-up")
        number = run(runs["ce"], held, options, of_baseline, of_baseline if of_baseline.exists() else warm_up)
    if number is not None:
        print("the same command goes on from there")
        return 128 + number

    curves, figures = options.out / "curves.png", options.out / "metrics.json"
    draw_curves(runs, curves)
    metrics = report(runs, held_pairs, options)
    figures.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if options.compare_updates:
        stream = iter(TrainingBatches(train, config.batch_tokens, config.seed))
        batches = [next(stream) for _ in range(compare.WARMUP + options.compare_updates)]
        metrics["comparison"] = compare.compare(
            runs[config.loss].model.size, batches, config.lr, config.dtype, config.seed, options.threads, options.impl
        )
        figures.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"\ncurves: {curves}   figures: {figures}")
    return 0


def run(
    trainer: Trainer,
    held: list[Example],
    options: argparse.Namespace,
    checkpoint: Path,
    start: Path,
    warm_up: Path | None = None,
) -> int | None:
    """Train to the end, from what `start` holds, if it is there; return the signal that ended it before."""
    steps = trainer.config.steps
    if start.exists():
        trainer.load(load_checkpoint(start, trainer.config))
        if trainer.step == steps:
            print(f"the run in {checkpoint} is finished: measuring it again (--fresh trains anew)")
            return None
        print(f"going on from update {trainer.step} of {steps} in {start}")
    number = run_training(trainer, held, options.evaluate_every, checkpoint, warm_up)
    if number is not None:
        print(f"stopped after update {trainer.step}")
    return number


def report(runs: dict[str, Trainer], held_pairs: list[Pair], options: argparse.Namespace) -> dict[str, Any]:
    """Translate with each run; print and return what came out, that of the baseline under its name."""
    chosen = list(held_pairs)
    random.Random(options.seed).shuffle(chosen)
    chosen = chosen[: options.bleu_sentences or None]
    sources, references = ([getattr(pair, side) for pair in chosen] for side in ("source", "target"))
    translations = {
        loss: translate(trainer.model, trainer.vocabulary, sources, options.beam) for loss, trainer in runs.items()
    }
    print()
    for i, pair in enumerate(chosen[: options.samples]):
        print(f"  {'source':20} {pair.source}\n  {'reference':20} {pair.target}")
        print("".join(f"  {NAMES[loss]:20} {own[i]}\n" for loss, own in translations.items()))
    how = "greedy" if options.beam == 1 else f"beam {options.beam}"
    print(f"BLEU of {len(chosen)} held-out sentences ({how}); accuracy and cross-entropy of all held-out pieces")
    print(f"{'':20}{'BLEU':>8}{'accuracy':>12}{'held-out CE':>14}{'tokens/s':>12}")
    measured: dict[str, dict[str, Any]] = {}
    for loss, trainer in runs.items():
        last, score = trainer.curves[-1], bleu(translations[loss], references)
        speed = trainer.pieces / trainer.seconds
        print(f"{NAMES[loss]:20}{score:8.1f}{last['accuracy']:12.1%}{last['held_out_loss']:14.3f}{speed:12,.0f}")
        measured[loss] = {
            "config": dataclasses.asdict(trainer.config),
            "bleu": score,
            "beam": options.beam,
            "bleu_sentences": len(chosen),
            "training_seconds": trainer.seconds,
            "target_tokens": trainer.pieces,
            "curves": trainer.curves,
        }
    metrics = measured.pop(options.loss)
    if measured:
        metrics["baseline"] = measured["ce"]
        difference = metrics["bleu"] - measured["ce"]["bleu"]
        print(
            f"{NAMES[options.loss]} has {abs(difference):.1f} BLEU {'more' if difference > 0 else 'less'} than "
            f"cross-entropy from the same warm-up of {warm_up_ends(runs['ce'].config)} updates, with one seed"
        )
    return metrics


def draw_curves(runs: dict[str, Trainer], path: Path) -> None:
    """The held-out measurements of all runs over the updates, and alpha; the shared warm-up is shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = ("held-out cross-entropy (nats per piece)", "held-out token accuracy (%)", "alpha of mixed cross-entropy")
    config = next(iter(runs.values())).config
    for axes, title in zip(panels, titles, strict=True):
        axes.axvspan(0, warm_up_ends(config), color="0.9", label="shared warm-up (cross-entropy)")
        axes.set(xlabel="update", ylabel=title, xlim=(0, config.steps))
        axes.grid(alpha=0.3)
    for loss, trainer in runs.items():
        steps = [point["step"] for point in trainer.curves]
        for axes, name, scale in ((panels[0], "held_out_loss", 1), (panels[1], "accuracy", 100)):
            values = [scale * point[name] for point in trainer.curves]
            axes.plot(steps, values, marker=".", label=NAMES[loss])
        # Of every update: between two points it may jump, where the warm-up ends.
        panels[2].plot([alpha_at(trainer.config, update) for update in range(trainer.step)], label=NAMES[loss])
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(0, 100)
    panels[2].set_ylim(0, 1)
    for axes in panels:
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
