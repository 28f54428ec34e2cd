"""Losses over the classes of which each rank of a group has some.

With f_k the terms of the classes of a row, functions of p_k and q_k = 1 - p_k, and d_k = df_k/dp_k - df_k/dq_k,

    dL/dz_j = p_j (d_j - S),   S = sum_k p_k d_k over the classes of all ranks

The terms are made of the statistics of whole rows, so that their sums take a collective after that of the statistics.
The sums of p_k d_k come with them, and the gradient needs nothing more of the others.

The passes have the compiled class terms, but for the two classes of a row for which 1 - p is not the difference: the
target and the top class, which PyTorch adds. All other terms are PyTorch, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, backends, ops
from .autograd import Source
from .backends import reference
from .checks import compute_dtype
from .epilogue import Epilogue, Overlap, Shared
from .projection import Form, dense_logits
from .statistics import Picks, Statistics
from .vocabulary import IGNORED, VocabularyShards, differentiated_once

#: Bytes of probabilities that class terms in PyTorch hold at a time.
DENSE_BYTES = 8 * 2**20

#: What the ranks sum of each row: f, p d of all classes but the top one, p d of that; then df by each learnt parameter.
LOSS, OTHERS, TOP, PARAMS = range(4)


def rows_at_once(classes: int) -> int:
    return max(1, DENSE_BYTES // (max(1, classes) * 4))


def row_losses(
    source: Source,
    target: Tensor,
    weight: Tensor | None,
    params: list[Tensor],
    epilogue: Epilogue,
    ignore_index: int,
    mean: bool,
    compiled: bool,
    inplace: bool,
    impl: str,
    shards: VocabularyShards,
) -> tuple[Tensor, Statistics]:
    """Sums of the terms of each row (N,), differentiable as are ``lse`` and ``mean_ce`` of the statistics.

    A compiled term has no gradient by ``mean_ce``, and by ``lse`` none that the sums have not.
    """
    settings = (epilogue, ignore_index, mean, compiled, inplace, impl, shards, _Wanted.by(params))
    loss, lse, mean_ce, ce, top_ce, top_index = autograd.apply(_RowLosses, source, settings, target, weight, *params)
    target = target.masked_fill(target == ignore_index, 0)
    return loss, Statistics(target=target, lse=lse, mean_ce=mean_ce, ce=ce, top_ce=top_ce, top_index=top_index)


def over_rows(
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    params: list[Tensor],
    overlap: Overlap,
    function: Callable[[Tensor], Tensor],
    summed: bool,
    ignore_index: int,
    compiled: bool,
    inplace: bool,
    impl: str,
    shards: VocabularyShards,
) -> tuple[Tensor, Statistics]:
    """``function(sums)`` of error and agreement of the classes here (2, V) in float64, and detached statistics.

    `summed`: it gives (K,), of which the sum over the ranks is returned. Otherwise one number for each class here.
    """
    settings = (overlap, function, summed, ignore_index, compiled, inplace, impl, shards, _Wanted.by(params))
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
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """In one process: the sum of the row losses times `token_weight`, over the divisor, with its gradient.

    Also detached statistics and pick indices, as :func:`autograd.row_sum`.
    """
    settings = (divisor, epilogue, shared, ignore_index, impl, _Wanted.by(params))
    return _RowSum.apply(logits, settings, target, weight, token_weight, *params)


class _Wanted(NamedTuple):
    """Asked before the function, in which gradients are off and parameters as if they were constants."""

    slopes: bool
    learnt: tuple[bool, ...]

    @staticmethod
    def by(params: Sequence[Tensor]) -> _Wanted:
        return _Wanted(torch.is_grad_enabled(), tuple(p.requires_grad for p in params))


class _Rows(NamedTuple):
    """What the terms of rows take of their statistics. Classes are columns here, -1 for those of others."""

    statistics: Tensor  # with the top class, (6 + 1, N)
    top_q: Tensor
    target: Tensor
    top: Tensor
    ignored: Tensor

    @staticmethod
    def of(
        target: Tensor, statistics: Tensor, index: Tensor, top_q: Any, ignore_index: int, shards: VocabularyShards
    ) -> _Rows:
        ignored = target == ignore_index
        column, top = (shards.here(x.masked_fill(ignored, -1))[0] for x in (target, index[0]))
        return _Rows(statistics, top_q, column, top, ignored)

    @property
    def for_passes(self) -> tuple[Tensor, Tensor]:
        """Targets and indices of the picks."""
        return self.target.masked_fill(self.ignored, IGNORED), self.top[None]

    def probabilities(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the classes here p, 1 - p, and whether it is the target. Those of ignored rows may be anything."""
        m = self.statistics[ops.MAX]
        p = (z.to(m.dtype) - m[:, None]).exp_().mul_(1 / self.statistics[ops.SUM_EXP][:, None])
        # 1 - p cancels for the one class that may have p > 0.5
        q = _put(1 - p, self.top, self.top_q)
        none = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
        return p, q, _put(none, self.target, torch.ones_like(self.ignored))

    def slope_sums(self, p: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of p d of the other classes than the top one, and that of the top class."""
        slope = p * d
        of_top = _at(slope, self.top)
        return _put(slope, self.top, torch.zeros_like(of_top)).sum(-1, dtype=torch.float64), of_top.double()

    def gradient(self, p: Tensor, d: Tensor, coefficients: Tensor, weight: Tensor | None) -> Tensor:
        """Of the logits, from `d`, which it overwrites, and coefficients as of `_Terms.gradients`."""
        g, others, of_top, a, u = coefficients
        at_top = self.top_q * _at(d, self.top) - others
        turn = _put(d.sub_((others + of_top)[:, None]), self.top, at_top)
        gradient = turn.mul_(g[:, None]).add_(a[:, None]).mul_(p)
        gradient.sub_(u[:, None] if weight is None else u[:, None] * weight)
        return gradient.masked_fill_(self.ignored[:, None], 0)

    def singled_out(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same of the target and of the top class, (N, 2), where they are; -1 for the second if it is the first."""
        top_p, q = 1 / self.statistics[ops.SUM_EXP], self.statistics[ops.Q]
        p = torch.stack([(-self.statistics[ops.CE]).exp(), top_p], 1)
        same = self.target == self.top
        columns = torch.stack([self.target, self.top.masked_fill(same, -1)], 1)
        always = torch.ones_like(same)
        positive, top = torch.stack([always, ~always], 1), torch.stack([same, always], 1)
        return p, torch.stack([q, self.top_q], 1), positive, top, columns


def _at(x: Tensor, column: Tensor) -> Tensor:
    """The rows' elements (n,) of `x` at columns (n,), 0 where there is none."""
    if x.shape[1] == 0:
        return x.new_zeros(len(column))
    return x.gather(1, column.clamp(min=0)[:, None])[:, 0].masked_fill(column < 0, 0)


def _put(x: Tensor, column: Tensor, value: Tensor) -> Tensor:
    """Puts them there, in place."""
    if x.shape[1] == 0:
        return x
    where = column.clamp(min=0)[:, None]
    return x.scatter_(1, where, torch.where(column[:, None] < 0, x.gather(1, where), value[:, None]))


@dataclass(frozen=True, eq=False)
class _Terms:
    """The terms of this rank's classes, and what they are made of; in PyTorch, a few rows at a time."""

    function: Callable[..., Any]
    """Terms (n, K) of (p, q, positive, columns, *params): of all columns slice(None), else an (n, K) of them."""
    form: Form | None
    sources: Sequence[Any]  # of all rows
    rows: _Rows
    params: Sequence[Tensor]

    @property
    def classes(self) -> int:
        return len(self.sources[1]) if self.form else self.sources[0].shape[1]

    def parts(self) -> Iterator[tuple[slice, _Rows, list[Tensor]]]:
        rows = len(self.rows.target)
        params, step = [x.expand(rows) for x in self.params], rows_at_once(self.classes)
        for begin in range(0, max(1, rows), step):
            part = slice(begin, min(begin + step, rows))
            yield part, _Rows(*(x[..., part] for x in self.rows)), [x[part] for x in params]

    def sums(self, wanted: _Wanted) -> Tensor:
        """(PARAMS + P, N) in float64, over the classes here; without slopes but the first row."""
        results = []
        for part, rows, params in self.parts():
            z, _ = self._logits(part, (False,) * 3)
            p, q, positive = rows.probabilities(z)
            if wanted.slopes:
                value, d, by_params = self.derivatives(p, q, positive, slice(None), params, wanted.learnt)
                sums = [value.sum(-1, dtype=torch.float64), *rows.slope_sums(p, d), *by_params]
            else:
                sums = [self.function(p, q, positive, slice(None), *params).sum(-1, dtype=torch.float64)]
            results.append(torch.stack(sums).masked_fill(rows.ignored, 0))
        return torch.cat(results, 1)

    def gradients(
        self, needed: Sequence[bool], coefficients: Tensor, weight: Tensor | None, shards: VocabularyShards
    ) -> Sequence[Tensor | None]:
        """Of the sources, by `coefficients` (5, N): g, OTHERS, TOP, a and u of dL/dz_j = p_j (g (d_j - S) + a) - u w_j.

        One collective where hidden states need theirs.
        """
        totals = [
            torch.zeros_like(x, dtype=compute_dtype(x.dtype) if k else x.dtype) if need else None
            for k, (x, need) in enumerate(zip(self.sources, needed, strict=True))
        ]
        for part, rows, params in self.parts():
            z, pull = self._logits(part, needed)
            p, q, positive = rows.probabilities(z)
            _, d, _ = self.derivatives(p, q, positive, slice(None), params)
            grads = iter(pull(rows.gradient(p, d, coefficients[:, part], weight).to(z.dtype)))
            for k, total in enumerate(totals):
                if total is not None:
                    (total if k else total[part]).add_(next(grads))
        result = [None if x is None else x.to(source.dtype) for x, source in zip(totals, self.sources, strict=True)]
        if self.form and result[0] is not None:
            hidden = ops.sum_over_ranks(result[0], shards.name)
            result[0] = hidden.chunk(self.form.row_parts)[shards.rank if self.form.row_parts > 1 else 0]
        return result

    def _logits(self, part: slice, needed: Sequence[bool]) -> tuple[Tensor, Any]:
        """Those of some rows, and what gives the gradients of the sources."""
        (first, *others), form = self.sources, self.form
        if form is None:
            return first[part], lambda gradient: [gradient]
        return _vjp(lambda h, w, b: dense_logits(h, w, b, form), (first[part], *others), needed)

    def derivatives(
        self,
        p: Tensor,
        q: Tensor,
        positive: Tensor,
        columns: Any,
        params: Sequence[Tensor],
        learnt: Sequence[bool] | None = None,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """The terms, d, and the derivatives of their sums over the classes by the learnt parameters."""

        def terms(p: Tensor, q: Tensor, *params: Tensor) -> Tensor:
            return self.function(p, q, positive, columns, *params)

        value, pull = _vjp(terms, (p, q, *params), (True, True, *(learnt or [False] * len(params))))
        dp, dq, *by_params = pull(torch.ones_like(value))
        return value, dp - dq, by_params


@dataclass(frozen=True, eq=False)
class _CompiledTerms(_Terms):
    """The same by the passes, for which PyTorch sees to the target and the top class."""

    name: str
    weight: Tensor | None  # of the classes here
    compiled_params: list[Tensor]
    inplace: bool
    impl: str

    def sums(self, wanted: _Wanted) -> Tensor:
        result = self.rows.target.new_zeros((PARAMS, len(self.rows.target)), dtype=torch.float64)
        if self.classes:
            target, index = self.rows.for_passes
            rows = (target, self.weight, self.rows.statistics, index, self.compiled_params, self.name, IGNORED)
            if self.form is None:
                loss, others = ops.term_sums(self.sources[0], *rows, self.impl)
            else:
                loss, others = ops.linear_term_sums(*self.sources, *rows, *self.form, self.impl)
            p, _, value, d, top, away = self._singled_out()
            of_top = p * d
            result[LOSS] = loss + value.masked_fill(away, 0).sum(1)
            result[OTHERS] = others + of_top.masked_fill(away | top, 0).sum(1)
            result[TOP] = of_top.masked_fill(away | ~top, 0).sum(1)
        return result if wanted.slopes else result[:OTHERS]

    def gradients(
        self, needed: Sequence[bool], coefficients: Tensor, weight: Tensor | None, shards: VocabularyShards
    ) -> Sequence[Tensor | None]:
        """`u` is 0, and `a` is where g is."""
        if not self.classes and self.form is None:
            return torch.zeros_like(self.sources[0]), None, None
        g, others, of_top, a, _ = coefficients
        a = torch.where(g == 0, 0, a / g)
        shift = others + of_top - a
        at_target = at_top = torch.zeros_like(g)
        if self.classes:
            p, q, _, d, top, _ = self._singled_out()
            at_target, at_top = (p * torch.where(top, q * d - (others - a)[:, None], d - shift[:, None])).unbind(1)
            at_top = torch.where(top[:, 0], at_target, at_top)
        target, index = self.rows.for_passes
        saved = (self.rows.statistics, index, torch.stack([shift, at_top, at_target, torch.zeros_like(g)]))
        tensors = (target, self.weight, *saved, g, self.compiled_params)
        return autograd.gradients(
            self.sources, self.form, needed, self.inplace, tensors, (self.name, IGNORED), self.impl
        )

    def _singled_out(self) -> tuple[Tensor, ...]:
        """Of the target and the top class (N, 2): p, q, terms, d, whether it is the top class, which are elsewhere."""
        p, q, positive, top, columns = self.rows.singled_out()
        params = [x.expand(len(p)) for x in self.params]
        value, d, _ = self.derivatives(p, q, positive, columns.clamp(min=0), params)
        return p, q, value, d, top, columns < 0


def _vjp(function: Callable[..., Tensor], inputs: Sequence[Any], wanted: Sequence[bool]) -> Any:
    """The value, and what gives the gradients of the inputs that are wanted from that of the value."""
    if not any(wanted):
        return function(*inputs), None
    if torch.compiler.is_compiling():

        def of_wanted(*chosen: Tensor) -> Tensor:
            rest = iter(chosen)
            return function(*(next(rest) if want else x for x, want in zip(inputs, wanted, strict=True)))

        return torch.func.vjp(of_wanted, *(x for x, want in zip(inputs, wanted, strict=True) if want))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if want else x for x, want in zip(inputs, wanted, strict=True)]
        value = function(*leaves)
    chosen = [x for x, want in zip(leaves, wanted, strict=True) if want]

    def pull(gradient: Tensor) -> Sequence[Tensor]:
        if not value.requires_grad:  # a constant
            return [torch.zeros_like(x) for x in chosen]
        return torch.autograd.grad(value, chosen, gradient, materialize_grads=True)

    return value.detach(), pull


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


class _RowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, settings, target, weight, token_weight, *params):  # type: ignore[no-untyped-def]
        divisor, epilogue, shared, ignore_index, impl, wanted = settings
        mean, classes = shared.label_smoothing != 0, logits.shape[1]
        statistics, index, top_q = autograd.statistics_of(
            (logits, None, None), None, target, weight, None, ignore_index, Picks(1, mean=mean), impl, of_top=True
        )
        ignored = target == ignore_index
        real = (target >= 0) & (target < classes) & ~ignored
        rows = _Rows(statistics, top_q, torch.where(real, target, -1), index[0], ignored)
        lse = statistics[ops.MAX] + statistics[ops.SUM_EXP].log()
        row_weight = autograd.row_weights(logits, target, token_weight, divisor)

        def losses(base: Tensor, lse: Tensor, mean_ce: Tensor) -> Tensor:
            statistics = Statistics(target=target.masked_fill(~real, 0), lse=lse, mean_ce=mean_ce)
            return shared.apply(base, statistics, weight, classes, weighted=True).masked_fill(ignored, 0)

        # All of it but the terms is linear in their sums.
        none, mean_ce = torch.zeros_like(lse), statistics[ops.MEAN_CE]
        upstream = torch.ones_like(lse) if row_weight is None else row_weight
        g, a, u = _vjp(losses, (none, lse, mean_ce), (True,) * 3)[1](upstream)
        u = u / classes
        a = a + u * (classes if weight is None else weight.sum())

        terms = _Terms(_weighted(epilogue, weight), None, (logits, None, None), rows, params)
        needed = ctx.needs_input_grad[0] and wanted.slopes
        gradient = backends.new_buffer(logits, logits.shape) if needed else None
        sums = []
        for part, some, own in terms.parts():
            p, q, positive = some.probabilities(logits[part])
            value, d, by_params = terms.derivatives(p, q, positive, slice(None), own, wanted.learnt)
            base = value.sum(-1, dtype=torch.float64).to(lse.dtype)
            sums.append(torch.stack([base, *by_params]).masked_fill(some.ignored, 0))
            if gradient is not None:
                others, of_top = some.slope_sums(p, d)
                coefficients = torch.stack([g[part], others.to(p.dtype), of_top.to(p.dtype), a[part], u[part]])
                gradient[part] = some.gradient(p, d, coefficients, weight)
        base, *by_rows = torch.cat(sums, 1)
        total = autograd.weighted_sum(losses(base, lse, mean_ce), token_weight)
        slopes = [x * g for x in by_rows]
        ctx.save_for_backward(logits, target, weight, row_weight, gradient, *slopes, *params)
        ctx.settings = settings
        ctx.mark_non_differentiable(statistics, index)
        ctx.set_materialize_grads(False)
        return autograd.divided(total, divisor), statistics, index

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _, epilogue, shared, ignore_index, impl, wanted = ctx.settings
        nothing = (None,) * 4
        if grad_output is None:
            return (None, *nothing, *(None for _ in wanted.learnt))
        logits, target, weight, row_weight, gradient, *others = ctx.saved_tensors
        slopes, params = others[: sum(wanted.learnt)], others[sum(wanted.learnt) :]
        grad_output = grad_output.to(compute_dtype(logits.dtype))
        needed = (ctx.needs_input_grad[0], *wanted.learnt)
        if torch.is_grad_enabled():
            rows = reference.row_losses(logits, target, weight, None, params, epilogue, shared, ignore_index)[0]
            total = autograd.weighted_sum(rows, row_weight)
            chosen = [x for x, need in zip((logits, *params), needed, strict=True) if need]
            grads = iter(torch.autograd.grad(total, chosen, grad_output, create_graph=True))
            of_logits, *of_params = (next(grads) if need else None for need in needed)
            return of_logits, *nothing, *of_params
        of_logits = None if gradient is None else autograd.scaled(gradient, grad_output, impl)
        return of_logits, *nothing, *_of_params(params, wanted.learnt, [x * grad_output for x in slopes])


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
        form, _, ignore_index, mean, compiled, _, impl, shards, wanted = settings
        statistics, index, top_q = autograd.merged_statistics(
            (logits, linear_weight, linear_bias), form, target, weight, None, ignore_index, Picks(1, mean=mean), impl,
            shards, of_top=True,
        )  # fmt: skip
        if form and form.row_parts > 1 and not compiled:
            logits = shards.gather_parts(logits).flatten(0, 1)
        saved = (logits, linear_weight, linear_bias, *_Rows.of(target, statistics, index, top_q, ignore_index, shards))
        terms = _RowLosses._terms(settings, weight, [*saved, *params])
        sums = shards.total(terms.sums(wanted)).to(statistics.dtype)
        ctx.save_for_backward(sums, weight, *saved, *params)
        ctx.settings = settings
        lse, *others = _columns(statistics, index, target)
        ctx.mark_non_differentiable(*others)
        return sums[LOSS].clone(), lse, statistics[ops.MEAN_CE].clone(), *others

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx: Any, grad_loss: Tensor, grad_lse: Tensor, grad_mean: Tensor, *_: Any
    ):
        differentiated_once()
        sums, weight, *saved = ctx.saved_tensors
        *_, shards, wanted = ctx.settings
        terms = _RowLosses._terms(ctx.settings, weight, saved)
        u = grad_mean / shards.classes
        a = grad_lse + u * (shards.classes if weight is None else weight.sum())
        coefficients = torch.stack([grad_loss, sums[OTHERS], sums[TOP], a, u])
        grads = terms.gradients(ctx.needs_input_grad[:3], coefficients, shards.weight(weight), shards)
        return *grads, None, None, None, *_of_params(terms.params, wanted.learnt, sums[PARAMS:] * grad_loss)

    @staticmethod
    def _terms(settings: tuple[Any, ...], weight: Tensor | None, saved: Sequence[Any]) -> _Terms:
        form, epilogue, _, _, compiled, inplace, impl, shards, _ = settings
        own = shards.weight(weight)
        last = 3 + len(_Rows._fields)
        params = list(saved[last:])
        made_of = (_weighted(epilogue, own), form, saved[:3], _Rows(*saved[3:last]), params)
        return _CompiledTerms(*made_of, epilogue.name, own, params, inplace, impl) if compiled else _Terms(*made_of)


