"""The losses in plain PyTorch: dense, differentiable any number of times, on any device; fallback and definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_indices, compute_dtype
from ..epilogue import Epilogue, Shared
from ..statistics import Statistics, assemble, dense_columns


def row_losses(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    epilogue: Epilogue,
    shared: Shared,
    ignore_index: int,
) -> tuple[Tensor, Statistics]:
    """Row losses (N,) of logits (N, V), and statistics that always hold the top class."""
    classes = logits.shape[-1]
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_indices("target", target, classes, ignore_index)
        if candidates is not None:
            check_indices("candidate", candidates, classes, None)
    ignored = target == ignore_index
    # Elsewhere a look at the targets would stall the stream: a row that is out of range is NaN.
    invalid = ((target < 0) | (target >= classes)) & ~ignored
    if candidates is not None:
        outside = (candidates < 0) | (candidates >= classes)
        invalid |= outside.any(-1) & ~ignored
        candidates = candidates.masked_fill(outside, 0)
    index = target.masked_fill(ignored | invalid, 0)
    z = logits.to(compute_dtype(logits.dtype)).masked_fill(ignored[:, None], 0)

    picks = epilogue.picks
    picks = picks._replace(top_k=max(picks.top_k, 1), mean=picks.mean or shared.label_smoothing != 0)
    columns, pick_index = dense_columns(z, index, weight, candidates, picks)
    s = assemble(columns, index, pick_index, picks, weight)
    over_classes = epilogue.over == "classes"
    base = _sum_over_classes(z, s, weight, params, epilogue) if over_classes else epilogue.of_rows(s, params)
    loss = shared.apply(base, s, weight, classes, weighted=over_classes)
    loss = loss.masked_fill(ignored, 0)
    return loss.masked_fill(invalid, torch.nan), s


def _sum_over_classes(
    z: Tensor, s: Statistics, weight: Tensor | None, params: list[Tensor], epilogue: Epilogue
) -> Tensor:
    top = s.top_index[:, None]
    e = (z - s.top_logit.detach()[:, None]).exp()
    # 1 - p cancels for the one class that may have p > 0.5
    others = e.scatter(-1, top, 0).sum(-1, keepdim=True)
    total = others + e.gather(-1, top)
    p = e / total
    q = (1 - p).scatter(-1, top, others / total)
    positive = torch.zeros_like(z, dtype=torch.bool).scatter(-1, s.target[:, None], True)
    terms = epilogue.of_classes(p, q, positive, params)
    return (terms if weight is None else terms * weight).sum(-1)
