"""Supervised contrastive loss.

Its sums over all pairs are row statistics of similarities, which are logits of a projection: an anchor is a hidden
state, and the contrast set stands where an output layer's weight does. So the chunks, the passes and the gradients are
those of the linear forms, and the N x N similarities are never stored. What is left, the mean over an anchor's
positives, needs no pairs: the features of each label are summed once.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import parallel
from .checks import DTYPES, check_choice, check_local, check_number, compute_dtype
from .epilogue import Epilogue
from .projection import Form, Projection
from .row import parameter, row_loss
from .statistics import Statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Bytes of similarities held at a time.
BUDGET = 12 * 2**20

#: Bytes of features at a time in what is done to each of them apart.
COLUMN_BYTES = 2**20

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
    averaged: bool = False,
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
        averaged: with a group, whether gradients are averaged over its ranks afterwards; see below.
        impl: as for the row losses.

    Memory is O((N + M) D): similarities exist a chunk at a time. "in" computes its positives in PyTorch, chunkwise.

    Across the R ranks of a group, each takes its own rows for anchors and compares them with those of all ranks, in
    memory O((N_own + N_all) D). All ranks must call it, and its backward.

    - "mean", "mean_all" and "sum" are over the anchors of all ranks: every rank returns the same number. "none" returns
      the rank's own anchors.
    - The gradients are those of one process that has the whole batch, where each rank runs backward on what it has.
    - DistributedDataParallel averages the gradients of parameters, which would divide them by R. With averaged=True
      those of the features come times R, so that the average is exact and nothing else is to be multiplied.
    - The gradient of `temperature` is that of one process in either case, the same on every rank.
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
    _check(features, labels, contrast, contrast_labels, temperature, normalize, positives, reduction, group, averaged)
    # Divided by the root of the temperature on either side: where anchors and others are one, one tensor serves both.
    scale = parameter(temperature, compute_dtype(features.dtype), features.device)
    if group is not None:
        scale = parallel.shared(scale, group, 1 / group.size() if averaged else 1)
    own: slice | None = slice(0, len(labels))
    anchors = _prepared("features", features, normalize, scale.sqrt())
    others, other_labels, ranks = anchors, labels, None
    if contrast is not None and contrast_labels is not None:
        own, other_labels = None, contrast_labels
        others = _prepared("contrast", contrast, normalize, scale.sqrt())
    elif group is not None:
        ranks = _meet(features, temperature, normalize, positives, reduction, averaged, group)
        own, other_labels = ranks.own, parallel.whole(labels.to(torch.int64), ranks)
        others = parallel.gather(anchors, ranks)
    pairs = _Pairs(anchors, labels, others, other_labels, own)

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
    if share is None or ranks is None:
        return loss
    return parallel.total(loss, ranks, len(ranks.rows) if averaged else 1)


class _Pairs(NamedTuple):
    """The anchors and what they are compared with. Similarities are products of the two as they are."""

    anchors: Tensor  # (N, D)
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
    averaged: object,
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
    if not isinstance(averaged, bool):
        raise TypeError(f"averaged must be a bool, got {averaged!r}")
    if averaged and reduction == "none":
        raise ValueError("averaged=True is for a loss that all ranks share, but reduction is 'none'")


def _prepared(name: str, features: Tensor, normalize: bool, root: Tensor) -> Tensor:
    x = features.to(compute_dtype(features.dtype))
    if not normalize:
        return x / root
    largest = (
        torch.linalg.vector_norm(x.detach(), torch.inf, -1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    )
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not largest.all():
        row = int((largest[:, 0] == 0).nonzero()[0, 0])
        raise ValueError(f"row {row} of {name} is zero and has no direction; drop it, or pass normalize=False")
    direction, _ = _Direction.apply(x, largest, root)
    return direction


class _Direction(torch.autograd.Function):
    """x / (|x| root), and |x|. Of all (N, D) on the way autograd would keep as many copies as there are steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        # Divided by the largest first: the squares of large or small ones would leave the range.
        direction = x / largest
        length = direction.norm(dim=-1, keepdim=True)
        # An output must not be the tensor that was changed in place: torch 2.11 would compile its gradient to zero.
        direction = direction.div_(length * root).view_as(x)
        length = length * largest
        ctx.save_for_backward(direction, length, root)
        ctx.set_materialize_grads(False)
        return direction, length

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_length: Tensor | None
    ) -> tuple[Tensor | None, None, Tensor | None]:
        direction, length, root = ctx.saved_tensors
        by_x = by_root = None
        if grad is not None:
            along = _dot(direction, grad)[:, None]
            by_x = torch.addcmul(grad, direction, along * root.square(), value=-1).div_(length * root)
            by_root = -along.sum() / root
        if grad_length is not None:  # of a second derivative
            of_length = direction * (grad_length * root)
            by_x = of_length if by_x is None else by_x + of_length
        return by_x, None, by_root


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Of each row."""
    return sum(((x[:, c] * y[:, c]).sum(-1) for c in _columns(x)), x.new_zeros(len(x)))


def _columns(x: Tensor) -> list[slice]:
    """A few at a time, for what is by columns and would need memory of the size of x."""
    count = max(32, COLUMN_BYTES // max(1, len(x) * x.element_size()))
    return [slice(i, i + count) for i in range(0, x.shape[1], count)]


def _meet(
    features: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    positives: str,
    reduction: str,
    averaged: bool,
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
        "averaged": averaged,
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
    anchors, labels, others, other_labels, own = pairs
    if len(others) == 0:
        return (anchors * 0).sum(-1)
    ordered = other_labels.sort().values
    slot = torch.searchsorted(ordered, labels).clamp(max=len(others) - 1)
    if others is anchors:
        sums = _SumSimilarity.apply(anchors, None, slot, None, own)
    else:
        sums = _SumSimilarity.apply(anchors, others, slot, torch.searchsorted(ordered, other_labels), own)
    return sums / count.clamp(min=1)


class _SumSimilarity(torch.autograd.Function):
    """An anchor's similarity to the sum of the others of its label, itself left out; labels are slots in [0, M).

    Others of None are the anchors themselves. The gradients are sums over labels, too; autograd alone would keep every
    step between.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, others: Tensor | None, slot: Tensor, other_slot: Tensor | None, own: slice | None
    ) -> Tensor:
        ctx.save_for_backward(anchors, others, slot, other_slot)
        ctx.own = own
        if others is None or other_slot is None:
            others, other_slot = anchors, slot
        similarity = anchors.new_zeros(len(anchors))
        for c in _columns(anchors):
            sums = _label_sums(others[:, c], other_slot, slot)
            if own is not None:
                sums -= anchors[:, c]
            similarity = similarity + (anchors[:, c] * sums).sum(-1)  # in place, torch 2.11 would lose the gradient
        return similarity

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, others, slot, other_slot = ctx.saved_tensors
        own, grad = ctx.own, grad[:, None]
        if same := others is None:
            others, other_slot = anchors, slot
        by_anchors = torch.zeros_like(anchors)
        by_others = by_anchors if same else torch.zeros_like(others) if ctx.needs_input_grad[1] else None
        for c in _columns(anchors):
            weighted = grad * anchors[:, c]
            by_anchors[:, c] += grad * _label_sums(others[:, c], other_slot, slot)
            if own is not None:
                by_anchors[:, c] -= weighted
            if by_others is not None:
                by_others[:, c] += _label_sums(weighted, slot, other_slot)
                if own is not None:
                    by_others[own, c] -= weighted
        return by_anchors, None if same else by_others, None, None, None


