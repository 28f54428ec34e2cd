"""Estimates of the memory of a step: with the row form after a linear layer, and with the linear form."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..checks import DTYPES, check_int, compute_dtype
from ..engine import budgets as chunking
from ..engine.chunks import gradient_dtype


class Footprint(NamedTuple):
    """The result of :func:`footprint`, in bytes, for hidden states (N, D), a weight (V, D) and their logits (N, V).

    Peaks are those of a training step beyond hidden states and weight, the gradients of both included, with no row
    ignored. Vectors with one number per row are left out.
    """

    hidden: int
    """The hidden states; their gradient is as large when it is handed over."""
    weight: int
    """The weight; its gradient is as large when it is handed over."""
    logits: int
    """All logits; their gradient is as large."""
    chunks: int
    """How many chunks the linear form cuts the logits into."""
    chunk_rows: int
    """How many rows a chunk has."""
    chunk: int
    """The logits of a chunk."""
    weight_sum: int
    """The sum of the weight's gradient, float32 at least. Of one bfloat16 chunk, on CPUs of four, it is bfloat16."""
    hidden_sum: int
    """The hidden states' gradient until it is handed over, float32 for float16, which has not the range."""
    row: int
    """Peak of the row form, with the logits, their gradient and the gradients of hidden states and weight."""
    row_in_place: int
    """The same with ``inplace_backward=True``."""
    linear: int
    """Peak of the linear form, with a chunk and the gradients, or with these twice where they are handed over."""
    evaluation: int
    """Peak of the linear form where nothing requires a gradient."""


def footprint(
    rows: int,
    features: int,
    classes: int,
    dtype: torch.dtype,
    budget: int | None = None,
    device: torch.device | str = "cpu",
) -> Footprint:
    """Estimate the memory of a loss of hidden states (rows, features), by the sizing rule of the linear form.

    Args:
        rows, features, classes: N, D and V, at least 1.
        dtype: of hidden states and weight.
        budget: bytes that a chunk of logits may take; None takes FUSEDLOSS_LINEAR_BUDGET or else the device's rule.
        device: where the tensors would be. "cuda" uses the rule of NVIDIA GPUs, and needs no GPU.

    Raises TypeError and ValueError for sizes, a dtype or a budget that the linear forms do not take.

    >>> import torch
    >>> f = footprint(4096, 512, 131072, torch.bfloat16)
    >>> f.logits // 2**20, f.chunk // 2**20, f.linear // 2**20
    (1024, 128, 388)
    """
    for name, value in (("rows", rows), ("features", features), ("classes", classes)):
        check_int(name, value, 1)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    size = dtype.itemsize
    budget = chunking.checked_budget(budget, classes * size)
    hidden, weight, logits = rows * features * size, classes * features * size, rows * classes * size

    def chunk_of(gradient: bool) -> tuple[int, int]:
        most = budget or chunking.default_budget(torch.device(device), dtype, logits, classes * features, gradient)
        return chunking.chunk_rows(rows, classes * size, most)

    chunks, chunk_rows = chunk_of(gradient=True)
    chunk = chunk_rows * classes * size
    handed_over, rounded = gradient_dtype(dtype), chunking.most_rounded(torch.device(device))
    weight_sum = classes * features * (handed_over if chunks <= rounded else compute_dtype(dtype)).itemsize
    hidden_sum = rows * features * handed_over.itemsize
    # In the dtype of what they are gradients of.
    copies = (weight if weight_sum != weight else 0) + (hidden if hidden_sum != hidden else 0)
    return Footprint(
        hidden=hidden,
        weight=weight,
        logits=logits,
        chunks=chunks,
        chunk_rows=chunk_rows,
        chunk=chunk,
        weight_sum=weight_sum,
        hidden_sum=hidden_sum,
        row=2 * logits + hidden + weight,
        row_in_place=logits + hidden + weight,
        linear=hidden_sum + weight_sum + max(chunk, copies),
        evaluation=chunk_of(gradient=False)[1] * classes * size,
    )
