"""Divergences of a student's predictions from a teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor

from ..checks import check_bool, check_choice, check_ignored, check_names, check_number, check_second_row, is_dtensor
from ..definition import divergences
from ..definition.epilogue import Epilogue
from ..definition.rows import Source
from ..definition.statistics import RowStats
from ..distributed.dtensor import local_projection, local_second_row
from ..engine.budgets import checked_budget
from ..engine.dispatch import second_row_loss, without_target
from ..engine.options import DISTILLATION_LACKS, DistillationOptions, LinearDistillationOptions
from ..engine.project import TEACHER_NAMES, project
from ._linear import projected
from ._registry import teacher_form

if TYPE_CHECKING:
    from typing_extensions import Unpack

Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd", "tv", "skew_kl", "skew_reverse_kl"]

DIVERGENCES = get_args(Divergence)

_ALONE = {
    "forward_kl": divergences.FORWARD_KL,
    "reverse_kl": divergences.REVERSE_KL,
    "tv": divergences.TOTAL_VARIATION,
}

#: Default and what the ends of its range would be.
_BETA = {
    "jsd": (0.5, "'forward_kl' is what some packages mean by 0, and 'reverse_kl' by 1"),
    "skew_kl": (0.1, "0 would be 'forward_kl', and 1 nothing"),
    "skew_reverse_kl": (0.1, "0 would be 'reverse_kl', and 1 nothing"),
}


def chosen(divergence: str, beta: float | None) -> tuple[Epilogue, tuple[float, ...]]:
    """Return the epilogue of the named divergence and its parameters."""
    check_choice("divergence", divergence, DIVERGENCES)
    if divergence in _ALONE:
        if beta is not None:
            raise ValueError(f"beta is of {', '.join(map(repr, _BETA))}, got {beta!r} with {divergence!r}")
        return _ALONE[divergence], ()
    default, ends = _BETA[divergence]
    beta = default if beta is None else beta
    beta = check_number("beta", beta, 0, 1)
    if not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, both excluded, got {beta!r} ({ends})")
    # The teacher's share of the mixture, and the weights of KL(y | m) and KL(p | m).
    params = {"jsd": (beta, beta, 1 - beta), "skew_kl": (beta, 1.0, 0.0), "skew_reverse_kl": (1 - beta, 0.0, 1.0)}
    return divergences.MIXTURE_KL, params[divergence]


@overload
def distillation_loss(
    input: Tensor, teacher: Tensor, *, divergence: Divergence = ..., beta: float | None = ...,
    return_stats: Literal[False] = ..., **options: Unpack[DistillationOptions],
) -> Tensor: ...  # fmt: skip
@overload
def distillation_loss(
    input: Tensor, teacher: Tensor, *, divergence: Divergence = ..., beta: float | None = ...,
    return_stats: Literal[True], **options: Unpack[DistillationOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@teacher_form(DistillationOptions)
def distillation_loss(
    input: Tensor,
    teacher: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    beta: float | None = None,
    return_stats: bool = False,
    **options: Unpack[DistillationOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute the divergence of a student's predictions from a teacher's.

    With p = softmax(input / temperature) and y = softmax(teacher / temperature), a row's loss is

        "forward_kl"        KL(y | p) = sum_j y_j log(y_j / p_j)
        "reverse_kl"        KL(p | y)
        "jsd"               beta KL(y | m) + (1 - beta) KL(p | m),  m = beta y + (1 - beta) p
        "tv"                1/2 sum_j |p_j - y_j|
        "skew_kl"           KL(y | beta y + (1 - beta) p)
        "skew_reverse_kl"   KL(p | beta p + (1 - beta) y)

    A class with probability 0 in both rows does not contribute. Where it is 0 in one row only, a KL may be infinite;
    the others are finite. The losses are summed in a form that stays accurate where student and teacher are close.

    Args:
        input: logits (*, V) of float64, float32, bfloat16 or float16 with any strides.
        teacher: logits of the same shape, dtype and device, which get no gradient.
        divergence: one of the above.
        beta: above 0 and below 1: the teacher's share of the mixture of "jsd" (default 0.5), the skew of the skew
            divergences (default 0.1).
        temperature: number or 0-d tensor from 1e-30 to 1e30 by which both rows' logits are divided. Not differentiated.
        scale_by_temperature_squared: multiply the divergence, though not the cross-entropy, by temperature^2, so that
            its gradients have the size that they have at temperature 1 (Hinton et al. 2015).
        target: (*) class indices, or None. Rows of the ignored index are skipped; `hard_weight` adds the
            cross-entropy of the others.
        hard_weight: adds hard_weight * (-log softmax(input)_t), of the logits without temperature.
        ignore_index: target value whose rows are skipped.
        token_weight: tensor of the shape (*) by which each row's loss is multiplied, differentiated if it requires
            grad. Otherwise rows of weight 0 are skipped, and still count in "mean".
        reduction: "mean" over the rows whose target is not ignored, "sum", or "none" for losses of shape (*).
        normalizer: number or 0-d tensor that replaces the divisor of "mean", or "token_weight", as for the losses.
        return_stats: also return :class:`~fusedloss.RowStats` of the student, at `temperature`. The log-probability of
            the target is NaN without one.
        stats, group, impl: as for the losses. With a group both rows have this rank's classes.

    The logits of skipped rows are not read; their loss and gradient are 0.

    Returns:
        The loss, float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range; a teacher that requires grad.
        IndexError: a target outside [0, V) that is not ignored (on a GPU: that row's loss is NaN).
        RuntimeError: the named implementation cannot run here.

    Sources: Hinton et al. 2015 (arXiv:1503.02531); Agarwal et al. 2024 for "jsd" (arXiv:2306.13649); Wen et al. 2023
    for "tv" (arXiv:2307.15190); Ko et al. 2024 for the skew divergences (arXiv:2402.03898).

    >>> import torch, fusedloss as fl
    >>> student, teacher = torch.randn(8, 1000, requires_grad=True), torch.randn(8, 1000)
    >>> fl.distillation_loss(student, teacher, divergence="jsd", temperature=2.0).backward()
    """
    check_names("distillation_loss", options, DistillationOptions)
    return _loss(input, teacher, divergence, beta, {**options, "return_stats": return_stats})


