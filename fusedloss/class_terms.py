"""Losses over the classes of which each rank of a group has some: in PyTorch, a few rows at a time.

With f_k the terms of the classes of a row, functions of p_k and q_k = 1 - p_k, and d_k = df_k/dp_k - df_k/dq_k,

    dL/dz_j = p_j (d_j - S),   S = sum_k p_k d_k over the classes of all ranks

The terms are made of the statistics of whole rows, so that their sums take a collective after that of the statistics.
The sums of p_k d_k come with them, and the gradient needs nothing more of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, ops
from .autograd import Source
from .checks import compute_dtype
from .epilogue import Epilogue, Overlap
from .projection import Form, dense_logits
from .statistics import Picks, Statistics
from .vocabulary import VocabularyShards, differentiated_once

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
    impl: str,
    shards: VocabularyShards,
) -> tuple[Tensor, Statistics]:
    """Sums of the terms of each row (N,), differentiable as are ``lse`` and ``mean_ce`` of the statistics."""
    learnt = tuple(p.requires_grad for p in params)
    settings = (epilogue, ignore_index, mean, impl, shards, torch.is_grad_enabled(), learnt)
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
    impl: str,
    shards: VocabularyShards,
) -> tuple[Tensor, Statistics]:
    """``function(sums)`` of error and agreement of the classes here (2, V) in float64, and detached statistics.

    `summed`: it gives (K,), of which the sum over the ranks is returned. Otherwise one number for each class here.
    """
    learnt = tuple(p.requires_grad for p in params)
    settings = (overlap, function, summed, ignore_index, impl, shards, torch.is_grad_enabled(), learnt)
    result, lse, ce, top_ce, top_index = _OverRows.apply(logits, row_weight, settings, target, *params)
    return result, Statistics(lse=lse, ce=ce, top_ce=top_ce, top_index=top_index)


class _Rows(NamedTuple):
    """What the terms of rows take of their statistics, (N,) each. Classes are columns here, -1 for those of others."""

    max: Tensor
    sum_exp: Tensor
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
        return _Rows(statistics[ops.MAX], statistics[ops.SUM_EXP], top_q, column, top, ignored)

    def probabilities(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the classes here p, 1 - p, whether it is the target, and whether it is the top class."""
        ignored = self.ignored[:, None]
        z = z.to(self.max.dtype).masked_fill(ignored, 0)
        p = ((z - self.max[:, None]).exp() / self.sum_exp[:, None]).masked_fill(ignored, 0)
        number = torch.arange(z.shape[-1], device=z.device)
        top = number == self.top[:, None]
        # 1 - p cancels for the one class that may have p > 0.5
        return p, torch.where(top, self.top_q[:, None], 1 - p), number == self.target[:, None], top


