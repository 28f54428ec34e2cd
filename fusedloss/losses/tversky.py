"""Tversky loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..checks import check_logits, check_parameter
from ..definition.epilogue import Overlap
from ..definition.statistics import RowStats
from ..engine.options import CLASS_LOSSES_LACK, ClassLossOptions, LinearClassLossOptions
from ._linear import projected
from ._overlap import Form, Level, overlap_loss, probabilities
from ._registry import example, linear_form, row_form

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _overlap(p: Tensor, q: Tensor, positive: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """E = beta (1 - p) and C = p where y = 1, E = alpha p elsewhere."""
    return torch.where(positive, beta * q, alpha * p), torch.where(positive, p, 0)


TVERSKY = Overlap("tversky", _overlap)


def _formula(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.6,
    smooth: float = 1.0,
    form: str = "one_vs_rest",
    level: str = "example",
) -> Tensor:
    p, y = probabilities(input, target, form)
    tp, fp, fn = p * y, p * (1 - y), (1 - p) * y
    if level != "example":
        rows = 0 if level == "class" else (0, 1)
        tp, fp, fn = tp.sum(rows), fp.sum(rows), fn.sum(rows)
    error = alpha * fp + (1 - alpha) * fn
    loss = error / (tp + error + smooth)  # as "1 - (tp + smooth) / ..." it would lose half the digits of float32
    return loss.sum(-1) if level == "example" else loss


@overload
def tversky_loss(
    input: Tensor, target: Tensor, *, alpha: float | Tensor = ..., beta: float | Tensor | None = ...,
    smooth: float = ..., form: Form = ..., level: Level = ...,
    return_stats: Literal[False] = ..., **options: Unpack[ClassLossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def tversky_loss(
    input: Tensor, target: Tensor, *, alpha: float | Tensor = ..., beta: float | Tensor | None = ...,
    smooth: float = ..., form: Form = ..., level: Level = ...,
    return_stats: Literal[True], **options: Unpack[ClassLossOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@row_form(
    example(_formula, over_classes=True),
    example(_formula, alpha=0.3, form="target"),
    example(_formula, over_rows=True, over_classes=True, level="class"),
    source="arXiv:1706.05721",
    without=CLASS_LOSSES_LACK,
)
def tversky_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor = 0.6,
    beta: float | Tensor | None = None,
    smooth: float = 1.0,
    form: Form = "one_vs_rest",
    level: Level = "example",
    return_stats: bool = False,
    **options: Unpack[ClassLossOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute the Tversky loss of logits, a dice loss with a weight for each kind of error.

    With p = softmax(input), the loss of a class is

        1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth),   TP = p y,  FP = p (1 - y),  FN = (1 - p) y

    y is 1 for the target's class and 0 for the others. ``form="one_vs_rest"`` sums the loss over all classes of a row.
    ``form="target"`` takes the target class alone (y = 1), which has no false positives.

    Args:
        alpha: the weight of false positives, at least 0: a number, a 0-d tensor or one value per target. Differentiated
            if it requires grad; in the linear form only with form "target".
        beta: the weight of false negatives, likewise; None for 1 - alpha, with alpha at most 1. alpha = beta = 1/2 is
            the dice loss with linear denominators and twice the smooth.
        smooth: added to numerator and denominator, at least 0 (one_vs_rest at level "example": 1e-30).
            Less than 1e-30 counts as that, so that a class without probability has no loss.
        form: "one_vs_rest" or "target".
        level: what TP, FP and FN are summed over, with form "one_vs_rest": nothing ("example"), the rows ("class"), or
            rows and classes ("set"); see :func:`dsc_loss`.

    With ``form="one_vs_rest"`` class weights multiply the loss of each class, not that of the row.

    Source: Salehi et al. 2017 (arXiv:1706.05721); for text Li et al. 2020 (arXiv:1911.02855), whose best alpha is 0.6.

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 9, requires_grad=True)
    >>> fl.tversky_loss(logits, torch.arange(8), alpha=0.6, level="class").backward()
    """
    check_logits(input, target)
    if beta is None:
        alpha = check_parameter("alpha", alpha, target, options, 1)
        beta = 1 - alpha
    else:
        check_parameter("alpha", alpha, target, options)
        check_parameter("beta", beta, target, options)
    return overlap_loss(
        "tversky_loss", input, target, TVERSKY, (alpha, beta), smooth, form, level, return_stats=return_stats, **options
    )


@overload
def linear_tversky_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, alpha: float | Tensor = ...,
    beta: float | Tensor | None = ..., smooth: float = ..., form: Form = ..., level: Level = ...,
    return_stats: Literal[False] = ..., **options: Unpack[LinearClassLossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_tversky_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, alpha: float | Tensor = ...,
    beta: float | Tensor | None = ..., smooth: float = ..., form: Form = ..., level: Level = ...,
    return_stats: Literal[True], **options: Unpack[LinearClassLossOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@linear_form(tversky_loss)
def linear_tversky_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor = 0.6,
    beta: float | Tensor | None = None,
    smooth: float = 1.0,
    form: Form = "one_vs_rest",
    level: Level = "example",
    return_stats: bool = False,
    **options: Unpack[LinearClassLossOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    projection, rest = projected(input, linear_weight, {**options, "return_stats": return_stats})
    return tversky_loss(projection, target, alpha=alpha, beta=beta, smooth=smooth, form=form, level=level, **rest)
