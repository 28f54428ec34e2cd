"""Cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from ..definition.epilogue import Epilogue
from ..definition.statistics import RowStats, Statistics
from ..engine.dispatch import row_loss
from ..engine.options import LinearOptions, RowOptions
from ._linear import projected
from ._registry import example, linear_form, row_form

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _epilogue(s: Statistics) -> Tensor:
    return s.ce


CROSS_ENTROPY = Epilogue("cross_entropy", _epilogue)


def _formula(input: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    log_p = input.log_softmax(-1)
    at_target = log_p.gather(-1, target[:, None])[:, 0]
    if label_smoothing == 0:
        return -at_target
    return -(1 - label_smoothing) * at_target - label_smoothing * log_p.mean(-1)


@overload
def cross_entropy(
    input: Tensor, target: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[RowOptions]
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor, target: Tensor, *, return_stats: Literal[True], **options: Unpack[RowOptions]
) -> tuple[Tensor, RowStats]: ...
@row_form(example(_formula), example(_formula, label_smoothing=0.1))
def cross_entropy(
    input: Tensor, target: Tensor, *, return_stats: bool = False, **options: Unpack[RowOptions]
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Cross-entropy of logits, -log p_t, with p = softmax(input) and t the target.

    The same as :func:`torch.nn.functional.cross_entropy` on class indices, with the class dimension last. With
    ``weight``, "mean" divides by the sum of the targets' weights, as there.

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 1000, requires_grad=True)
    >>> loss = fl.cross_entropy(logits, torch.arange(8), label_smoothing=0.1)
    >>> loss.backward()
    """
    return row_loss(
        "cross_entropy", input, target, CROSS_ENTROPY, mean_over_weights=True, return_stats=return_stats, **options
    )


@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *,
    return_stats: Literal[False] = ..., **options: Unpack[LinearOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *,
    return_stats: Literal[True], **options: Unpack[LinearOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@linear_form(cross_entropy)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    projection, rest = projected(input, linear_weight, return_stats, options)
    return cross_entropy(projection, target, **rest)
