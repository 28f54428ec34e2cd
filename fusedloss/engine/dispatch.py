"""One call of a loss: which passes run, and what is made of their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends, checks
from ..definition import reference
from ..definition.epilogue import Epilogue
from ..definition.projection import Projection
from ..definition.rows import Source
from ..definition.statistics import (
    ALL_MOMENTS,
    CE,
    ENTROPY,
    MAX,
    STATISTICS,
    SUM_EXP,
    Picks,
    RowStats,
    Statistics,
    Targets,
    assemble,
)
from . import dense, functions, over_classes, temperature
from .chunks import GradientsLaterError
from .functions import Reduction
from .options import CallOptions
from .prepare import Call, divisor_of, prepare, with_second_row, without_zero_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


def row_loss(
    name: str,
    input: Source,
    target: Tensor,
    epilogue: Epilogue,
    params: Sequence[float | Tensor] = (),
    *,
    without: tuple[str, ...] = (),
    candidates: Tensor | None = None,
    mean_over_weights: bool = False,
    skip_zero_weights: bool = False,
    **options: Unpack[CallOptions],
) -> Any:
    """The loss `epilogue` of logits in hand or of a projection; `name` is the public function's on logits.

    With `skip_zero_weights` rows are left out where their token weight is 0, too, and still count in "mean".
    """
    call = prepare(name, input, target, params, without, candidates, options, more=epilogue)
    if epilogue.picks.top_k > 1 or epilogue.picks.below:
        _check_picks(epilogue.picks, call)
    return reduced_loss(call, epilogue, target, mean_over_weights, skip_zero_weights)


def second_row_loss(
    name: str,
    input: Source,
    target: Tensor,
    second: Source,
    epilogue: Epilogue,
    params: Sequence[float | Tensor],
    *,
    without: tuple[str, ...] = (),
    main: Callable[[Tensor], Tensor] | None = None,
    **options: Unpack[CallOptions],
) -> Any:
    """The loss `epilogue` against a second row, of the input's shape; `main` makes its factor of that of the logits.

    Rows are left out by their target and, where it is 0, by their token weight.
    """
    more = (epilogue, main is None, second.form if isinstance(second, Projection) else None)
    call = with_second_row(prepare(name, input, target, params, without, None, options, more), second)
    if main is not None and call.rows.scalars is not None:
        _, *others, factor = call.rows.scalars
        scalars = torch.stack([main(factor), *others, factor])
        call = call._replace(rows=call.rows._replace(scalars=scalars))
    return reduced_loss(call, epilogue, target, skip_zero_weights=True)


def without_target(result: Any) -> Any:
    """The loss, with statistics that know no target where they were asked for."""
    if not isinstance(result, tuple):
        return result
    loss, stats = result
    return loss, stats._replace(target_log_prob=torch.full_like(stats.target_log_prob, torch.nan))


def reduced_loss(
    call: Call, epilogue: Epilogue, target: Tensor, mean_over_weights: bool = False, skip_zero_weights: bool = False
) -> Any:
    """The loss of a call, with RowStats of the target's shape where asked."""
    divisor, normalizer = divisor_of(call, mean_over_weights)
    if skip_zero_weights:
        call = without_zero_weights(call)
    loss, stats = _dispatch(call, epilogue, divisor)
    o = call.options
    if o["reduction"] == "none":
        loss = loss.reshape(target.shape)
    elif isinstance(normalizer, Tensor):
        # Over a count of no targets at all it stays 0; anything else over 0 is infinite.
        loss = loss / torch.where((normalizer == 0) & (loss != 0), 0, 1)
    return loss if stats is None else (loss, shaped_stats(stats, target, o))


def row_statistics(
    name: str, input: Source, target: Tensor, statistics: tuple[str, ...], options: CallOptions
) -> Statistics:
    """Differentiable statistics of rows (N,) for a caller of its own, whose floats are 0 where the row is ignored."""
    call = prepare(name, input, target, (), (), None, options, more=statistics)
    rows, spec, picks = call.rows, call.spec, Picks.of(statistics)
    if spec.impl == "reference":
        s, ignored, invalid = reference.statistics(rows, spec, picks)
    else:
        columns, index = functions.row_statistics(rows, spec, picks, call.inplace, call.shards)
        targets = Targets.of(rows.target, call.classes)
        s, ignored, invalid = assemble(columns, targets.safe, index, picks, None), targets.ignored, targets.invalid
    return s.map(lambda x: x.masked_fill(ignored, 0).masked_fill(invalid, torch.nan))


def shaped_stats(stats: tuple[Tensor, ...], target: Tensor, options: CallOptions) -> RowStats:
    """The argmax of an ignored row equals no target."""
    lse, log_prob, argmax, *others = (column.reshape(target.shape) for column in stats)
    if options["ignore_index"] == -1:
        argmax = argmax.masked_fill(argmax == -1, -2)
    return RowStats(lse, log_prob, argmax, *others)


def _check_picks(picks: Picks, call: Call) -> None:
    if picks.top_k > call.classes:
        raise ValueError(f"the second largest logit needs at least 2 classes, got {call.classes}")
    if picks.below and call.shards is not None:
        raise ValueError("statistics 'below' are those below the target's logit, which a rank of a group need not have")


