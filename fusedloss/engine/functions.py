"""The autograd functions over the operators. Thin: an operator forward, an operator backward.

They take the rows' tensors flat, after what is static about the call. A backward that is itself to be differentiated
(create_graph=True) goes through the dense reference instead.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .. import transforms
from ..backends import BACKENDS
from ..checks import compute_dtype
from ..definition import reference
from ..definition.epilogue import Epilogue, Overlap
from ..definition.rows import Job, Rows, Spec
from ..definition.statistics import (
    CE,
    ENTROPY,
    EXCESS,
    MAX,
    MEAN_CE,
    POWER,
    STATISTICS,
    SUM_EXP,
    TARGET_GRADIENT,
    TARGET_LOGIT,
    A,
    Columns,
    Picks,
    Q,
    Targets,
    dense_columns,
)
from ..distributed import vocabulary
from ..distributed.vocabulary import VocabularyShards
from . import chunks, constants, operators, temperature


class Reduction(NamedTuple):
    """The sum of row losses times the token weights, over the divisor."""

    token_weight: Tensor | None
    divisor: float | Tensor | None

    def of(self, loss: Tensor) -> Tensor:
        """Reduce the losses of rows (N,), those of ignored ones 0."""
        # Autocast would round a dot product.
        total = loss.sum() if self.token_weight is None else (loss * self.token_weight).sum()
        return total if self.divisor is None else total / self.divisor

    def upstream(self, rows: Rows, grad_output: Tensor | None = None) -> Tensor | None:
        """Return the derivative of the result by each row's loss, (N,), times `grad_output`.

        None stands for ones, 0-d for the same number in all rows of logits in hand.
        """
        like = rows.hidden[0]
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if grad_output is None:
            if self.divisor is None:
                return self.token_weight
            if self.token_weight is None and not isinstance(self.divisor, Tensor):
                if rows.weight:
                    return torch.full((rows.target.shape[0],), 1 / self.divisor, dtype=dtype, device=like.device)
                return constants.kept((1 / self.divisor,), dtype, like.device)[1][0]
            grad_output = torch.ones((), dtype=dtype, device=like.device)
        # In the dtype of the rows: a divisor in float64 makes the loss that.
        share = (grad_output if self.divisor is None else grad_output / self.divisor).to(dtype)
        return _of_rows(share, rows) if self.token_weight is None else share * self.token_weight


def _of_rows(number: Tensor, rows: Rows) -> Tensor:
    """A factor of all rows, as a pass takes it; the chunks of a linear form divide it among them."""
    return number.expand(rows.target.shape[0]) if rows.weight else number


class Settings(NamedTuple):
    """What is static about a function."""

    counts: tuple[int, int, int, int]  # of Rows.flatten
    spec: Spec
    epilogue: Epilogue
    inplace: bool
    total: bool
    """Whether the losses are reduced."""
    stats: bool = False
    """Whether statistics and pick indices are returned, too: outputs cost a small call much of its time."""


def loss(
    rows: Rows, spec: Spec, epilogue: Epilogue, inplace: bool, reduction: Reduction | None, stats: bool = False
) -> tuple[Tensor, ...]:
    """Row losses (N,) by a compiled epilogue or, with a reduction, one number; detached statistics and pick indices.

    With a reduction, gradients that `spec.needed` names are made with the loss. Without the name of an epilogue the
    loss is a function that is called between the passes, and GradientsLaterError says that it cannot be.
    """
    counts, flat = rows.flatten()
    settings = Settings(counts, spec, epilogue, inplace, reduction is not None, stats)
    result = _Loss.apply(settings, *(reduction or (None, None)), *flat)
    return result if stats else (result,)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, settings: Settings, token_weight, divisor, *flat
    ):
        rows, spec = Rows.unflatten(settings.counts, flat), settings.spec
        reduction, made = Reduction(token_weight, divisor), bool(spec.needed)
        row_weight = reduction.upstream(rows) if made else None
        if made and spec.form.tempered:
            row_weight = _by_raw_logits(row_weight, rows)
        if spec.epilogue:
            loss, statistics, index, coefficients, gradients = operators.call(operators.forward, rows, spec, row_weight)
        else:
            loss, statistics, index, coefficients, gradients = _with_function(rows, row_weight, spec, settings.epilogue)
        is_tensor = isinstance(divisor, Tensor)
        ctx.save_for_backward(
            token_weight,
            divisor if is_tensor else None,
            *flat,
            *(gradients if made else (statistics, index, coefficients)),
        )
        ctx.settings, ctx.divisor = settings, None if is_tensor else divisor
        result = reduction.of(loss) if settings.total else loss
        if not settings.stats:
            return result
        ctx.mark_non_differentiable(statistics, index)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        return result, statistics, index

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        settings, spec = ctx.settings, ctx.settings.spec
        # Once: under activation checkpointing a second look computes all anew.
        token_weight, divisor, *saved = ctx.saved_tensors
        rows, results = Rows.unflatten(settings.counts, saved), saved[len(ctx.needs_input_grad) - 3 :]
        if settings.total:
            grad_output = grad_output.to(compute_dtype(saved[0].dtype))
        made = bool(spec.needed)
        if made and not torch.is_grad_enabled():
            rest, scaled = iter(results), []
            for need, source in zip(spec.needed, saved, strict=False):
                scaled.append(scaled_once(next(rest), grad_output, spec.impl, source.dtype) if need else None)
            return of_inputs(ctx, (None,) * 3, rows, spec, scaled)
        needed = needed_of(ctx, 3, rows)
        reduction = Reduction(token_weight, ctx.divisor if divisor is None else divisor)
        if made or transforms.plain_backward(grad_output, inplace=settings.inplace):

            def outputs(*sources: Tensor) -> list[Tensor]:
                losses = reference.row_losses(rows.with_sources(sources), settings.epilogue, spec)[0]
                return [reduction.of(losses) if settings.total else losses]

            grads = differentiable(rows.sources, needed, outputs, [grad_output])
        else:
            upstream = reduction.upstream(rows, grad_output) if settings.total else grad_output
            statistics, index, coefficients = results
            grads = gradients(rows, spec, needed, statistics, index, coefficients, upstream, settings.inplace)
        return of_inputs(ctx, (None,) * 3, rows, spec, grads)


def _by_raw_logits(upstream: Tensor | None, rows: Rows) -> Tensor:
    """The derivative by each row's loss, as a gradient pass takes it: times the factor of the logits."""
    assert rows.scalars is not None
    factor = rows.scalars.detach()[-1]
    return _of_rows(factor, rows) if upstream is None else upstream * factor


