"""The tables and the plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tables import interval, spread
from torch import Tensor
from training import LOSSES, Settings


def table(results: list[dict[str, Any]], by: Sequence[str] = ("labelled",)) -> str:
    """A row for each value of `by`, in Markdown; the difference is the joint loss's minus cross-entropy's, by seed."""
    plain, joint = LOSSES
    lines = [
        f"| {' | '.join(by)} | {plain} | {joint} | difference, paired | 95 % interval of its mean | {joint} ahead |",
        f"|{'---:|' * (len(by) + 5)}",
    ]
    for key in sorted({tuple(result[name] for name in by) for result in results}):
        own = [result for result in results if tuple(result[name] for name in by) == key]
        of_loss = {loss: {r["seed"]: 100 * r["accuracy"] for r in own if r["loss"] == loss} for loss in LOSSES}
        differences = [of_loss[joint][seed] - of_loss[plain][seed] for seed in sorted(of_loss[plain])]
        scores = " | ".join(spread(list(of_loss[loss].values()), ".1f") for loss in LOSSES)
        ahead = f"{sum(d > 0 for d in differences)} of {len(differences)}"
        row = (*map(str, key), scores, spread(differences, "+.1f"), interval(differences), ahead)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def tuning_table(rows: list[tuple[str, Settings, dict[int, float]]], header: bool = True) -> str:
    """A row for each candidate, in Markdown: mean accuracies on the validation part."""
    lines = []
    if header:
        lines += [
            f"| loss | lr | lam | temperature | {' | '.join(f'{size} labelled' for size in rows[0][2])} | mean |",
            f"|---|{'---:|' * (len(rows[0][2]) + 4)}",
        ]
    for loss, settings, scores in rows:
        own = f"{settings.lam:g} | {settings.temperature:g}" if loss == LOSSES[1] else " | "
        values = " | ".join(f"{100 * score:.1f}" for score in (*scores.values(), statistics.mean(scores.values())))
        lines.append(f"| {loss} | {settings.lr:g} | {own} | {values} |")
    return "\n".join(lines) + "\n"


def principal(features: Tensor) -> Tensor:
    """features (N, D) -> the first two principal components (N, 2) of their directions, which SupCon compares."""
    directions = F.normalize(features.double())
    centred = directions - directions.mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].t()


def draw_embeddings(embeddings: dict[tuple[int, str], Tensor], labels: Tensor, names: list[str], path: Path) -> None:
    """A panel for each size and loss, in rows of a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({size for size, _ in embeddings})
    columns = ("as shipped", *LOSSES)
    figure, panels = pyplot.subplots(len(sizes), 3, figsize=(11, 3.4 * len(sizes)), squeeze=False, layout="constrained")
    handles: list[Any] = []
    for row, size in zip(panels, sizes, strict=True):
        for panel, column in zip(row, columns, strict=True):
            if (size, column) not in embeddings:
                panel.set_axis_off()
                continue
            x, y = principal(embeddings[size, column]).unbind(1)
            handles = [
                panel.scatter(x[labels == k], y[labels == k], s=4, color=f"C{k}", label=name)
                for k, name in enumerate(names)
            ]
            panel.set_title(column if column == "as shipped" else f"{column}, {size} labelled")
            panel.set_xticks([])
            panel.set_yticks([])
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 8), markerscale=3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
