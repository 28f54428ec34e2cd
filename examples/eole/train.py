"""Trains Eole's Transformer from English to German four times: by its own loss and by the fused one, with cross-entropy
and with mixed cross-entropy. README.md tells the options."""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import sentencepiece
import torch

import fusedloss as fl

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
sys.path.append(str(Path(__file__).resolve().parents[1] / "nmt"))
from arguments import count, cpus, parse
from data import UNK, DataError, Vocabulary, load_pairs, split_by_file
from evaluate import bleu
from resident import resident_mib

#: Each loss with Eole's own way and with the fused one.
RUNS = ("cross-entropy, Eole", "cross-entropy, fused", "mixed, plain PyTorch", "mixed, fused")
SMOOTHING = 0.1
QUICK = {"updates": 30, "rounds": 3, "vocab_size": 2000, "bleu_sentences": 20}
#: The first pieces of the vocabulary, which Eole has of its own.
SPECIAL = 1 + UNK


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains Eole's Transformer by its own loss and by the fused one, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, help="pairs, 'source TAB target' a line; None for the help of LibreOffice")
    add("--out", type=Path, default=Path("runs/eole"), help="folder of the corpus, the logs and the results")
    add("--updates", type=count(1), default=800, help="of each run")
    add("--rounds", type=count(1), default=10, help="turns in which the runs take their updates")
    add("--batch-tokens", type=count(1), default=1024, help="of Eole's batches, the longer side, padding included")
    add("--vocab-size", type=count(1), default=8000, help="BPE pieces of both languages together")
    add("--d-model", type=count(1), default=128, help="width of the model")
    add("--layers", type=count(1), default=1, help="of the encoder, and of the decoder")
    add("--lr", type=float, default=3e-3, help="learning rate at its highest")
    add("--bleu-sentences", type=count(1), default=300, help="held-out sentences to translate")
    add("--seed", type=int, default=1, help="of the weights and the batches")
    add("--threads", type=count(1), default=cpus(), help="CPU threads")
    add("--run", choices=RUNS, help=argparse.SUPPRESS)  # a process of one of them
    options = parse(parser, QUICK, arguments)
    if options.updates % options.rounds:
        parser.error(f"--updates {options.updates} must be a multiple of --rounds {options.rounds}")
    return options


# the parent: the corpus, and the runs in turns


def compare(options: argparse.Namespace) -> None:
    write_corpus(options)
    print(f"{options.updates} updates a run, {options.rounds} rounds in turn, {options.threads} threads", flush=True)
    runs = {name: Run(name, options) for name in RUNS}
    try:
        for turn in range(options.rounds):
            for run in list(runs.values())[:: -1 if turn % 2 else 1]:
                run.ask()
        results = {name: run.finish() for name, run in runs.items()}
    finally:
        for run in runs.values():
            run.close()
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = as_table(results)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")


