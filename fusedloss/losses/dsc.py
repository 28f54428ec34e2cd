"""The dice family: self-adjusting dice (DSC) and dice loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_choice, check_logits, check_number, check_parameter
from ..epilogue import Epilogue, power
from ..examples import example
from ..linear import linear_form
from ..row import RowOptions, row_form, row_loss
from ..statistics import Statistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

FORMS = ("one_vs_rest", "target")
_WITHOUT = ("label_smoothing", "smoothing_over")


def _dice(
    p: Tensor, q: Tensor, positive: Tensor, alpha: Tensor, smooth: Tensor, squared: Tensor, adjust: Tensor
) -> Tensor:
    """1 - (2 u y + s) / (u^k + y + s), u = (1 - p)^alpha p, k = 2 if squared, of y = positive."""
    factor = power(q, alpha)
    shrink = torch.where(q > 0, torch.expm1(alpha * torch.where(q > 0, q, 1).log()), (alpha == 0).to(q.dtype) - 1)
    adjusts = adjust != 0
    u = torch.where(adjusts, factor, factor.detach()) * p
    rest = q - torch.where(adjusts, shrink, shrink.detach()) * p  # 1 - u, which would cancel
    size, rest = (torch.where(squared != 0, x * x, x) for x in (u, rest))
    return torch.where(positive, rest / (size + 1 + smooth), size / (size + smooth))


def _target(s: Statistics, *params: Tensor) -> Tensor:
    return _dice(s.p, s.q, torch.ones_like(s.q, dtype=torch.bool), *params)


_EPILOGUES = {
    "one_vs_rest": Epilogue("dsc_one_vs_rest", _dice, over="classes"),
    "target": Epilogue("dsc_target", _target),
}


def _formula(
    input: Tensor, target: Tensor, alpha: float = 0.0, smooth: float = 1.0, form: str = "one_vs_rest"
) -> Tensor:
    p = input.softmax(-1)
    if form == "target":
        p = p.gather(-1, target[:, None])
        y = torch.ones_like(p)
    else:
        y = (torch.arange(p.shape[-1], device=p.device) == target[:, None]).to(p.dtype)
    u = (1 - p) ** alpha * p
    return (1 - (2 * u * y + smooth) / (u * u + y + smooth)).sum(-1)


@example(_formula, alpha=0.01, form="target")
@example(_formula, alpha=0.01)
@row_form(*_WITHOUT)
def dsc_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor = 0.01,
    smooth: float = 1.0,
    squared: bool = True,
    form: str = "one_vs_rest",
    level: str = "example",
    detach_weight: bool = False,
    **options: Unpack[RowOptions],
) -> Any:
    r"""Self-adjusting dice loss of logits, for imbalanced data where F1 is what counts. With p = softmax(input),

        DSC(p, y) = 1 - (2 u y + smooth) / (u^k + y + smooth),   u = (1 - p)^alpha p,  k = 2 if squared else 1

    y says whether the class is the target. ``form="one_vs_rest"`` sums DSC over all the classes of a row,
    ``form="target"`` takes the target class alone (y = 1).

    Args:
        alpha: how fast examples that are already predicted well lose their say, at least 0; 0 is the dice loss.
        smooth: added to numerator and denominator, at least 0 (one_vs_rest: above 0).
        squared: squared denominators, as in the authors' scripts; False for the paper's equation.
        form: "one_vs_rest" or "target".
        level: where the sums of the dice run: "example" takes every row for itself.
        detach_weight: take the factor (1 - p)^alpha for a constant.

    DSC is not monotone: du/dp = 0 at p = 1 / (1 + alpha), and beyond it the gradient pushes the target's
    probability down again (alpha = 1: beyond 0.5; the default 0.01: beyond 0.990). ``detach_weight=True`` removes
    that. With ``form="one_vs_rest"`` class weights multiply the loss of each class, not that of the row.

    Source: Li et al. 2020, "Dice Loss for Data-imbalanced NLP Tasks" (arXiv:1911.02855).

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 9, requires_grad=True)
    >>> fl.dsc_loss(logits, torch.arange(8), alpha=0.01).backward()
    """
    check_logits(input, target)
    check_parameter("alpha", alpha, target, 0)
    return _dsc("dsc_loss", input, target, alpha, smooth, squared, form, level, detach_weight, options)


@example(_formula)
@row_form(*_WITHOUT)
def dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    smooth: float = 1.0,
    squared: bool = True,
    form: str = "one_vs_rest",
    level: str = "example",
    **options: Unpack[RowOptions],
) -> Any:
    r"""Dice loss of logits, 1 - (2 p y + smooth) / (p^k + y + smooth): :func:`dsc_loss` with alpha = 0.

    Args:
        smooth, squared, form, level: as for :func:`dsc_loss`.

    Source: Milletari et al. 2016 (arXiv:1606.04797); for text Li et al. 2020 (arXiv:1911.02855).

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 9, requires_grad=True)
    >>> fl.dice_loss(logits, torch.arange(8)).backward()
    """
    return _dsc("dice_loss", input, target, 0.0, smooth, squared, form, level, False, options)


linear_dsc_loss = linear_form(dsc_loss)


def _dsc(
    name: str,
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    smooth: float,
    squared: bool,
    form: str,
    level: str,
    detach_weight: bool,
    options: RowOptions,
) -> Any:
    check_choice("form", form, FORMS)
    check_choice("level", level, ("example",))
    # Without smooth, a class of no probability would be 0 / 0.
    check_number("smooth", smooth, 0, above=form == "one_vs_rest")
    for flag, value in (("squared", squared), ("detach_weight", detach_weight)):
        if not isinstance(value, bool):
            raise TypeError(f"{flag} must be a bool, got {value!r}")
    params = (alpha, smooth, float(squared), float(not detach_weight))
    return row_loss(name, input, target, _EPILOGUES[form], params, without=_WITHOUT, **options)
