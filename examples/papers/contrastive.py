"""Cross-entropy with a contrastive loss beside it: an encoder fine-tuned on few labels, of which some are wrong.

After Gunel et al. 2021, "Supervised Contrastive Learning for Pre-trained Language Model Fine-tuning". It is
examples/fewshot with a share of the training labels replaced by those of other classes.
"""

from __future__ import annotations

import os

# Read when torch is imported. By default its threads wait for each other by spinning, which beside other busy programs
# costs ten times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import hashlib
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
sys.path.append(str(Path(__file__).resolve().parents[1] / "fewshot"))
from arguments import parse, share_or_all
from experiment import Experiment
from frame import Run, main, make_parser, run_all, save_figure
from options import add_options, settle
from report import table
from tables import spread
from training import LOSSES

QUICK = {"seeds": 1, "sizes": [20], "noise": [0.0, 0.3]}

#: What --grid takes, of each with each.
LAMS = (0.1, 0.5, 0.9)
TEMPERATURES = (0.1, 0.3, 0.5, 0.7)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("contrastive", "Few labels, of which some are wrong: CE against CE + SupCon.")
    parser.set_defaults(seeds=5)
    add = parser.add_argument_group("comparison").add_argument
    add("--noise", type=share_or_all, nargs="+", default=[0.0, 0.1, 0.3, 0.5], help="shares of wrong training labels")
    add(
        "--grid",
        action="store_true",
        help="CE + SupCon of each lam with each temperature, all labels right, in its place",
    )
    add(
        "--tsne",
        action="store_true",
        help="in its place the embeddings of the test questions, all labels right: t-SNE of the first seed's",
    )
    add_options(parser)
    options = parse(parser, QUICK, arguments)
    if options.grid and options.tsne:
        parser.error("--grid and --tsne each take the place of the comparison: give one of them")
    settle(parser, options)
    return options


def compare(options: argparse.Namespace) -> None:
    experiment = Experiment(options)
    test = experiment.encoded(experiment.parts.test)
    shared = {
        "fingerprint": fingerprint(experiment),
        "max_length": options.max_length,
        "dtype": options.dtype,
        **experiment.settings._asdict(),
    }
    seeds = range(options.seed, options.seed + options.seeds)
    plan = [
        {"labelled": size, "noise": noise, "loss": loss, "seed": seed, "epochs": options.epochs[size], **shared}
        for seed, size, noise, loss in itertools.product(
            seeds, options.sizes, [0.0] if options.grid or options.tsne else options.noise, LOSSES
        )
    ]
    if options.grid:
        joint = [settings for settings in plan if settings["loss"] != "CE"]
        plan = [settings for settings in plan if settings["loss"] == "CE"]
        plan += [
            {**settings, "lam": lam, "temperature": temperature}
            for settings, lam, temperature in itertools.product(joint, LAMS, TEMPERATURES)
        ]
    if options.tsne:
        plan = [{**settings, "drawn": settings["seed"] == options.seed} for settings in plan]

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        size = settings["labelled"]
        own = experiment.settings._replace(lam=settings["lam"], temperature=settings["temperature"])
        with tqdm(total=experiment.updates(size), unit="update", leave=False, disable=None) as bar:
            accuracy, features = experiment.run(
                settings["loss"], size, settings["seed"], own, test, bar, settings["noise"]
            )
        more = embedded(features, test.labels, settings["drawn"]) if options.tsne else {}
        return {"accuracy": accuracy, **more}

    runs = run_all(plan, run, told, options.out, options.fresh)
    if options.grid:
        return report_grid(runs, options.out)
    if options.tsne:
        return report_embeddings(runs, test.labels, experiment.labels, options.out)
    written = table([{**run.settings, **run.measured} for run in runs], by=("labelled", "noise"))
    print(f"\naccuracy in %, mean and standard deviation over {len(seeds)} seed(s)\n\n{written}")
    (options.out / "table.md").write_text(written, encoding="utf-8")
    draw_accuracies(runs, options.out / "contrastive.png")
    print(f"table, plot and results: {options.out}")


def fingerprint(experiment: Experiment) -> str:
    """Of the questions, the pieces they are cut into, and the encoder."""
    parts = [(part, experiment.encoded(part).pieces) for part in (experiment.parts.pool, experiment.parts.test)]
    digest = hashlib.sha256(repr(parts).encode())
    for weight in experiment.encoder.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()[:16]


def told(run: Run) -> str:
    size, noise, loss, seed = (run.settings[name] for name in ("labelled", "noise", "loss", "seed"))
    share = "" if loss == "CE" else f" (lam {run.settings['lam']}, temperature {run.settings['temperature']})"
    return f"{size} labelled, noise {noise}, {loss}{share}, seed {seed}: {run.measured['accuracy']:.1%}"