def _spread(needed: Sequence[bool], gradients: Any) -> tuple[Tensor | None, ...]:
    """Gradients of those that need one, and None of the others."""
    rest = iter(gradients)
    return tuple(next(rest) if need else None for need in needed)


def of_inputs(
    ctx: Any,
    given: Sequence[Tensor | None],
    rows: Rows,
    spec: Spec,
    gradients: Sequence[Tensor | None],
    shards: VocabularyShards | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of a function's inputs: those given of what comes before the rows, then the rows' sources'."""
    result, needs = [*given, *gradients], ctx.needs_input_grad
    result += [None] * (len(needs) - len(result))
    scalars = -1 - len(rows.params)  # only the params come after them
    if needs[scalars]:
        result[scalars] = temperature.by_scalars(rows, spec, gradients, shards)
    return tuple(result)


def needed_of(ctx: Any, before: int, rows: Rows) -> tuple[bool, ...]:
    """Which gradients of the rows' sources a backward makes, for inputs that come after so many others."""
    needs = ctx.needs_input_grad
    needed = tuple(needs[before : before + len(rows.sources)])
    return temperature.needed(rows, needed) if needs[-1 - len(rows.params)] else needed


def gradients(
    rows: Rows,
    spec: Spec,
    needed: Sequence[bool],
    statistics: Tensor,
    index: Tensor,
    coefficients: Tensor,
    upstream: Tensor | None,
    inplace: bool = False,
) -> tuple[Tensor | None, ...]:
    """Those of the sources, by the gradient pass."""
    spec = spec._replace(needed=tuple(needed))
    if spec.form.tempered:
        upstream, rows = _by_raw_logits(upstream, rows), rows._replace(candidates=None)
    else:
        rows = rows._replace(candidates=None, scalars=None)
    saved = (statistics, index, coefficients, upstream)
    if rows.is_linear:
        sources = [x for x, need in zip(rows.sources, needed, strict=True) if need]
        grads = operators.call(operators.backward, rows, spec, *saved)
        return _spread(needed, (grad.to(x.dtype) for grad, x in zip(grads, sources, strict=True)))
    if not inplace:
        return tuple(operators.call(operators.backward, rows, spec, *saved))
    logits = rows.logits
    grad = logits.detach()
    operators.call(operators.backward_, rows._replace(hidden=[grad]), spec, *saved)
    # A later use of the logits by autograd, a second backward above all, must fail rather than read gradients.
    torch.autograd.graph.increment_version(logits)
    return (grad,)


def differentiable(
    inputs: Sequence[Any],
    needed: Sequence[bool],
    outputs_of: Callable[..., Sequence[Tensor]],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs that are needed, themselves differentiable where the backward is."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An input that was made of another must not pass its gradient on to that.
        own = [x.view_as(x) if need else x for x, need in zip(inputs, needed, strict=True)]
        for x, need in zip(own, needed, strict=True):
            if need and not x.requires_grad:  # of a learnt temperature, whose gradient is made of that of the logits
                x.requires_grad_()
        outputs = outputs_of(*own)
    pairs = [(x, g) for x, g in zip(outputs, grad_outputs, strict=True) if x.requires_grad and g is not None]
    wanted = [x for x, need in zip(own, needed, strict=True) if need]
    grads = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph)
    return _spread(needed, grads)


#: Tells whether the backward pass that is running may run again (retain_graph); True where that cannot be known.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled_once(gradient: Tensor, factor: Tensor, impl: str, dtype: torch.dtype) -> Tensor:
    """Return a saved gradient times a factor, in place where nobody will look at it again; in that dtype.

    What is 0, as in an ignored row, remains so for a factor that is not finite, except where a GPU changes the dtype.
    """
    if transforms.active(factor) or torch.compiler.is_compiling():
        # A 0-d factor would be rounded to the gradient's dtype.
        return torch.where(gradient == 0, 0, gradient.to(factor.dtype) * factor).to(dtype)
    if dtype != gradient.dtype and gradient.device.type != "cpu":
        # One launch. On a CPU it would take memory of the wider dtype.
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    if _graph_is_kept():
        gradient = gradient.clone()
    if operators.seen(gradient, factor):
        operators.scale_(gradient, factor, impl)
    else:
        BACKENDS[impl].scale_(gradient, factor)
    return gradient if gradient.dtype is dtype else gradient.to(dtype)


# --- statistics for a loss that is PyTorch code ---


def statistics_of(rows: Rows, spec: Spec, picks: Picks, top_q: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Statistics, indices of the picks and, if asked for, 1 - p of the top class."""
    spec = spec.of_picks(picks, epilogue="", top_q=top_q, needed=())
    _, statistics, index, *_ = operators.call(operators.forward, rows._replace(params=[]), spec, None)
    return (statistics[:-1], index, statistics[-1]) if top_q else (statistics, index, None)


def merged_statistics(
    rows: Rows, spec: Spec, picks: Picks, shards: VocabularyShards | None, top_q: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same over the classes of all ranks, where they are divided."""
    if shards is None:
        return statistics_of(rows, spec, picks, top_q)
    own = shards.sizes[shards.rank]
    if own:
        here = picks._replace(top_k=min(picks.top_k, own))
        statistics, index, own_top = statistics_of(vocabulary.rows_here(shards, rows), spec, here, top_q)
    else:
        statistics, index = vocabulary.nothing_here(rows, picks)
        own_top = statistics[Q] if top_q else None
    return vocabulary.merge(shards, rows, statistics, index, picks, own_top)


def row_statistics(
    rows: Rows, spec: Spec, picks: Picks, inplace: bool, shards: VocabularyShards | None
) -> tuple[Columns, Tensor]:
    """The statistics of rows as differentiable columns, and the picks' indices (K, N).

    With `shards` the sources are of this rank's classes; all else is of the classes of all ranks.
    """
    counts, flat = rows._replace(params=[]).flatten()
    *columns, index = _RowStatistics.apply((counts, spec, picks, inplace, shards), *flat)
    return Columns(*columns), index


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], *flat):  # type: ignore[no-untyped-def]
        counts, spec, picks, _, shards = settings
        rows = Rows.unflatten(counts, flat)
        statistics, index, _ = merged_statistics(rows, spec, picks, shards)
        ctx.save_for_backward(*flat, statistics, index)
        ctx.settings = settings
        ctx.mark_non_differentiable(index)
        return *_columns(statistics, index, rows.target, picks), index

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        counts, spec, picks, inplace, shards = ctx.settings
        *flat, statistics, index = ctx.saved_tensors
        rows = Rows.unflatten(counts, flat)
        given, needed = rows, needed_of(ctx, 1, rows)
        plain = transforms.plain_backward(*grads[:-1], inplace=inplace)
        if shards is not None:
            vocabulary.differentiated_once(*grads[:-1])
        if plain and shards is None:

            def columns(*sources: Tensor) -> Sequence[Tensor]:
                z = reference.logits_of(rows.with_sources(sources), spec.form)
                z = reference.tempered(z.to(grads[0].dtype), rows, spec.form)
                safe, ignored, _ = Targets.of(rows.target, z.shape[-1])
                z = z.masked_fill(ignored[:, None], 0)
                return dense_columns(z, safe, rows.class_weight, rows.candidates, picks)[0]

            by_sources = differentiable(rows.sources, needed, columns, grads[:-1])
            return of_inputs(ctx, (None,), rows, spec, by_sources)
        classes = rows.classes if shards is None else shards.classes
        coefficients = _coefficients(statistics, rows, index, Columns(*grads[:-1]), classes)
        if shards is not None:
            if not rows.classes and not rows.is_linear:
                return of_inputs(ctx, (None,), rows, spec, [torch.zeros_like(rows.logits)], shards)
            here = vocabulary.targets_here(shards, rows.target)
            rows = rows._replace(target=here, class_weight=shards.weight(rows.class_weight))
            index = shards.here(index)[0]
        saved = (statistics, index, coefficients, None)
        spec = spec._replace(moments=picks.moments)
        by_sources = gradients(rows, spec, needed, *saved, inplace)
        return of_inputs(ctx, (None,), given, spec, by_sources, shards)