class _Terms(NamedTuple):
    """The terms of this rank's classes, and what they are made of."""

    function: Callable[..., Any]
    """Terms (n, V) of (p, q, positive, *params), the parameters (n,)."""
    form: Form | None
    sources: Sequence[Any]  # of all rows
    rows: _Rows
    params: Sequence[Tensor]

    def parts(self) -> Iterator[tuple[slice, _Rows, list[Tensor]]]:
        rows, classes = len(self.rows.max), len(self.sources[1]) if self.form else self.sources[0].shape[1]
        params, step = [x.expand(rows) for x in self.params], rows_at_once(classes)
        for begin in range(0, max(1, rows), step):
            part = slice(begin, min(begin + step, rows))
            yield part, _Rows(*(x[part] for x in self.rows)), [x[part] for x in params]

    def sums(self, slopes: bool, learnt: Sequence[bool]) -> Tensor:
        """(PARAMS + P, N) in float64, over the classes here; without `slopes` but the first row."""
        results = []
        for part, rows, params in self.parts():
            z, _ = self._logits(part, (False,) * 3)
            p, q, positive, top = rows.probabilities(z)
            by_params: Sequence[Tensor] = []
            if slopes:
                value, d, by_params = self._derivatives(p, q, positive, params, learnt)
                sums = [value, (p * d).masked_fill(top, 0), (p * d).masked_fill(~top, 0)]
            else:
                sums = [self.function(p, q, positive, *params)]
            results.append(torch.stack([*(x.sum(-1, dtype=torch.float64) for x in sums), *by_params]))
        return torch.cat(results, 1)

    def gradients(
        self, needed: Sequence[bool], coefficients: Tensor, weight: Tensor | None, shards: VocabularyShards
    ) -> list[Tensor | None]:
        """Of the sources, by `coefficients` (5, N): g, OTHERS, TOP, a and u of dL/dz_j = p_j (g (d_j - S) + a) - u w_j.

        One collective where hidden states need theirs.
        """
        totals = [
            torch.zeros_like(x, dtype=compute_dtype(x.dtype) if k else x.dtype) if need else None
            for k, (x, need) in enumerate(zip(self.sources, needed, strict=True))
        ]
        for part, rows, params in self.parts():
            z, pull = self._logits(part, needed)
            p, q, positive, top = rows.probabilities(z)
            _, d, _ = self._derivatives(p, q, positive, params, [False] * len(params))
            g, others, of_top, a, u = coefficients[:, part, None].unbind()
            turn = torch.where(top, q * d - others, d - (others + of_top))
            gradient = p * (turn * g + a) - (u if weight is None else u * weight)
            grads = iter(pull(gradient.masked_fill(rows.ignored[:, None], 0).to(z.dtype)))
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

    def _derivatives(
        self, p: Tensor, q: Tensor, positive: Tensor, params: Sequence[Tensor], learnt: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """The terms, d, and the derivatives of their sums over the classes by the learnt parameters."""
        value, pull = _vjp(self.function, (p, q, positive, *params), (True, True, False, *learnt))
        dp, dq, *by_params = pull(torch.ones_like(value))
        return value, dp - dq, by_params


def _vjp(function: Callable[..., Tensor], inputs: Sequence[Any], wanted: Sequence[bool]) -> Any:
    """The value, and what gives the gradients of the inputs that are wanted from that of the value."""
    if not any(wanted):
        return function(*inputs), None

    def of_wanted(*chosen: Tensor) -> Tensor:
        rest = iter(chosen)
        return function(*(next(rest) if want else x for x, want in zip(inputs, wanted, strict=True)))

    return torch.func.vjp(of_wanted, *(x for x, want in zip(inputs, wanted, strict=True) if want))


def _columns(statistics: Tensor, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, ce, top_ce and top_index."""
    m, ce, log_sum = statistics[ops.MAX], statistics[ops.CE].clone(), statistics[ops.SUM_EXP].log()
    top_ce = torch.where(index[0] == target, ce, log_sum + (m - statistics[ops.STATISTICS]))
    return m + log_sum, ce, top_ce, index[0].clone()


def _of_params(params: Sequence[Tensor], learnt: Sequence[bool], by_rows: Tensor) -> list[Tensor | None]:
    """The parameters' gradients from those of the learnt ones by rows, (P, N)."""
    rest = iter(by_rows)
    return [
        (next(rest) if p.dim() else next(rest).sum()) if need else None for p, need in zip(params, learnt, strict=True)
    ]


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, logits, linear_weight, linear_bias, settings, target, weight, *params
    ):
        form, _, ignore_index, mean, impl, shards, slopes, learnt = settings
        statistics, index, _, top_q = autograd.merged_statistics(
            (logits, linear_weight, linear_bias), form, target, weight, None, ignore_index, Picks(1, mean=mean), impl,
            shards, of_top=True,
        )  # fmt: skip
        if form and form.row_parts > 1:
            logits = shards.gather_parts(logits).flatten(0, 1)
        saved = (logits, linear_weight, linear_bias, *_Rows.of(target, statistics, index, top_q, ignore_index, shards))
        terms = _RowLosses._terms(settings, weight, [*saved, *params])
        sums = shards.total(terms.sums(slopes, learnt)).to(statistics.dtype)
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
        *_, shards, _, learnt = ctx.settings
        terms = _RowLosses._terms(ctx.settings, weight, saved)
        u = grad_mean / shards.classes
        a = grad_lse + u * (shards.classes if weight is None else weight.sum())
        coefficients = torch.stack([grad_loss, sums[OTHERS], sums[TOP], a, u])
        grads = terms.gradients(ctx.needs_input_grad[:3], coefficients, shards.weight(weight), shards)
        return *grads, None, None, None, *_of_params(terms.params, learnt, sums[PARAMS:] * grad_loss)

    @staticmethod
    def _terms(settings: tuple[Any, ...], weight: Tensor | None, saved: Sequence[Any]) -> _Terms:
        form, epilogue, _, _, _, shards, _, _ = settings
        own = shards.weight(weight)

        def function(p: Tensor, q: Tensor, positive: Tensor, *params: Tensor) -> Tensor:
            terms = epilogue.of_classes(p, q, positive, list(params))
            return terms if own is None else terms * own

        last = 3 + len(_Rows._fields)
        return _Terms(function, form, saved[:3], _Rows(*saved[3:last]), saved[last:])


class _OverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, row_weight, settings, target, *params):  # type: ignore[no-untyped-def]
        overlap, function, summed, ignore_index, impl, shards, slopes, learnt = settings
        statistics, index, _, top_q = autograd.merged_statistics(
            (logits, None, None), None, target, None, None, ignore_index, Picks(1), impl, shards, of_top=True
        )
        saved = [logits, *_Rows.of(target, statistics, index, top_q, ignore_index, shards), *params]
        pairs = _OverRows._pairs(overlap, saved)
        sums = logits.new_zeros((2, logits.shape[1]), dtype=torch.float64)
        for part, rows, own in pairs.parts():
            p, q, positive, _ = rows.probabilities(logits[part])
            terms = torch.stack(pairs.function(p, q, positive, *own))
            sums += (terms if row_weight is None else terms * row_weight[part, None]).sum(1, dtype=torch.float64)
        result, by_rows = function(sums), None
        if summed:
            # The sums of the rows' derivatives by each of the results come with these.
            units = torch.eye(len(result), dtype=result.dtype, device=result.device) if slopes else ()
            parts = [_OverRows._by_sums(pairs, function, sums, unit).sums(True, learnt).flatten() for unit in units]
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
        overlap, function, *_, shards, _, learnt = ctx.settings
        terms = _OverRows._by_sums(_OverRows._pairs(overlap, saved), function, sums, grad_result)
        if by_rows is None:
            by_rows = shards.total(terms.sums(True, learnt))
        else:
            by_rows = torch.tensordot(grad_result, by_rows.view(len(grad_result), PARAMS + sum(learnt), -1), 1)
        by_rows = by_rows.to(terms.rows.max.dtype)
        g = torch.ones_like(by_rows[LOSS]) if row_weight is None else row_weight
        none = torch.zeros_like(g)
        coefficients = torch.stack([g, by_rows[OTHERS], by_rows[TOP], none, none])
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = terms.gradients((True, False, False), coefficients, None, shards)[0]
        of_weight = by_rows[LOSS] if ctx.needs_input_grad[1] else None
        return gradient, of_weight, None, None, *_of_params(terms.params, learnt, by_rows[PARAMS:] * g)

    @staticmethod
    def _pairs(overlap: Overlap, saved: Sequence[Any]) -> _Terms:
        """Error and agreement of each class."""
        last = 1 + len(_Rows._fields)

        def function(p: Tensor, q: Tensor, positive: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
            return overlap.function(p, q, positive, *(x[:, None] for x in params))

        return _Terms(function, None, (saved[0], None, None), _Rows(*saved[1:last]), saved[last:])

    @staticmethod
    def _by_sums(pairs: _Terms, function: Callable[[Tensor], Tensor], sums: Tensor, upstream: Tensor) -> _Terms:
        """Terms whose sum over all rows has the gradient of the function."""
        (slopes,) = torch.func.vjp(function, sums)[1](upstream)
        by_error, by_agreement = slopes.to(pairs.rows.max.dtype)

        def weighted(*arguments: Tensor) -> Tensor:
            error, agreement = pairs.function(*arguments)
            return error * by_error + agreement * by_agreement

        return pairs._replace(function=weighted)
