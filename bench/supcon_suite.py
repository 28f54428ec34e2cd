"""The supervised contrastive loss beside its peers: cases and candidates, measured as the linear forms are.

Run as a program, with the arguments of `memory`, it prints the memory of one candidate.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from linear_suite import COMPILED, child, compare, step
from memory import peak_memory
from torch import Tensor

from fusedloss.tools import peers

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
    return features, torch.randint(peers.LABELS, (case.rows,), generator=generator)


def expected(features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradient by the formula, a few anchors at a time."""
    parts = [
        step(partial(peers.supcon_sum, labels=labels, anchors=slice(i, i + FORMULA_ROWS)), features)
        for i in range(0, len(features), FORMULA_ROWS)
    ]
    loss, gradient = (sum(column, torch.zeros(())) for column in zip(*parts, strict=True))
    return loss / peers.supcon_divisor(labels), gradient / peers.supcon_divisor(labels)


def measure(benchmark: Any, case: Case) -> None:
    features, labels = data(case)
    compare(
        benchmark,
        case,
        f"supcon_loss(temperature={peers.TEMPERATURE})",
        (features,),
        peers.supcon_candidates(labels),
        peers.similarity_products(features),
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
        way = peers.supcon_candidates(labels)[name]
        step(way, features)
    else:
        step(peers.supcon_candidates(labels[:64])[name], features[:64])
        way = peers.supcon_candidates(labels)[name]
    return peak_memory(partial(step, way, features))


if __name__ == "__main__":
    name, *sizes = sys.argv[1:]
    print(json.dumps(memory(name, Case(*map(int, sizes), rounds=1, seconds=0))))