class _OverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, row_weight, settings, target, *params):  # type: ignore[no-untyped-def]
        _, function, summed, ignore_index, _, _, impl, shards, wanted = settings
        statistics, index, top_q = autograd.merged_statistics(
            (logits, None, None), None, target, None, None, ignore_index, Picks(1), impl, shards, of_top=True
        )
        saved = [logits, *_Rows.of(target, statistics, index, top_q, ignore_index, shards), *params]
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
        differentiated_once()
        row_weight, sums, by_rows, *saved = ctx.saved_tensors
        *_, shards, wanted = ctx.settings
        terms = _OverRows._by_sums(ctx.settings, _OverRows._pairs(ctx.settings, saved), sums, grad_result)
        if by_rows is None:
            by_rows = shards.total(terms.sums(wanted._replace(slopes=True)))
        else:
            by_rows = torch.tensordot(grad_result, by_rows.view(len(grad_result), PARAMS + sum(wanted.learnt), -1), 1)
        by_rows = by_rows.to(terms.rows.top_q.dtype)
        g = torch.ones_like(by_rows[LOSS]) if row_weight is None else row_weight
        none = torch.zeros_like(g)
        coefficients = torch.stack([g, by_rows[OTHERS], by_rows[TOP], none, none])
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = terms.gradients((True, False, False), coefficients, None, shards)[0]
        of_weight = by_rows[LOSS] if ctx.needs_input_grad[1] else None
        return gradient, of_weight, None, None, *_of_params(terms.params, wanted.learnt, by_rows[PARAMS:] * g)

    @staticmethod
    def _pairs(settings: tuple[Any, ...], saved: Sequence[Any]) -> _Terms:
        """Error and agreement of each class."""
        overlap, last = settings[0], 1 + len(_Rows._fields)

        def function(p: Tensor, q: Tensor, positive: Tensor, _: Any, *params: Tensor) -> tuple[Tensor, Tensor]:
            return overlap.function(p, q, positive, *(x[:, None] for x in params))

        return _Terms(function, None, (saved[0], None, None), _Rows(*saved[1:last]), saved[last:])

    @staticmethod
    def _sums(settings: tuple[Any, ...], pairs: _Terms, row_weight: Tensor | None) -> Tensor:
        """Over the rows (2, V), in float64."""
        overlap, _, _, _, compiled, _, impl, *_ = settings
        logits, rows, params = pairs.sources[0], pairs.rows, list(pairs.params)
        if compiled and pairs.classes:
            target, index = rows.for_passes
            of_rows = (target, row_weight, rows.statistics, index, params, overlap.over_rows, IGNORED, rows.top_q)
            return ops.class_sums(logits, *of_rows, impl)
        sums = logits.new_zeros((2, pairs.classes), dtype=torch.float64)
        for part, some, own in pairs.parts():
            p, q, positive = some.probabilities(logits[part])
            terms = torch.stack(pairs.function(p, q, positive, slice(None), *own)).masked_fill(some.ignored[:, None], 0)
            sums += (terms if row_weight is None else terms * row_weight[part, None]).sum(1, dtype=torch.float64)
        return sums

    @staticmethod
    def _by_sums(settings: tuple[Any, ...], pairs: _Terms, sums: Tensor, upstream: Tensor) -> _Terms:
        """Terms whose sum over all rows has the gradient of the function of the sums."""
        overlap, function, _, _, compiled, inplace, impl, *_ = settings
        (slopes,) = torch.func.vjp(function, sums)[1](upstream)
        by_error, by_agreement = slopes.to(pairs.rows.top_q.dtype).contiguous()

        def weighted(p: Tensor, q: Tensor, positive: Tensor, columns: Any, *params: Tensor) -> Tensor:
            error, agreement = pairs.function(p, q, positive, columns, *params)
            return error * by_error[columns] + agreement * by_agreement[columns]

        made_of = (weighted, None, pairs.sources, pairs.rows, pairs.params)
        if not compiled:
            return _Terms(*made_of)
        # The term's last parameter is the slope of the target's agreement, which is not the passes' to add.
        params = [*pairs.params, by_agreement.new_zeros(())]
        return _CompiledTerms(*made_of, overlap.over_rows, by_error, params, inplace, impl)
