"""Divergences of a student's predictions from the k stored classes per row of a teacher."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor

from .. import checks, transforms
from ..definition.epilogue import Epilogue
from ..definition.rows import Source
from ..definition.statistics import RowStats, Statistics
from ..distributed.dtensor import local_rows
from ..distributed.vocabulary import shards_of
from ..engine.dispatch import row_loss, without_target
from ..engine.options import DISTILLATION_LACKS, DistillationOptions, LinearDistillationOptions
from ._linear import projected
from ._registry import teacher_form
from .cross_entropy import CROSS_ENTROPY
from .distillation import Divergence, chosen, of_teacher

if TYPE_CHECKING:
    from typing_extensions import Unpack

Rest: TypeAlias = Literal["renormalize", "ignore", "bucket"]

RESTS = get_args(Rest)

#: What the probabilities of a row's classes may sum to, whose logarithms may have been stored in half precision.
MOST_PROBABILITY = 1.05


@overload
def topk_distillation_loss(
    input: Tensor, index: Tensor, log_prob: Tensor, *,
    rest: Rest = ..., divergence: Divergence = ..., beta: float | None = ...,
    return_stats: Literal[False] = ..., **options: Unpack[DistillationOptions],
) -> Tensor: ...  # fmt: skip
@overload
def topk_distillation_loss(
    input: Tensor, index: Tensor, log_prob: Tensor, *,
    rest: Rest = ..., divergence: Divergence = ..., beta: float | None = ...,
    return_stats: Literal[True], **options: Unpack[DistillationOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@teacher_form(DistillationOptions)
def topk_distillation_loss(
    input: Tensor,
    index: Tensor,
    log_prob: Tensor,
    *,
    rest: Rest = "bucket",
    divergence: Divergence = "forward_kl",
    beta: float | None = None,
    return_stats: bool = False,
    **options: Unpack[DistillationOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute the divergence of a student's predictions from the k stored classes per row of a teacher.

    With y_1 ... y_k = exp(log_prob) and p = softmax(input / temperature) at the classes of `index`, a row's loss is the
    divergence of :func:`~fusedloss.distillation_loss` between

        "bucket"        (y_1, ..., y_k, 1 - sum_k y_k) and (p_1, ..., p_k, 1 - sum_k p_k): all other classes are one.
                        Where k = V there are no others
        "renormalize"   y / sum_k y_k and p / sum_k p_k. The other classes' logits get no gradient
        "ignore"        y and p as they are, whose sums differ

    A divergence is a sum of terms that are not negative: sum_k (y_k log(y_k / p_k) - y_k + p_k) for KL(y | p), and
    likewise for the KLs in the others. With "ignore" that differs from sum_k y_k log(y_k / p_k), which has no minimum
    at p = y. Neither logits nor probabilities of the teacher's V classes are needed.

    Args:
        input: logits (*, V) of float64, float32, bfloat16 or float16 with any strides.
        index: (*, k) classes of the teacher, different ones in each row, of any integer dtype. The most likely comes
            first, as :func:`~fusedloss.linear_topk_log_probs` gives them; the order only affects rounding.
        log_prob: (*, k) their log-probabilities of any of the input's dtypes, normalised over all V classes and made at
            the same temperature. They get no gradient.
        rest: how the other classes count, as above.
        divergence, beta: as of :func:`~fusedloss.distillation_loss`.
        temperature: number or 0-d tensor from 1e-30 to 1e30 by which the student's logits are divided. Not
            differentiated.
        scale_by_temperature_squared: multiply the divergence, though not the cross-entropy, by temperature^2.
        target: (*) class indices, or None. Rows of the ignored index are skipped; `hard_weight` adds the
            cross-entropy of the others.
        hard_weight: adds hard_weight * (-log softmax(input)_t), of the logits without temperature. With a temperature
            other than 1 it takes two more passes.
        %others%: as of :func:`~fusedloss.distillation_loss`.

    With a group, `index` and `target` are classes of all ranks. The logits of skipped rows are not read, their indices
    may be any, and their loss and gradient are 0.

    1 - sum_k p_k is computed from 1 - p_t, t the target or, without one, the first class. In float32 its absolute error
    is about 1e-7 (1 - p_t), and 1e-7 where t is none of the k. Below the smallest normal number it is taken for that,
    and has gradient 0. The teacher's has the error of the stored log-probabilities.

    Returns:
        The loss, float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range; a `log_prob` that requires grad; on a CPU
            one above 0, or a class that is twice in a row.
        IndexError: a class or target outside [0, V) that is not ignored (on a GPU: that row's loss is NaN).
        RuntimeError: the named implementation cannot run here.

    >>> import torch, fusedloss as fl
    >>> teacher, student = torch.randn(8, 1000), torch.randn(8, 1000, requires_grad=True)
    >>> log_prob, index = teacher.log_softmax(-1).topk(16)
    >>> fl.topk_distillation_loss(student, index, log_prob, divergence="jsd").backward()
    """
    checks.check_names("topk_distillation_loss", options, DistillationOptions)
    return _loss(input, index, log_prob, rest, divergence, beta, {**options, "return_stats": return_stats})


