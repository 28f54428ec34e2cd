"""The command line."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from arguments import count, cpus, parse, positive, share, share_or_all

QUICK = {"out": Path("runs/fewshot-quick"), "sizes": [20, 100], "seeds": 1, "epochs": [6]}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tunes a sentence encoder on few labelled questions: CE against CE + SupCon.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    add = parser.add_argument_group("comparison").add_argument
    add("--out", type=Path, default=Path("runs/fewshot"), help="folder of the table, the plot and the figures")
    add("--seeds", type=count(1), default=5, help="runs of each size and loss")
    add("--seed", type=int, default=1, help="the first: of the draw, the head, the batches and dropout")
    add("--threads", type=count(1), default=cpus(), help="CPU threads")

    add = parser.add_argument_group("choice of settings").add_argument
    add("--tune", action="store_true", help="in place of the comparison: measure these on the validation part")
    add("--lrs", type=positive, nargs="+", default=[5e-5, 1e-4, 2e-4], help="learning rates, for CE")
    add("--lams", type=share_or_all, nargs="+", default=[0.5, 0.9], help="shares, at the best learning rate of CE")
    add("--temperatures", type=positive, nargs="+", default=[0.1, 0.3], help="temperatures, for each of the shares")
    options = parse(parser, QUICK, arguments)
    settle(parser, options)
    return options


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the questions, the encoder and its training."""
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="your own: label TAB question, one a line, UTF-8; else the TREC questions")
    add("--held-out", type=share, default=0.2, help="share of every class to test on")
    add("--validation", type=share, default=0.1, help="share of every class to choose settings by")
    add("--encoder", type=Path, help="folder of an encoder that transformers can load; else MiniLM-L6")
    add("--max-length", type=count(8), default=64, help="pieces of a question; what is longer is cut")

    add = parser.add_argument_group("training").add_argument
    add("--sizes", type=count(2), nargs="+", default=[20, 100, 1000], help="labelled questions to train on")
    add("--epochs", type=count(1), nargs="+", help="one number, or one for each size; else 100 / sqrt(size)")
    add("--batch", type=count(2), default=16, help="questions an update, at most")
    add("--lr", type=positive, default=1e-4, help="learning rate of the encoder, at its highest")
    add("--head-lr", type=positive, default=1e-2, help="that of the linear layer")
    add("--lam", type=share_or_all, default=0.9, help="share of the contrastive loss in CE + SupCon")
    add("--temperature", type=positive, default=0.3, help="of the contrastive loss")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 where the CPU computes in it")


def settle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses those that do not go together, and settles what is left to the number of questions and the CPU."""
    sizes = sorted(set(options.sizes))
    if sizes != options.sizes:
        parser.error(f"--sizes must grow, got {' '.join(map(str, options.sizes))}")
    options.epochs = epochs_of(parser, "--epochs", options.epochs, sizes, 100)
    if options.held_out + options.validation >= 1:
        parser.error(f"--held-out {options.held_out} and --validation {options.validation} leave nothing to train on")
    options.dtype = settled_dtype(options.dtype)


def epochs_of(
    parser: argparse.ArgumentParser, name: str, given: list[int] | None, sizes: list[int], scale: float
) -> dict[int, int]:
    """For each size what is given, one number or one for each; else scale / sqrt(size)."""
    epochs = given or [max(1, round(scale / math.sqrt(size))) for size in sizes]
    if len(epochs) not in (1, len(sizes)):
        parser.error(f"{name} takes one number or one for each of the {len(sizes)} --sizes, got {len(epochs)}")
    return dict(zip(sizes, epochs * (len(sizes) // len(epochs)), strict=True))


def settled_dtype(dtype: str) -> str:
    """ "auto" is bf16 where the CPU computes in it."""
    if dtype != "auto":
        return dtype
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public one
    return "bf16" if probe is not None and probe() else "fp32"
