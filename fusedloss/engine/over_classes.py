"""The autograd functions of losses over the classes that no operator has whole: see :mod:`~fusedloss.engine.class_terms`.

Of a group, whose ranks have some of the classes each, the sums of the terms take a collective after that of the
statistics; those of p_k d_k come with them, and the gradient needs nothing more of the others. In one process a sum
over the rows has its gradient made with it, of one look at each part of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, transforms
from ..checks import compute_dtype
from ..definition import reference
from ..definition.epilogue import Epilogue, Overlap, Shared
from ..definition.statistics import Picks, Statistics, Targets
from ..distributed.vocabulary import VocabularyShards, differentiated_once
from . import functions as autograd
from . import operators as ops
from .class_terms import LOSS, OTHERS, PARAMS, TOP, Coefficients, CompiledTerms, Rows, Terms, Wanted, vjp
from .functions import Source


def row_losses(
    source: Source,
    target: Tensor,
    weight: Tensor | None,
    params: list[Tensor],
    epilogue: Epilogue,
    mean: bool,
    compiled: bool,
    inplace: bool,
    impl: str,
    shards: VocabularyShards | None,
) -> tuple[Tensor, Statistics]:
    """Sums of the terms of each row (N,), differentiable as are ``lse`` and ``mean_ce`` of the statistics.

    A compiled term has no gradient by ``mean_ce``, and by ``lse`` none that the sums have not. Without `shards` the
    terms are not compiled, and may be differentiated any number of times.
    """
    wanted = Wanted.by(params, source if shards is None else None)
    settings = (epilogue, mean, compiled, inplace, impl, shards, wanted)
    loss, lse, mean_ce, ce, top_ce, top_index = autograd.apply(_RowLosses, source, settings, target, weight, *params)
    classes = source.shape[-1] if shards is None else shards.classes
    target = Targets.of(target, classes).safe
    return loss, Statistics(target=target, lse=lse, mean_ce=mean_ce, ce=ce, top_ce=top_ce, top_index=top_index)


def over_rows(
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    params: list[Tensor],
    overlap: Overlap,
    function: Callable[[Tensor], Tensor],
    summed: bool,
    compiled: bool,
    inplace: bool,
    impl: str,
    shards: VocabularyShards,
) -> tuple[Tensor, Statistics]:
    """``function(sums)`` of error and agreement of the classes here (2, V) in float64, and detached statistics.

    `summed`: it gives (K,), of which the sum over the ranks is returned. Otherwise one number for each class here.
    """
    settings = (overlap, function, summed, compiled, inplace, impl, shards, Wanted.by(params))
    result, lse, ce, top_ce, top_index = _OverRows.apply(logits, row_weight, settings, target, *params)
    return result, Statistics(lse=lse, ce=ce, top_ce=top_ce, top_index=top_index)


def row_sum(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    params: list[Tensor],
    token_weight: Tensor | None,
    divisor: float | Tensor | None,
    epilogue: Epilogue,
    shared: Shared,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """In one process: the sum of the row losses times `token_weight`, over the divisor, whose gradient is made with it.

    Also detached statistics and pick indices, as :func:`autograd.row_sum`.
    """
    settings = (divisor, epilogue, shared, impl, [p.requires_grad for p in params])
    return _RowSum.apply(logits, settings, target, weight, token_weight, *params)


def _columns(statistics: Tensor, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, ce, top_ce and top_index."""
    m, ce, log_sum = statistics[ops.MAX], statistics[ops.CE].clone(), statistics[ops.SUM_EXP].log()
    top_ce = torch.where(index[0] == target, ce, log_sum + (m - statistics[ops.STATISTICS]))
    return m + log_sum, ce, top_ce, index[0].clone()


def _of_params(params: Sequence[Tensor], learnt: Sequence[bool], by_rows: Iterable[Tensor]) -> list[Tensor | None]:
    """The parameters' gradients from those of the learnt ones by rows, (P, N)."""
    rest = iter(by_rows)
    return [
        (next(rest) if p.dim() else next(rest).sum()) if need else None for p, need in zip(params, learnt, strict=True)
    ]


def _of_statistics(
    by_lse: Tensor | None, by_mean: Tensor | None, weight: Tensor | None, classes: int
) -> tuple[Tensor | None, Tensor | None]:
    """The coefficients a and u from the derivatives by ``lse`` and ``mean_ce``."""
    if by_mean is None:
        return by_lse, None
    u = by_mean / classes
    a = u * (classes if weight is None else weight.sum())
    return a if by_lse is None else by_lse + a, u