def _dispatch(
    call: Call, epilogue: Epilogue, divisor: float | Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Row losses (N,) or their sum over the divisor, times the token weights; columns of RowStats where asked."""
    rows, spec, o = call.rows, call.spec, call.options
    reduction = Reduction(call.token_weight, divisor)
    unreduced, return_stats = o["reduction"] == "none", o["return_stats"]
    moments, token_weight = ALL_MOMENTS if o["stats"] else 0, call.token_weight
    # Whether nothing but a factor is upstream of the row losses.
    one_factor = not (
        unreduced
        or (token_weight is not None and token_weight.requires_grad)
        or (isinstance(divisor, Tensor) and divisor.requires_grad)
    )

    def reduced(losses: Tensor) -> Tensor:
        if not unreduced:
            return reduction.of(losses)
        return losses if token_weight is None else losses * token_weight

    if has_compiled(epilogue.name, call) and call.shards is None:
        # An epilogue takes every pick for its own, so that the top class can ride along only where there is no other.
        top_k = max(epilogue.picks.top_k, int(return_stats and rows.candidates is None))
        needed = _made_with_the_loss(call) if one_factor else ()
        spec = spec._replace(epilogue=epilogue.name, top_k=top_k, moments=moments, needed=needed)
        own_reduction, stats = reduction if one_factor else None, return_stats and top_k > 0
        loss, *found = functions.loss(rows, spec, epilogue, call.inplace, own_reduction, stats)
        if not one_factor:
            loss = reduced(loss)
        if found:
            return loss, row_stats(found[0], found[1], rows.target, moments > 0)
        return loss, top_stats(call) if return_stats else None
    if epilogue.has_second_row and spec.impl != "reference" and not has_compiled(epilogue.name, call):
        raise ValueError(f"impl={spec.impl!r} has no losses against a second row; use another implementation")
    if epilogue.over == "classes" and call.shards is None and spec.impl != "reference":
        _check_dense(call)
        if unreduced:
            loss = reduced(dense.losses(rows, spec, epilogue))
        else:
            loss = dense.total(rows, spec, epilogue, reduction)
        return loss, top_stats(call) if return_stats else None
    if one_factor and _function_in_forward(call, epilogue):
        with suppress(GradientsLaterError):
            return _with_gradients(call, epilogue, reduction)
    losses, s = _in_pytorch(call, epilogue)
    return reduced(losses), dense_row_stats(s, call) if return_stats else None


def has_compiled(name: str, call: Call) -> bool:
    """Whether the passes have the epilogue of that name, and all gradients that are asked for."""
    backend = backends.BACKENDS.get(call.spec.impl)
    known = None if backend is None else backend.epilogues
    # Not by a method, which would cost a small call one more.
    if known is None or not (name in known.rows or name in known.classes or name in known.pairs):
        return False
    params = call.rows.params
    return not params or True not in [p.requires_grad for p in params]


def _made_with_the_loss(call: Call) -> tuple[bool, ...]:
    """Which gradients of a sum are made with it, while the logits are at hand; () for none."""
    rows = call.rows
    # A trace would keep which gradients were asked for.
    if not torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return ()
    # Asked here: within a function gradients are off, and ctx.needs_input_grad knows nothing of no_grad.
    learnt = rows.scalars is not None and rows.scalars.requires_grad  # of which the temperature alone may
    if rows.weight:
        needed = tuple([x.requires_grad for x in rows.sources])
        if learnt:
            needed = temperature.needed(rows, needed)
        return needed if True in needed else ()
    if (
        # A compiled backward would not know whether it may scale in place, and copy.
        torch.compiler.is_compiling()
        or not backends.BACKENDS[call.spec.impl].one_read(rows)
        or not (rows.logits.requires_grad or learnt)
        or call.inplace  # not while others need the logits
        # Where losses are scaled because gradients underflow, so would this one before it is.
        or rows.logits.dtype == torch.float16
    ):
        return ()
    return (True,)


_NOT_IN_PLACE = "inplace_backward needs a compiled epilogue, which this loss over the classes has not"


def _check_dense(call: Call) -> None:
    """Refuse what the definition in PyTorch cannot do on a few rows of logits at a time."""
    if call.inplace:
        raise ValueError(_NOT_IN_PLACE)
    if call.rows.is_linear:
        raise ValueError(
            "a linear form over the classes needs a compiled epilogue, which a loss function over the classes and "
            "parameters of the loss that require grad have not; compute the logits and use the row form"
        )


def _in_pytorch(call: Call, epilogue: Epilogue) -> tuple[Tensor, Statistics]:
    """Row losses (N,) of which a part, or all, is PyTorch code, and statistics with the top class where asked for."""
    if call.spec.impl == "reference":
        return reference.row_losses(call.rows, epilogue, call.spec)
    if epilogue.has_second_row:
        return over_classes.pair_losses(call, epilogue)
    return _composed(call, epilogue) if epilogue.over == "rows" else _over_ranks(call, epilogue)


def _composed(call: Call, epilogue: Epilogue) -> tuple[Tensor, Statistics]:
    """A loss in PyTorch between the two passes, and the statistics."""
    picks = _picks_between(call, epilogue)
    columns, index = functions.row_statistics(call.rows, call.spec, picks, call.inplace, call.shards)
    return reference.losses_between(columns, index, picks, call.rows, epilogue, call.spec, call.classes)


def _picks_between(call: Call, epilogue: Epilogue) -> Picks:
    """What the statistics pass of a loss in PyTorch looks for."""
    picks, o = epilogue.picks, call.options
    top_k, moments = max(picks.top_k, int(o["return_stats"])), ALL_MOMENTS if o["stats"] else picks.moments
    return picks._replace(top_k=top_k, mean=picks.mean or call.spec.smooths, moments=moments)


def _function_in_forward(call: Call, epilogue: Epilogue) -> bool:
    """Whether a loss in PyTorch is called between the passes of a chunk, so that gradients are made with it."""
    rows = call.rows
    return (
        rows.is_linear
        and call.spec.impl != "reference"
        and call.shards is None
        and True not in [x.requires_grad for x in rows.params]
        # No operator can call the function, and what traces sees operators alone.
        and checks.may_read(rows.target, stall=True)
        and bool(_made_with_the_loss(call))
        and (epilogue.per_chunk or not functions.has_other_sources(epilogue.function))
    )


def _with_gradients(call: Call, epilogue: Epilogue, reduction: Reduction) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    picks = _picks_between(call, epilogue)
    spec = call.spec.of_picks(picks, needed=_made_with_the_loss(call))
    loss, *found = functions.loss(call.rows, spec, epilogue, False, reduction, call.options["return_stats"])
    if not found:
        return loss, None
    return loss, row_stats(found[0], found[1], call.rows.target, len(call.options["stats"]) > 0)


def _over_ranks(call: Call, epilogue: Epilogue) -> tuple[Tensor, Statistics]:
    """A class term over the classes of all ranks, of which each sums its own."""
    if not has_compiled(epilogue.name, call):
        if call.inplace:
            raise ValueError(_NOT_IN_PLACE)
        raise ValueError(
            "with a group, a loss over the classes needs a compiled epilogue, which a loss function over the classes "
            "and parameters of the loss that require grad have not; compute all logits on each rank, or use a loss over"
            " the rows"
        )
    base, s = over_classes.row_losses(call, epilogue)
    loss = reference.with_common_terms(base, s, call.rows, call.spec, call.classes, weighted=True)
    return loss.masked_fill(call.rows.target == checks.IGNORED, 0), s


def top_stats(call: Call) -> tuple[Tensor, ...]:
    """Compute the columns of RowStats by another statistics pass, where the loss did not look for the top class."""
    picks = Picks(1, moments=ALL_MOMENTS if call.options["stats"] else 0)
    rows = call.rows._replace(candidates=None, teacher=[])
    with torch.no_grad():
        statistics, index, _ = functions.merged_statistics(rows, call.spec, picks, call.shards)
    return row_stats(statistics, index, rows.target, picks.moments > 0)


def row_stats(statistics: Tensor, index: Tensor, target: Tensor, moments: bool) -> tuple[Tensor, ...]:
    """The columns of RowStats from the operators' statistics with the top class as the first pick."""
    log_sum = statistics[SUM_EXP].log()
    entropy = [statistics[STATISTICS + index.shape[0] + ENTROPY]] if moments else []
    return _row_stats(statistics[MAX] + log_sum, statistics[CE], index[0], log_sum, target, *entropy)


def dense_row_stats(s: Statistics, call: Call) -> tuple[Tensor, ...]:
    """The same from statistics for a loss function; an entropy that is not among them takes a pass of its own."""
    entropy = []
    if call.options["stats"]:
        entropy = [s.entropy.detach() if s.has("entropy") else _entropy(call)]
    return _row_stats(s.lse.detach(), s.ce.detach(), s.top_index, s.top_ce.detach(), call.rows.target, *entropy)


@torch.no_grad()
def _entropy(call: Call) -> Tensor:
    rows = call.rows._replace(candidates=None, class_weight=None, teacher=[])
    if call.spec.impl == "reference":
        return reference.statistics(rows, call.spec, Picks(moments=ALL_MOMENTS))[0].entropy
    statistics, *_ = functions.merged_statistics(rows, call.spec, Picks(moments=ALL_MOMENTS), call.shards)
    return statistics[STATISTICS + ENTROPY]


def _row_stats(
    lse: Tensor, ce: Tensor, argmax: Tensor, argmax_ce: Tensor, target: Tensor, *entropy: Tensor
) -> tuple[Tensor, ...]:
    ignored = target == checks.IGNORED
    return (
        lse.masked_fill(ignored, torch.nan),
        (-ce).masked_fill(ignored, torch.nan),
        argmax.masked_fill(ignored, -1),
        (-argmax_ce).masked_fill(ignored, torch.nan),
        *[x.masked_fill(ignored, torch.nan) for x in entropy],
    )