def _columns(statistics: Tensor, index: Tensor, target: Tensor, picks: Picks) -> Columns:
    """Copies of what a pass has written, as the columns of a loss function."""
    m, ce = statistics[MAX], statistics[CE].clone()
    log_sum = statistics[SUM_EXP].log()
    after = STATISTICS + index.shape[0]
    pick_logit = statistics[STATISTICS:after].clone()
    asked = [statistics[after + ENTROPY], statistics[after + POWER]] if picks.moments else []
    return Columns(
        ce=ce,
        q=statistics[Q].clone(),
        lse=m + log_sum,
        target_logit=statistics[TARGET_LOGIT].clone(),
        mean_ce=statistics[MEAN_CE].clone(),
        pick_logit=pick_logit,
        pick_ce=torch.where(index == target, ce, log_sum + (m - pick_logit)) if len(index) else pick_logit.clone(),
        moments=torch.stack(asked) if asked else statistics.new_empty((0, statistics.shape[1])),
    )


#: The code objects of loss functions that use another tensor that requires grad. Several functions may share one.
_WITH_OTHER_SOURCES: weakref.WeakSet[Any] = weakref.WeakSet()


def has_other_sources(function: Any) -> bool:
    """Tell whether slopes_of has raised for this loss function before, so that it need not be called in vain."""
    return getattr(inspect.unwrap(function), "__code__", None) in _WITH_OTHER_SOURCES


