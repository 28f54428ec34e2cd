"""Losses over the classes whose classes are divided over the ranks of a group.

With f_k the terms of the classes of a row, functions of p_k and q_k = 1 - p_k, and d_k = df_k/dp_k - df_k/dq_k,

    dL/dz_j = p_j (d_j - S),   S = sum_k p_k d_k over all classes

Each rank makes the sums of its own classes' f and p d from the statistics of whole rows, which a collective brings
together; the gradient needs nothing more of the others. The passes make the terms, but for the two classes of a row for
which 1 - p is not the difference: the target and the top class, which PyTorch adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..checks import IGNORED
from ..definition.divergences import lag_between
from ..definition.epilogue import Epilogue, Overlap
from ..definition.rows import Rows, Spec
from ..definition.statistics import CE, MAX, STATISTICS, SUM_EXP, TARGET_LOGIT, Picks, Q, Statistics, Targets
from ..distributed.vocabulary import VocabularyShards, differentiated_once, targets_here
from . import functions, operators
from .functions import Settings
from .prepare import Call

#: What the ranks sum of each row: f, p d of all classes but the top one, p d of that.
LOSS, OTHERS, TOP = range(3)


class _Here(NamedTuple):
    """What a rank keeps of a forward: statistics of whole rows, with the top class, and classes as its columns."""

    statistics: Tensor
    top_q: Tensor
    target: Tensor
    top: Tensor  # (1, N)

    @staticmethod
    def of(rows: Rows, spec: Spec, shards: VocabularyShards) -> tuple[_Here, Tensor]:
        """Return what a rank keeps, and the top class among the classes of all ranks."""
        statistics, index, top_q = functions.merged_statistics(rows, spec, Picks(1), shards, top_q=True)
        assert top_q is not None
        top = shards.here(index.masked_fill(rows.target == IGNORED, -1))[0]
        return _Here(statistics, top_q, targets_here(shards, rows.target), top), index


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of this rank's classes."""

    function: Callable[..., Tensor]
    """Terms (n, K) of (p, q, positive, columns, *params) for columns (n, K) of this rank."""
    rows: Rows
    """Targets are columns of this rank, -1 for those of others."""
    spec: Spec
    here: _Here

    def sums(self) -> Tensor:
        """(3, N) in float64, over the classes here."""
        result = self.here.statistics.new_zeros((3, len(self.here.target)), dtype=torch.float64)
        if self.rows.classes:
            rows = self.rows._replace(candidates=None)
            saved = (self.here.statistics, self.here.top, None, None)
            loss, others = operators.call(operators.sums, rows, self.spec, *saved)
            p, _, value, d, top, away = self._singled_out()
            of_top = p * d
            result[LOSS] = loss + value.masked_fill(away, 0).sum(1)
            result[OTHERS] = others + of_top.masked_fill(away | top, 0).sum(1)
            result[TOP] = of_top.masked_fill(away | ~top, 0).sum(1)
        return result

    def gradients(
        self, needed: Sequence[bool], g: Tensor, sums: Tensor, by_lse: Tensor | None, inplace: bool
    ) -> tuple[Tensor | None, ...]:
        """Of the sources, from the derivatives by the rows' losses and by ``lse``, and the sums of all ranks."""
        if not self.rows.classes and not self.rows.is_linear:
            return (torch.zeros_like(self.rows.logits),)
        # Where g is 0, so are the others.
        lag = torch.zeros_like(g) if by_lse is None else torch.where(g == 0, 0, by_lse / g)
        others = sums[OTHERS] - lag
        shift = others + sums[TOP]
        at_target = at_top = torch.zeros_like(g)
        if self.rows.classes:
            p, q, _, d, top, _ = self._singled_out()
            at_target, at_top = (p * torch.where(top, q * d - others[:, None], d - shift[:, None])).unbind(1)
            at_top = torch.where(top[:, 0], at_target, at_top)
        coefficients = torch.stack([shift, at_top, at_target, torch.zeros_like(g)])
        saved = (self.here.statistics, self.here.top, coefficients, g)
        return functions.gradients(self.rows, self.spec, needed, *saved, inplace)

    def _singled_out(self) -> tuple[Tensor, ...]:
        """Of the target and the top class (N, 2): p, q, terms, d, whether it is the top class, which are elsewhere.

        Where they are the same class, it is the first.
        """
        statistics, top_q, target, top = self.here
        target, top = target.clamp(min=-1), top[0]
        p = torch.stack([(-statistics[CE]).exp(), 1 / statistics[SUM_EXP]], 1)
        q = torch.stack([statistics[Q], top_q], 1)
        same = target == top
        always = torch.ones_like(same)
        positive, is_top = torch.stack([always, ~always], 1), torch.stack([same, always], 1)
        where = torch.stack([target, top.masked_fill(same, -1)], 1)
        params = [x.expand(target.shape[0]) for x in self.rows.params]

        def terms(p: Tensor, q: Tensor) -> Tensor:
            return self.function(p, q, positive, where.clamp(min=0), *params)

        value, pull = _vjp(terms, p, q)
        by_p, by_q = pull(torch.ones_like(value))
        return p, q, value, by_p - by_q, is_top, where < 0


