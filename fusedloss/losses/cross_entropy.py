"""Cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..checks import check_number, check_second_row, compute_dtype
from ..definition.divergences import SOFT_TARGETS
from ..definition.epilogue import Epilogue
from ..definition.projection import Projection
from ..definition.statistics import RowStats
from ..distributed.dtensor import local_second_row
from ..distributed.vocabulary import shards_of
from ..engine.dispatch import row_loss, second_row_loss, without_target
from ..engine.options import LinearOptions, RowOptions
from ._linear import projected
from ._registry import example, linear_form, row_form

if TYPE_CHECKING:
    from typing_extensions import Unpack


CROSS_ENTROPY = Epilogue("cross_entropy", lambda s: s.ce)


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
    r"""Compute the cross-entropy of logits, -log p_t, with p = softmax(input) and t the target.

    On class indices it equals :func:`torch.nn.functional.cross_entropy` with the class dimension last. With
    ``weight``, "mean" divides by the sum of the targets' weights, as in PyTorch; if that is 0, the loss is 0, not NaN.

    A floating ``target`` (*, V) holds numbers y for all the classes. They must be finite and not negative; their sums
    are not checked. A row's loss is -sum_j w_j y'_j log p_j with y' = (1 - label_smoothing) y + label_smoothing / V.
    The target gets no gradient. "mean" divides by the number of rows, as in PyTorch. To skip a row, give it a
    ``token_weight`` of 0; no value of a target does so. The linear form takes class indices only.

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 1000, requires_grad=True)
    >>> loss = fl.cross_entropy(logits, torch.arange(8), label_smoothing=0.1)
    >>> loss.backward()
    """
    # One number a row is more likely meant for an index.
    if isinstance(target, Tensor) and target.is_floating_point() and target.shape != input.shape[:-1]:
        return _of_soft_targets(input, target, {**options, "return_stats": return_stats})
    return row_loss(
        "cross_entropy", input, target, CROSS_ENTROPY, mean_over_weights=True, return_stats=return_stats, **options
    )


def _of_soft_targets(input: Any, target: Tensor, options: dict[str, Any]) -> Any:
    if isinstance(input, Projection):
        raise ValueError(
            "the linear form takes class indices: targets for all the classes are as large as the logits; compute the "
            f"logits and use the row form, or take distillation_loss of a teacher's hidden states, got {target.dtype}"
        )
    check_second_row("target", target, input)
    target, input = local_second_row("target", target, input, options)
    for name, default in (("ignore_index", -100), ("smoothing_over", "all")):
        if (given := options.get(name, default)) != default:
            raise ValueError(f"{name} is for class indices, and targets for all the classes have none, got {given!r}")
    smoothing = options.pop("label_smoothing", 0.0)
    smoothing = check_number("label_smoothing", smoothing, 0, 1)
    shards = shards_of(options.get("group"), input)
    classes = input.shape[-1] if shards is None else shards.classes
    index = torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device)
    if shards is not None:
        options["group"] = shards
    params = (1 - smoothing, smoothing / max(1, classes))
    second = target.to(compute_dtype(input.dtype))
    return without_target(second_row_loss("cross_entropy", input, index, second, SOFT_TARGETS, params, **options))


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
    projection, rest = projected(input, linear_weight, {**options, "return_stats": return_stats})
    return cross_entropy(projection, target, **rest)