class _MadeWithLoss(torch.autograd.Function):
    """What a loss function is called with. A later backward from there to the sources has come too late, and raises."""

    @staticmethod
    def forward(ctx: Any, columns: Sequence[Tensor], *sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            "a loss function has handed out what it was called with, or what it made of that, but its gradients are "
            "made with the loss: hand out detached tensors, or pass reduction='none' and reduce the losses yourself"
        )


def called_with(columns: Sequence[Tensor], *sources: Tensor | None) -> tuple[tuple[Tensor, ...], list[GradientEdge]]:
    """Return the columns as a loss function takes them, and where their gradients arrive, whatever it does to them."""
    with torch.enable_grad():
        columns = _MadeWithLoss.apply(columns, *[x for x in sources if x is not None and x.requires_grad])
        return tuple(columns), [get_gradient_edge(x) for x in columns]


def slopes_of(
    value: Tensor, columns: Sequence[Tensor], edges: Sequence[GradientEdge], upstream: Tensor | None, function: Any
) -> list[Tensor]:
    """Return the derivatives of a loss function's `value` by each column.

    GradientsLaterError is raised where its graph has another leaf.
    """
    found: Sequence[Tensor | None] = [None] * len(edges)
    if value.requires_grad:
        nodes, seen = [value.grad_fn], {edges[0].node}
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                with suppress(AttributeError):  # a module has none
                    _WITH_OTHER_SOURCES.add(inspect.unwrap(function).__code__)
                raise chunks.GradientsLaterError
            nodes += [source for source, _ in node.next_functions]
        upstream = torch.ones_like(value) if upstream is None else upstream
        found = torch.autograd.grad(value, edges, upstream, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(columns, found, strict=True)]


