"""Trains a small language model with transformers' Trainer on a fused loss. README.md tells the options."""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import compare
import torch
from data import DataError, load_documents, make_blocks, split_by_document, train_tokenizer
from model import LOSSES, Size, fuse_with, held_out, make_model, row_loss
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

import fusedloss as fl

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from arguments import cpus, parse


class RunError(Exception):
    """A folder of another run; the message says what to do."""


class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks  # (N, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class Objective(TrainerCallback):
    """Plain cross-entropy for the first updates, then the loss of choice, whose alpha grows from update to update."""

    def __init__(self, model: LlamaForCausalLM, options: argparse.Namespace) -> None:
        self.model, self.options, self.step = model, options, 0
        self.warmup = 0 if options.loss == "cross_entropy" else round(options.ce_warmup * options.steps)
        self.changing: dict[str, Any] = {"alpha": self.alpha} if options.loss == "mixed" else {}
        self.name = ""
        self.switch()

    def alpha(self) -> float:
        return fl.alpha_schedule(self.step, self.options.steps)

    def switch(self) -> None:
        name = "cross_entropy" if self.step < self.warmup else self.options.loss
        if name == self.name:
            return
        self.name = name
        changing = self.changing if name == self.options.loss else {}
        self.rows = row_loss(name, **changing)
        if self.options.fuse:
            fuse_with(self.model, name, **changing)

    def of_logits(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return self.rows(outputs, labels, num_items_in_batch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        self.switch()


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    documents = load_documents(options.data)
    config = {name: getattr(options, name) for name in CONFIG}
    config["corpus"] = hashlib.sha256("\f".join(d.name + d.text for d in documents).encode()).hexdigest()[:16]
    begin(options.out, config, options.fresh)
    train_documents, held_documents = split_by_document(documents, options.held_out, options.seed)
    tokenizer_file = options.out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(train_documents, options.vocab_size).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    train, held = (make_blocks(side, tokenizer, options.length) for side in (train_documents, held_documents))
    size = Size(tokenizer.get_vocab_size(), options.width, options.layers, options.heads, options.length)
    model = make_model(size, options.seed)
    print(
        f"{train.numel():,} BPE pieces of {len(train_documents)} documents to train on, {held.numel():,} of "
        f"{len(held_documents)} held out; vocabulary {size.vocabulary:,}, {model.num_parameters() / 1e6:.1f} M "
        f"parameters, {options.dtype}, {options.threads} threads"
    )
    bf16 = options.dtype == "bf16"
    before = held_out(model, held, options.batch, bf16)
    report("before training", before)
    seconds = run_training(model, train, options, config)
    after = held_out(model, held, options.batch, bf16)
    report("after training", after)
    updates = f"{options.steps} updates of {options.batch * options.length} tokens"
    print(f"{updates} with {options.loss}, {'fused' if options.fuse else 'not fused'}: {seconds:.0f} s in this run")
    print(f"a sample: {sample(model, tokenizer, held)!r}")
    metrics: dict[str, Any] = {
        "config": config,
        "before": {"cross_entropy": before[0], "accuracy": before[1]},
        "after": {"cross_entropy": after[0], "accuracy": after[1]},
    }
    if options.compare_steps:
        metrics["comparison"] = compare.compare(size, train, options)
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"\nfigures: {options.out / 'metrics.json'}")
    return 0


def begin(folder: Path, config: dict[str, Any], fresh: bool) -> None:
    """Refuses a folder of another configuration; notes this one's in it."""
    note = folder / "run.json"
    if fresh:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        for name in ("tokenizer.json", note.name):
            (folder / name).unlink(missing_ok=True)
    if note.exists():
        saved = json.loads(note.read_text(encoding="utf-8"))
        differing = [
            f"{name.replace('_', '-')} is {saved.get(name)!r} there and {config.get(name)!r} here"
            for name in sorted(saved.keys() | config.keys())
            if saved.get(name) != config.get(name)
        ]
        if differing:
            raise RunError(
                f"{folder} is of another run: {', '.join(differing)}; --fresh starts anew in this folder, --out names "
                "another one"
            )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def run_training(model: LlamaForCausalLM, train: Tensor, options: argparse.Namespace, config: dict[str, Any]) -> float:
    """Trains from the last checkpoint on, to the end; the seconds that it took."""
    objective = Objective(model, options)
    own = not options.fuse and options.loss == "cross_entropy"  # transformers' own loss
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 20),
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=config["dtype"] == "bf16",
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=options.seed,
            logging_steps=max(1, options.steps // 20),
            save_steps=options.save_every,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
        ),
        train_dataset=Blocks(train),
        compute_loss_func=None if options.fuse or own else objective.of_logits,
        callbacks=[objective],
    )
    last = get_last_checkpoint(str(options.out))
    if last is not None:
        print(f"going on from {last}")
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    return time.perf_counter() - start


