"""Supervised contrastive loss.

Its sums over all pairs are row statistics of similarities, which are logits of a projection: an anchor is a hidden
state, and the contrast set stands where an output layer's weight does. So the chunks, the passes and the gradients are
those of the linear forms, and the N x N similarities are never stored. What is left, the mean over an anchor's
positives, needs no pairs: the features of each label are summed once.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from .. import checks, transforms
from ..definition.epilogue import Epilogue
from ..definition.projection import Form, Projection
from ..distributed import batch as parallel
from ..engine import budgets
from ..engine.constants import parameter
from ..engine.dispatch import row_loss
from ..engine.functions import differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..engine.options import LinearImpl

#: Bytes of similarities held at a time, on a CPU.
BUDGET = 12 * 2**20

#: Bytes of features at a time in what is done to each of them apart.
COLUMN_BYTES = 2**20

SupConReduction: TypeAlias = Literal["mean", "mean_all", "sum", "none"]

REDUCTIONS = get_args(SupConReduction)
POSITIVES = ("out", "in")


LOG_SUM_EXP = Epilogue("log_sum_exp", lambda s: s.lse)


def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.3,
    normalize: bool = True,
    positives: Literal["out", "in"] = "out",
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    self_index: Tensor | None = None,
    contrast_includes_batch: bool = False,
    positive_mask: Tensor | None = None,
    reduction: SupConReduction = "mean",
    group: ProcessGroup | None = None,
    averaged: bool = False,
    impl: LinearImpl | None = None,
) -> Tensor:
    r"""Compute the supervised contrastive loss of features.

    With f = features / |features| and s_ij = f_i . f_j / temperature, the loss of an anchor i is

        "out"  L_i = log sum_{k != i} exp s_ik - 1/|P(i)| sum_{j in P(i)} s_ij,    P(i) = {j != i: labels_j = labels_i}
        "in"   L_i = log sum_{k != i} exp s_ik - log (1/|P(i)| sum_{j in P(i)} exp s_ij)

    An anchor i without positives has no loss and no gradient. Several views of an example are rows of equal labels.

    Args:
        features: (N, D) of float64, float32, bfloat16 or float16; computed in float32 (float64). Views of each example
            are (N, views, D): every view is an anchor and is compared with all views but itself.
        labels: (N,) of integers.
        temperature: from 1e-30 to 1e30; a 0-d tensor is learnable if it requires grad.
        normalize: divide each feature vector, also of `contrast`, by its norm. With False they are used unchanged.
        positives: "out" or "in", as above.
        contrast, contrast_labels: (M, D) or (M, views, D), and (M,): another contrast set instead of the anchors
            themselves, such as a memory bank. Differentiated if it requires grad. No pair is left out, unless
            one of the next two arguments says which of its rows is the anchor itself.
        self_index: with `contrast`, the row of it that is the anchor itself, -1 for an anchor that is not among them:
            integers of the shape (N,) or (N, views). The row is left out of the anchor's positives and of its sum
            over k. Rows of views count one after the other, as in ``contrast.flatten(0, 1)``. An index that is out of
            range raises on a CPU; on a GPU and in a compiled graph that anchor's loss is NaN.
        contrast_includes_batch: with `contrast`, its first rows are the batch, ``contrast = cat([features, bank])``:
            short for a self_index of arange.
        positive_mask: boolean (N, N) or, with `contrast`, (N, M), in place of the labels: where j is a positive of i.
            It serves examples of several labels. An anchor is no positive of itself, whatever the mask says, but its
            other views are where the mask says so. The mask is dense, O(N M) bytes; similarities are not.
        reduction: "mean" over the anchors with a positive, "mean_all" over all of them, "sum", or "none" for (N,) or
            (N, views).
        group: of torch.distributed: the ranks' features, any number on each, are one batch; see below.
        averaged: with a group, whether gradients are averaged over its ranks afterwards; see below.
        impl: as for the row losses.

    Memory is O((N + M) D): similarities are computed one chunk at a time. "in" and `positive_mask` compute positives in
    PyTorch, chunkwise, but under torch.compile and in an exported program in one piece.

    With a group of R ranks, the anchors of each rank are its own rows, and the contrast set is the rows of all ranks.
    Memory is O((N_own + N_all) D). All ranks must call it, and its backward.

    - "mean", "mean_all" and "sum" are over the anchors of all ranks: every rank returns the same number. "none" returns
      the rank's own anchors.
    - The gradients are those of one process that has the whole batch, where each rank runs backward on what it has.
    - DistributedDataParallel averages the gradients of parameters, which would divide them by R. With averaged=True
      the gradients of the features are multiplied by R, so that the average is exact.
    - The gradient of `temperature` is that of one process in either case, the same on every rank.
    - The host reads the numbers of rows, torch.compile breaks its graph there, and a second derivative raises.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, shape or range, or two that exclude one
            another; a zero vector that is to be normalized (on a GPU, where looking would stall the stream, the loss is
            NaN); a group together with `contrast` or `positive_mask`, without torch.distributed being initialised, or
            whose ranks do not agree on D, dtype or options, or one of which raises.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning" (arXiv:2004.11362); for language models, with
    cross-entropy beside it, Gunel et al. 2021 (arXiv:2011.01403).

    >>> import torch, fusedloss as fl
    >>> features = torch.randn(8, 64, requires_grad=True)
    >>> fl.supcon_loss(features, torch.arange(8) // 2, temperature=0.1).backward()
    """
    try:
        if not {type(normalize), type(averaged), type(contrast_includes_batch)} <= {bool}:
            checks.check_bool(normalize=normalize, averaged=averaged, contrast_includes_batch=contrast_includes_batch)
        _check_tensors(
            features, labels=labels, contrast=contrast, contrast_labels=contrast_labels, self_index=self_index,
            contrast_includes_batch=contrast_includes_batch, positive_mask=positive_mask, group=group,
        )  # fmt: skip
        _check_options(features, temperature, positives, reduction, averaged)
        shape = features.shape[:-1]
        mask = None if positive_mask is None else _mask_of_views(positive_mask, features, contrast)
        features, labels = _by_rows(features, labels)
        if contrast is not None:
            contrast, contrast_labels = _by_rows(contrast, contrast_labels)
            if self_index is not None:
                self_index = self_index.reshape(-1).to(torch.int64)
            _check_own(labels, contrast, contrast_labels, self_index, contrast_includes_batch, features.shape[0])

        if torch.compiler.is_compiling():
            features, contrast, temperature = map(_as_traced, (features, contrast, temperature))

        # Divided by the root of the temperature on either side: where anchors and others are one, one tensor is both.
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        scale = parameter(temperature, dtype, features.device)
        if group is not None:
            scale = parallel.shared(scale, group, 1 / group.size() if averaged else 1)
        anchors = _prepared("features", features, normalize, scale.sqrt())
    except Exception:
        if group is not None:
            parallel.raises(group, features)
        raise
    others, other_labels, ranks = anchors, labels, None
    own: int | Tensor | None = 0
    if contrast is not None:
        own, other_labels = own if contrast_includes_batch else self_index, contrast_labels
        others = _prepared("contrast", contrast, normalize, scale.sqrt())
    elif group is not None and labels is not None:
        options: dict[str, Any] = {
            "normalize": normalize,
            "positives": positives,
            "reduction": reduction,
            "averaged": averaged,
        }
        ranks = _meet(features, temperature, options, group)
        own, other_labels = ranks.own.start, parallel.whole(labels, ranks)
        others = parallel.gather(anchors, ranks)
    pairs = _Pairs(anchors, others, labels, other_labels, mask, own)
    if transforms.active():
        loss = _definition(pairs, positives, reduction)
        return loss.reshape(shape) if reduction == "none" else loss

    ordered = None if other_labels is None else other_labels.sort().values
    count = _count(pairs, ordered)
    # Of the anchors of all ranks.
    counts = count if ranks is None else _count(pairs._replace(labels=other_labels), ordered)
    if counts.shape[0] and checks.may_read(counts) and not (counts > 0).any():
        warnings.warn("no anchor has a positive: the supervised contrastive loss is 0", stacklevel=2)
    compared = count > 0
    reduced = reduction != "none"
    positive_term = torch.where(compared, _positive_term(pairs, ordered, count, positives, reduced), 0)
    if self_index is not None:
        outside = (self_index < -1) | (self_index >= others.shape[0])
        positive_term = positive_term * positive_term.new_ones(()).masked_fill(outside, torch.nan)

    share = None
    if reduced:
        divisors: dict[str, Any] = {"mean": (counts > 0).sum().clamp(min=1), "mean_all": counts.shape[0], "sum": 1}
        share = compared.to(anchors.dtype) / divisors[reduction]
    if others.shape[0] == 0 or anchors.shape[0] == 0:
        loss = positive_term if share is None else positive_term.sum()
    else:
        loss = _log_sum_exp(pairs, compared, share, impl)
        loss = loss - (positive_term if share is None else (positive_term * share).sum())
    if share is None:
        return loss.reshape(shape)
    return loss if ranks is None else parallel.total(loss, ranks, len(ranks.rows) if averaged else 1)


def labels_apart(
    ignored: int,
    features: Tensor,
    labels: Tensor,
    contrast: Tensor | None,
    contrast_labels: Tensor | None,
    *,
    self_index: Tensor | None,
    contrast_includes_batch: bool,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor | None]:
    """Give each example of the ignored label one that no other example of any rank has, also where it is in `contrast`.

    Arguments are those of :func:`supcon_loss`, which refuses what is returned as it is.
    """
    if contrast is not None:
        _check_tensors(
            features, labels=labels, contrast=contrast, contrast_labels=contrast_labels, self_index=self_index,
            contrast_includes_batch=contrast_includes_batch, group=group,
        )  # fmt: skip
    elif not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        return labels, contrast_labels
    labels = labels.to(torch.int64)  # in uint8 the ignored one would be another number
    first = min(ignored, 0) - 1 - (0 if group is None else group.rank() << 32)
    apart = torch.where(labels == ignored, first - torch.arange(len(labels), device=labels.device), labels)
    if contrast is None or contrast_labels is None or (self_index is None and not contrast_includes_batch):
        return apart, contrast_labels
    anchors, of_anchors = _by_rows(features, labels)
    others, of_others = _by_rows(contrast, contrast_labels)
    if self_index is not None:
        self_index = self_index.reshape(-1).to(torch.int64)
    _check_own(of_anchors, others, of_others, self_index, contrast_includes_batch, len(anchors))
    own = torch.arange(len(anchors), device=labels.device) if self_index is None else self_index
    examples, views = len(contrast_labels), contrast.shape[1] if contrast.dim() == 3 else 1
    # The last place is for anchors that are none of them.
    filled = torch.cat([contrast_labels.to(torch.int64), labels.new_zeros(1)])
    here = (of_anchors == ignored) & (own >= 0) & (own < len(others))
    at = torch.where(here, own // max(1, views), examples)
    at = torch.where(filled[at] == ignored, at, examples)
    each = apart if features.dim() == 2 else apart.repeat_interleave(features.shape[1])
    return apart, filled.scatter_reduce(0, at, each, "amin", include_self=False)[:-1]


class _Pairs(NamedTuple):
    """The anchors, their contrast set, and which of its rows are their positives.

    Similarities are products of the two as they are. Positives are those of the anchor's label, or those that a mask
    names, and never the anchor itself.
    """

    anchors: Tensor  # (N, D)
    others: Tensor  # (M, D)
    labels: Tensor | None  # (N,)
    other_labels: Tensor | None  # (M,)
    mask: Tensor | None  # (N, M), in place of labels
    own: int | Tensor | None
    """Which of the others the anchors are: those from a row on, of the same labels; or (N,), out of range where none
    is; or none at all."""

    def positives(self, rows: slice) -> Tensor:
        """Return the positives of some anchors, (n, M) booleans."""
        if self.mask is not None:
            positive = self.mask[rows]
        else:
            assert self.labels is not None and self.other_labels is not None
            positive = self.labels[rows, None] == self.other_labels
        own = self.own_index()
        if own is None:
            return positive
        return positive & (own[rows, None] != torch.arange(self.others.shape[0], device=own.device))

    def own_index(self) -> Tensor | None:
        if isinstance(self.own, int):
            return torch.arange(self.own, self.own + self.anchors.shape[0], device=self.anchors.device)
        return self.own

    def own_positive(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return an index (N,) of the anchors' own rows, and whether these have the anchor's label."""
        assert self.labels is not None and self.other_labels is not None
        at = own.clamp(0, self.others.shape[0] - 1)
        return at, (own == at) & (self.other_labels[at] == self.labels)

    def similarity(self, rows: slice) -> Tensor:
        """Return the similarity of some anchors to all rows of the contrast set."""
        with _without_autocast(self.anchors):
            return self.anchors[rows] @ self.others.t()

    def chunks(self) -> list[slice]:
        """Return slices of anchors whose similarities and intermediate results fit the budget."""
        rows, columns = self.anchors.shape[0], self.others.shape[0]
        budget = budgets.at_a_time(self.anchors.device, BUDGET)
        return _pieces(rows, 4 * columns * self.anchors.element_size(), budget)


def _as_traced(x: Any) -> Any:
    """Cut a tensor off its gradient in a graph that is exported.

    In an exported program the pass over all pairs has no gradient, and the positives' alone would be wrong.
    """
    # torch.compiler.is_exporting() reads it too, but on torch 2.11 says True in every graph that is compiled.
    if not isinstance(x, Tensor) or not getattr(torch.compiler, "_is_exporting_flag", False):
        return x
    # Integers have no gradient; a detach would be lost where the program is decomposed.
    return x.view(_BITS[x.dtype.itemsize]).view(x.dtype)


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _by_rows(features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Make each view a row, with the label of its example."""
    labels = None if labels is None else labels.to(torch.int64)
    if features.dim() == 2:
        return features, labels
    return features.flatten(0, 1), None if labels is None else labels.repeat_interleave(features.shape[1])


def _mask_of_views(mask: Tensor, features: Tensor, contrast: Tensor | None) -> Tensor:
    for dim, x in enumerate((features, features if contrast is None else contrast)):
        if x.dim() == 3:
            mask = mask.repeat_interleave(x.shape[1], dim)
    return mask


def _check_tensors(features: Tensor, **others: Any) -> None:
    """Check the arguments that are tensors, or say what they are."""
    given = set()
    for name, value in others.items():
        if value is not None and value is not False:
            given.add(name)
    for one, other, what in (
        ("contrast", "group", "what to compare with"),
        ("positive_mask", "group", "which pairs there are"),
        ("positive_mask", "labels", "which pairs are positives"),
        ("positive_mask", "contrast_labels", "which pairs are positives"),
        ("self_index", "contrast_includes_batch", "which row of contrast is the anchor"),
    ):
        if {one, other} <= given:
            raise ValueError(f"{one} and {other} both say {what}; pass one of them")
    if not given & {"labels", "positive_mask"}:
        raise TypeError("labels or positive_mask must say which pairs are positives, but neither was given")
    for name in ("contrast_labels", "self_index", "contrast_includes_batch"):
        if name in given and "contrast" not in given:
            raise TypeError(f"{name} was given without contrast")
    if "contrast" in given and not given & {"contrast_labels", "positive_mask"}:
        raise TypeError("contrast was given without contrast_labels")

    _check_features("features", features, "labels", others["labels"])
    contrast = features if others["contrast"] is None else others["contrast"]
    if "contrast" in given:
        _check_features("contrast", contrast, "contrast_labels", others["contrast_labels"])
        if contrast.shape[-1] != features.shape[-1]:
            raise ValueError(f"contrast has D = {contrast.shape[-1]} features, but features {features.shape[-1]}")
        checks.check_device("contrast", contrast, features, "features")
        if contrast.dtype != features.dtype:
            raise TypeError(f"contrast is {contrast.dtype}, but features {features.dtype}")
    for name, dtypes, shape, unit in (
        ("self_index", checks.INDEX_DTYPES, features.shape[:-1], "one an anchor"),
        ("positive_mask", (torch.bool,), (features.shape[0], contrast.shape[0]), "one a pair of examples"),
    ):
        if name in given:
            _check_tensor(name, others[name], dtypes)
            if others[name].shape != shape:
                raise ValueError(f"{name} must be {tuple(shape)}, {unit}, got shape {tuple(others[name].shape)}")
            checks.check_device(name, others[name], features, "features")
    if "group" in given:
        parallel.check_group(others["group"])


def _check_features(name: str, x: Tensor, labels_name: str, labels: Tensor | None) -> None:
    _check_tensor(name, x, checks.DTYPES)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"{name} must be (N, D), one row of features each, or (N, views, D), got shape {tuple(x.shape)}"
        )
    if labels is None:
        return
    _check_tensor(labels_name, labels, checks.INDEX_DTYPES)
    if labels.shape != x.shape[:1]:
        unit = "a row" if x.dim() == 2 else "an example"
        raise ValueError(
            f"{labels_name} must be ({x.shape[0]},), one {unit} of {name}, got shape {tuple(labels.shape)}"
        )
    if x.device != labels.device:
        checks.check_device(labels_name, labels, x, name)


def _check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested or checks.is_dtensor(value):
        checks.check_local(name, value)
    if value.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        expected = f"{', '.join(names)} or {last}" if names else last
        raise TypeError(f"{name} must be {expected}, got {value.dtype}")


def _check_own(
    labels: Tensor | None,
    contrast: Tensor,
    contrast_labels: Tensor | None,
    self_index: Tensor | None,
    contrast_includes_batch: bool,
    anchors: int,
) -> None:
    """Check the arguments that say which rows of the contrast set are the anchors themselves."""
    rows = contrast.shape[0]
    self_index = None if self_index is None else transforms.values(self_index)
    if self_index is not None and checks.may_read(self_index):
        bad = (self_index < -1) | (self_index >= rows)
        if bad.any():
            raise IndexError(
                f"self_index {int(self_index[bad][0])} is out of range for {rows} rows of contrast, and not the -1 of "
                "an anchor that is not among them"
            )
    if not contrast_includes_batch:
        return
    if rows < anchors:
        raise ValueError(
            f"contrast_includes_batch says that contrast begins with the {anchors} rows of features, but it has {rows}"
        )
    if labels is not None and contrast_labels is not None and checks.may_read(labels) and not transforms.active():
        bad = labels != contrast_labels[:anchors]
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                "contrast_includes_batch says that contrast begins with the rows of features, but row "
                f"{row} has label {int(labels[row])} there and {int(contrast_labels[row])} in contrast_labels"
            )


def _check_options(features: Tensor, temperature: object, positives: str, reduction: str, averaged: bool) -> None:
    checks.check_temperature(temperature, features)
    if positives not in POSITIVES or reduction not in REDUCTIONS:
        checks.check_choice("positives", positives, POSITIVES)
        checks.check_choice("reduction", reduction, REDUCTIONS)
    if averaged and reduction == "none":
        raise ValueError("averaged=True is for a loss that all ranks share, but reduction is 'none'")


def _prepared(name: str, features: Tensor, normalize: bool, root: Tensor) -> Tensor:
    x = features.to(root.dtype)
    if not normalize:
        return x / root
    rows, columns = x.shape
    largest = x.new_zeros(rows, 1)
    if columns:  # the norm of that name takes ten times as long
        largest = torch.maximum(x.detach().amax(-1, keepdim=True), -x.detach().amin(-1, keepdim=True))
    if transforms.active():
        direction = x / largest
        return direction / (direction.norm(dim=-1, keepdim=True) * root)
    if checks.may_read(x) and not largest.all():
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
    """Return the dot product of each pair of rows."""
    if transforms.active(y):
        return (x * y).sum(-1)  # PyTorch cannot slice a batched gradient
    return sum(((x[:, c] * y[:, c]).sum(-1) for c in _columns(x)), x.new_zeros(x.shape[0]))


def _columns(x: Tensor) -> list[slice]:
    """Return slices of a few columns, for operations that would otherwise need memory of the size of x."""
    rows, columns = x.shape
    return _pieces(columns, rows * x.element_size(), COLUMN_BYTES, least=32)


def _pieces(length: int, size: int, budget: int, least: int = 1) -> list[slice]:
    """Return slices of as many items of `size` bytes as fit the budget, and at least `least`.

    While a graph is traced it is a single slice: more would all be in the graph, and fit this length only.
    """
    if torch.compiler.is_compiling() or isinstance(length * size, torch.SymInt):
        return [slice(0, length)]
    step = max(least, budget // max(1, size))
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def _meet(
    features: Tensor, temperature: float | Tensor, options: dict[str, Any], group: ProcessGroup
) -> parallel.Ranks:
    """Exchange options and row counts with the other ranks, which must agree."""
    learnt = isinstance(temperature, Tensor) and temperature.requires_grad
    told: object = temperature if isinstance(temperature, Tensor) else float(temperature)
    if isinstance(temperature, Tensor):
        told = "a tensor", temperature.item() if checks.may_read(temperature) else None
    same = {
        "the number of features": features.shape[1],
        "the features' dtype": features.dtype,
        "temperature": told,
        **options,
        # The backward has collectives of its own.
        "features.requires_grad": torch.is_grad_enabled() and features.requires_grad,
        "temperature.requires_grad": torch.is_grad_enabled() and learnt,
    }
    return parallel.meet(group, features.shape[0], features.device, same)


def _count(pairs: _Pairs, ordered: Tensor | None) -> Tensor:
    """Count the positives of each anchor; `ordered` are the sorted labels of the contrast set."""
    if pairs.labels is None or ordered is None:
        parts = [pairs.positives(rows).sum(-1) for rows in pairs.chunks()]
        return torch.cat(parts) if parts else pairs.anchors.new_zeros(0, dtype=torch.int64)
    count = torch.searchsorted(ordered, pairs.labels, right=True) - torch.searchsorted(ordered, pairs.labels)
    if isinstance(pairs.own, Tensor) and pairs.others.shape[0]:
        return count - pairs.own_positive(pairs.own)[1].long()
    return count - 1 if isinstance(pairs.own, int) else count


def _positive_term(pairs: _Pairs, ordered: Tensor | None, count: Tensor, positives: str, reduced: bool) -> Tensor:
    """Compute each anchor's mean similarity to its positives, or the log of the mean of the exponentials."""
    if pairs.others.shape[0] == 0:
        return (pairs.anchors * 0).sum(-1) + (pairs.others * 0).sum()
    if positives == "in":
        return _over_positives(pairs, lse=True) - _log_count(pairs, count)
    total = _over_positives(pairs, lse=False) if ordered is None else _label_similarity(pairs, ordered, reduced)
    return total / count.clamp(min=1)


def _log_count(pairs: _Pairs, count: Tensor) -> Tensor:
    return count.clamp(min=1).to(pairs.anchors.dtype).log()  # of integers it would be in PyTorch's default dtype


def _label_similarity(pairs: _Pairs, ordered: Tensor, reduced: bool) -> Tensor:
    """An anchor's similarity to the sum of its positives, which are summed by labels, without a look at the pairs.

    Where it is `reduced`, anchors of one label have the same upstream gradient.
    """
    anchors, others, labels, other_labels, _, own = pairs
    assert labels is not None and other_labels is not None
    slots = others.shape[0]
    grouped = _Groups.of(torch.searchsorted(ordered, labels).clamp(max=slots - 1), slots)
    if others is anchors:
        return _SumSimilarity.apply(own, reduced, anchors, None, *grouped)
    grouped_others = _Groups.of(torch.searchsorted(ordered, other_labels), slots)
    if isinstance(own, Tensor):
        own = torch.where(pairs.own_positive(own)[1], own, -1)
    return _SumSimilarity.apply(own, False, anchors, others, *grouped, *grouped_others)


class _Groups(NamedTuple):
    """Rows by their labels, which are slots in [0, M)."""

    slot: Tensor  # (N,)
    rows: Tensor  # (N,), those of slot 0 first
    begin: Tensor  # (M,), where those of each slot begin

    @staticmethod
    def of(slot: Tensor, slots: int) -> _Groups:
        ordered, rows = slot.sort()
        return _Groups(slot, rows, torch.searchsorted(ordered, torch.arange(slots, device=slot.device)))

    def sums(self, x: Tensor, at: Tensor) -> Tensor:
        """Return the sums of the rows of x by slot, at the slots `at`."""
        if checks.may_read(x, stall=True) and not (torch.is_grad_enabled() and x.requires_grad):
            # It has no second derivative. index_add_ takes six times as long on a CPU and, on a GPU, adds in another
            # order each time.
            sums = torch.nn.functional.embedding_bag(self.rows, x, self.begin, mode="sum")
        else:  # a graph that was traced without gradients could have none
            sums = x.new_zeros((self.begin.shape[0], x.shape[1])).index_add_(0, self.slot, x)
        return sums.index_select(0, at)


def _own_rows(own: int | Tensor, x: Tensor, anchors: int) -> Tensor:
    """Return the rows of x that are the anchors: those from row `own` on, or by index, with zeros where it is -1."""
    if isinstance(own, int):
        return x[own : own + anchors]
    return x.index_select(0, own.clamp(min=0)).masked_fill_(own[:, None] < 0, 0)


class _SumSimilarity(torch.autograd.Function):
    """An anchor's similarity to the sum of the others of its label, itself left out.

    Others of None are the anchors themselves, and `alike` says that those of one label have the same upstream gradient.
    The gradients are sums over labels, too; autograd alone would keep every step between.
    """

    @staticmethod
    def forward(
        ctx: Any, own: int | Tensor | None, alike: bool, anchors: Tensor, others: Tensor | None, *groups: Tensor
    ) -> Tensor:
        ctx.save_for_backward(anchors, others, own if isinstance(own, Tensor) else None, *groups)
        ctx.first, ctx.alike = None if isinstance(own, Tensor) else own, alike
        of_anchors, of_others = _Groups(*groups[:3]), _Groups(*groups[-3:])
        others = anchors if others is None else others
        similarity = anchors.new_zeros(anchors.shape[0])
        for c in _columns(anchors):
            sums = of_others.sums(others[:, c], of_anchors.slot)
            if own is not None:
                sums -= _own_rows(own, others[:, c], anchors.shape[0])
            similarity = similarity + sums.mul_(anchors[:, c]).sum(-1)  # in place, torch 2.11 would lose the gradient
        return similarity

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, others, own, *groups = ctx.saved_tensors
        own, nothing = ctx.first if own is None else own, (None,) * len(groups)
        of_anchors, of_others = _Groups(*groups[:3]), _Groups(*groups[-3:])
        if transforms.active(grad):

            def similarity(x: Tensor, y: Tensor | None) -> list[Tensor]:
                pairs = _Pairs(x, x if y is None else y, of_anchors.slot, of_others.slot, None, own)
                return [_of_positives(pairs, slice(None), lse=False)]

            gradients = differentiable((anchors, others), ctx.needs_input_grad[2:4], similarity, [grad])
            return None, None, *gradients, *nothing
        # With alike upstream gradients the losses of both rows of a pair give the same gradient.
        grad = (2 * grad if ctx.alike else grad)[:, None]
        if same := others is None:
            others = anchors
        by_anchors = torch.empty_like(anchors)
        by_others = torch.empty_like(others) if ctx.needs_input_grad[3] else None
        for c in _columns(anchors):
            of_anchor = of_others.sums(others[:, c], of_anchors.slot).mul_(grad)
            if own is not None:
                of_anchor.addcmul_(grad, _own_rows(own, others[:, c], anchors.shape[0]), value=-1)
            if (same and not ctx.alike) or by_others is not None:
                weighted = grad * anchors[:, c]
                of_other = of_anchors.sums(weighted, of_others.slot)
                if isinstance(own, Tensor):
                    of_other.index_add_(0, own.clamp(min=0), weighted.masked_fill(own[:, None] < 0, 0), alpha=-1)
                elif own is not None:
                    of_other[own : own + anchors.shape[0]] -= weighted
                if same:
                    of_anchor += of_other
                elif by_others is not None:
                    by_others[:, c] = of_other
            by_anchors[:, c] = of_anchor
        return None, None, by_anchors, by_others, *nothing


def _over_positives(pairs: _Pairs, lse: bool) -> Tensor:
    """Compute the log of the sum of exp s over each anchor's positives, or the sum of s."""
    # By other names: torch.compile takes no tensor twice for a function with a backward of its own.
    others, labels = pairs.others, pairs.other_labels
    labels = None if labels is None else labels.view_as(labels)
    pairs = pairs._replace(others=others.view_as(others), other_labels=labels, own=pairs.own_index())
    return _OverPositives.apply(*pairs, lse)


class _OverPositives(torch.autograd.Function):
    """The same for chunks of anchors, whose similarities are recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.lse = arguments
        pairs = _Pairs(*tensors)
        parts = [_of_positives(pairs, rows, ctx.lse) for rows in pairs.chunks()]
        result = torch.cat(parts) if parts else pairs.anchors.new_zeros(0)
        ctx.save_for_backward(*pairs, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, result = ctx.saved_tensors
        pairs = _Pairs(*tensors)
        anchors, others = pairs[:2]
        needed, nothing = ctx.needs_input_grad[:2], (None,) * 5
        if transforms.plain_backward(grad):

            def values(x: Tensor, y: Tensor) -> list[Tensor]:
                return [_of_positives(pairs._replace(anchors=x, others=y), slice(None), ctx.lse)]

            return *differentiable((anchors, others), needed, values, [grad]), *nothing
        by_anchors = torch.empty_like(anchors) if needed[0] else None
        by_others = torch.zeros_like(others) if needed[1] else None
        with _without_autocast(anchors):
            for rows in pairs.chunks():
                positive, upstream = pairs.positives(rows), grad[rows, None]
                if ctx.lse:
                    p = pairs.similarity(rows).sub_(result[rows, None]).exp_()
                    p = p.masked_fill_(~positive, 0).mul_(upstream)
                else:
                    p = positive * upstream
                if by_anchors is not None:
                    by_anchors[rows] = p @ others
                if by_others is not None:
                    by_others.addmm_(p.t(), anchors[rows])
        return by_anchors, by_others, *nothing


def _of_positives(pairs: _Pairs, rows: slice, lse: bool) -> Tensor:
    """Compute the same for some anchors; without positives it is 0 or, for the log, a finite number."""
    similarity, positive = pairs.similarity(rows), pairs.positives(rows)
    if not lse:
        return similarity.masked_fill(~positive, 0).sum(-1)
    # Without positives none is masked.
    apart = ~positive & positive.any(-1, keepdim=True)
    return similarity.masked_fill(apart, -torch.inf).logsumexp(-1)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off on the device of x, if it has any."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if checks.has_autocast(device) else nullcontext()


def _definition(pairs: _Pairs, positives: str, reduction: str) -> Tensor:
    """Compute the loss of all pairs at once in plain PyTorch, which goes through function transforms."""
    every = slice(None)
    similarity, count = pairs.similarity(every), pairs.positives(every).sum(-1)
    compared = count > 0
    if positives == "in":
        positive_term = _of_positives(pairs, every, lse=True) - _log_count(pairs, count)
    else:
        positive_term = _of_positives(pairs, every, lse=False) / count.clamp(min=1)
    own = pairs.own_index()
    if own is not None:
        itself = own[:, None] == torch.arange(pairs.others.shape[0], device=own.device)
        similarity = similarity.masked_fill(itself, -torch.inf)
    # An anchor without positives may be without any other at all.
    lse = similarity.masked_fill(~compared[:, None], 0).logsumexp(-1)
    loss = torch.where(compared, lse - positive_term, 0)
    if reduction == "none":
        return loss
    divisors: dict[str, Any] = {"mean": compared.sum().clamp(min=1), "mean_all": max(1, len(compared)), "sum": 1}
    return loss.sum() / divisors[reduction]


def _log_sum_exp(pairs: _Pairs, compared: Tensor, share: Tensor | None, impl: Any) -> Tensor:
    """log sum over all that an anchor is compared with of exp s: (N,), or the sum of these times `share`."""
    anchors, others, own = pairs.anchors, pairs.others, pairs.own_index()
    rows, bias = others.shape[0], None
    index = torch.zeros_like(compared, dtype=torch.int64) if own is None else own
    if isinstance(pairs.own, Tensor):
        # An anchor that is none of the others is told to be one that counts for nothing to anybody.
        others = torch.nn.functional.pad(others, (0, 0, 0, 1))
        bias = torch.nn.functional.pad(others.new_zeros(rows), (0, 1), value=-torch.inf)
        index = torch.where((index >= 0) & (index < rows), index, rows)
    drop = anchors.device.type == "cpu"
    if drop and checks.may_read(compared):  # to leave out a few would take longer than their similarities
        drop = 16 * int(compared.count_nonzero()) < 15 * compared.shape[0]
    symmetric = others is anchors
    budget = budgets.at_a_time(anchors.device, BUDGET)
    form = Form(0.0, budget, drop_ignored=drop, mask_target=own is not None, symmetric=symmetric)
    # By another name: torch.compile takes no tensor twice for a function with a backward of its own.
    weight = others.detach() if symmetric else others.view_as(others)
    projection, target = Projection([anchors], [weight], bias, form), torch.where(compared, index, checks.IGNORED)
    reduction: Any = "none" if share is None else "sum"
    return row_loss("supcon_loss", projection, target, LOG_SUM_EXP, reduction=reduction, token_weight=share, impl=impl)