@overload
def linear_topk_distillation_loss(
    input: Tensor, linear_weight: Tensor, index: Tensor, log_prob: Tensor, *,
    rest: Rest = ..., divergence: Divergence = ..., beta: float | None = ...,
    return_stats: Literal[False] = ..., **options: Unpack[LinearDistillationOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_topk_distillation_loss(
    input: Tensor, linear_weight: Tensor, index: Tensor, log_prob: Tensor, *,
    rest: Rest = ..., divergence: Divergence = ..., beta: float | None = ...,
    return_stats: Literal[True], **options: Unpack[LinearDistillationOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@teacher_form(LinearDistillationOptions)
def linear_topk_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    log_prob: Tensor,
    *,
    rest: Rest = "bucket",
    divergence: Divergence = "forward_kl",
    beta: float | None = None,
    return_stats: bool = False,
    **options: Unpack[LinearDistillationOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute the divergence from the k stored classes per row of a teacher, without storing the student's logits.

    This is the linear form of :func:`topk_distillation_loss`. The logits softcap(input @ linear_weight.T + linear_bias)
    are computed one chunk of rows at a time. "mean" and "sum" compute the gradients with the loss (three products in
    all) where :func:`~fusedloss.linear_flex_loss` does with per_chunk=True; "none" recomputes the logits (four). With
    a `hard_weight` and a temperature other than 1 the cross-entropy is a separate call with as many products.

    Args:
        input: hidden states (*, D). Under autocast it, the weight and the bias are cast as by
            torch.nn.functional.linear.
        linear_weight: (V, D), such as the weight of the student's output layer.
        linear_bias, softcap, budget, drop_ignored, group: as of :func:`~fusedloss.linear_cross_entropy`.
        %others%: as of :func:`topk_distillation_loss`.

    Returns and raises as :func:`topk_distillation_loss`.

    >>> import torch, fusedloss as fl
    >>> index, log_prob = fl.linear_topk_log_probs(torch.randn(8, 128), torch.randn(1000, 128), 16)
    >>> hidden, weight = torch.randn(8, 64, requires_grad=True), torch.randn(1000, 64, requires_grad=True)
    >>> fl.linear_topk_distillation_loss(hidden, weight, index, log_prob).backward()
    """
    checks.check_names("linear_topk_distillation_loss", options, LinearDistillationOptions)
    projection, others = projected(input, linear_weight, {**options, "return_stats": return_stats})
    return _loss(projection, index, log_prob, rest, divergence, beta, others)


def _loss(
    input: Source,
    index: Tensor,
    log_prob: Tensor,
    rest: str,
    divergence: str,
    beta: float | None,
    options: dict[str, Any],
) -> Any:
    of_outcomes, params = chosen(divergence, beta)
    checks.check_choice("rest", rest, RESTS)
    target, hard_weight, scaled = of_teacher(options)
    temperature = options.get("temperature", 1.0)
    _check_teacher(input, index, log_prob)
    temperature = checks.check_temperature(temperature, input)
    if target is not None:
        target = local_rows(target)
        checks.check_logits(input, target)
        target = target.to(torch.int64)
    index = index.to(torch.int64)  # a comparison converts a number to the tensor's dtype, where it may wrap around
    shards = shards_of(options.get("group"), input)
    if shards is not None:
        options["group"] = shards
    k, classes = index.shape[-1], input.shape[-1] if shards is None else shards.classes
    if k > classes:
        raise ValueError(f"index must be of at most {classes} different classes, as many as input has, got {k}")

    left_out = _left_out(index, target, options)
    if left_out is not None:
        index = torch.where(left_out[..., None], torch.arange(k, device=index.device), index)
        log_prob = log_prob.masked_fill(left_out[..., None], -math.log(k))
    _check_values(index, log_prob, classes, rest)
    if rest == "bucket" and k == classes:
        rest = "ignore"  # there are no others
    in_one_pass = not isinstance(temperature, Tensor) and temperature == 1
    hard = hard_weight if in_one_pass else 0.0
    # Not in the temperature's own dtype, in which its square may be infinite.
    exact = temperature.to(checks.compute_dtype(input.dtype)) if isinstance(temperature, Tensor) else temperature
    factor = exact * exact if scaled else 1.0
    # A class that is out of range must not be taken for a row that is left out.
    slot = index[..., 0].clamp(min=-1) if target is None else target
    result = row_loss(
        "topk_distillation_loss", input, slot, _epilogue(of_outcomes, rest, bool(hard)),
        (log_prob, index, factor, float(hard), *params), candidates=index,
        without=DISTILLATION_LACKS, skip_zero_weights=True, **options,
    )  # fmt: skip
    if target is None:
        return without_target(result)
    if not hard_weight or in_one_pass:
        return result
    for name in ("temperature", "return_stats", "stats"):
        options.pop(name, None)
    cross_entropy = row_loss("cross_entropy", input, target, CROSS_ENTROPY, skip_zero_weights=True, **options)
    if not isinstance(result, tuple):
        return result + hard_weight * cross_entropy
    loss, stats = result
    return loss + hard_weight * cross_entropy, stats


def _epilogue(divergence: Epilogue, rest: str, hard: bool) -> Epilogue:
    """The divergence of the outcomes, times a factor, and a cross-entropy with a weight."""

    def losses(
        s: Statistics, log_prob: Tensor, index: Tensor, factor: Tensor, hard_weight: Tensor, *params: Tensor
    ) -> Tensor:
        log_y, log_p = _outcomes(s, log_prob, index, rest)
        nowhere = (log_y == -torch.inf) & (log_p == -torch.inf)
        d = (log_y - log_p).masked_fill(nowhere, 0)
        loss = factor * divergence.function(log_y, log_p, d, *params).sum(-1)
        return loss + hard_weight * s.ce if hard else loss

    return Epilogue("", losses, per_chunk=True)


def _outcomes(s: Statistics, log_prob: Tensor, index: Tensor, rest: str) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the outcomes in the teacher's and the student's rows, (N, k) or (N, k + 1)."""
    if rest == "renormalize":
        # Of the logits: by probabilities the other classes would get a gradient of rounding errors.
        return log_prob.log_softmax(-1), s.candidate_logit.log_softmax(-1)
    log_p = -s.candidate_ce
    if rest == "ignore":
        return log_prob, log_p
    # 1 - p of the likeliest class has digits that a difference of probabilities has not.
    is_target = index == s.target[:, None]
    others = log_p.exp().masked_fill(is_target, 0).sum(-1)
    rest_p = torch.where(is_target.any(-1), s.q, 1) - others
    rest_y = -log_prob[:, 0].expm1() - log_prob[:, 1:].exp().sum(-1)
    return _with_rest(log_prob, rest_y), _with_rest(log_p, rest_p)


def _with_rest(log_p: Tensor, rest: Tensor) -> Tensor:
    tiny = torch.finfo(rest.dtype).tiny
    return torch.cat([log_p, torch.where(rest > tiny, rest, tiny).log()[:, None]], -1)


def _left_out(index: Tensor, target: Tensor | None, options: dict[str, Any]) -> Tensor | None:
    """Return which rows are skipped, (*), or None."""
    left_out = None if target is None else target == checks.check_ignored(options.get("ignore_index", -100))
    token_weight = options.get("token_weight")
    if token_weight is not None:
        checks.check_token_weight(token_weight, index[..., 0])
        if not token_weight.requires_grad:
            left_out = (token_weight == 0) if left_out is None else left_out | (token_weight == 0)
    return left_out


def _check_teacher(input: Source, index: Tensor, log_prob: Tensor) -> None:
    checks.check_input(input)
    for name, x in (("index", index), ("log_prob", log_prob)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        checks.check_local(name, x)
    checks.check_index_dtype("index", index)
    checks.check_dtype("log_prob", log_prob)
    rows = tuple(input.shape[:-1])
    if index.dim() != len(rows) + 1 or index.shape[:-1] != rows or index.shape[-1] < 1:
        raise ValueError(f"index must be {(*rows, 'k')} with k >= 1 classes of each row, got {tuple(index.shape)}")
    if log_prob.shape != index.shape:
        raise ValueError(f"log_prob must be of the index's shape {tuple(index.shape)}, got {tuple(log_prob.shape)}")
    checks.check_device("index", index, input)
    checks.check_device("log_prob", log_prob, input)
    if log_prob.requires_grad:
        raise ValueError("log_prob requires grad, but gets no gradient here; pass log_prob.detach()")


def _check_values(index: Tensor, log_prob: Tensor, classes: int, rest: str) -> None:
    """Check that a row's classes are in range and distinct, and log_prob of probabilities, where reading is free."""
    if not checks.may_read(index) or transforms.traced():
        return
    wrapped = transforms.is_wrapped(index) or transforms.is_wrapped(log_prob)
    index, log_prob = transforms.values(index), transforms.values(log_prob)
    outside = (index < 0) | (index >= classes)
    if bool(outside.any()):
        checks.raise_index_error("index", int(index[outside][0]), classes)
    wrong = ~(log_prob <= 0)
    if bool(wrong.any()):
        raise ValueError(
            f"log_prob must hold log-probabilities, which are at most 0, got {log_prob[wrong][0]:g}; "
            "take log_softmax of logits, over all classes"
        )
    if wrapped:
        return  # a transform may have put the rows' dimension anywhere
    in_order = index.sort(-1).values
    twice = in_order[..., 1:] == in_order[..., :-1]
    if bool(twice.any()):
        first = int(in_order[..., 1:][twice][0])
        raise ValueError(f"index must hold different classes in each row, got class {first} twice in one")
    if rest == "renormalize":
        if bool((log_prob == -math.inf).all(-1).any()):
            raise ValueError("log_prob must leave each row a class to renormalize, got a row of -inf alone")
        return
    total = log_prob.to(torch.float32).exp().sum(-1)
    if total.numel() and (most := float(total.max())) > MOST_PROBABILITY:
        raise ValueError(
            f"log_prob must hold the logarithms of probabilities that sum to at most 1 in a row, got {most:g}; "
            "take log_softmax of logits, over all classes"
        )
