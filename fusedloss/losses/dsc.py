"""The dice family: self-adjusting dice (DSC) and dice loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..checks import check_bool, check_logits, check_parameter
from ..definition.epilogue import Overlap, power
from ..definition.statistics import RowStats
from ..engine.options import CLASS_LOSSES_LACK, ClassLossOptions, LinearClassLossOptions
from ._linear import projected
from ._overlap import Form, Level, overlap_loss, probabilities
from ._registry import example, linear_form, row_form

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _overlap(
    p: Tensor, q: Tensor, positive: Tensor, alpha: Tensor, squared: Tensor, adjust: Tensor
) -> tuple[Tensor, Tensor]:
    """Of u = (1 - p)^alpha p: E = (1 - u)^k and C = 2 u where y = 1, E = u^k elsewhere, k = 2 if squared.

    So that E + C = u^k + y, and 1 - (2 u y + s) / (u^k + y + s) = E / (E + C + s).
    """
    factor = power(q, alpha)
    some = q >= torch.finfo(q.dtype).tiny  # as in power()
    shrink = torch.where(some, torch.expm1(alpha * torch.where(some, q, 1).log()), (alpha == 0).to(q.dtype) - 1)
    adjusts = adjust != 0
    u = torch.where(adjusts, factor, factor.detach()) * p
    rest = q - torch.where(adjusts, shrink, shrink.detach()) * p  # 1 - u, which would cancel
    error = torch.where(positive, rest, u)
    return torch.where(squared != 0, error * error, error), torch.where(positive, 2 * u, 0)


DSC = Overlap("dsc", _overlap)


def _formula(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.0,
    smooth: float = 1.0,
    form: str = "one_vs_rest",
    level: str = "example",
) -> Tensor:
    p, y = probabilities(input, target, form)
    u = (1 - p) ** alpha * p
    agreement, size = u * y, u * u + y
    if level != "example":
        rows = 0 if level == "class" else (0, 1)
        return 1 - (2 * agreement.sum(rows) + smooth) / (size.sum(rows) + smooth)
    return (1 - (2 * agreement + smooth) / (size + smooth)).sum(-1)


@overload
def dsc_loss(
    input: Tensor, target: Tensor, *, alpha: float | Tensor = ..., smooth: float = ..., squared: bool = ...,
    form: Form = ..., level: Level = ..., detach_weight: bool = ...,
    return_stats: Literal[False] = ..., **options: Unpack[ClassLossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def dsc_loss(
    input: Tensor, target: Tensor, *, alpha: float | Tensor = ..., smooth: float = ..., squared: bool = ...,
    form: Form = ..., level: Level = ..., detach_weight: bool = ...,
    return_stats: Literal[True], **options: Unpack[ClassLossOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@row_form(
    example(_formula, over_classes=True, alpha=0.01),
    example(_formula, alpha=0.01, form="target"),
    example(_formula, over_rows=True, over_classes=True, alpha=0.01, level="class"),
    example(_formula, over_rows=True, over_classes=True, alpha=0.01, level="set"),
    source="arXiv:1911.02855",
    without=CLASS_LOSSES_LACK,
)
def dsc_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor = 0.01,
    smooth: float = 1.0,
    squared: bool = True,
    form: Form = "one_vs_rest",
    level: Level = "example",
    detach_weight: bool = False,
    return_stats: bool = False,
    **options: Unpack[ClassLossOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute the self-adjusting dice loss of logits, for imbalanced data evaluated by F1.

    With p = softmax(input), the loss of a class is

        DSC(p, y) = 1 - (2 u y + smooth) / (u^k + y + smooth),   u = (1 - p)^alpha p,  k = 2 if squared else 1

    y is 1 for the target's class and 0 for the others. ``form="one_vs_rest"`` sums DSC over all the classes of a row,
    ``form="target"`` takes the target class alone (y = 1).

    Args:
        alpha: how fast the weight of well predicted examples decreases, at least 0; 0 is the dice loss.
        smooth: added to numerator and denominator, at least 0 (one_vs_rest at level "example": 1e-30).
            Less than 1e-30 counts as that, so that a class without probability has no loss.
        squared: use squared denominators, as in the authors' scripts; False for the paper's equation.
        form: "one_vs_rest" or "target".
        level: what numerators and denominators are summed over before the division, with form "one_vs_rest".
            "example": nothing; each class of each row has its own DSC.
            "class": the rows that are not ignored, each times its token weight. Each class has one DSC, times its
            weight; "mean" is over the V classes, and "none" returns (V,), with a group those of this rank.
            "set": rows and classes. The loss is a single number, without class weights or another reduction.
            "class" and "set" take no z_loss and no normalizer, and have no linear form.
        detach_weight: treat the factor (1 - p)^alpha as a constant.

    DSC is not monotone: du/dp = 0 at p = 1 / (1 + alpha), and beyond it the gradient pushes the target's
    probability down again (alpha = 1: beyond 0.5; the default 0.01: beyond 0.990). ``detach_weight=True`` removes
    that. With ``form="one_vs_rest"`` class weights multiply the loss of each class, not that of the row.

    Source: Li et al. 2020, "Dice Loss for Data-imbalanced NLP Tasks" (arXiv:1911.02855).

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 9, requires_grad=True)
    >>> fl.dsc_loss(logits, torch.arange(8), alpha=0.01).backward()
    """
    check_logits(input, target)
    check_parameter("alpha", alpha, target, options)
    if type(squared) is not bool or type(detach_weight) is not bool:
        check_bool(squared=squared, detach_weight=detach_weight)
    params = (alpha, float(squared), 1.0 - detach_weight)
    return overlap_loss(
        "dsc_loss", input, target, DSC, params, smooth, form, level, return_stats=return_stats, **options
    )