def write_corpus(options: argparse.Namespace) -> None:
    """The files that Eole reads: BPE pieces with spaces between them, and the pieces a line."""
    pairs = load_pairs(options.data)
    train, held = split_by_file(pairs[:4000] if options.quick else pairs, 0.05, options.seed)
    model = Vocabulary.train(train, options.vocab_size).model
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    held = held[:: max(1, len(held) // options.bleu_sentences)][: options.bleu_sentences]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, side in (("train", train), ("valid", held)):
        for language in ("source", "target"):
            lines = [" ".join(pieces.encode(getattr(pair, language), out_type=str)) for pair in side]
            (options.out / f"{name}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = pieces.id_to_piece(list(range(SPECIAL, len(pieces))))
    (options.out / "pieces").write_text("\n".join(known) + "\n", encoding="utf-8")
    (options.out / "bpe.model").write_bytes(model)
    print(f"{len(train):,} pairs to train on, {len(held):,} held out, {len(pieces):,} BPE pieces")


class Run:
    """A process that trains a round for every line it reads, and answers with a line of JSON."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.rounds = name, []
        values = {k: v for k, v in vars(options).items() if k not in ("run", "quick", "data")}
        arguments = [text for k, v in values.items() for text in (f"--{k.replace('_', '-')}", str(v))]
        self.log = options.out / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--run", name, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.answer()  # ready

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise DataError(f"the run '{self.name}' ended with code {self.process.wait()}; see {self.log}")
        return json.loads(line)

    def ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self.answer())
        last = self.rounds[-1]
        print(f"{self.name:22} round {len(self.rounds):2}  {last['tokens_per_second']:6,.0f} tokens/s", flush=True)

    def finish(self) -> dict[str, Any]:
        """The figures of the training, and those of what it led to."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        speed = statistics.median(x["tokens_per_second"] for x in self.rounds)
        return {**self.rounds[-1], "tokens_per_second": speed, "rounds": self.rounds, **self.answer()}

    def close(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


def as_table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| loss | target tokens/s | peak memory, MiB | above the idle model's, MiB | token accuracy | BLEU |",
        "|---|---|---|---|---|---|",
    ]
    for name, x in results.items():
        memory = f"{x['peak_mib']:,.0f} | {x['peak_mib'] - x['start_mib']:,.0f}"
        speed = f"{x['tokens_per_second']:,.0f}"
        lines.append(f"| {name} | {speed} | {memory} | {x['accuracy']:.1f} % | {x['bleu']:.1f} |")
    return "\n".join(lines) + "\n"


# a run: Eole's training, as its own train_single.main does it


def train(options: argparse.Namespace, answers: TextIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Eole names kernels for GPUs that are not there
        from eole import train_single as eole

    torch.set_num_threads(options.threads)
    config = eole.TrainConfig(**configuration(options))
    config._validate_vocab_config()
    eole.configure_process(config, -1)
    eole.init_logger(None)
    context = eole.TrainingInitializer(config).initialize()
    config, vocabs = context.config, context.vocabs
    eole.ValidationConfigurer.configure_validation_transforms(config)
    model = eole.get_model_class(config.model).for_training(config.model, vocabs, config.training, device_id=-1)
    trainer = eole.build_trainer(config, -1, model, vocabs, eole.Optimizer.from_config(model, config))
    choose_loss(trainer, options)
    train_batches, valid_batches = (
        eole.build_dynamic_dataset_iter(config, context.transforms, vocabs, task=task, device_id=-1)
        for task in (eole.CorpusTask.TRAIN, eole.CorpusTask.VALID)
    )

    def tell(**answer: float) -> None:
        print(json.dumps(answer), file=answers, flush=True)
        if not sys.stdin.readline():
            sys.exit("the parent is gone")

    turns = in_turns(train_batches, options.updates // options.rounds, trainer.train_loss.padding_idx, tell)
    stats = trainer.train(turns, options.updates, save_checkpoint_steps=0)
    next(turns)  # tells of the last round
    accuracy = trainer.validate(valid_batches).accuracy()
    model.eval()
    translations, references, _ = trainer.scoring_preparator.translate(model, -1, options.updates)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(options.out / "bpe.model"))
    texts = [[pieces.decode(line.split()) for line in side] for side in (translations, references)]
    tell(loss=stats.xent(), accuracy=accuracy, bleu=bleu(*texts))


def choose_loss(trainer: Any, options: argparse.Namespace) -> None:
    """The lines that matter."""
    from fusedloss.integrations.eole import fuse

    def alpha() -> float:
        done = trainer.optim.training_step - 1
        return fl.alpha_schedule(done, options.updates, warmup=options.updates // 2)

    if options.run == "cross-entropy, fused":
        fuse(trainer.train_loss)
        fuse(trainer.valid_loss)
    elif options.run == "mixed, fused":
        fuse(trainer.train_loss, "mixed_cross_entropy", alpha=alpha)
        fuse(trainer.valid_loss)
    elif options.run == "mixed, plain PyTorch":
        trainer.train_loss.criterion = MixedCrossEntropy(alpha, trainer.train_loss.padding_idx)


class MixedCrossEntropy(torch.nn.Module):
    """As one writes it for Eole without this package: scores (N, V), target (N,) -> the sum."""

    def __init__(self, alpha: Callable[[], float], padding: int) -> None:
        super().__init__()
        self.alpha, self.ignore_index = alpha, padding

    def forward(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        alpha, log_p = self.alpha(), scores.log_softmax(-1)
        gold = log_p.gather(-1, target[:, None])[:, 0]
        own = log_p.gather(-1, scores.argmax(-1, keepdim=True))[:, 0]
        rows = -(1 - SMOOTHING) * ((1 - alpha) * gold + alpha * own) - SMOOTHING * log_p.mean(-1)
        return rows[target != self.ignore_index].sum()


def in_turns(batches: Iterable[Any], updates: int, padding: int, tell: Callable[..., None]) -> Iterator[Any]:
    """The batches. Before the first, and after each `updates` more, it tells of them and waits."""
    answer, tokens, start = {"start_mib": resident_mib("VmRSS")}, 0, 0.0
    for number, batch in enumerate(batches):
        if number % updates == 0:
            if number:
                answer["tokens_per_second"] = tokens / (time.perf_counter() - start)
                answer["peak_mib"] = resident_mib("VmHWM")
            tell(**answer)
            tokens, start = 0, time.perf_counter()
        tokens += int((batch[0]["tgt"][:, 1:] != padding).sum())
        yield batch


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """What Eole's own command reads from a YAML file."""

    def files(name: str) -> dict[str, Any]:
        return {"path_src": f"{options.out}/{name}.source", "path_tgt": f"{options.out}/{name}.target"}

    return {
        "data": {"train": files("train"), "valid": files("valid")},
        "transforms": [],
        "share_vocab": True,
        "src_vocab": f"{options.out}/pieces",
        "tgt_vocab": f"{options.out}/pieces",
        "seed": options.seed,
        "report_every": options.updates // options.rounds,
        "inference": {"beam_size": 1, "max_length": 100},
        "model": {
            "architecture": "transformer",
            "layers": options.layers,
            "hidden_size": options.d_model,
            "heads": 4,
            "transformer_ff": 4 * options.d_model,
            "embeddings": {"word_vec_size": options.d_model, "position_encoding_type": "SinusoidalInterleaved"},
            "share_embeddings": True,
            "share_decoder_embeddings": True,
        },
        "training": {
            "train_steps": options.updates,
            "batch_type": "tokens",
            "batch_size": options.batch_tokens,
            "normalization": "tokens",
            "label_smoothing": SMOOTHING,
            "optim": "adamw",
            "learning_rate": options.lr,
            "decay_method": "cosine",
            "warmup_steps": max(1, options.updates // 10),
            "max_grad_norm": 1.0,
            "dropout": [0.0],
            "attention_dropout": [0.0],
            "param_init": 0.0,
            "param_init_method": "xavier_uniform",
            "log_attention_entropy": False,
            "num_workers": 0,
            "bucket_size": 40_000,
            "model_path": f"{options.out}/model",
        },
    }


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        chosen = parse_arguments()
        if chosen.run:
            with contextlib.redirect_stdout(sys.stderr):  # where Eole prints
                train(chosen, sys.__stdout__)
        else:
            compare(chosen)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