def _with_function(rows: Rows, row_weight: Tensor | None, spec: Spec, epilogue: Epilogue) -> tuple[Any, ...]:
    """What the operator ``forward`` returns, of a loss function that is called between the passes of each chunk."""

    def losses(job: Job, upstream: Tensor | None) -> None:
        # Within an autograd function its inputs still require grad.
        part = job.rows._replace(scalars=None if rows.scalars is None else rows.scalars.detach())
        given = _columns(job.statistics, job.index, part.target, spec.picks)
        columns, edges = called_with(given, *rows.sources, rows.scalars)
        with torch.enable_grad():
            loss, _ = reference.losses_between(
                Columns(*columns), job.index, spec.picks, part, epilogue, spec, rows.classes
            )
        slopes = slopes_of(loss, given, edges, upstream, epilogue.function)
        job.loss = loss.detach()
        job.coefficients = _coefficients(job.statistics, part, job.index, Columns(*slopes), rows.classes)

    return chunks.forward(rows, row_weight, spec, BACKENDS[spec.impl], losses, epilogue.per_chunk)


def _coefficients(statistics: Tensor, rows: Rows, index: Tensor, g: Columns, classes: int) -> Tensor:
    """Of dL/dz_j = a p_j - u w_j - sum_k b_k [j == index_k], from the derivatives `g` by each column."""
    target, weight = rows.target, rows.class_weight
    q, p = statistics[Q], (-statistics[CE]).exp()
    g_ce, g_target, g_lse, b = g.ce, g.target_logit, g.lse, g.pick_ce
    if len(index):
        # A pick that is the target acts through the target's own statistics, which are the accurate ones.
        same = index == target
        g_ce, g_target = g_ce + (g.pick_ce * same).sum(0), g_target + (g.pick_logit * same).sum(0)
        b = g.pick_ce * ~same
        g_lse, b = g_lse + b.sum(0), b - g.pick_logit * ~same
    u = g.mean_ce / classes
    weight_sum: Tensor | int = classes if weight is None else weight.sum()
    # d = a - b_target is summed without the terms that cancel in it
    d = g_lse + u * weight_sum
    a = d + g_ce + torch.where(p == 0, 0, g.q * p)  # of an infinite ce, whatever the loss does with it
    at_target = d + g_target - a * q
    valid_target = target.clamp(0, classes - 1)  # ignored rows may hold any index
    at_target = at_target - (u if weight is None else u * weight[valid_target])
    parts = [torch.stack([a, u, at_target]), b]
    if g.moments.shape[0]:
        moments = statistics[STATISTICS + index.shape[0] :]
        # dH/dz_j = p_j (E - (z_j - max)) and dP/dz_j = 2 p_j (p_j - P)
        slopes = torch.stack([-g.moments[0], 2 * g.moments[1]])
        of_row = g.moments[0] * moments[EXCESS] - slopes[1] * moments[POWER]
        lag = torch.where(p == 0, 0, statistics[TARGET_LOGIT] - statistics[MAX])
        parts[0][A] += of_row
        parts[0][TARGET_GRADIENT] += p * (of_row + slopes[0] * lag + slopes[1] * p)
        parts.append(slopes)
    return torch.cat(parts)