def report_grid(runs: Sequence[Run], out: Path) -> None:
    """Accuracy of each pair of lam and temperature less that of CE of the same seed: a table, and a heat map."""
    plain = {
        (r.settings["labelled"], r.settings["seed"]): r.measured["accuracy"] for r in runs if r.settings["loss"] == "CE"
    }
    gains: dict[tuple[int, float, float], list[float]] = {}
    for r in runs:
        size, lam, temperature = (r.settings[name] for name in ("labelled", "lam", "temperature"))
        if r.settings["loss"] != "CE":
            gain = 100 * (r.measured["accuracy"] - plain[size, r.settings["seed"]])
            gains.setdefault((size, lam, temperature), []).append(gain)
    sizes = list(dict.fromkeys(size for size, _, _ in gains))
    lines = [
        f"| labelled | lam | {' | '.join(f'temperature {t}' for t in TEMPERATURES)} |",
        f"|---:|---:|{'---:|' * len(TEMPERATURES)}",
    ]
    for size, lam in itertools.product(sizes, LAMS):
        cells = (spread(gains[size, lam, t], "+.1f") for t in TEMPERATURES)
        lines.append(f"| {size} | {lam} | {' | '.join(cells)} |")
    written = "\n".join(lines) + "\n"
    print(f"\naccuracy less that of CE, in points, mean and standard deviation over the seeds\n\n{written}")
    (out / "grid.md").write_text(written, encoding="utf-8")
    with save_figure(out / "grid.png", 1, len(sizes)) as (panels,):
        for panel, size in zip(panels, sizes, strict=True):
            means = [[statistics.mean(gains[size, lam, t]) for t in TEMPERATURES] for lam in LAMS]
            largest = max(abs(mean) for line in means for mean in line) or 1.0
            panel.imshow(means, cmap="RdBu", vmin=-2 * largest, vmax=2 * largest, aspect="auto", origin="lower")
            for (i, line), j in itertools.product(enumerate(means), range(len(TEMPERATURES))):
                panel.text(j, i, f"{line[j]:+.1f}", ha="center", va="center", fontsize=8)
            panel.set_xticks(range(len(TEMPERATURES)), TEMPERATURES)
            panel.set_yticks(range(len(LAMS)), LAMS)
            panel.set(title=f"{size} labels: points over CE", xlabel="temperature", ylabel="lam")
    print(f"table, plot and results: {out}")


def embedded(features: torch.Tensor, labels: torch.Tensor, drawn: bool) -> dict[str, Any]:
    """How far the directions of the features (N, D) lie apart by class, and where t-SNE draws them: (N, 2)."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    directions = F.normalize(features).numpy()
    score = silhouette_score(directions, labels.numpy(), metric="cosine")
    if not drawn:
        return {"silhouette": float(score)}
    neighbours = min(30, (len(directions) - 1) / 3)  # scikit-learn's default, and fewer where there are few texts
    points = TSNE(perplexity=neighbours, random_state=0).fit_transform(directions)
    return {"silhouette": float(score), "points": points.round(1).tolist()}


def report_embeddings(runs: Sequence[Run], labels: torch.Tensor, names: Sequence[str], out: Path) -> None:
    """A table of the silhouette scores, and a panel for each size and loss of the points of the first seed."""
    sizes = list(dict.fromkeys(run.settings["labelled"] for run in runs))
    written = table([{**run.settings, "accuracy": run.measured["silhouette"]} for run in runs])
    print(f"\n100 times the silhouette score of the classes, mean and standard deviation over the seeds\n\n{written}")
    (out / "tsne.md").write_text(written, encoding="utf-8")
    with save_figure(out / "tsne.png", len(sizes), len(LOSSES)) as panels:
        for run in (run for run in runs if run.settings["drawn"]):
            size, loss = run.settings["labelled"], run.settings["loss"]
            panel = panels[sizes.index(size)][LOSSES.index(loss)]
            points = torch.tensor(run.measured["points"])
            for k, name in enumerate(names):
                panel.scatter(*points[labels == k].T, s=2, color=f"C{k}", label=name)
            panel.set(title=f"{loss}, {size} labels", xticks=[], yticks=[])
        handles = panels[0][0].get_legend_handles_labels()
        panels[0][0].figure.legend(*handles, loc="outside lower center", ncols=3, markerscale=4)
    print(f"table, plot and results: {out}")


def draw_accuracies(runs: Sequence[Run], path: Path) -> None:
    """Accuracy against noise, a panel for each number of labels: a point for each seed, a line through their means."""
    sizes = list(dict.fromkeys(run.settings["labelled"] for run in runs))
    with save_figure(path, 1, len(sizes)) as (panels,):
        for (panel, size), (i, loss) in itertools.product(zip(panels, sizes, strict=True), enumerate(LOSSES)):
            scores: dict[float, list[float]] = {}
            for run in runs:
                if (run.settings["labelled"], run.settings["loss"]) == (size, loss):
                    scores.setdefault(run.settings["noise"], []).append(100 * run.measured["accuracy"])
            for noise, own in scores.items():
                panel.plot([noise] * len(own), own, f"C{i}.", markersize=4)
            panel.plot(scores.keys(), [statistics.mean(own) for own in scores.values()], f"C{i}", label=loss)
            panel.set(title=f"{size} labelled: accuracy in %", xlabel="share of wrong labels")
        panels[0].legend()


if __name__ == "__main__":
    main(parse_arguments, compare)
