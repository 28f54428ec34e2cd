"""The supervised contrastive loss beside its peers: cases and candidates, measured as the linear forms are.

Run as a program, with the arguments of `memory`, it prints the memory of one candidate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from linear_suite import COMPILED, child, compare, step
from memory import peak_memory
from torch import Tensor

import fusedloss as fl
from fusedloss.tools import timing

Loss = Callable[[Tensor], Tensor]  # of features (N, D)

TEMPERATURE = 0.3
LABELS = 100

#: Anchors at a time where the formula is computed to compare with: what it stores is many times their similarities.
FORMULA_ROWS = 256


class Case(NamedTuple):
    """Features to measure on, and for how long."""

    rows: int
    features: int
    rounds: int
    seconds: float  # after which a candidate has no more turns

    dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.rows}x{self.features}"


QUICK = [Case(2048, 256, 3, 2)]
DEFAULT = [Case(rows, 256, 3, 5) for rows in (512, 2048, 8192)]
FULL = [Case(rows, features, 5, 30) for features in (256, 768) for rows in (512, 2048, 8192, 16384)]


def data(case: Case) -> tuple[Tensor, Tensor]:
    """Features and labels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(case.rows, case.features, generator=generator)
    return features, torch.randint(LABELS, (case.rows,), generator=generator)


def candidates(labels: Tensor) -> dict[str, Loss]:
    """The mean loss over anchors with a positive by each way to have it. One not installed raises when called."""
    return {
        "fused": partial(fl.supcon_loss, labels=labels, temperature=TEMPERATURE),
        "eager": partial(_eager, labels=labels),
        "compiled": timing.compile_when_called(partial(_eager, labels=labels)),
        "pytorch-metric-learning": partial(_pytorch_metric_learning, labels=labels),
    }


def _sum(features: Tensor, labels: Tensor, anchors: slice) -> Tensor:
    """The losses of some anchors, from the matrix of their similarities to all."""
    f = F.normalize(features, dim=-1)
    itself = torch.arange(len(f))[anchors, None] == torch.arange(len(f))
    positive = (labels[anchors, None] == labels) & ~itself
    similarity = (f[anchors] @ f.t() / TEMPERATURE).masked_fill(itself, -torch.inf)
    log_p = similarity.log_softmax(1).masked_fill(~positive, 0)
    return -(log_p.sum(1) / positive.sum(1).clamp(min=1)).sum()


def _divisor(labels: Tensor) -> Tensor:
    """The number of anchors with a positive."""
    count = labels.bincount()
    return count[count > 1].sum().clamp(min=1)


def _eager(features: Tensor, *, labels: Tensor) -> Tensor:
    return _sum(features, labels, slice(None)) / _divisor(labels)


def _pytorch_metric_learning(features: Tensor, *, labels: Tensor) -> Tensor:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE)(features, labels)


def expected(features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradient by the formula, a few anchors at a time."""
    parts = [
        step(partial(_sum, labels=labels, anchors=slice(i, i + FORMULA_ROWS)), features)
        for i in range(0, len(features), FORMULA_ROWS)
    ]
    loss, gradient = (sum(column, torch.zeros(())) for column in zip(*parts, strict=True))
    return loss / _divisor(labels), gradient / _divisor(labels)


def products(features: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The floor: the product that makes the similarities and the two of their gradient, into memory that is there."""
    similarity, by_rows, by_columns = (
        features.new_empty(len(features), len(features)),
        *features.new_empty(2, *features.shape),
    )

    def run() -> tuple[Tensor, ...]:
        torch.mm(features, features.t(), out=similarity)
        torch.mm(similarity, features, out=by_rows)
        return by_rows, torch.mm(similarity.t(), features, out=by_columns)

    return run


def measure(benchmark: Any, case: Case) -> None:
    features, labels = data(case)
    compare(
        benchmark,
        case,
        f"supcon_loss(temperature={TEMPERATURE})",
        (features,),
        candidates(labels),
        products(features),
        partial(expected, features, labels),
        partial(memory_in_process, case=case),
    )


def memory_in_process(name: str, case: Case) -> float | None:
    """Bytes at the peak of a step beyond its inputs, in a process of its own; None where the kernel does not tell."""
    return child(Path(__file__), name, case.rows, case.features)


def memory(name: str, case: Case) -> int | None:
    features, labels = data(case)
    # What comes with a first call: threads, and code that is compiled for this shape.
    if name in COMPILED:
        way = candidates(labels)[name]
        step(way, features)
    else:
        step(candidates(labels[:64])[name], features[:64])
        way = candidates(labels)[name]
    return peak_memory(partial(step, way, features))


if __name__ == "__main__":
    name, *sizes = sys.argv[1:]
    print(json.dumps(memory(name, Case(*map(int, sizes), rounds=1, seconds=0))))
