"""Focal loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from ..checks import check_logits, check_parameter
from ..definition.epilogue import Epilogue, power
from ..definition.statistics import RowStats
from ..engine.dispatch import row_loss
from ..engine.options import LinearOptions, RowOptions
from ._linear import projected
from ._registry import example, linear_form, row_form

if TYPE_CHECKING:
    from typing_extensions import Unpack


FOCAL = Epilogue("focal", lambda s, gamma: power(s.q, gamma) * s.ce)


def _formula(input: Tensor, target: Tensor, gamma: float) -> Tensor:
    log_p = input.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    return -((1 - log_p.exp()) ** gamma) * log_p


@overload
def focal_loss(
    input: Tensor, target: Tensor, *, gamma: float | Tensor = ...,
    return_stats: Literal[False] = ..., **options: Unpack[RowOptions],
) -> Tensor: ...  # fmt: skip
@overload
def focal_loss(
    input: Tensor, target: Tensor, *, gamma: float | Tensor = ...,
    return_stats: Literal[True], **options: Unpack[RowOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@row_form(example(_formula, gamma=2.0), source="arXiv:1708.02002")
def focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float | Tensor = 2.0,
    return_stats: bool = False,
    **options: Unpack[RowOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute the focal loss of logits, -(1 - p_t)^gamma log p_t, with p = softmax(input) and t the target.

    It reduces the loss of rows that are already predicted well; gamma = 0 is cross-entropy. A larger gamma gives better
    calibrated, less confident predictions, up to a point and at a small cost in accuracy. The gradient is finite
    for every gamma >= 0 and every p_t, also where the textbook formula divides by 1 - p_t = 0.

    Args:
        gamma: the focusing parameter, at least 0: a number, a 0-d tensor, or one value per target, which allows
            schedules such as FLSD-53 (5 where p_t < 0.2, else 3). Differentiated if it requires grad.

    "mean" divides by the number of rows, with or without class weights.

    Source: Lin et al. 2017 (arXiv:1708.02002); for calibration Mukhoti et al. 2020 (arXiv:2002.09437),
    Wang et al. 2022.

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 1000, requires_grad=True)
    >>> fl.focal_loss(logits, torch.arange(8), gamma=3.0).backward()
    """
    check_logits(input, target)
    check_parameter("gamma", gamma, target, options)
    return row_loss("focal_loss", input, target, FOCAL, (gamma,), return_stats=return_stats, **options)


@overload
def linear_focal_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, gamma: float | Tensor = ...,
    return_stats: Literal[False] = ..., **options: Unpack[LinearOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_focal_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, gamma: float | Tensor = ...,
    return_stats: Literal[True], **options: Unpack[LinearOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@linear_form(focal_loss)
def linear_focal_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    gamma: float | Tensor = 2.0,
    return_stats: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    projection, rest = projected(input, linear_weight, {**options, "return_stats": return_stats})
    return focal_loss(projection, target, gamma=gamma, **rest)