class _RowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, settings, target, weight, token_weight, *params):  # type: ignore[no-untyped-def]
        divisor, epilogue, shared, impl, learnt = settings
        mean, classes = shared.label_smoothing != 0, logits.shape[1]
        statistics, index, top_q = autograd.statistics_of(
            (logits, None, None), None, target, weight, None, Picks(1, mean=mean), impl, of_top=True
        )
        rows = Rows.of(target, statistics, index, top_q, classes)
        lse = statistics[ops.MAX] + statistics[ops.SUM_EXP].log()
        row_weight = autograd.row_weights(logits, target, token_weight, divisor)

        def losses(base: Tensor, lse: Tensor, mean_ce: Tensor) -> Tensor:
            statistics = Statistics(target=rows.target.clamp(min=0), lse=lse, mean_ce=mean_ce)
            return shared.apply(base, statistics, weight, classes, weighted=True).masked_fill(rows.ignored, 0)

        # All of it but the terms is linear in their sums.
        none, mean_ce = torch.zeros_like(lse), statistics[ops.MEAN_CE]
        upstream = torch.ones_like(lse) if row_weight is None else row_weight
        g, by_lse, by_mean = vjp(losses, (none, lse, mean_ce), (True,) * 3)[1](upstream)
        a, u = _of_statistics(by_lse if shared.z_loss else None, by_mean if mean else None, weight, classes)

        terms = Terms(_weighted(epilogue, weight), None, (logits, None, None), rows, params)
        gradient = backends.new_buffer(logits, logits.shape) if ctx.needs_input_grad[0] else None
        coefficients = Coefficients(g, torch.empty_like(g), torch.empty_like(g), a, u, weight)
        sums = []
        for part, some, own in terms.parts():
            p, q, positive = some.probabilities(logits[part])
            value, d, by_params = terms.derivatives(p, q, positive, slice(None), own, learnt, g[part])
            base = value.sum(-1, dtype=torch.float64).to(lse.dtype)
            sums.append(torch.stack([base, *by_params]).masked_fill(some.ignored, 0))
            if gradient is not None:
                coefficients.others[part], coefficients.of_top[part] = some.slope_sums(p, d)
                gradient[part] = some.gradient(p, d, coefficients.part(part))
        base, *by_rows = torch.cat(sums, 1)
        total = autograd.weighted_sum(losses(base, lse, mean_ce), token_weight)
        ctx.save_for_backward(logits, target, weight, row_weight, gradient, *by_rows, *params)
        ctx.settings = settings
        ctx.mark_non_differentiable(statistics, index)
        ctx.set_materialize_grads(False)
        return autograd.divided(total, divisor), statistics, index

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _, epilogue, shared, impl, learnt = ctx.settings
        nothing = (None,) * 4
        if grad_output is None:
            return (None, *nothing, *(None for _ in learnt))
        logits, target, weight, row_weight, gradient, *others = ctx.saved_tensors
        by_rows, params = others[: sum(learnt)], others[sum(learnt) :]
        grad_output = grad_output.to(compute_dtype(logits.dtype))
        needed = (ctx.needs_input_grad[0], *learnt)
        if torch.is_grad_enabled():

            def total(z: Tensor, *p: Tensor) -> list[Tensor]:
                rows = reference.row_losses(z, target, weight, None, list(p), epilogue, shared)[0]
                return [autograd.weighted_sum(rows, row_weight)]

            of_logits, *of_params = autograd.differentiable((logits, *params), needed, total, [grad_output])
            return of_logits, *nothing, *of_params
        of_logits = None if gradient is None else autograd.scaled_once(gradient, grad_output, impl)
        return of_logits, *nothing, *_of_params(params, learnt, [x * grad_output for x in by_rows])


