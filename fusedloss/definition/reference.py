"""The losses in plain PyTorch: dense, differentiable any number of times, on any device; fallback and definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import IGNORED, check_indices, compute_dtype, may_read
from .divergences import lag_between, whole
from .epilogue import Epilogue
from .projection import Form, dense_logits
from .rows import Rows, Spec
from .statistics import Columns, Picks, Statistics, Targets, assemble, dense_columns


def logits_of(rows: Rows, form: Form) -> Tensor:
    """All logits, differentiable: those in hand, or by their definition."""
    if not rows.is_linear:
        return rows.logits
    return dense_logits(rows.hidden, rows.weight, rows.bias, form, rows.target)


def tempered(logits: Tensor, rows: Rows, form: Form) -> Tensor:
    """The logits, in the compute dtype, over the temperature."""
    if not form.tempered:
        return logits
    assert rows.scalars is not None
    # A logit that is not finite, of a masked class or an ignored row, has no part in the factor's gradient.
    finite = logits.isfinite()
    return torch.where(finite, logits.masked_fill(~finite, 0) * rows.scalars[-1], logits)


def row_losses(rows: Rows, epilogue: Epilogue, spec: Spec) -> tuple[Tensor, Statistics]:
    """Row losses (N,), and statistics that always hold the top class."""
    picks = epilogue.picks
    picks = picks._replace(top_k=max(picks.top_k, 1), mean=picks.mean or spec.smooths)
    z, s, ignored, invalid = _statistics(rows, spec.form, picks)
    if epilogue.has_second_row:
        loss = _against_second_row(z, rows, epilogue, spec, s)
    elif epilogue.over == "classes":
        base, _ = _over_classes(z, s.target, s.top_index, s.top_logit.detach(), rows, epilogue)
        loss = with_common_terms(base, s, rows, spec, z.shape[-1], weighted=True)
    else:
        loss = with_common_terms(epilogue.of_rows(s, rows.params), s, rows, spec, z.shape[-1], weighted=False)
    return loss.masked_fill(ignored, 0) * _nan_where(invalid, loss), s


def statistics(rows: Rows, spec: Spec, picks: Picks) -> tuple[Statistics, Tensor, Tensor]:
    """Those of rows, which rows are ignored and which invalid."""
    return _statistics(rows, spec.form, picks)[1:]


def losses_between(
    columns: Columns, index: Tensor, picks: Picks, rows: Rows, epilogue: Epilogue, spec: Spec, classes: int
) -> tuple[Tensor, Statistics]:
    """Row losses (N,) of statistics that a pass has computed, and the statistics by their names."""
    invalid: Tensor | None = None
    if spec.impl == "cpu" and rows.classes == classes:  # its pass has raised for any target that is out of range
        ignored = rows.target == IGNORED
        safe = rows.target.masked_fill(ignored, 0)
    else:
        safe, ignored, invalid = Targets.of(rows.target, classes)
    s = assemble(columns, safe, index, picks, rows.class_weight)
    loss = with_common_terms(epilogue.of_rows(s, rows.params), s, rows, spec, classes, weighted=False)
    loss = loss.masked_fill(ignored, 0)
    return loss if invalid is None else loss.masked_fill(invalid, torch.nan), s


def losses_over_classes(rows: Rows, epilogue: Epilogue, spec: Spec) -> Tensor:
    """Row losses (N,) of a sum over the classes, without the statistics that only other losses need."""
    z, index, ignored, invalid = _targeted(rows, spec.form)
    m, top = z.detach().max(-1)
    base, total = _over_classes(z, index, top, m, rows, epilogue)
    mean_ce = lse = m + total.log()
    if spec.smooths:
        ce = lse[:, None] - z
        mean_ce = (ce if rows.class_weight is None else ce * rows.class_weight).mean(-1)
    s = Statistics(target=index, lse=lse, mean_ce=mean_ce)
    loss = with_common_terms(base, s, rows, spec, z.shape[-1], weighted=True)
    return loss.masked_fill(ignored, 0) * _nan_where(invalid, loss)


def _nan_where(invalid: Tensor, like: Tensor) -> Tensor:
    """A factor, since masked_fill would give an invalid row a gradient of 0."""
    return torch.where(invalid, torch.nan, 1.0).to(like.dtype)


def second_row(rows: Rows, form: Form) -> Tensor:
    """The teacher's logits over the temperature, or the targets, (N, V) in the compute dtype; of ignored rows 0."""
    first, *layer = rows.teacher
    if layer:
        weight, bias = layer[0], layer[1] if len(layer) > 1 else None
        first = dense_logits([first], [weight], bias, Form(form.teacher_softcap), None)
    return first.to(compute_dtype(first.dtype)).masked_fill((rows.target == IGNORED)[:, None], 0)


