"""Supervised contrastive loss.

Its sums over all pairs are row statistics of similarities, which are logits of a projection: an anchor is a hidden
state, and the contrast set stands where an output layer's weight does. So the chunks, the passes and the gradients are
those of the linear forms, and the N x N similarities are never stored. What is left, the mean over an anchor's
positives, needs no pairs: the features of each label are summed once.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .checks import DTYPES, check_choice, check_local, check_number, compute_dtype
from .epilogue import Epilogue
from .projection import Form, Projection
from .row import row_loss
from .statistics import Statistics

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
        impl: as for the row losses.

    Memory is O((N + M) D): similarities exist a chunk at a time. "in" computes its positives in PyTorch, chunkwise.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range; a zero vector that is to be normalized
            (on a GPU, where looking would stall the stream, the loss is NaN).

    Source: Khosla et al. 2020, "Supervised Contrastive Learning" (arXiv:2004.11362); for language models, with
    cross-entropy beside it, Gunel et al. 2021 (arXiv:2011.01403).

    >>> import torch, fusedloss as fl
    >>> features = torch.randn(8, 64, requires_grad=True)
    >>> fl.supcon_loss(features, torch.arange(8) // 2, temperature=0.1).backward()
    """
    _check(features, labels, contrast, contrast_labels, temperature, normalize, positives, reduction)
    own = contrast is None
    anchors = _prepared("features", features, normalize)
    others = anchors if contrast is None else _prepared("contrast", contrast, normalize)
    other_labels = labels if contrast_labels is None else contrast_labels
    if isinstance(temperature, Tensor):
        temperature = temperature.to(anchors.device, anchors.dtype)
    scaled = anchors / temperature
    count, mean_similarity = _positives(scaled, anchors, labels, others, other_labels, own)
    compared = count > 0
    if not torch.compiler.is_compiling() and features.device.type == "cpu" and len(features) and not compared.any():
        warnings.warn("no anchor has a positive: the supervised contrastive loss is 0", stacklevel=2)

    if positives == "in":
        positive_term = _positive_lse(scaled, labels, others, other_labels, own, compared) - count.clamp(min=1).log()
    else:
        positive_term = mean_similarity
    positive_term = torch.where(compared, positive_term, 0)
    if len(others) == 0 or len(features) == 0:
        rows = positive_term
        return rows if reduction == "none" else rows.sum()

    index = torch.arange(len(features), device=features.device) if own else torch.zeros_like(labels, dtype=torch.int64)
    form = Form(0.0, max(BUDGET, len(others) * anchors.element_size()), features.device.type == "cpu", own)
    projection = Projection(scaled, others, None, form)
    target = torch.where(compared, index, _IGNORED)
    share = None
    if reduction != "none":
        divisor = (
            compared.sum().clamp(min=1) if reduction == "mean" else len(features) if reduction == "mean_all" else 1
        )
        share = compared.to(anchors.dtype) / divisor
    lse = row_loss(
        "supcon_loss",
        projection,
        target,
        LOG_SUM_EXP,
        ignore_index=_IGNORED,
        reduction="none" if share is None else "sum",
        token_weight=share,
        impl=impl,
    )
    if share is None:
        return lse - positive_term
    return lse - (positive_term * share).sum()


def _check(
    features: object,
    labels: object,
    contrast: object,
    contrast_labels: object,
    temperature: object,
    normalize: object,
    positives: str,
    reduction: str,
) -> None:
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


def _positives(
    scaled: Tensor, anchors: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, own: bool
) -> tuple[Tensor, Tensor]:
    """How many positives each anchor has, and its mean similarity to them, without a look at the pairs."""
    if len(others) == 0:
        return torch.zeros_like(labels), (scaled * 0).sum(-1)
    ordered = other_labels.sort().values
    first, last = torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)
    count = last - first - int(own)
    sums = torch.zeros_like(others).index_add(0, torch.searchsorted(ordered, other_labels), others)
    mine = sums[first.clamp(max=len(others) - 1)]
    if own:
        mine = mine - anchors
    return count, (scaled * mine).sum(-1) / count.clamp(min=1)


def _positive_lse(
    scaled: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, own: bool, compared: Tensor
) -> Tensor:
    """log sum over an anchor's positives of exp s; 0 where there are none."""

    def lse(scaled: Tensor, others: Tensor, first: int) -> Tensor:
        rows = slice(first, first + len(scaled))
        with torch.autocast(scaled.device.type, enabled=False):
            similarity = scaled @ others.t()
        apart = labels[rows, None] != other_labels
        if own:
            apart.diagonal(first).fill_(True)
        similarity = similarity.masked_fill(apart, -torch.inf).masked_fill(~compared[rows, None], 0)
        return torch.where(compared[rows], similarity.logsumexp(-1), 0)

    size = max(1, BUDGET // (4 * max(1, len(others)) * scaled.element_size()))
    parts = [checkpoint(lse, part, others, i * size, use_reentrant=False) for i, part in enumerate(scaled.split(size))]
    return torch.cat(parts)
