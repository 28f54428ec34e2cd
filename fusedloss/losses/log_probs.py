"""Log-probabilities of targets, entropies, and the most likely classes, from which other objectives are built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..checks import check_bool, check_int, check_logits, check_names
from ..definition.statistics import LogProbs
from ..engine.dispatch import row_loss, row_statistics
from ..engine.options import LinearLogProbOptions, LogProbOptions, TopkOptions
from ..engine.topk import topk_log_probs
from ._linear import projected
from .cross_entropy import CROSS_ENTROPY

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def log_probs(
    input: Tensor, target: Tensor, *, entropy: Literal[False] = ..., **options: Unpack[LogProbOptions]
) -> Tensor: ...
@overload
def log_probs(
    input: Tensor, target: Tensor, *, entropy: Literal[True], **options: Unpack[LogProbOptions]
) -> LogProbs: ...
def log_probs(
    input: Tensor, target: Tensor, *, entropy: bool = False, **options: Unpack[LogProbOptions]
) -> Tensor | LogProbs:
    r"""Compute the log-probabilities of the targets, log p_t with p = softmax(input / temperature), and the entropies.

    Policy gradients, preference losses (DPO, KTO) and distillation are built from these. There are no weights, no
    smoothing and no reduction. For hidden states, :func:`linear_log_probs` never stores the logits.

    Args:
        input: logits (*, V) of float64, float32, bfloat16 or float16 with any strides.
        target: (*) class indices of any integer dtype.
        temperature: number or 0-d tensor from 1e-30 to 1e30 (one on a GPU is not checked: rows are NaN), by which the
            logits are divided. Differentiated if it requires grad.
        entropy: also return the entropies -sum_j p_j log p_j, from the same read of the logits.
        ignore_index: target value whose rows are skipped: both results and their gradients are 0.
        group: of torch.distributed, as for the losses: this rank has the logits of some of the classes.
        impl: as for the losses.

    Returns:
        log p_t, float32 (float64 for float64) of the target's shape; :class:`LogProbs` with entropy=True. Both are
        differentiable. An entropy near 0 keeps its digits.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.
        IndexError: a target outside [0, V) that is not ignored (on a GPU: that row is NaN).
        RuntimeError: the named implementation cannot run here; a function transform together with `group`.

    >>> import torch, fusedloss as fl
    >>> logits = torch.randn(8, 1000, requires_grad=True)
    >>> log_prob, entropy = fl.log_probs(logits, torch.arange(8), entropy=True)
    >>> (-log_prob - 0.01 * entropy).mean().backward()
    """
    check_names("log_probs", options, LogProbOptions)
    check_logits(input, target)
    check_bool(entropy=entropy)
    if not entropy:
        # 0 minus, which leaves no -0.0 of an ignored row
        return 0 - row_loss("log_probs", input, target, CROSS_ENTROPY, reduction="none", **options)
    s = row_statistics("log_probs", input, target, ("entropy",), options)  # type: ignore[arg-type]
    return LogProbs(0 - s.ce.reshape(target.shape), s.entropy.reshape(target.shape))


@overload
def linear_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *,
    entropy: Literal[False] = ..., **options: Unpack[LinearLogProbOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *,
    entropy: Literal[True], **options: Unpack[LinearLogProbOptions],
) -> LogProbs: ...  # fmt: skip
def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    entropy: bool = False,
    **options: Unpack[LinearLogProbOptions],
) -> Tensor | LogProbs:
    r"""Compute the log-probabilities of the targets, and the entropies, from hidden states without storing the logits.

    This is the linear form of :func:`log_probs`. The logits are softcap(input @ linear_weight.T + linear_bias),
    computed one chunk at a time in the forward and again in the backward (four products in all).

    Args:
        input: hidden states (*, D). Under autocast it, the weight and the bias are cast as by
            torch.nn.functional.linear.
        linear_weight: (V, D), such as the weight of the output layer.
        target, entropy, impl, and all others: as for :func:`log_probs`; the temperature comes after the softcap, and
            has no gradient with one.
        linear_bias, softcap, budget, drop_ignored, sequence_parallel, group: as for
            :func:`~fusedloss.linear_cross_entropy`.

    Returns and raises as :func:`log_probs`.

    >>> import torch, fusedloss as fl
    >>> hidden, weight = torch.randn(8, 64, requires_grad=True), torch.randn(1000, 64, requires_grad=True)
    >>> log_prob, entropy = fl.linear_log_probs(hidden, weight, torch.arange(8), temperature=0.7, entropy=True)
    >>> log_prob.sum().backward()
    """
    check_names("linear_log_probs", options, LinearLogProbOptions)
    projection, rest = projected(input, linear_weight, options)
    return log_probs(projection, target, entropy=entropy, **rest)  # type: ignore[call-overload]


def linear_topk_log_probs(
    input: Tensor, linear_weight: Tensor, k: int, **options: Unpack[TopkOptions]
) -> tuple[Tensor, Tensor]:
    r"""Find the k most likely classes of each row, and their log-probabilities, without storing the logits.

    A teacher's predictions can be stored in this form. The results are not differentiable.

    Args:
        input: hidden states (*, D).
        linear_weight: (V, D), such as the weight of the output layer.
        k: how many classes, from 1 to V.
        linear_bias, softcap, temperature, budget, group, impl: as for :func:`linear_log_probs`. "triton_fused", which
            finds no more than two classes, raises.

    Returns:
        (index, log_prob), (*, k) each: int64 in the order of falling log-probabilities, and float32 (float64 for
        float64), normalised over all V classes.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.

    >>> import torch, fusedloss as fl
    >>> index, log_prob = fl.linear_topk_log_probs(torch.randn(8, 64), torch.randn(1000, 64), 5)
    >>> index.shape, log_prob.shape
    (torch.Size([8, 5]), torch.Size([8, 5]))
    """
    check_names("linear_topk_log_probs", options, TopkOptions)
    projection, rest = projected(input, linear_weight, options)
    with torch.no_grad():
        return topk_log_probs(projection, check_int("k", k, 1), **rest)