@overload
def dice_loss(
    input: Tensor, target: Tensor, *, smooth: float = ..., squared: bool = ..., form: Form = ..., level: Level = ...,
    return_stats: Literal[False] = ..., **options: Unpack[ClassLossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def dice_loss(
    input: Tensor, target: Tensor, *, smooth: float = ..., squared: bool = ..., form: Form = ..., level: Level = ...,
    return_stats: Literal[True], **options: Unpack[ClassLossOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@row_form(example(_formula, over_classes=True), source="arXiv:1911.02855", without=CLASS_LOSSES_LACK)
def dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    smooth: float = 1.0,
    squared: bool = True,
    form: Form = "one_vs_rest",
    level: Level = "example",
    return_stats: bool = False,
    **options: Unpack[ClassLossOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute the dice loss of logits, 1 - (2 p y + smooth) / (p^k + y + smooth): :func:`dsc_loss` with alpha = 0.

    Args:
        smooth, squared, form, level: as for :func:`dsc_loss`.

    Source: Milletari et al. 2016 (arXiv:1606.04797); for text Li et al. 2020 (arXiv:1911.02855).

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 9, requires_grad=True)
    >>> fl.dice_loss(logits, torch.arange(8)).backward()
    """
    check_bool(squared=squared)
    params = (0.0, float(squared), 1.0)
    return overlap_loss(
        "dice_loss", input, target, DSC, params, smooth, form, level, return_stats=return_stats, **options
    )


@overload
def linear_dsc_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, alpha: float | Tensor = ..., smooth: float = ...,
    squared: bool = ..., form: Form = ..., level: Level = ..., detach_weight: bool = ...,
    return_stats: Literal[False] = ..., **options: Unpack[LinearClassLossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_dsc_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, alpha: float | Tensor = ..., smooth: float = ...,
    squared: bool = ..., form: Form = ..., level: Level = ..., detach_weight: bool = ...,
    return_stats: Literal[True], **options: Unpack[LinearClassLossOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@linear_form(dsc_loss)
def linear_dsc_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor = 0.01,
    smooth: float = 1.0,
    squared: bool = True,
    form: Form = "one_vs_rest",
    level: Level = "example",
    detach_weight: bool = False,
    return_stats: bool = False,
    **options: Unpack[LinearClassLossOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    projection, rest = projected(input, linear_weight, {**options, "return_stats": return_stats})
    return dsc_loss(
        projection, target, alpha=alpha, smooth=smooth, squared=squared, form=form, level=level,
        detach_weight=detach_weight, **rest,
    )  # fmt: skip
