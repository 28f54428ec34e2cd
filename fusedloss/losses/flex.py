"""A loss of your own between the fused passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..checks import check_bool, check_choice, check_like, check_local, check_logits
from ..definition.epilogue import Epilogue
from ..definition.statistics import OPTIONAL, RowStats, Statistics
from ..engine.dispatch import row_loss
from ..engine.options import LinearOptions, RowOptions
from ._linear import projected
from ._registry import example, linear_form, row_form

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _poly1(s: Statistics) -> Tensor:
    return s.ce + s.q


def _brier(p: Tensor, q: Tensor, positive: Tensor) -> Tensor:
    return torch.where(positive, q * q, p * p)


def _poly1_formula(input: Tensor, target: Tensor, **_: Any) -> Tensor:
    log_p = input.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    return 1 - log_p.exp() - log_p


def _brier_formula(input: Tensor, target: Tensor, **_: Any) -> Tensor:
    p = input.softmax(-1)
    return (p - (torch.arange(p.shape[-1], device=p.device) == target[:, None]).to(p.dtype)).square().sum(-1)


@overload
def flex_loss(
    input: Tensor, target: Tensor, loss_fn: Callable[..., Tensor], *, statistics: Sequence[str] = ...,
    candidates: Tensor | None = ..., row_tensors: Sequence[Tensor] = ..., per_chunk: bool = ...,
    over: Literal["rows", "classes"] = ...,
    return_stats: Literal[False] = ..., **options: Unpack[RowOptions],
) -> Tensor: ...  # fmt: skip
@overload
def flex_loss(
    input: Tensor, target: Tensor, loss_fn: Callable[..., Tensor], *, statistics: Sequence[str] = ...,
    candidates: Tensor | None = ..., row_tensors: Sequence[Tensor] = ..., per_chunk: bool = ...,
    over: Literal["rows", "classes"] = ...,
    return_stats: Literal[True], **options: Unpack[RowOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@row_form(
    example(_poly1_formula, loss_fn=_poly1),
    example(_brier_formula, over_classes=True, loss_fn=_brier, over="classes"),
)
def flex_loss(
    input: Tensor,
    target: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    statistics: Sequence[str] = (),
    candidates: Tensor | None = None,
    row_tensors: Sequence[Tensor] = (),
    per_chunk: bool = False,
    over: Literal["rows", "classes"] = "rows",
    return_stats: bool = False,
    **options: Unpack[RowOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Compute your own loss, a function of the rows' statistics, between the same fused passes.

    ``loss_fn(s)`` receives :class:`~fusedloss.Statistics`, (N,) tensors over the rows, and returns their losses.
    It is plain differentiable PyTorch; its derivatives with respect to the statistics are the coefficients of the
    gradient pass. Tensors of your own reach it by closure or as `row_tensors`, and get their gradients.

    Args:
        loss_fn: the loss, called with all rows, once; a linear form may call it again where it uses another tensor that
            requires grad. Ignored rows hold harmless values and are masked afterwards.
        statistics: optional statistics to compute: "top", "second", "below", "mean", "entropy", "power".
        candidates: (*) or (*, k) classes whose logits become ``s.candidate_logit`` and ``s.candidate_ce``, (N, k).
        row_tensors: tensors of the target's shape, which ``loss_fn(s, *row_tensors)`` receives as rows (N,). Floating
            tensors are cast to the dtype of the statistics. The values of ignored rows are replaced by 1.
        per_chunk: let a linear form with reduction "mean" or "sum" call `loss_fn` once for each chunk of rows, and make
            its gradients with the loss: three matrix products in place of four. A row's loss must then be a
            function of that row alone, and other tensors must be `row_tensors` or the same for all rows.
            It has no effect on logits in hand, under torch.compile, with a group, and where the loss depends on another
            tensor that requires grad, be it a row tensor, the token weights or one of a closure. Without `per_chunk`
            the gradients are made with the loss if all rows fit one chunk.
        over: "rows" as above, or "classes": ``loss_fn(p, q, positive)`` gives the loss of each class from its
            probability p, q = 1 - p and whether it is the target, which is summed over the classes. It must be 0
            at p = 0 of a class that is not the target. It runs in PyTorch on a few rows at a time, and receives
            `row_tensors` as columns (n, 1). A group and the linear form raise ValueError.

    >>> import torch, fusedloss as fl
    >>> def poly1(s):  # Leng et al. 2022: -log p_t + epsilon (1 - p_t)
    ...     return s.ce + 1.0 * s.q
    >>> logits = torch.randn(8, 1000, requires_grad=True)
    >>> fl.flex_loss(logits, torch.arange(8), poly1).backward()
    """
    check_logits(input, target)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {loss_fn!r}")
    if isinstance(statistics, str):
        raise TypeError(f"statistics must be a sequence of names, got the string {statistics!r}")
    for name in statistics:
        check_choice("statistics", name, tuple(OPTIONAL))
    check_choice("over", over, ("rows", "classes"))
    if over == "classes" and (statistics or candidates is not None):
        raise ValueError("over='classes' takes neither statistics nor candidates")
    _check_row_tensors(row_tensors, target)
    check_bool(per_chunk=per_chunk)
    names = tuple(statistics)
    if "second" in names and "top" not in names:
        names = ("top", *names)
    epilogue = Epilogue("", loss_fn, over, names, per_chunk=per_chunk)
    return row_loss(
        "flex_loss", input, target, epilogue, row_tensors, candidates=candidates, return_stats=return_stats, **options
    )


def _check_row_tensors(row_tensors: Sequence[Tensor], target: Tensor) -> None:
    if isinstance(row_tensors, Tensor):
        raise TypeError(
            f"row_tensors must be a sequence of tensors, got one of shape {tuple(row_tensors.shape)}; put it in a tuple"
        )
    for i, x in enumerate(row_tensors):
        name = f"row_tensors[{i}]"
        if not isinstance(x, Tensor) or x.is_complex():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of real numbers, got {kind}")
        check_local(name, x)
        check_like(name, x, target, "target")


@overload
def linear_flex_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, loss_fn: Callable[..., Tensor], *,
    statistics: Sequence[str] = ..., candidates: Tensor | None = ..., row_tensors: Sequence[Tensor] = ...,
    per_chunk: bool = ..., over: Literal["rows", "classes"] = ...,
    return_stats: Literal[False] = ..., **options: Unpack[LinearOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_flex_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, loss_fn: Callable[..., Tensor], *,
    statistics: Sequence[str] = ..., candidates: Tensor | None = ..., row_tensors: Sequence[Tensor] = ...,
    per_chunk: bool = ..., over: Literal["rows", "classes"] = ...,
    return_stats: Literal[True], **options: Unpack[LinearOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@linear_form(flex_loss)
def linear_flex_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    statistics: Sequence[str] = (),
    candidates: Tensor | None = None,
    row_tensors: Sequence[Tensor] = (),
    per_chunk: bool = False,
    over: Literal["rows", "classes"] = "rows",
    return_stats: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    projection, rest = projected(input, linear_weight, {**options, "return_stats": return_stats})
    return flex_loss(
        projection, target, loss_fn, statistics=statistics, candidates=candidates, row_tensors=row_tensors,
        per_chunk=per_chunk, over=over, **rest,
    )  # fmt: skip