def report(when: str, measured: tuple[float, float]) -> None:
    loss, accuracy = measured
    print(
        f"{when}: held-out perplexity {math.exp(loss):,.1f} (cross-entropy {loss:.3f}), token accuracy {accuracy:.1%}"
    )


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, held: Tensor) -> str:
    """The likeliest continuation of the first held-out pieces: generation takes the logits as ever."""
    start = held[:1, : held.shape[1] // 4]
    written = model.eval().generate(start, max_new_tokens=start.shape[1], do_sample=False, pad_token_id=0)
    return tokenizer.decode(written[0].tolist())


#: Options that decide the course of a run.
CONFIG = ("loss", "fuse", "steps", "ce_warmup", "batch", "length", "vocab_size", "width", "layers", "heads")
CONFIG += ("lr", "dtype", "seed", "held_out")


QUICK = {
    "out": Path("runs/lm-quick"),
    "steps": 40,
    "batch": 8,
    "vocab_size": 8000,
    "width": 96,
    "layers": 2,
    "compare_steps": 4,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small language model with transformers' Trainer on a fused loss, and measures it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, help="your own text, UTF-8; else the King James Bible and a commentary on the Psalms")
    add("--out", type=Path, default=Path("runs/lm"), help="folder of the checkpoints and the figures")
    add("--fresh", action="store_true", help="start anew, over what is in --out")
    add("--loss", choices=tuple(LOSSES), default="cross_entropy", help="the loss after the warm-up")
    add("--fuse", action=argparse.BooleanOptionalAction, default=True, help="train on the linear form")
    add("--ce-warmup", type=_share, default=0.5, help="share of the updates that plain cross-entropy makes first")
    add("--steps", type=_count, default=300, help="updates")
    add("--batch", type=_count, default=16, help="blocks an update")
    add("--length", type=_count, default=128, help="pieces a block")
    add("--vocab-size", type=_count, default=32000, help="BPE pieces")
    add("--width", type=_count, default=160, help="of the model")
    add("--layers", type=_count, default=4, help="of the model")
    add("--heads", type=_count, default=4, help="attention heads")
    add("--lr", type=float, default=2e-3, help="learning rate at its highest")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 where the CPU computes in it")
    add("--held-out", type=_share, default=0.03, help="share of the text held out, whole documents at a time")
    add("--seed", type=int, default=1, help="of the split, the weights and the order of the blocks")
    add("--threads", type=_count, default=cpus(), help="CPU threads")
    add("--save-every", type=_count, default=100, help="updates between checkpoints")
    add("--compare-steps", type=int, default=10, help="updates of fused and unfused training in turn, 0 for none")
    options = parse(parser, QUICK, arguments)
    if options.width % (2 * options.heads):
        parser.error(f"--width {options.width} must be a multiple of twice --heads {options.heads}")
    if options.dtype == "auto":
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public one
        options.dtype = "bf16" if probe is not None and probe() else "fp32"
    return options


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, got {value}")
    return value


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log shows each line when it is due
    try:
        sys.exit(main())
    except (DataError, RunError, compare.ComparisonError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