# --- sums over the rows ---


def class_sums(
    rows: Rows, spec: Spec, row_weight: Tensor | None, overlap: Overlap, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows (2, V) of error and agreement, differentiable, and detached statistics and pick indices."""
    counts, flat = rows._replace(class_weight=None).flatten()
    spec = spec.of_picks(Picks(), epilogue=overlap.over_rows, over_rows=True)
    return _ClassSums.apply((counts, spec, overlap, inplace), row_weight, *flat)


class _ClassSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], row_weight, *flat):  # type: ignore[no-untyped-def]
        counts, spec, *_ = settings
        rows = Rows.unflatten(counts, flat)
        statistics, index, _ = statistics_of(rows, spec, Picks(1))
        sums = operators.call(operators.sums, rows, spec, statistics, index, row_weight, None)
        ctx.save_for_backward(row_weight, *flat, statistics, index)
        ctx.settings = settings
        ctx.mark_non_differentiable(statistics, index)
        ctx.set_materialize_grads(False)
        return sums, statistics, index

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_sums is None:
            return (None,) * len(ctx.needs_input_grad)
        counts, spec, overlap, inplace = ctx.settings
        row_weight, *flat, statistics, index = ctx.saved_tensors
        rows = Rows.unflatten(counts, flat)
        needed = (ctx.needs_input_grad[1], *needed_of(ctx, 2, rows))
        if transforms.plain_backward(grad_sums, inplace=inplace):

            def sums(w: Tensor | None, z: Tensor) -> list[Tensor]:
                return [reference.class_sums(rows.with_sources([z]), w, overlap.function, spec.form)[0]]

            by_weight, *by_logits = differentiable((row_weight, rows.logits), needed, sums, [grad_sums])
            return of_inputs(ctx, (None, by_weight), rows, spec, by_logits)
        # Each row has a loss of its own: its errors and its agreement, each times the derivative by their sum.
        error, agreement = grad_sums.to(compute_dtype(rows.logits.dtype)).contiguous().unbind()
        agreement = agreement[Targets.of(rows.target, rows.classes).safe]
        plain = rows.without_factors(spec.form)
        of_sums = plain._replace(class_weight=error, params=[*rows.params, agreement])
        loss, coefficients = operators.call(operators.terms, of_sums, spec, statistics, index)
        gradient = None
        if needed[1]:
            saved = (statistics, index, coefficients, row_weight)
            (gradient,) = gradients(of_sums, spec, (True,), *saved, inplace)
        return of_inputs(ctx, (None, loss if needed[0] else None), rows, spec, [gradient])
