"""The command line, and what of it decides the course of a run."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from arguments import count, cpus, parse

QUICK = {
    "out": Path("runs/nmt-quick"),
    "threads": 1,  # two that sleep while they wait for each other take longer on models this small
    "steps": 160,
    "evaluate_every": 40,
    "vocab_size": 4000,
    "d_model": 96,
    "beam": 1,
    "bleu_sentences": 50,
    "samples": 2,
    "compare_updates": 10,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the course of a run: a checkpoint of other values is refused."""

    loss: str
    steps: int
    ce_warmup: float
    label_smoothing: float
    gamma: float
    d_model: int
    layers: int
    heads: int
    dropout: float
    max_length: int
    vocab_size: int
    batch_tokens: int
    lr: float
    dtype: str
    seed: int
    held_out: float
    corpus: str  # the fingerprint of its pairs


def make_config(options: argparse.Namespace, corpus: str) -> Config:
    names = [field.name for field in dataclasses.fields(Config) if field.name != "corpus"]
    values = {name: getattr(options, name) for name in names}
    if options.dtype == "auto":
        values["dtype"] = "bf16" if _computes_in_bf16() else "fp32"
    return Config(**values, corpus=corpus)


def _computes_in_bf16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public one
    return probe is not None and bool(probe())


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small Transformer to translate, with a fused loss, and measures it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default=Path("runs/nmt"), help="folder of the checkpoint, the curves and the figures")
    add("--fresh", action="store_true", help="start anew, over the checkpoint in --out")
    add("--seed", type=int, default=1, help="of the split, the weights and the order of the batches")
    add("--threads", type=count(1), default=cpus(), help="CPU threads")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=("ce", "focal", "mixed", "dsc"), default="mixed", help="the loss after the warm-up")
    add(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train plain cross-entropy too, from the same warm-up, and measure it beside the loss",
    )
    add("--gamma", type=_number(0), default=2.0, help="of the focal loss")
    add("--impl", choices=("reference", "cpu"), help="of the loss; else the fastest that runs here")
    add_options(parser)

    add = parser.add_argument_group("report").add_argument
    add("--evaluate-every", type=count(1), default=200, help="updates between held-out measurements and checkpoints")
    add("--samples", type=count(0), default=5, help="translations to print")
    add(
        "--compare-updates",
        type=count(0),
        default=40,
        help="updates of fused and eager loss in turn, 0 for none",
    )
    options = parse(parser, QUICK, arguments)
    check(parser, options)
    return options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the corpus, the training and the translations; `check` looks at what they are together."""
    add = parser.add_argument_group("corpus").add_argument
    add(
        "--data",
        type=Path,
        help="your own pairs: source TAB target, one pair a line, UTF-8; else LibreOffice's help",
    )
    add("--held-out", type=_share, default=0.03, help="share of the pairs held out, whole files at a time")

    add = parser.add_argument_group("training").add_argument
    add("--ce-warmup", type=_share, default=0.5, help="share of the updates that plain cross-entropy makes first")
    add("--label-smoothing", type=_share, default=0.1, help="of every loss but dsc")
    add("--steps", type=count(1), default=1000, help="updates")
    add("--batch-tokens", type=count(1), default=1024, help="target tokens an update, padding included")
    add("--vocab-size", type=count(1), default=8000, help="BPE pieces of both languages together")
    add("--d-model", type=count(1), default=192, help="width of the model")
    add("--layers", type=count(1), default=2, help="of the encoder, and of the decoder")
    add("--heads", type=count(1), default=4, help="attention heads")
    add("--dropout", type=_share, default=0.0, help="worth its time in runs of many passes over the data")
    add("--max-length", type=count(8), default=128, help="pieces a sentence; pairs with a longer side are left out")
    add("--lr", type=_number(0), default=3e-3, help="learning rate at its highest")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 where the CPU computes in it")

    add = parser.add_argument_group("translations").add_argument
    add("--bleu-sentences", type=count(0), default=300, help="held-out sentences to translate, 0 for all")
    add("--beam", type=count(1), default=4, help="beam width; 1 is greedy decoding")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not 0 < options.held_out < 1:
        parser.error(f"--held-out must lie between 0 and 1, both excluded, got {options.held_out}")
    if options.d_model % (2 * options.heads):
        parser.error(f"--d-model {options.d_model} must be a multiple of twice --heads {options.heads}")
    if options.max_length % 8 or options.max_length > options.batch_tokens:
        parser.error(
            f"--max-length {options.max_length} must be a multiple of 8 "
            f"and at most --batch-tokens {options.batch_tokens}"
        )


def _number(least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number from {least} on, got {value}")
        return value

    parse.__name__ = "number"
    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {value}")
    return value
