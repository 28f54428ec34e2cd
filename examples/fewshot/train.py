"""Fine-tunes a sentence encoder on few labelled questions, with and without a contrastive loss beside cross-entropy.

README.md tells the options.
"""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: the encoder is a folder

import itertools
import json
import statistics
import sys
import time
from typing import Any

import torch
from data import DataError, draw, load_questions, split
from model import Classifier, encode, encoder_folder, load_encoder
from options import parse_arguments
from report import draw_embeddings, table, tuning_table
from torch import Tensor
from tqdm import tqdm
from training import LOSSES, Settings, accuracy, predict, train, updates

TUNING_SEEDS = (1001, 1002)  # no draw that settings are chosen by is one that they are compared on


class Experiment:
    """Encoder and questions, and the runs on them."""

    def __init__(self, options: Any) -> None:
        self.options = options
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

    def encoded(self, questions: list[Any]) -> Any:
        return encode(questions, self.labels, self.tokenizer, self.options.max_length)

    def updates(self, size: int, settings: Settings) -> int:
        return updates(size, self.options.epochs[size], settings.batch)

    def run(self, loss: str, size: int, seed: int, settings: Settings, measured: Any, bar: Any) -> tuple[float, Tensor]:
        """The accuracy on the questions `measured`, and their features."""
        bar.set_description(f"{size} labelled, seed {seed}, {loss}")
        drawn = self.encoded(draw(self.parts.pool, size, seed))
        epochs = self.options.epochs[size]
        model = train(
            self.encoder, drawn, len(self.labels), loss, epochs, settings, seed, self.bf16, progress=bar.update
        )
        classes, features = predict(model, measured)
        return accuracy(classes, measured), features


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    experiment = Experiment(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (tune if options.tune else compare)(experiment)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def compare(experiment: Experiment) -> None:
    """Both losses on the same draws, measured on the test part."""
    options = experiment.options
    settings = Settings(*(getattr(options, name) for name in Settings._fields))
    seeds = range(options.seed, options.seed + options.seeds)
    test = experiment.encoded(experiment.parts.test)
    results: list[dict[str, Any]] = []
    shipped = Classifier(experiment.encoder, len(experiment.labels), experiment.bf16).eval()
    embeddings = {(size, "as shipped"): predict(shipped, test)[1] for size in options.sizes[:1]}
    total = len(LOSSES) * len(seeds) * sum(experiment.updates(size, settings) for size in options.sizes)
    with tqdm(total=total, unit="update", leave=False) as bar:
        for size, seed, loss in itertools.product(options.sizes, seeds, LOSSES):
            score, features = experiment.run(loss, size, seed, settings, test, bar)
            results.append({"size": size, "seed": seed, "loss": loss, "accuracy": score})
            if seed == options.seed:
                embeddings[size, loss] = features
            if loss == LOSSES[-1]:
                scores = ", ".join(f"{r['loss']} {r['accuracy']:.1%}" for r in results[-len(LOSSES) :])
                tqdm.write(f"{size} labelled, seed {seed}: {scores}", file=sys.stdout)
    written = table(results)
    print(f"\naccuracy in % on {len(test.labels):,} test questions, mean and standard deviation over the seeds\n")
    print(written)
    (options.out / "table.md").write_text(written, encoding="utf-8")
    config = {name: getattr(options, name) for name in ("sizes", "epochs", "max_length", "dtype")}
    metrics = {"config": {**config, **settings._asdict()}, "results": results}
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw_embeddings(embeddings, test.labels, experiment.labels, options.out / "embeddings.png")
    print(f"table, figures and plot of the embeddings: {options.out}")


def tune(experiment: Experiment) -> None:
    """Chooses settings on the validation part: the learning rate for plain cross-entropy, and then at that rate, which
    is therefore not the joint loss's choice, the share and the temperature of the contrastive part.
    """
    options = experiment.options
    base = Settings(*(getattr(options, name) for name in Settings._fields))
    validation = experiment.encoded(experiment.parts.validation)
    rows: list[tuple[str, Settings, dict[int, float]]] = []

    def best(loss: str, candidates: list[Settings], bar: Any) -> Settings:
        for settings in candidates:
            scores = {
                size: statistics.mean(
                    experiment.run(loss, size, seed, settings, validation, bar)[0] for seed in TUNING_SEEDS
                )
                for size in options.sizes
            }
            rows.append((loss, settings, scores))
            tqdm.write(tuning_table(rows[-1:], header=len(rows) == 1).rstrip(), file=sys.stdout)
        return max(rows[-len(candidates) :], key=lambda row: statistics.mean(row[2].values()))[1]

    grid = [(lam, temperature) for lam in options.lams for temperature in options.temperatures]
    per_candidate = len(TUNING_SEEDS) * sum(experiment.updates(size, base) for size in options.sizes)
    with tqdm(total=per_candidate * (len(options.lrs) + len(grid)), unit="update", leave=False) as bar:
        chosen = best(LOSSES[0], [base._replace(lr=lr) for lr in options.lrs], bar)
        chosen = best(LOSSES[1], [chosen._replace(lam=lam, temperature=t) for lam, t in grid], bar)
    (options.out / "tuning.md").write_text(tuning_table(rows), encoding="utf-8")
    print(
        f"\nbest on the validation part: --lr {chosen.lr:g} --lam {chosen.lam:g} --temperature {chosen.temperature:g}"
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log shows each line when it is due
    try:
        sys.exit(main())
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
