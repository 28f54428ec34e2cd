"""Supervised contrastive loss.

Its sums over all pairs are row statistics of similarities, which are logits of a projection: an anchor is a hidden
state, and the contrast set stands where an output layer's weight does. So the chunks, the passes and the gradients are
those of the linear forms, and the N x N similarities are never stored. What is left, the mean over an anchor's
positives, needs no pairs: the features of each label are summed once.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import parallel
from .checks import DTYPES, check_choice, check_local, check_number, compute_dtype
from .epilogue import Epilogue
from .projection import Form, Projection
from .row import row_loss
from .statistics import Statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Bytes of similarities held at a time.
BUDGET = 12 * 2**20

REDUCTIONS = ("mean", "mean_all", "sum", "none")
_IGNORED = -1


def _lse(s: Statistics) -> Tensor:
    return s.lse


LOG_SUM_EXP = Epilogue("log_sum_exp", _lse)


def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.3,
    normalize: bool = True,
    positives: str = "out",
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor:
    r"""Supervised contrastive loss of features. With f = features / |features| and s_ij = f_i . f_j / temperature,

        "out"  L_i = log sum_{k != i} exp s_ik - 1/|P(i)| sum_{j in P(i)} s_ij,    P(i) = {j != i: labels_j = labels_i}
        "in"   L_i = log sum_{k != i} exp s_ik - log (1/|P(i)| sum_{j in P(i)} exp s_ij)

    An anchor i without positives has no loss and no gradient. Several views of an example are rows of equal labels.

    Args:
        features: (N, D) of float64, float32, bfloat16 or float16; computed in float32 (float64).
        labels: (N,) of int64 or int32.
        temperature: above 0; a 0-d tensor that requires grad is learnt.
        normalize: divide each feature vector, also of `contrast`, by its length. False: they are taken as they are.
        positives: "out" or "in", as above.
        contrast, contrast_labels: (M, D) and (M,), another set to compare with in place of the anchors themselves, such
            as a memory bank; no pair is left out. Differentiated if it requires grad.
        reduction: "mean" over the anchors with a positive, "mean_all" over all of them, "sum", or "none" for (N,).
        group: of torch.distributed: the ranks' features, any number on each, are one batch; see below.
        impl: as for the row losses.

    Memory is O((N + M) D): similarities exist a chunk at a time. "in" computes its positives in PyTorch, chunkwise.

    Across the R ranks of a group, each takes its own rows for anchors and compares them with those of all ranks, in
    memory O((N_own + N_all) D). All ranks must call it, and its backward.

    - "mean", "mean_all" and "sum" are over the anchors of all ranks: every rank returns the same number. "none" returns
      the rank's own anchors.
    - The ranks' backward passes add up, as through any collective. Where each runs backward on the same number,
      features get R times its gradient, and parameters in DistributedDataParallel, which averages, get exactly what one
      process with the whole batch would give them: nothing is to be multiplied by R.
    - The gradient of `temperature` comes averaged, the same on every rank, be it in DistributedDataParallel or not.
    - The host reads the numbers of rows, torch.compile breaks its graph there, and a second derivative raises.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range; a zero vector that is to be normalized
            (on a GPU, where looking would stall the stream, the loss is NaN); a group together with `contrast`, without
            torch.distributed being initialised, or whose ranks do not agree on D, dtype or options.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning" (arXiv:2004.11362); for language models, with
    cross-entropy beside it, Gunel et al. 2021 (arXiv:2011.01403).

    >>> import torch, fusedloss as fl
    >>> features = torch.randn(8, 64, requires_grad=True)
    >>> fl.supcon_loss(features, torch.arange(8) // 2, temperature=0.1).backward()
    """
    _check(features, labels, contrast, contrast_labels, temperature, normalize, positives, reduction, group)
    anchors = _prepared("features", features, normalize)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(anchors.device, anchors.dtype)
    own: slice | None = slice(0, len(labels))
    others, other_labels, ranks = anchors, labels, None
    if contrast is not None and contrast_labels is not None:
        own, others, other_labels = None, _prepared("contrast", contrast, normalize), contrast_labels
    elif group is not None:
        ranks = _meet(features, temperature, normalize, positives, reduction, group)
        own, other_labels = ranks.own, parallel.whole(labels.to(torch.int64), ranks)
        others, temperature = parallel.gather(anchors, torch.as_tensor(temperature).to(anchors), ranks)
    pairs = _Pairs(anchors, anchors / temperature, labels, others, other_labels, own)

    counts = _count(labels if own is None else other_labels, other_labels, own)  # (N,), across ranks that of all
    count = counts if own is None else counts[own]
    compared = count > 0
    looks = not torch.compiler.is_compiling() and features.device.type == "cpu"
    if looks and len(counts) and not (counts > 0).any():
        warnings.warn("no anchor has a positive: the supervised contrastive loss is 0", stacklevel=2)
    if positives == "in":
        positive_term = _positive_lse(pairs, compared) - count.clamp(min=1).log()
    else:
        positive_term = _mean_similarity(pairs, count)
    positive_term = torch.where(compared, positive_term, 0)

    share = None
    if reduction != "none":
        divisors: dict[str, Tensor | int] = {"mean": (counts > 0).sum().clamp(min=1), "mean_all": len(counts), "sum": 1}
        share = compared.to(anchors.dtype) / divisors[reduction]
    if len(others) == 0 or len(features) == 0:
        loss = positive_term if share is None else positive_term.sum()
    else:
        loss = _log_sum_exp(pairs, compared, share, impl)
        loss = loss - (positive_term if share is None else (positive_term * share).sum())
    return loss if share is None or ranks is None else parallel.total(loss, ranks)


class _Pairs(NamedTuple):
    """The anchors and what they are compared with."""

    anchors: Tensor  # (N, D)
    scaled: Tensor  # the same, divided by the temperature
    labels: Tensor  # (N,)
    others: Tensor  # (M, D)
    other_labels: Tensor  # (M,)
    own: slice | None
    """Where the anchors lie among the others; None where those are another set."""


def _check(
    features: object,
    labels: object,
    contrast: object,
    contrast_labels: object,
    temperature: object,
    normalize: object,
    positives: str,
    reduction: str,
    group: object,
) -> None:
    if group is not None:
        if contrast is not None:
            raise ValueError("contrast and group both say what to compare with; pass one of them")
        parallel.check_group(group)
    if (contrast is None) != (contrast_labels is None):
        missing, given = ("contrast_labels", "contrast") if contrast_labels is None else ("contrast", "contrast_labels")
        raise TypeError(f"{given} was given without {missing}")
    pairs = [("features", features, "labels", labels)]
    if contrast is not None:
        pairs.append(("contrast", contrast, "contrast_labels", contrast_labels))
    for name, x, labels_name, y in pairs:
        for n, value in ((name, x), (labels_name, y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{n} must be a tensor, got {type(value).__name__}")
            check_local(n, value)
        assert isinstance(x, Tensor) and isinstance(y, Tensor)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if y.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{labels_name} must be int64 or int32, got {y.dtype}")
        if x.dim() != 2:
            raise ValueError(f"{name} must be (N, D), one row of features each, got shape {tuple(x.shape)}")
        if y.shape != x.shape[:1]:
            raise ValueError(f"{labels_name} must be ({x.shape[0]},), one a row of {name}, got shape {tuple(y.shape)}")
        if x.device != y.device:
            raise ValueError(f"{labels_name} is on {y.device}, but {name} on {x.device}")
    assert isinstance(features, Tensor)
    if isinstance(contrast, Tensor):
        if contrast.shape[1] != features.shape[1]:
            raise ValueError(f"contrast has D = {contrast.shape[1]} features, but features {features.shape[1]}")
        if contrast.device != features.device:
            raise ValueError(f"contrast is on {contrast.device}, but features on {features.device}")
        if contrast.dtype != features.dtype:
            raise TypeError(f"contrast is {contrast.dtype}, but features {features.dtype}")
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, 0, above=True)
    elif temperature.dim() or not temperature.is_floating_point():
        got = f"{temperature.dtype} of shape {tuple(temperature.shape)}"
        raise ValueError(f"temperature must be a number or a 0-d floating point tensor, got {got}")
    elif temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        check_number("temperature", float(temperature.detach()), 0, above=True)
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be a bool, got {normalize!r}")
    check_choice("positives", positives, ("out", "in"))
    check_choice("reduction", reduction, REDUCTIONS)


def _prepared(name: str, features: Tensor, normalize: bool) -> Tensor:
    x = features.to(compute_dtype(features.dtype))
    if not normalize:
        return x
    # Divided by the largest first: the squares of large or small ones would leave the range.
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[1] else x.new_zeros((len(x), 1))
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not largest.all():
        row = int((largest[:, 0] == 0).nonzero()[0, 0])
        raise ValueError(f"row {row} of {name} is zero and has no direction; drop it, or pass normalize=False")
    x = x / largest
    return x / x.norm(dim=-1, keepdim=True)


def _meet(
    features: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    positives: str,
    reduction: str,
    group: ProcessGroup,
) -> parallel.Ranks:
    """The other ranks, if they do the same."""
    learnt = isinstance(temperature, Tensor) and temperature.requires_grad
    same = {
        "the number of features": features.shape[1],
        "the features' dtype": features.dtype,
        "temperature": "a tensor" if isinstance(temperature, Tensor) else float(temperature),
        "normalize": normalize,
        "positives": positives,
        "reduction": reduction,
        # The backward has collectives of its own.
        "features.requires_grad": torch.is_grad_enabled() and features.requires_grad,
        "temperature.requires_grad": torch.is_grad_enabled() and learnt,
    }
    return parallel.meet(group, len(features), features.device, same)


def _count(labels: Tensor, other_labels: Tensor, own: slice | None) -> Tensor:
    """How many positives each anchor has."""
    ordered = other_labels.sort().values
    count = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
    return count if own is None else count - 1


def _mean_similarity(pairs: _Pairs, count: Tensor) -> Tensor:
    """An anchor's mean similarity to its positives, without a look at the pairs."""
    anchors, scaled, labels, others, other_labels, own = pairs
    if len(others) == 0:
        return (scaled * 0).sum(-1)
    ordered = other_labels.sort().values
    sums = torch.zeros_like(others).index_add(0, torch.searchsorted(ordered, other_labels), others)
    mine = sums[torch.searchsorted(ordered, labels).clamp(max=len(others) - 1)]
    if own is not None:
        mine = mine - anchors
    return (scaled * mine).sum(-1) / count.clamp(min=1)


def _positive_lse(pairs: _Pairs, compared: Tensor) -> Tensor:
    """log sum over an anchor's positives of exp s; 0 where there are none."""
    _, scaled, labels, others, other_labels, own = pairs

    def lse(scaled: Tensor, others: Tensor, first: int) -> Tensor:
        rows = slice(first, first + len(scaled))
        with torch.autocast(scaled.device.type, enabled=False):
            similarity = scaled @ others.t()
        apart = labels[rows, None] != other_labels
        if own is not None:
            apart.diagonal(own.start + first).fill_(True)
        similarity = similarity.masked_fill(apart, -torch.inf).masked_fill(~compared[rows, None], 0)
        return torch.where(compared[rows], similarity.logsumexp(-1), 0)

    size = max(1, BUDGET // (4 * max(1, len(others)) * scaled.element_size()))
    parts = [checkpoint(lse, part, others, i * size, use_reentrant=False) for i, part in enumerate(scaled.split(size))]
    return torch.cat(parts)


def _log_sum_exp(pairs: _Pairs, compared: Tensor, share: Tensor | None, impl: str | None) -> Tensor:
    """log sum over all that an anchor is compared with of exp s: (N,), or the sum of these times `share`."""
    _, scaled, labels, others, _, own = pairs
    if own is None:
        index = torch.zeros_like(labels, dtype=torch.int64)
    else:
        index = torch.arange(own.start, own.stop, device=labels.device)
    budget = max(BUDGET, len(others) * scaled.element_size())
    form = Form(0.0, budget, drop_ignored=scaled.device.type == "cpu", mask_target=own is not None)
    return row_loss(
        "supcon_loss",
        Projection(scaled, others, None, form),
        torch.where(compared, index, _IGNORED),
        LOG_SUM_EXP,
        ignore_index=_IGNORED,
        reduction="none" if share is None else "sum",
        token_weight=share,
        impl=impl,
    )