def _weighted(epilogue: Epilogue, weight: Tensor | None) -> Callable[..., Tensor]:
    """What makes the terms."""

    def function(p: Tensor, q: Tensor, positive: Tensor, columns: Any, *params: Tensor) -> Tensor:
        terms = epilogue.of_classes(p, q, positive, list(params))
        return terms if weight is None else terms * weight[columns]

    return function


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, logits, linear_weight, linear_bias, settings, target, weight, *params
    ):
        form, _, mean, compiled, _, impl, shards, wanted = settings
        sources, classes = (logits, linear_weight, linear_bias), len(linear_weight) if form else logits.shape[1]
        arguments = (sources, form, target, weight, None, Picks(1, mean=mean), impl)
        statistics, index, top_q = (
            autograd.statistics_of(*arguments, of_top=True)
            if shards is None
            else autograd.merged_statistics(*arguments, shards, of_top=True)
        )
        if form and form.row_parts > 1 and not compiled:
            sources = (shards.gather_parts(logits).flatten(0, 1), *sources[1:])
        saved = (*sources, *Rows.of(target, statistics, index, top_q, classes, shards))
        terms = _RowLosses._terms(settings, weight, [*saved, *params])
        sums = terms.sums(wanted)
        sums = (sums if shards is None else shards.total(sums)).to(statistics.dtype)
        ctx.save_for_backward(sums, weight, *saved, *params)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        lse, *others = _columns(statistics, index, target)
        ctx.mark_non_differentiable(*others)
        return sums[LOSS].clone(), lse, statistics[ops.MEAN_CE].clone(), *others

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, grad_mean: Tensor | None, *_: Any
    ):
        sums, weight, *saved = ctx.saved_tensors
        *_, shards, wanted = ctx.settings
        terms = _RowLosses._terms(ctx.settings, weight, saved)
        if shards is None and transforms.plain_backward(grad_loss, grad_lse, grad_mean):
            needed, by_outputs = (ctx.needs_input_grad[0], *wanted.learnt), (grad_loss, grad_lse, grad_mean)
            of_logits, *of_params = _dense_gradients(terms, ctx.settings[1], weight, needed, by_outputs)
            return of_logits, *(None,) * 5, *of_params
        differentiated_once(grad_loss, grad_lse, grad_mean)
        classes, own = (terms.classes, weight) if shards is None else (shards.classes, shards.weight(weight))
        a, u = _of_statistics(grad_lse, grad_mean, weight, classes)
        grad_loss = torch.zeros_like(sums[LOSS]) if grad_loss is None else grad_loss
        coefficients = Coefficients(grad_loss, grad_loss * sums[OTHERS], grad_loss * sums[TOP], a, u, own)
        grads = terms.gradients(ctx.needs_input_grad[:3], coefficients, shards)
        return *grads, None, None, None, *_of_params(terms.params, wanted.learnt, sums[PARAMS:] * grad_loss)

    @staticmethod
    def _terms(settings: tuple[Any, ...], weight: Tensor | None, saved: Sequence[Any]) -> Terms:
        form, epilogue, _, compiled, inplace, impl, shards, _ = settings
        own = weight if shards is None else shards.weight(weight)
        last = 3 + len(Rows._fields)
        params = list(saved[last:])
        made_of = (_weighted(epilogue, own), form, saved[:3], Rows(*saved[3:last]), params)
        return CompiledTerms(*made_of, epilogue.name, own, params, inplace, impl) if compiled else Terms(*made_of)


