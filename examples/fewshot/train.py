"""Fine-tunes a sentence encoder on few labelled questions, with and without a contrastive loss beside cross-entropy.

README.md tells the options.
"""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import itertools
import json
import statistics
import sys
import time
from typing import Any

import torch
from data import DataError
from experiment import Experiment
from model import Classifier
from options import parse_arguments
from report import draw_embeddings, table, tuning_table
from tqdm import tqdm
from training import LOSSES, Settings, predict

TUNING_SEEDS = (1001, 1002)  # no draw that settings are chosen by is one that they are compared on


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
    options, settings = experiment.options, experiment.settings
    seeds = range(options.seed, options.seed + options.seeds)
    test = experiment.encoded(experiment.parts.test)
    results: list[dict[str, Any]] = []
    shipped = Classifier(experiment.encoder, len(experiment.labels), experiment.bf16).eval()
    embeddings = {(size, "as shipped"): predict(shipped, test)[1] for size in options.sizes[:1]}
    total = len(LOSSES) * len(seeds) * sum(experiment.updates(size) for size in options.sizes)
    with tqdm(total=total, unit="update", leave=False, disable=None) as bar:
        for size, seed, loss in itertools.product(options.sizes, seeds, LOSSES):
            score, features = experiment.run(loss, size, seed, settings, test, bar)
            results.append({"labelled": size, "seed": seed, "loss": loss, "accuracy": score})
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
    options, base = experiment.options, experiment.settings
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
    per_candidate = len(TUNING_SEEDS) * sum(experiment.updates(size) for size in options.sizes)
    with tqdm(total=per_candidate * (len(options.lrs) + len(grid)), unit="update", leave=False, disable=None) as bar:
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