def _label_sums(x: Tensor, slot: Tensor, at: Tensor) -> Tensor:
    """The sums of the rows of x by slot, at the slots `at`."""
    return x.new_zeros((max(len(slot), len(at)), x.shape[1])).index_add_(0, slot, x)[at]


def _positive_lse(pairs: _Pairs, compared: Tensor) -> Tensor:
    """log sum over an anchor's positives of exp s; 0 where there are none."""
    anchors, labels, others, other_labels, own = pairs
    # Under other names: torch.compile takes no tensor twice for a function with a backward of its own.
    others, other_labels = others.view_as(others), other_labels.view_as(other_labels)
    return _PositiveLse.apply(anchors, others, labels, other_labels, own, compared)


class _PositiveLse(torch.autograd.Function):
    """The same, some anchors at a time, whose similarities are made once more in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        others: Tensor,
        labels: Tensor,
        other_labels: Tensor,
        own: slice | None,
        compared: Tensor,
    ) -> Tensor:
        pairs = _Pairs(anchors, labels, others, other_labels, own)
        lse = anchors.new_empty(len(anchors))
        for rows in _chunks(pairs):
            lse[rows] = _positive_similarity(pairs, compared, rows).logsumexp(-1)
        ctx.save_for_backward(anchors, others, labels, other_labels, compared, lse)
        ctx.own = own
        return torch.where(compared, lse, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, others, labels, other_labels, compared, lse = ctx.saved_tensors
        pairs = _Pairs(anchors, labels, others, other_labels, ctx.own)
        grad = torch.where(compared, grad, 0)
        needed, nothing = ctx.needs_input_grad[:2], (None,) * 4
        if torch.is_grad_enabled():
            lse = _positive_similarity(pairs, compared, slice(None)).logsumexp(-1)
            wanted = [x for x, need in zip((anchors, others), needed, strict=True) if need]
            grads = iter(torch.autograd.grad(lse, wanted, grad, create_graph=True))
            return *(next(grads) if need else None for need in needed), *nothing
        by_anchors = torch.empty_like(anchors) if needed[0] else None
        by_others = torch.zeros_like(others) if needed[1] else None
        with torch.autocast(anchors.device.type, enabled=False):
            for rows in _chunks(pairs):
                p = _positive_similarity(pairs, compared, rows).sub_(lse[rows, None]).exp_().mul_(grad[rows, None])
                if by_anchors is not None:
                    torch.mm(p, others, out=by_anchors[rows])
                if by_others is not None:
                    by_others.addmm_(p.t(), anchors[rows])
        return by_anchors, by_others, *nothing


def _chunks(pairs: _Pairs) -> list[slice]:
    """Anchors whose similarities, and what is made of them, fit into the budget."""
    size = max(1, BUDGET // (4 * max(1, len(pairs.others)) * pairs.anchors.element_size()))
    return [slice(i, min(i + size, len(pairs.anchors))) for i in range(0, len(pairs.anchors), size)]


def _positive_similarity(pairs: _Pairs, compared: Tensor, rows: slice) -> Tensor:
    """Of some anchors to all others, -inf where these are no positives; 0 for an anchor that has none."""
    anchors, labels, others, other_labels, own = pairs
    with torch.autocast(anchors.device.type, enabled=False):
        similarity = anchors[rows] @ others.t()
    apart = labels[rows, None] != other_labels
    if own is not None:
        apart.diagonal(own.start + (rows.start or 0)).fill_(True)
    return similarity.masked_fill(apart, -torch.inf).masked_fill(~compared[rows, None], 0)


def _log_sum_exp(pairs: _Pairs, compared: Tensor, share: Tensor | None, impl: str | None) -> Tensor:
    """log sum over all that an anchor is compared with of exp s: (N,), or the sum of these times `share`."""
    anchors, labels, others, _, own = pairs
    if own is None:
        index = torch.zeros_like(labels, dtype=torch.int64)
    else:
        index = torch.arange(own.start, own.stop, device=labels.device)
    budget = max(BUDGET, len(others) * anchors.element_size())
    form = Form(0.0, budget, drop_ignored=anchors.device.type == "cpu", mask_target=own is not None)
    return row_loss(
        "supcon_loss",
        # By another name: torch.compile takes no tensor twice for a function with a backward of its own.
        Projection(anchors, others.view_as(others), None, form),
        torch.where(compared, index, _IGNORED),
        LOG_SUM_EXP,
        ignore_index=_IGNORED,
        reduction="none" if share is None else "sum",
        token_weight=share,
        impl=impl,
    )
