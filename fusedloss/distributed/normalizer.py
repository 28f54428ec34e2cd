"""The divisor of a mean over micro-batches and ranks: the number of targets that count."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from .batch import ELSEWHERE, check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Few enough values that the sum of their squares over 2^14 ranks is exact in float64.
_CODES = 2**12


def normalizer(
    target: Tensor | Sequence[Tensor],
    *,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    token_weight: Tensor | Sequence[Tensor] | None = None,
    group: ProcessGroup | None = None,
    averaged: bool = False,
) -> Tensor:
    """Count the targets of a whole batch, the `normalizer` with which the losses of its parts sum to its mean.

    The count is

        n = sum_i [target_i != ignore_index] * weight_{target_i} * token_weight_i

    over the micro-batches of gradient accumulation and over the ranks of a data-parallel group, in one all-reduce.
    The loss of a part is then its share of the mean, sum_i loss_i / n. The gradients of the shares add up to those of
    the mean, even if the parts have different numbers of targets. The mean of the parts' means does not.

    Args:
        target: class indices of any shape and integer dtype; or a sequence of such, the micro-batches before an update.
        ignore_index: target value that does not count.
        weight: (V,) class weights to sum, as in the mean of `cross_entropy`; the other losses divide by the count.
        token_weight: of the target's shape, or a sequence of such beside a sequence of targets: weights to sum,
            as with normalizer="token_weight".
        group: of torch.distributed: count the targets of all of its ranks. All of them must call it; a rank without
            targets passes an empty tensor.
        averaged: whether gradients are later averaged over the ranks of `group`, not summed; see below.

    Returns a 0-d tensor on the target's device, without gradient: int64 for a count, float64 if weighted or,
    with a group, averaged. Without any target it is 0, for which the losses and gradients are 0.

    If the gradients of the R ranks are summed, they are those of the mean. DistributedDataParallel and fully_shard
    average them, which divides by R again. With averaged=True the result is n / R, so that the average of the
    gradients, and of the losses, is that of the whole batch. Ranks that share a loss, those of its own `group`, count
    as one here.

    With a MixedPrecisionPolicy, fully_shard rounds floating point arguments of forward, a divisor among them, to its
    param_dtype; cast_forward_inputs=False leaves them as they are.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range; a group without torch.distributed being
            initialised, or whose ranks do not agree on the ignored target, `averaged` and which weights they give (on a
            GPU, where looking would stall the stream, the result is NaN).
        IndexError: with `weight`, a target outside [0, V) that is not ignored (on a GPU the result is NaN). The other
            ranks of a group raise ValueError then.

    >>> import torch, fusedloss as fl
    >>> batches = torch.tensor([[3, 1, -100], [2, -100, -100]])
    >>> n = fl.normalizer(batches)
    >>> n
    tensor(3)
    >>> logits = torch.randn(2, 3, 5, requires_grad=True)
    >>> for z, t in zip(logits, batches):
    ...     fl.cross_entropy(z, t, normalizer=n).backward()
    """
    parts = _parts(target, token_weight)
    _check(parts, ignore_index, weight, averaged)
    if group is not None:
        check_group(group)
    parts = [(checks.normalized_targets(t, ignore_index), w) for t, w in parts]
    if weight is not None:
        try:
            for t, _ in parts:
                if checks.may_read(t):
                    checks.check_indices(t, None, len(weight))
        except IndexError:
            if group is not None:
                # The others raise, too, in place of waiting for this rank.
                dist.all_reduce(torch.tensor([0, 0, 0, 1], dtype=torch.float64), group=group)
            raise
    count = torch.stack([_count(t, weight, w) for t, w in parts]).sum()
    if group is None:
        return count
    options: dict[str, object] = {
        "ignore_index": ignore_index,
        "averaged": averaged,
        "weight": "None" if weight is None else "given",
        "token_weight": "None" if token_weight is None else "given",
    }
    total = _total(count, options, group)
    return total / group.size() if averaged else total.to(count.dtype)


def _parts(
    target: Tensor | Sequence[Tensor], token_weight: Tensor | Sequence[Tensor] | None
) -> list[tuple[Tensor, Tensor | None]]:
    """Pair the targets with their token weights."""
    if isinstance(target, Tensor):
        target = [target]
        token_weight = None if token_weight is None else [token_weight]  # type: ignore[list-item]
    if not isinstance(target, list | tuple):
        raise TypeError(f"target must be a tensor of class indices or a list of such, got {type(target).__name__}")
    if not target:
        raise ValueError("target is an empty sequence; where there are no targets, pass an empty tensor")
    if token_weight is None:
        return [(t, None) for t in target]
    if not isinstance(token_weight, list | tuple):
        kind = type(token_weight).__name__
        raise TypeError(f"token_weight must be a list as target is, of a tensor for each, got {kind}")
    if len(token_weight) != len(target):
        raise ValueError(f"token_weight must be of {len(target)} tensors, one a target, got {len(token_weight)}")
    return list(zip(target, token_weight, strict=True))


def _check(parts: list[tuple[Tensor, Tensor | None]], ignore_index: int, weight: Tensor | None, averaged: bool) -> None:
    for target, token_weight in parts:
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a tensor of class indices or a list of such, got {type(target).__name__}")
        checks.check_local("target", target)
        checks.check_index_dtype("target", target)
        if token_weight is not None:
            checks.check_token_weight(token_weight, target)
        checks.check_device("one target", target, parts[0][0], "the first")
    checks.check_ignored(ignore_index)
    checks.check_bool(averaged=averaged)
    if weight is None:
        return
    checks.check_floating("weight", weight)
    if weight.dim() != 1 or not len(weight):
        raise ValueError(f"weight must be (V,), one a class, got shape {tuple(weight.shape)}")
    checks.check_device("weight", weight, parts[0][0], "target")


def _count(target: Tensor, weight: Tensor | None, token_weight: Tensor | None) -> Tensor:
    counted = target != checks.IGNORED
    if weight is None and token_weight is None:
        return counted.sum()
    product = target.new_ones(target.shape, dtype=torch.float64)
    if weight is not None:
        known = (target >= 0) & (target < len(weight))
        product = product * weight.detach()[target.clamp(0, len(weight) - 1)].masked_fill(~known, torch.nan)
    if token_weight is not None:
        product = product * token_weight.detach()
    return product.masked_fill(~counted, 0).sum()


def _total(count: Tensor, options: dict[str, object], group: ProcessGroup) -> Tensor:
    """Sum the count over the ranks, which must have the same options."""
    # One shape and dtype, whatever a rank was given: others would be summed wrongly, or hang.
    code = zlib.crc32(repr(options).encode()) % _CODES
    told = count.new_full((4,), code, dtype=torch.float64)
    told[0], told[2], told[3] = count, code * code, 0
    dist.all_reduce(told, group=group)
    total, codes, squares, failed = told
    agree = codes.square() == squares * group.size()  # by Cauchy-Schwarz, of equal ones alone
    if checks.may_read(count) and failed > 0:
        raise ValueError(ELSEWHERE.format("another rank"))
    if checks.may_read(count) and not agree:
        here = ", ".join(f"{name}={value}" for name, value in options.items())
        raise ValueError(f"the ranks do not agree on what counts: rank {group.rank()} has {here}, others have not")
    return torch.where(agree, total, torch.nan)