@overload
def linear_distillation_loss(
    input: Tensor, linear_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, *,
    divergence: Divergence = ..., beta: float | None = ...,
    teacher_bias: Tensor | None = ..., teacher_softcap: float | None = ...,
    return_stats: Literal[False] = ..., **options: Unpack[LinearDistillationOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_distillation_loss(
    input: Tensor, linear_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, *,
    divergence: Divergence = ..., beta: float | None = ...,
    teacher_bias: Tensor | None = ..., teacher_softcap: float | None = ...,
    return_stats: Literal[True], **options: Unpack[LinearDistillationOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@teacher_form(LinearDistillationOptions)
def linear_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    beta: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    return_stats: bool = False,
    **options: Unpack[LinearDistillationOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute the divergence of a student's predictions from a teacher's, without storing the logits of either.

    This is the linear form of :func:`distillation_loss`. The logits are softcap(input @ linear_weight.T + linear_bias)
    and teacher_softcap(teacher_input @ teacher_weight.T + teacher_bias), computed one chunk of rows at a time. "mean"
    and "sum" compute the gradients with the loss (four products in all), "none" recomputes the logits (six).

    Args:
        input: hidden states (*, D). Under autocast all of them are cast as by torch.nn.functional.linear.
        linear_weight: (V, D), such as the weight of the student's output layer.
        teacher_input: the teacher's hidden states (*, E); E may be another size than D.
        teacher_weight: (V, E). Nothing of the teacher may require grad.
        teacher_bias, teacher_softcap: (V,) and a number, or None.
        budget: bytes that a chunk of the logits of both may take; None as for :func:`~fusedloss.linear_cross_entropy`.
        linear_bias, softcap, drop_ignored, group: as of :func:`~fusedloss.linear_cross_entropy`.
        %others%: as of :func:`distillation_loss`.

    Returns and raises as :func:`distillation_loss`.

    >>> import torch, fusedloss as fl
    >>> hidden, weight = torch.randn(8, 64, requires_grad=True), torch.randn(1000, 64, requires_grad=True)
    >>> fl.linear_distillation_loss(hidden, weight, torch.randn(8, 128), torch.randn(1000, 128)).backward()
    """
    check_names("linear_distillation_loss", options, LinearDistillationOptions)
    projection, rest = projected(input, linear_weight, {**options, "return_stats": return_stats})
    teachers = [teacher_input], [teacher_weight], teacher_bias
    hidden, weight, bias, group, by_rows = local_projection(*teachers, None, False, TEACHER_NAMES[:3])
    if is_dtensor(teacher_weight) and (group != rest.get("group") or by_rows):
        placements = [tuple(x.placements) for x in (teacher_input, teacher_weight)]  # type: ignore[attr-defined]
        raise ValueError(
            "of DTensors, teacher_input must be replicated and teacher_weight placed as linear_weight is, got "
            f"placements {placements[0]} and {placements[1]}"
        )
    teacher = project(hidden, weight, bias, teacher_softcap, None, False, names=TEACHER_NAMES)
    copies = 2 if projection.form.softcap == 0 else 3  # a chunk has the logits of both
    checked_budget(options.get("budget"), copies * projection.shape[-1] * projection.dtype.itemsize)
    return _loss(projection, teacher, divergence, beta, rest)


def _loss(input: Source, teacher: Source, divergence: str, beta: float | None, options: dict[str, Any]) -> Any:
    epilogue, params = chosen(divergence, beta)
    check_second_row("teacher", teacher, input)
    teacher, input = local_second_row("teacher", teacher, input, options)
    if teacher.dtype != input.dtype:
        raise TypeError(f"teacher must be {input.dtype} as input is, got {teacher.dtype}")
    target, hard_weight, scaled = of_teacher(options)
    index = torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device) if target is None else target
    main = (lambda factor: factor.square().reciprocal()) if scaled else None  # of the inverse temperature
    params = (*params, float(hard_weight))
    result = second_row_loss(
        "distillation_loss", input, index, teacher, epilogue, params, without=DISTILLATION_LACKS, main=main, **options
    )
    return result if target is not None else without_target(result)


def of_teacher(options: dict[str, Any]) -> tuple[Tensor | None, float, bool]:
    """Remove and return the options of a loss against a teacher: target, hard_weight and whether it is scaled."""
    target, hard_weight = options.pop("target", None), options.pop("hard_weight", 0.0)
    scaled = options.pop("scale_by_temperature_squared", False)
    hard_weight = check_number("hard_weight", hard_weight, 0)
    if hard_weight and target is None:
        raise ValueError(f"hard_weight is of the cross-entropy with a target, but target is None, got {hard_weight!r}")
    check_bool(scale_by_temperature_squared=scaled)
    temperature = options.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature requires grad, but is not differentiated here; pass temperature.detach()")
    elif scaled:
        check_number("temperature, whose square multiplies the divergence,", temperature, 1e-15, 1e15)
    if target is None:
        # A class stands for the target, and may be that number.
        check_ignored(options.pop("ignore_index", -100))
    return target, hard_weight, scaled
