"""Mixed cross-entropy and its schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..checks import check_int, check_logits, check_number, check_parameter
from ..definition.epilogue import Epilogue
from ..definition.statistics import RowStats, Statistics
from ..engine.dispatch import row_loss
from ..engine.options import LinearOptions, RowOptions
from ._linear import projected
from ._registry import example, linear_form, row_form

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _mix(s: Statistics, alpha: Tensor, predicted_ce: Tensor) -> Tensor:
    # A share of nothing is nothing, also of an infinite loss.
    own = torch.where(alpha < 1, (1 - alpha) * s.ce, 0)
    return own + torch.where(alpha > 0, alpha * predicted_ce, 0)


_NAME = "mixed_cross_entropy"
_TOP_1 = Epilogue(_NAME, lambda s, alpha: _mix(s, alpha, s.top_ce), statistics=("top",))
_TOP_2 = Epilogue(_NAME, lambda s, alpha: _mix(s, alpha, (s.top_ce + s.second_ce) / 2), statistics=("top", "second"))
_CANDIDATES = Epilogue(_NAME, lambda s, alpha: _mix(s, alpha, s.candidate_ce.mean(-1)))


def _formula(input: Tensor, target: Tensor, alpha: float, top_k: int = 1) -> Tensor:
    log_p = input.log_softmax(-1)
    predicted = input.argmax(-1, keepdim=True) if top_k == 1 else input.topk(top_k).indices
    at_target = log_p.gather(-1, target[:, None])[:, 0]
    return -(1 - alpha) * at_target - alpha * log_p.gather(-1, predicted).mean(-1)


@overload
def mixed_cross_entropy(
    input: Tensor, target: Tensor, *, alpha: float | Tensor, top_k: Literal[1, 2] = ...,
    candidates: Tensor | None = ..., return_stats: Literal[False] = ..., **options: Unpack[RowOptions],
) -> Tensor: ...  # fmt: skip
@overload
def mixed_cross_entropy(
    input: Tensor, target: Tensor, *, alpha: float | Tensor, top_k: Literal[1, 2] = ...,
    candidates: Tensor | None = ..., return_stats: Literal[True], **options: Unpack[RowOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@row_form(example(_formula, alpha=0.25), example(_formula, alpha=0.25, top_k=2), source="arXiv:2106.15880")
def mixed_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor,
    top_k: Literal[1, 2] = 1,
    candidates: Tensor | None = None,
    return_stats: bool = False,
    **options: Unpack[RowOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute the mixed cross-entropy of logits, -[(1 - alpha) log p_y + alpha log p_yhat].

    y is the target, and yhat = argmax(input) the model's own prediction, with the lowest index on ties. The loss is for
    translation, where the reference is one of many right answers. The gradient flows through log p_yhat, not through
    the argmax. Where yhat = y this is plain cross-entropy.

    Args:
        alpha: the prediction's share, in [0, 1]: a number, a 0-d tensor (which may change from step to step without
            recompilation under torch.compile) or one value per target. See :func:`alpha_schedule`. The modules mix only
            in training: in ``eval()`` alpha is 0, unless the call names one.
        top_k: 1, or 2 to share alpha equally between the two most likely tokens.
        candidates: (*) or (*, k) classes to use as yhat in place of the argmax, with alpha shared equally between
            them. Scheduled sampling takes them from an earlier pass.

    A row is ignored by its target alone; yhat may be any token.

    Source: Li et al. 2021, "Mixed Cross Entropy Loss for Neural Machine Translation" (arXiv:2106.15880). The paper
    trains on plain cross-entropy first, and counts those updates in the schedule of alpha.

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 1000, requires_grad=True)
    >>> alpha = fl.alpha_schedule(step=100, total_steps=1000)
    >>> fl.mixed_cross_entropy(logits, torch.arange(8), alpha=alpha, label_smoothing=0.1).backward()
    """
    check_logits(input, target)
    check_parameter("alpha", alpha, target, options, 1)
    if top_k not in (1, 2) or isinstance(top_k, bool):
        raise ValueError(f"top_k must be 1 or 2, got {top_k!r}")
    if candidates is not None and top_k != 1:
        raise ValueError(f"candidates take the place of the top predictions; drop top_k={top_k}")
    epilogue = _CANDIDATES if candidates is not None else _TOP_2 if top_k == 2 else _TOP_1
    return row_loss(
        _NAME, input, target, epilogue, (alpha,), candidates=candidates, return_stats=return_stats, **options
    )


@overload
def linear_mixed_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, alpha: float | Tensor, top_k: Literal[1, 2] = ...,
    candidates: Tensor | None = ..., return_stats: Literal[False] = ..., **options: Unpack[LinearOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_mixed_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, alpha: float | Tensor, top_k: Literal[1, 2] = ...,
    candidates: Tensor | None = ..., return_stats: Literal[True], **options: Unpack[LinearOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@linear_form(mixed_cross_entropy)
def linear_mixed_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor,
    top_k: Literal[1, 2] = 1,
    candidates: Tensor | None = None,
    return_stats: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    projection, rest = projected(input, linear_weight, {**options, "return_stats": return_stats})
    return mixed_cross_entropy(projection, target, alpha=alpha, top_k=top_k, candidates=candidates, **rest)


@overload
def alpha_schedule(step: int, total_steps: int, maximum: float = ..., warmup: int = ...) -> float: ...
@overload
def alpha_schedule(step: Tensor, total_steps: int, maximum: float = ..., warmup: int = ...) -> Tensor: ...
def alpha_schedule(step: int | Tensor, total_steps: int, maximum: float = 0.5, warmup: int = 0) -> float | Tensor:
    """Return alpha for an update of mixed cross-entropy, which grows linearly: maximum * step / total_steps.

    During the first `warmup` updates, of plain cross-entropy, alpha is 0. As in the paper, `step` and `total_steps`
    count every update from the first, those of the warm-up included: alpha begins at maximum * warmup / total_steps
    after it. For a ramp that begins at 0 there, pass step - warmup and total_steps - warmup once the warm-up is over.
    Beyond `total_steps` alpha stays at `maximum`. A step that is a tensor gives a float64 tensor on its device; see
    also :class:`fusedloss.nn.AlphaSchedule`, which counts.

    >>> alpha_schedule(50, 100)
    0.25
    >>> [alpha_schedule(step, 100, warmup=50) for step in (0, 49, 50, 100)]
    [0.0, 0.0, 0.25, 0.5]
    """
    check_number("total_steps", total_steps, 0, above=True)
    check_number("maximum", maximum, 0, 1)
    if check_int("warmup", warmup, 0) > total_steps:
        raise ValueError(f"warmup must be at most total_steps, {total_steps!r}, got {warmup!r}")
    if isinstance(step, Tensor):
        alpha = maximum * (step.to(torch.float64) / total_steps).clamp(0, 1)
        return torch.where(step < warmup, 0.0, alpha) if warmup else alpha
    check_number("step", step, 0)
    return maximum * min(step / total_steps, 1.0) if step >= warmup else 0.0
