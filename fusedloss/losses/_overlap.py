"""Overlap losses, such as dice: their forms, and the levels at which errors and agreements are summed.

    level "example"   E / (E + C + smooth) of each class of each row, whose losses are summed: a row loss
    level "class"     the same of each class, from its E and C summed over the rows
    level "set"       the same of their sums over rows and classes: one number

Above the rows, a pass sums E and C of each class (V,), PyTorch makes the loss of these, and autograd's derivatives by
them are the class weights of a row loss, which has the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..checks import DIVISORS, check_choice, check_number, compute_dtype
from ..definition import reference
from ..definition.epilogue import Overlap
from ..definition.projection import Projection
from ..definition.rows import Source
from ..engine import dense, functions, over_classes
from ..engine.constants import parameter
from ..engine.dispatch import dense_row_stats, has_compiled, row_loss, row_stats, shaped_stats, top_stats
from ..engine.options import CLASS_LOSSES_LACK, CallOptions
from ..engine.prepare import Call, prepare

if TYPE_CHECKING:
    from typing_extensions import Unpack

Form: TypeAlias = Literal["one_vs_rest", "target"]
Level: TypeAlias = Literal["example", "class", "set"]

FORMS, LEVELS = get_args(Form), get_args(Level)


def probabilities(input: Tensor, target: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Return p and y of the classes that the form uses, (N, V) or (N, 1), for the losses' formulas in PyTorch."""
    p = input.softmax(-1)
    if form == "target":
        p = p.gather(-1, target[:, None])
        return p, torch.ones_like(p)
    return p, (torch.arange(p.shape[-1], device=p.device) == target[:, None]).to(p.dtype)


def overlap_loss(
    name: str,
    input: Source,
    target: Tensor,
    overlap: Overlap,
    params: Sequence[float | Tensor],
    smooth: float,
    form: Form,
    level: Level,
    **options: Unpack[CallOptions],
) -> Any:
    """Compute an overlap loss of logits or, at level "example", of a projection; `name` is the public function's."""
    if form not in FORMS or level not in LEVELS:
        check_choice("form", form, FORMS)
        check_choice("level", level, LEVELS)
    least = DIVISORS[0]  # a class of no probability is 0 / smooth, and the slope of E is 1 / smooth
    check_number("smooth", smooth, least if form == "one_vs_rest" and level == "example" else 0)
    smooth = max(smooth, least)
    if level == "example":
        every = (*params, smooth)
        return row_loss(name, input, target, overlap.forms[form], every, without=CLASS_LOSSES_LACK, **options)
    if form != "one_vs_rest":
        raise ValueError(
            f"level={level!r} holds a class's right and wrong predictions against each other, but form={form!r} sees "
            "only the rows of that target; use form='one_vs_rest' or level='example'"
        )
    if isinstance(input, Projection):
        raise ValueError(
            f"the linear forms make the logits of some rows at a time, but level={level!r} needs all of them before "
            "the gradient of any; compute the logits and use the row form, or level='example'"
        )
    more = {"level": level, "smooth": smooth}
    call = prepare(name, input, target, params, CLASS_LOSSES_LACK, None, options, more)
    _check_level(call, level)
    weight, reduction = call.rows.class_weight, call.options["reduction"]
    if call.shards is not None:
        weight = call.shards.weight(weight)

    def ratio(sums: Tensor) -> Tensor:
        error, agreement = sums.unbind()
        # In the float64 of the sums: by E its derivative is a difference.
        return Overlap.ratio(error, agreement, parameter(smooth, torch.float64, sums.device))

    def of_classes(sums: Tensor) -> Tensor:
        """What remains of the sums (2, V): numbers (K,) of which those of other classes add up, or one a class."""
        if level == "set":
            return sums.sum(1)
        loss = ratio(sums) if weight is None else ratio(sums) * weight
        return loss if reduction == "none" else loss.sum(0, keepdim=True)

    result, stats = _over_rows(call, overlap, of_classes, level == "set" or reduction != "none")
    if level == "set":
        result = ratio(result)
    elif reduction != "none":
        result = result[0] / (1 if reduction == "sum" else call.classes)
    loss = result.to(compute_dtype(input.dtype))
    return loss if stats is None else (loss, shaped_stats(stats, target, call.options))


def _check_level(call: Call, level: str) -> None:
    """Raise for options that have no meaning where the loss is not a sum over rows."""
    o = call.options
    if o["z_loss"]:
        raise ValueError(f"z_loss is a term of each row's loss; with level={level!r} rows have none, got {o['z_loss']}")
    if o["normalizer"] is not None:
        raise ValueError(
            f"normalizer replaces the number of rows, by which level={level!r} does not divide, got {o['normalizer']!r}"
        )
    if level == "set" and o["weight"] is not None:
        raise ValueError("weight is of the classes' losses, but level='set' has one loss for all; use level='class'")
    if level == "set" and o["reduction"] != "mean":
        raise ValueError(f"level='set' gives one number, which nothing reduces, got reduction={o['reduction']!r}")


def _over_rows(
    call: Call, overlap: Overlap, of_classes: Callable[[Tensor], Tensor], summed: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """A function of error and agreement of each class, (2, V) in float64, and the columns of RowStats where asked.

    `summed`: of all ranks, the sum of what it gives for the classes of each.
    """
    rows, spec, row_weight, return_stats = call.rows, call.spec, call.token_weight, call.options["return_stats"]
    if spec.impl == "reference":
        sums, s = reference.class_sums(rows, row_weight, overlap.function, spec.form)
        return of_classes(sums), dense_row_stats(s, call) if return_stats else None
    compiled = has_compiled(overlap.over_rows, call)
    if call.inplace and not compiled:
        raise ValueError(
            "inplace_backward needs a compiled epilogue, which parameters of the loss that require grad have not"
        )
    if call.shards is not None:
        if not compiled:
            raise ValueError(
                "with a group, parameters of the loss that require grad have no gradients in a loss over the classes; "
                "detach them"
            )
        result, s = over_classes.over_rows(call, overlap, of_classes, summed)
        return result, dense_row_stats(s, call) if return_stats else None
    if compiled:
        sums, statistics, index = functions.class_sums(rows, spec, row_weight, overlap, call.inplace)
    else:

        def some(z: Tensor, target: Tensor, weight: Tensor | None, *params: Tensor) -> Tensor:
            part = rows._replace(hidden=[z], target=target, params=list(params))
            return reference.class_sums(part, weight, overlap.function, spec.form)[0]

        parts = dense.in_chunks(some, rows.classes, rows.logits, rows.target, row_weight, *rows.params)
        sums = torch.stack(parts).sum(0)
    if not return_stats:
        return of_classes(sums), None
    if not compiled or call.options["stats"]:
        return of_classes(sums), top_stats(call)
    return of_classes(sums), row_stats(statistics, index, rows.target, False)