def _dense_gradients(
    terms: Terms,
    epilogue: Epilogue,
    weight: Tensor | None,
    needed: Sequence[bool],
    by_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Of logits and parameters, differentiable, from those of loss, lse and mean_ce."""

    def outputs(z: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
        rows = (terms.rows.for_passes[0], weight, None, list(p))
        loss, s = reference.row_losses(z, *rows, epilogue, Shared())
        ce = s.lse[:, None] - z.to(loss.dtype).masked_fill(terms.rows.ignored[:, None], 0)
        return loss, s.lse, (ce if weight is None else ce * weight).mean(-1)

    return autograd.differentiable((terms.sources[0], *terms.params), needed, outputs, by_outputs)


class _OverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, row_weight, settings, target, *params):  # type: ignore[no-untyped-def]
        _, function, summed, _, _, impl, shards, wanted = settings
        statistics, index, top_q = autograd.merged_statistics(
            (logits, None, None), None, target, None, None, Picks(1), impl, shards, of_top=True
        )
        rows = Rows.of(target, statistics, index, top_q, logits.shape[1], shards)
        saved = [logits, *rows, *params]
        pairs = _OverRows._pairs(settings, saved)
        sums = _OverRows._sums(settings, pairs, row_weight)
        result, by_rows = function(sums), None
        if summed:
            # The sums of the rows' derivatives by each of the results come with these.
            units = torch.eye(len(result), dtype=result.dtype, device=result.device) if wanted.slopes else ()
            parts = [_OverRows._by_sums(settings, pairs, sums, unit).sums(wanted).flatten() for unit in units]
            result, by_rows = shards.total(torch.cat([result, *parts])).tensor_split([len(result)])
        ctx.save_for_backward(row_weight, sums, by_rows, *saved)
        ctx.settings = settings
        columns = _columns(statistics, index, target)
        ctx.mark_non_differentiable(*columns)
        return result.clone(), *columns

    @staticmethod
    def backward(ctx: Any, grad_result: Tensor, *_: Any):  # type: ignore[no-untyped-def]
        differentiated_once(grad_result)
        row_weight, sums, by_rows, *saved = ctx.saved_tensors
        *_, shards, wanted = ctx.settings
        terms = _OverRows._by_sums(ctx.settings, _OverRows._pairs(ctx.settings, saved), sums, grad_result)
        if by_rows is None:
            by_rows = shards.total(terms.sums(wanted._replace(slopes=True)))
        else:
            by_rows = torch.tensordot(grad_result, by_rows.view(len(grad_result), PARAMS + sum(wanted.learnt), -1), 1)
        by_rows = by_rows.to(terms.rows.top_q.dtype)
        g = torch.ones_like(by_rows[LOSS]) if row_weight is None else row_weight
        coefficients = Coefficients(g, g * by_rows[OTHERS], g * by_rows[TOP], None, None, None)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = terms.gradients((True, False, False), coefficients, shards)[0]
        of_weight = by_rows[LOSS] if ctx.needs_input_grad[1] else None
        return gradient, of_weight, None, None, *_of_params(terms.params, wanted.learnt, by_rows[PARAMS:] * g)

    @staticmethod
    def _pairs(settings: tuple[Any, ...], saved: Sequence[Any]) -> Terms:
        """Error and agreement of each class."""
        overlap, last = settings[0], 1 + len(Rows._fields)

        def function(p: Tensor, q: Tensor, positive: Tensor, _: Any, *params: Tensor) -> tuple[Tensor, Tensor]:
            return overlap.function(p, q, positive, *(x[:, None] for x in params))

        return Terms(function, None, (saved[0], None, None), Rows(*saved[1:last]), saved[last:])

    @staticmethod
    def _sums(settings: tuple[Any, ...], pairs: Terms, row_weight: Tensor | None) -> Tensor:
        """Over the rows (2, V), in float64."""
        overlap, _, _, compiled, _, impl, *_ = settings
        logits, rows, params = pairs.sources[0], pairs.rows, list(pairs.params)
        if compiled and pairs.classes:
            target, index = rows.for_passes
            of_rows = (target, row_weight, rows.statistics, index, params, overlap.over_rows, rows.top_q)
            return ops.class_sums(logits, *of_rows, impl)
        sums = logits.new_zeros((2, pairs.classes), dtype=torch.float64)
        for part, some, own in pairs.parts():
            p, q, positive = some.probabilities(logits[part])
            terms = torch.stack(pairs.function(p, q, positive, slice(None), *own)).masked_fill(some.ignored[:, None], 0)
            sums += (terms if row_weight is None else terms * row_weight[part, None]).sum(1, dtype=torch.float64)
        return sums

    @staticmethod
    def _by_sums(settings: tuple[Any, ...], pairs: Terms, sums: Tensor, upstream: Tensor) -> Terms:
        """Terms whose sum over all rows has the gradient of the function of the sums."""
        overlap, function, _, compiled, inplace, impl, *_ = settings
        (slopes,) = torch.func.vjp(function, sums)[1](upstream)
        by_error, by_agreement = slopes.to(pairs.rows.top_q.dtype).contiguous()

        def weighted(p: Tensor, q: Tensor, positive: Tensor, columns: Any, *params: Tensor) -> Tensor:
            error, agreement = pairs.function(p, q, positive, columns, *params)
            return error * by_error[columns] + agreement * by_agreement[columns]

        made_of = (weighted, None, pairs.sources, pairs.rows, pairs.params)
        if not compiled:
            return Terms(*made_of)
        # The term's last parameter is the slope of the target's agreement, which is not the passes' to add.
        params = [*pairs.params, by_agreement.new_zeros(())]
        return CompiledTerms(*made_of, overlap.over_rows, by_error, params, inplace, impl)
