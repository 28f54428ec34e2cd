"""The losses in plain PyTorch: dense, differentiable any number of times, on any device; fallback and definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_indices, compute_dtype, may_read
from .epilogue import Epilogue, Shared
from .statistics import Picks, Statistics, Targets, assemble, dense_columns


def row_losses(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    epilogue: Epilogue,
    shared: Shared,
) -> tuple[Tensor, Statistics]:
    """Row losses (N,) of logits (N, V), and statistics that always hold the top class."""
    picks = epilogue.picks
    picks = picks._replace(top_k=max(picks.top_k, 1), mean=picks.mean or shared.label_smoothing != 0)
    z, s, ignored, invalid = _statistics(logits, target, weight, candidates, picks)
    over_classes = epilogue.over == "classes"
    if over_classes:
        terms = epilogue.of_classes(*_probabilities(z, s), params)
        base = (terms if weight is None else terms * weight).sum(-1)
    else:
        base = epilogue.of_rows(s, params)
    loss = shared.apply(base, s, weight, logits.shape[-1], weighted=over_classes)
    loss = loss.masked_fill(ignored, 0)
    return loss.masked_fill(invalid, torch.nan), s


def class_sums(
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    params: list[Tensor],
    function: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Statistics]:
    """Sums over the rows (2, V) in float64 of an overlap's error and agreement, and statistics with the top class."""
    z, s, ignored, invalid = _statistics(logits, target, None, None, Picks(1))
    terms = torch.stack(function(*_probabilities(z, s), *(x[:, None] if x.dim() else x for x in params)))
    if row_weight is not None:
        terms = terms * row_weight[:, None]
    terms = terms.masked_fill(ignored[:, None], 0).masked_fill(invalid[:, None], torch.nan)
    return terms.sum(1, dtype=torch.float64), s


def _statistics(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    picks: Picks,
) -> tuple[Tensor, Statistics, Tensor, Tensor]:
    """Logits in the compute dtype, those of ignored rows 0; their statistics; which rows are ignored, which invalid."""
    classes = logits.shape[-1]
    if may_read(target):
        check_indices(target, candidates, classes)
    index, ignored, invalid = Targets.of(target, classes)
    if candidates is not None:
        outside = (candidates < 0) | (candidates >= classes)
        invalid = invalid | (outside.any(-1) & ~ignored)
        candidates = candidates.masked_fill(outside, 0)
    z = logits.to(compute_dtype(logits.dtype)).masked_fill(ignored[:, None], 0)
    columns, pick_index = dense_columns(z, index, weight, candidates, picks)
    return z, assemble(columns, index, pick_index, picks, weight), ignored, invalid


def _probabilities(z: Tensor, s: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """p, 1 - p and whether it is the target, of every class."""
    top = s.top_index[:, None]
    e = (z - s.top_logit.detach()[:, None]).exp()
    # 1 - p cancels for the one class that may have p > 0.5
    others = e.scatter(-1, top, 0).sum(-1, keepdim=True)
    total = others + e.gather(-1, top)
    p = e / total
    q = (1 - p).scatter(-1, top, others / total)
    positive = torch.zeros_like(z, dtype=torch.bool).scatter(-1, s.target[:, None], 1)
    return p, q, positive