def _against_second_row(z: Tensor, rows: Rows, epilogue: Epilogue, spec: Spec, s: Statistics) -> Tensor:
    second, log_p = second_row(rows, spec.form), z.log_softmax(-1)
    params = [x[:, None] if x.dim() else x for x in rows.params]
    if epilogue.over == "targets":
        y = second * params[0] + params[1]
        base = epilogue.function(y if rows.class_weight is None else y * rows.class_weight, log_p).sum(-1)
        return with_common_terms(base, s, rows, spec, z.shape[-1], weighted=True)
    second = tempered(second, rows, spec.form)
    none = (second == -torch.inf) & (z == -torch.inf)
    # One after the other: a large common offset would leave no digits of the sums.
    tops = [x.detach().amax(-1, keepdim=True) for x in (second, z)]
    second_top, top = (torch.where(x.isfinite(), x, 0) for x in tops)
    log_sums = (second - second_top).logsumexp(-1, keepdim=True) - (z - top).logsumexp(-1, keepdim=True)
    d = lag_between(second, z, second_top, top).masked_fill(none, 0) - log_sums
    log_y = second.log_softmax(-1)
    base = epilogue.function(log_y, log_p, whole(log_y, log_p, d), *params[:-1]).sum(-1)
    ce = s.ce
    if spec.form.tempered:
        plain, index, *_ = _targeted(rows._replace(scalars=None), spec.form._replace(tempered=False))
        ce = dense_columns(plain, index, None, None, Picks())[0].ce
    hard = rows.params[-1]
    # A row that has no target may have an infinite cross-entropy with what stands for it.
    ce = torch.where(hard == 0, 0, ce)
    return with_common_terms(base, s, rows, spec, z.shape[-1], weighted=True) + hard * ce


def with_common_terms(base: Tensor, s: Statistics, rows: Rows, spec: Spec, classes: int, weighted: bool) -> Tensor:
    """The rows' whole losses, main * base + smooth * sum_j w_j (-log p_j) + z_loss * lse^2.

    `classes`: of all ranks. `weighted`: the base already holds the class weights.
    """
    # Soft targets have no class whose weight the row's other terms could have.
    row_weight = None if rows.class_weight is None or rows.teacher else rows.class_weight[s.target]
    loss = base if row_weight is None or weighted else row_weight * base
    if rows.scalars is None:
        return loss
    main, smooth, z_loss, _ = rows.scalars
    loss = main * loss
    if spec.z_loss:
        z_term = z_loss * s.lse.square()
        loss = loss + (z_term if row_weight is None else row_weight * z_term)
    return loss + smooth * classes * s.mean_ce if spec.smooths else loss


def class_sums(
    rows: Rows, row_weight: Tensor | None, function: Callable[..., tuple[Tensor, Tensor]], form: Form
) -> tuple[Tensor, Statistics]:
    """Sums over the rows (2, V) in float64 of an overlap's error and agreement, and statistics with the top class."""
    z, s, ignored, invalid = _statistics(rows._replace(class_weight=None, candidates=None), form, Picks(1))
    columns = (x[:, None] if x.dim() else x for x in rows.params)
    p, q, positive, _ = _probabilities(z, s.target, s.top_index, s.top_logit.detach())
    terms = torch.stack(function(p, q, positive, *columns))
    if row_weight is not None:
        terms = terms * row_weight[:, None]
    terms = terms.masked_fill(ignored[:, None], 0).masked_fill(invalid[:, None], torch.nan)
    return terms.sum(1, dtype=torch.float64), s


def _targeted(rows: Rows, form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits in the compute dtype, those of ignored rows 0; targets that are safe; which are ignored, which invalid."""
    logits = logits_of(rows, form)
    if may_read(rows.target):
        check_indices(rows.target, rows.candidates, logits.shape[-1])
    index, ignored, invalid = Targets.of(rows.target, logits.shape[-1])
    logits = tempered(logits.to(compute_dtype(logits.dtype)), rows, form)
    return logits.masked_fill(ignored[:, None], 0), index, ignored, invalid


def _statistics(rows: Rows, form: Form, picks: Picks) -> tuple[Tensor, Statistics, Tensor, Tensor]:
    """Such logits, their statistics, which rows are ignored and which invalid."""
    z, index, ignored, invalid = _targeted(rows, form)
    weight, candidates, classes = rows.class_weight, rows.candidates, z.shape[-1]
    if candidates is not None:
        outside = (candidates < 0) | (candidates >= classes)
        invalid = invalid | (outside.any(-1) & ~ignored)
        candidates = candidates.masked_fill(outside, 0)
    columns, pick_index = dense_columns(z, index, weight, candidates, picks)
    return z, assemble(columns, index, pick_index, picks, weight), ignored, invalid


def _over_classes(
    z: Tensor, target: Tensor, top: Tensor, largest: Tensor, rows: Rows, epilogue: Epilogue
) -> tuple[Tensor, Tensor]:
    """Sums (N,) over the classes, of the weighted losses and of exp(z_j - max)."""
    p, q, positive, total = _probabilities(z, target, top, largest)
    terms = epilogue.of_classes(p, q, positive, rows.params)
    return (terms if rows.class_weight is None else terms * rows.class_weight).sum(-1), total


def _probabilities(z: Tensor, target: Tensor, top: Tensor, largest: Tensor) -> tuple[Tensor, ...]:
    """Of every class p, 1 - p and whether it is the target; sum_j exp(z_j - max). By the top class and its logit."""
    e, top = (z - largest[:, None]).exp(), top[:, None]
    # 1 - p cancels for the one class that may have p > 0.5
    others = e.scatter(-1, top, 0).sum(-1, keepdim=True)
    total = others + e.gather(-1, top)
    p = e / total
    positive = torch.zeros_like(z, dtype=torch.bool).scatter(-1, target[:, None], True)
    return p, (1 - p).scatter(-1, top, others / total), positive, total[:, 0]