def _vjp(function: Callable[..., Tensor], *inputs: Tensor) -> Any:
    """The value, and what gives the gradients of the inputs from that of the value."""
    if torch.compiler.is_compiling():
        return torch.func.vjp(function, *inputs)
    # Activation checkpointing would run the whole forward again for what is saved here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        leaves = [x.detach().requires_grad_() for x in inputs]
        value = function(*leaves)
    return value.detach(), lambda gradient: torch.autograd.grad(value, leaves, gradient, materialize_grads=True)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def columns_of(statistics: Tensor, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, ce, top_ce and top_index."""
    m, ce, log_sum = statistics[MAX], statistics[CE].clone(), statistics[SUM_EXP].log()
    top_ce = torch.where(index[0] == target, ce, log_sum + (m - statistics[STATISTICS]))
    return m + log_sum, ce, top_ce, index[0].clone()


def row_losses(call: Call, epilogue: Epilogue) -> tuple[Tensor, Statistics]:
    """Sums of the terms of each row (N,), differentiable as is ``lse`` of the statistics."""
    counts, flat = call.rows.flatten()
    spec = call.spec._replace(epilogue=epilogue.name)
    settings = Settings(counts, spec, epilogue, call.inplace, False)
    loss, lse, ce, top_ce, top_index = _RowLosses.apply(settings, call.shards, *flat)
    target = Targets.of(call.rows.target, call.classes).safe
    return loss, Statistics(target=target, lse=lse, ce=ce, top_ce=top_ce, top_index=top_index)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, shards: VocabularyShards, *flat):  # type: ignore[no-untyped-def]
        rows = Rows.unflatten(settings.counts, flat)
        here, index = _Here.of(rows, settings.spec, shards)
        terms = _RowLosses._terms(settings, shards, rows, here)
        sums = shards.total(terms.sums()).to(here.statistics.dtype)
        ctx.save_for_backward(*flat, sums, *here)
        ctx.settings, ctx.shards = settings, shards
        ctx.set_materialize_grads(False)
        lse, *others = columns_of(here.statistics, index, rows.target)
        ctx.mark_non_differentiable(*others)
        return sums[LOSS].clone(), lse, *others

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: Any):  # type: ignore[no-untyped-def]
        differentiated_once(grad_loss, grad_lse)
        *flat, sums, statistics, top_q, target, top = ctx.saved_tensors
        rows, here = Rows.unflatten(ctx.settings.counts, flat), _Here(statistics, top_q, target, top)
        terms = _RowLosses._terms(ctx.settings, ctx.shards, rows, here)
        needed = functions.needed_of(ctx, 2, rows)
        g = torch.zeros_like(sums[LOSS]) if grad_loss is None else grad_loss
        by_sources = terms.gradients(needed, g, sums, grad_lse, ctx.settings.inplace)
        return functions.of_inputs(ctx, (None, None), rows, ctx.settings.spec, by_sources, ctx.shards)

    @staticmethod
    def _terms(settings: Settings, shards: VocabularyShards, rows: Rows, here: _Here) -> Terms:
        weight, epilogue = shards.weight(rows.class_weight), settings.epilogue

        def function(p: Tensor, q: Tensor, positive: Tensor, columns: Tensor, *params: Tensor) -> Tensor:
            terms = epilogue.of_classes(p, q, positive, list(params))
            return terms if weight is None else terms * weight[columns]

        rows = rows._replace(target=here.target, class_weight=weight)
        return Terms(function, rows, settings.spec, here)


def pair_losses(call: Call, epilogue: Epilogue) -> tuple[Tensor, Statistics]:
    """Losses against a second row (N,), and statistics with the top class if there are statistics at all."""
    counts, flat = call.rows.flatten()
    top = int(call.options["return_stats"])
    spec = call.spec._replace(epilogue=epilogue.name, top_k=top)
    settings = Settings(counts, spec, epilogue, call.inplace, False)
    loss, *columns = _PairLosses.apply(settings, call.shards, *flat)
    return loss, Statistics(**dict(zip(("lse", "ce", "top_ce", "top_index"), columns, strict=False)))


class _PairLosses(torch.autograd.Function):
    """The rows' softmax is that of all ranks; each sums the terms of its own classes."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, shards: VocabularyShards, *flat):  # type: ignore[no-untyped-def]
        rows, spec, epilogue = Rows.unflatten(settings.counts, flat), settings.spec, settings.epilogue
        alone, picks = rows._replace(teacher=[], params=[], class_weight=None), Picks(spec.top_k)
        statistics, index, _ = functions.merged_statistics(alone, spec, picks, shards)
        max_, sum_exp, q = statistics[MAX], statistics[SUM_EXP], statistics[Q]
        ones = torch.ones_like(q)
        second, plain = torch.stack([0 * ones, ones, sum_exp]), statistics
        hard = rows.params[-1] if epilogue.over == "teacher" else torch.zeros_like(rows.params[-1])
        main, _, z_loss, factor = (1, 0, 0, 1) if rows.scalars is None else rows.scalars
        slope_at_target = torch.zeros_like(q)
        if epilogue.over == "teacher":
            first, *layer = rows.teacher
            teacher = alone._replace(hidden=[first], weight=layer[:1], bias=layer[1] if len(layer) > 1 else None)
            form = spec.form._replace(softcap=spec.form.teacher_softcap)
            of_teacher, *_ = functions.merged_statistics(teacher, spec._replace(form=form), Picks(), shards)
            if spec.form.tempered:
                form = spec.form._replace(tempered=False)
                raw = alone._replace(scalars=None)
                plain, *_ = functions.merged_statistics(raw, spec._replace(form=form), Picks(), shards)
            plain_sum = plain[SUM_EXP] * (plain[MAX] - max_ / factor).exp()
            second = torch.stack([of_teacher[MAX], of_teacher[SUM_EXP], plain_sum])
            slope_at_target = _slope_of(epilogue, statistics, of_teacher, rows.params[:-1])
        own = targets_here(shards, rows.target)
        weight = shards.weight(rows.class_weight)
        here = rows._replace(target=own, class_weight=weight, candidates=None)
        saved = torch.cat([statistics, second])
        columns_here = shards.here(index)[0]
        sums = q.new_zeros((3, len(q)), dtype=torch.float64)
        if rows.classes:
            sums = operators.call(operators.sums, here, spec, saved, columns_here, None, None)
        loss, slope, difference = shards.total(sums)
        # As in the passes: a rounded log-sum-exp makes all p too large by the same factor.
        more = difference * (slope - epilogue.curvature(*rows.params[:-1]) / 2 * difference)
        loss = (main * torch.where(loss.isinf(), loss, loss - more)).to(q.dtype)
        lse = max_ + sum_exp.log()
        z_slope = 2 * z_loss * lse
        loss = loss + z_loss * lse * lse + torch.where(hard == 0, 0, hard * plain[CE])
        shift = main * slope.to(q.dtype) - z_slope
        p = (-statistics[CE]).exp()
        at_target = main * slope_at_target - p * shift - hard / factor * plain[Q]
        # The kernels' gradient is right at a target that has no cross-entropy beside it.
        own = torch.where((hard == 0) & (own != IGNORED), -1, own)
        coefficients = torch.stack([shift, hard / (factor * second[2]), at_target])
        coefficients = torch.cat([coefficients, torch.zeros_like(statistics[: spec.top_k])])
        ctx.save_for_backward(*flat, saved, columns_here, coefficients, own, weight)
        ctx.settings, ctx.shards = settings, shards
        loss = loss.masked_fill(rows.target == IGNORED, 0)
        if not spec.top_k:
            return (loss,)
        stats = columns_of(statistics, index, rows.target)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        differentiated_once(grad_loss)
        *flat, statistics, index, coefficients, own, weight = ctx.saved_tensors
        rows, spec = Rows.unflatten(ctx.settings.counts, flat), ctx.settings.spec
        needed = functions.needed_of(ctx, 2, rows)
        by_sources: tuple[Tensor | None, ...] = (torch.zeros_like(rows.hidden[0]),)
        if rows.classes or rows.is_linear:
            here = rows._replace(target=own, class_weight=weight)
            saved = (statistics, index, coefficients, grad_loss)
            by_sources = functions.gradients(here, spec, needed, *saved, ctx.settings.inplace)
        return functions.of_inputs(ctx, (None, None), rows, spec, by_sources, ctx.shards)


def _slope_of(epilogue: Epilogue, student: Tensor, teacher: Tensor, params: Sequence[Tensor]) -> Tensor:
    """p df/dp of the targets' terms (N,), from statistics of whole rows."""
    # As in the passes, one after the other.
    d = lag_between(teacher[TARGET_LOGIT], student[TARGET_LOGIT], teacher[MAX], student[MAX])
    d = d - (teacher[SUM_EXP] / student[SUM_EXP]).log()

    def of_target(log_p: Tensor) -> Tensor:
        return epilogue.function(-teacher[CE], log_p, d - (log_p - log_p.detach()), *params)

    value, pull = _vjp(of_target, -student[CE])
    return pull(torch.ones_like(value))[0]


class _Sums(NamedTuple):
    """What is static about a function of sums over the rows."""

    counts: tuple[int, int, int, int]
    spec: Spec
    overlap: Overlap
    function: Callable[[Tensor], Tensor]
    summed: bool
    inplace: bool
    gradients: bool
    shards: VocabularyShards


def over_rows(
    call: Call, overlap: Overlap, function: Callable[[Tensor], Tensor], summed: bool
) -> tuple[Tensor, Statistics]:
    """``function(sums)`` of error and agreement of the classes here (2, V) in float64, and detached statistics.

    `summed`: it gives (K,), of which the sum over the ranks is returned. Otherwise one number for each class here.
    """
    assert call.shards is not None
    counts, flat = call.rows._replace(class_weight=None).flatten()
    spec = call.spec._replace(epilogue=overlap.over_rows)
    # Asked before the function, in which gradients are off.
    gradients = torch.is_grad_enabled() or transforms.traced()
    settings = _Sums(counts, spec, overlap, function, summed, call.inplace, gradients, call.shards)
    result, lse, ce, top_ce, top_index = _OverRows.apply(settings, call.token_weight, *flat)
    return result, Statistics(lse=lse, ce=ce, top_ce=top_ce, top_index=top_index)


class _OverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: _Sums, row_weight, *flat):  # type: ignore[no-untyped-def]
        rows = Rows.unflatten(x.counts, flat)
        here, index = _Here.of(rows, x.spec, x.shards)
        sums = rows.logits.new_zeros((2, 0), dtype=torch.float64)
        if rows.classes:
            over_rows = rows._replace(target=here.target)
            saved = (here.statistics, here.top, row_weight, here.top_q)
            sums = operators.call(operators.sums, over_rows, x.spec._replace(over_rows=True), *saved)
        result, by_rows = x.function(sums), None
        if x.summed:
            # The sums of the rows' derivatives by each of the results come with these.
            units = torch.eye(len(result), dtype=result.dtype, device=result.device) if x.gradients else ()
            parts = [_OverRows._by_sums(x, rows, here, sums, unit).sums().flatten() for unit in units]
            result, by_rows = x.shards.total(torch.cat([result, *parts])).tensor_split([len(result)])
        ctx.save_for_backward(row_weight, *flat, sums, by_rows, *here)
        ctx.settings = x
        stats = columns_of(here.statistics, index, rows.target)
        ctx.mark_non_differentiable(*stats)
        return result.clone(), *stats

    @staticmethod
    def backward(ctx: Any, grad_result: Tensor, *_: Any):  # type: ignore[no-untyped-def]
        differentiated_once(grad_result)
        x = ctx.settings
        row_weight, *flat, sums, by_rows, statistics, top_q, target, top = ctx.saved_tensors
        here, rows = _Here(statistics, top_q, target, top), Rows.unflatten(x.counts, flat)
        terms = _OverRows._by_sums(x, rows, here, sums, grad_result)
        if by_rows is None:
            by_rows = x.shards.total(terms.sums())
        else:
            by_rows = torch.tensordot(grad_result, by_rows.view(len(grad_result), 3, -1), 1)
        by_rows = by_rows.to(here.top_q.dtype)
        g = torch.ones_like(by_rows[LOSS]) if row_weight is None else row_weight
        gradient: tuple[Tensor | None, ...] = (None,)
        if functions.needed_of(ctx, 2, rows)[0]:
            gradient = terms.gradients((True,), g, by_rows, None, x.inplace)
        by_weight = by_rows[LOSS] if ctx.needs_input_grad[1] else None
        return functions.of_inputs(ctx, (None, by_weight), rows, x.spec, gradient, x.shards)

    @staticmethod
    def _by_sums(x: _Sums, rows: Rows, here: _Here, sums: Tensor, upstream: Tensor) -> Terms:
        """Terms whose sum over all rows has the gradient of the function of the sums."""
        (slopes,) = _vjp(x.function, sums)[1](upstream)
        by_error, by_agreement = slopes.to(here.top_q.dtype).contiguous()

        def weighted(p: Tensor, q: Tensor, positive: Tensor, columns: Tensor, *params: Tensor) -> Tensor:
            error, agreement = x.overlap.function(p, q, positive, *(c[:, None] for c in params[:-1]))
            return error * by_error[columns] + agreement * by_agreement[columns]

        # The term's last parameter is the slope of the target's agreement, which is not the passes' to add.
        params = [*rows.params, by_agreement.new_zeros(())]
        rows = rows._replace(target=here.target, class_weight=by_error, params=params)
        return Terms(weighted, rows, x.spec, here)
