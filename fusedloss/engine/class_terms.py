"""The terms of a loss over the classes, one a class of each row, as the autograd functions take them.

With f_k the terms of the classes of a row, functions of p_k and q_k = 1 - p_k, and d_k = df_k/dp_k - df_k/dq_k,

    dL/dz_j = p_j (d_j - S),   S = sum_k p_k d_k over all classes

A process may have some of the classes. Then it makes the sums of its own from the statistics of whole rows, and the
gradient of these by the sums of all.

The passes have the compiled class terms, but for the two classes of a row for which 1 - p is not the difference: the
target and the top class, which PyTorch adds. All other terms are PyTorch, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..checks import IGNORED, compute_dtype
from ..definition.projection import Form, dense_logits
from ..distributed.vocabulary import VocabularyShards, columns
from . import functions as autograd
from . import operators as ops

#: Bytes of probabilities that class terms in PyTorch hold at a time.
DENSE_BYTES = 2 * 2**20

#: What the ranks sum of each row: f, p d of all classes but the top one, p d of that; then df by each learnt parameter.
LOSS, OTHERS, TOP, PARAMS = range(4)


def rows_at_once(rows: int, classes: int) -> int:
    """Of so many. All of them where a compiler makes one loop of what is done to each, and parts would be unrolled."""
    most = rows if torch.compiler.is_compiling() else DENSE_BYTES // (max(1, classes) * 4)
    return max(1, most)


class OwnGradientsError(Exception):
    """A loss function over the classes uses a tensor that requires grad and that is none of its arguments."""


def _check_sources(value: Tensor, arguments: Sequence[Tensor]) -> None:
    """Raises OwnGradientsError where the graph of `value` has a leaf that is none of the arguments."""
    if value.is_leaf:
        leaves = [value] if value.requires_grad else []
    else:
        leaves, nodes, seen = [], [value.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            nodes += [source for source, _ in node.next_functions]
    if not all(any(leaf is x for x in arguments) for leaf in leaves):
        raise OwnGradientsError


class Wanted(NamedTuple):
    """Asked before the function, in which gradients are off and parameters as if they were constants."""

    slopes: bool
    learnt: tuple[bool, ...]
    grad_mode: bool

    @staticmethod
    def by(params: Sequence[Tensor], logits: Any = None) -> Wanted:
        """`logits`: for which alone there may be slopes to be made, of one process. Ranks make them all or none."""
        learnt = tuple(p.requires_grad for p in params)
        grad_mode = torch.is_grad_enabled()
        slopes = grad_mode and (logits is None or logits.requires_grad or any(learnt))
        return Wanted(slopes or transforms.traced(), learnt, grad_mode)


class Coefficients(NamedTuple):
    """Of dL/dz_j = p_j (g d_j - others - of_top + a) - u w_j: g S is in two parts. (N,) but the class weights w."""

    g: Tensor
    others: Tensor
    of_top: Tensor
    a: Tensor | None
    u: Tensor | None
    weight: Tensor | None

    def part(self, rows: slice) -> Coefficients:
        a, u = (None if x is None else x[rows] for x in (self.a, self.u))
        return Coefficients(self.g[rows], self.others[rows], self.of_top[rows], a, u, self.weight)


class Rows(NamedTuple):
    """What the terms of rows take of their statistics. Classes are columns here, -1 for those of others."""

    statistics: Tensor  # with the top class, (6 + 1, N)
    top_q: Tensor
    target: Tensor
    top: Tensor
    ignored: Tensor

    @staticmethod
    def of(
        target: Tensor,
        statistics: Tensor,
        index: Tensor,
        top_q: Any,
        classes: int,
        shards: VocabularyShards | None = None,
    ) -> Rows:
        """`classes`: here. On a GPU nobody has looked whether a target is one of them."""
        ignored = target == IGNORED
        first = 0 if shards is None else shards.own.start
        column, top = (columns(x.masked_fill(ignored, -1), first, classes)[0] for x in (target, index[0]))
        return Rows(statistics, top_q, column, top, ignored)

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

    def gradient(self, p: Tensor, d: Tensor, x: Coefficients) -> Tensor:
        """Of the logits, from d times g, which it overwrites."""
        at_top = self.top_q * _at(d, self.top) - x.others
        gradient = _put(d.sub_((x.others + x.of_top)[:, None]), self.top, at_top)
        if x.a is not None:
            gradient.add_(x.a[:, None])
        gradient.mul_(p)
        if x.u is not None:
            gradient.sub_(x.u[:, None] if x.weight is None else x.u[:, None] * x.weight)
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


def _is(x: Tensor, column: Tensor) -> Tensor:
    """Where each row's column is: a compiler makes part of a loop of it, which a gather or scatter would end."""
    return torch.arange(x.shape[1], device=x.device) == column[:, None]


def _at(x: Tensor, column: Tensor) -> Tensor:
    """The rows' elements (n,) of `x` at columns (n,), 0 where there is none."""
    if x.shape[1] == 0:
        return x.new_zeros(len(column))
    if torch.compiler.is_compiling():
        return torch.where(_is(x, column), x, 0).sum(1)
    return x.gather(1, column.clamp(min=0)[:, None])[:, 0].masked_fill(column < 0, 0)


def _put(x: Tensor, column: Tensor, value: Tensor) -> Tensor:
    """Puts them there, perhaps in place."""
    if x.shape[1] == 0:
        return x
    if torch.compiler.is_compiling():
        return torch.where(_is(x, column), value[:, None], x)
    where = column.clamp(min=0)[:, None]
    return x.scatter_(1, where, torch.where(column[:, None] < 0, x.gather(1, where), value[:, None]))


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of this rank's classes, and what they are made of; in PyTorch, a few rows at a time."""

    function: Callable[..., Any]
    """Terms (n, K) of (p, q, positive, columns, *params): of all columns slice(None), else an (n, K) of them."""
    form: Form | None
    sources: Sequence[Any]  # of all rows
    rows: Rows
    params: Sequence[Tensor]

    @property
    def classes(self) -> int:
        return len(self.sources[1]) if self.form else self.sources[0].shape[1]

    def parts(self) -> Iterator[tuple[slice, Rows, list[Tensor]]]:
        rows = len(self.rows.target)
        params, step = [x.expand(rows) for x in self.params], rows_at_once(rows, self.classes)
        for begin in range(0, max(1, rows), step):
            part = slice(begin, min(begin + step, rows))
            yield part, Rows(*(x[..., part] for x in self.rows)), [x[part] for x in params]

    def sums(self, wanted: Wanted) -> Tensor:
        """(PARAMS + P, N) in float64, over the classes here; without slopes but the first row."""
        results = []
        for part, rows, params in self.parts():
            z, _ = self._logits(part, (False,) * 3)
            p, q, positive = rows.probabilities(z)
            if wanted.slopes:
                value, d, by_params = self.derivatives(p, q, positive, slice(None), params, wanted.learnt)
                sums = [value.sum(-1, dtype=torch.float64), *rows.slope_sums(p, d), *by_params]
            else:
                with torch.set_grad_enabled(wanted.grad_mode and not torch.compiler.is_compiling()):
                    value = self.function(p, q, positive, slice(None), *params)
                _check_sources(value, ())
                sums = [value.sum(-1, dtype=torch.float64)]
            results.append(torch.stack(sums).masked_fill(rows.ignored, 0))
        return torch.cat(results, 1)

    def gradients(
        self, needed: Sequence[bool], coefficients: Coefficients, shards: VocabularyShards | None
    ) -> Sequence[Tensor | None]:
        """Of the sources. One collective where hidden states need theirs."""
        totals = [
            torch.zeros_like(x, dtype=compute_dtype(x.dtype) if k else x.dtype) if need else None
            for k, (x, need) in enumerate(zip(self.sources, needed, strict=True))
        ]
        for part, rows, params in self.parts():
            z, pull = self._logits(part, needed)
            p, q, positive = rows.probabilities(z)
            own = coefficients.part(part)
            _, d, _ = self.derivatives(p, q, positive, slice(None), params, upstream=own.g)
            grads = iter(pull(rows.gradient(p, d, own).to(z.dtype)))
            for k, total in enumerate(totals):
                if total is not None:
                    (total if k else total[part]).add_(next(grads))
        result = [None if x is None else x.to(source.dtype) for x, source in zip(totals, self.sources, strict=True)]
        if self.form and shards is not None and result[0] is not None:
            hidden = ops.sum_over_ranks(result[0], shards.name)
            result[0] = hidden.chunk(self.form.row_parts)[shards.rank if self.form.row_parts > 1 else 0]
        return result

    def _logits(self, part: slice, needed: Sequence[bool]) -> tuple[Tensor, Any]:
        """Those of some rows, and what gives the gradients of the sources."""
        (first, *others), form = self.sources, self.form
        if form is None:
            return first[part], lambda gradient: [gradient]
        return vjp(lambda h, w, b: dense_logits(h, w, b, form), (first[part], *others), needed)

    def derivatives(
        self,
        p: Tensor,
        q: Tensor,
        positive: Tensor,
        columns: Any,
        params: Sequence[Tensor],
        learnt: Sequence[bool] | None = None,
        upstream: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """The terms; d and the derivatives of the terms' sums by the learnt parameters, times the upstream gradient.

        `learnt`: in a forward, which raises OwnGradientsError where the function has other sources.
        """

        def terms(p: Tensor, q: Tensor, *params: Tensor) -> Tensor:
            value = self.function(p, q, positive, columns, *params)
            if learnt is not None and not torch.compiler.is_compiling():
                _check_sources(value, (p, q, *params))
            return value

        value, pull = vjp(terms, (p, q, *params), (True, True, *(learnt or [False] * len(params))))
        dp, dq, *by_params = pull(torch.ones_like(value) if upstream is None else upstream[:, None].expand_as(value))
        return value, dp - dq, by_params


@dataclass(frozen=True, eq=False)
class CompiledTerms(Terms):
    """The same by the passes, for which PyTorch sees to the target and the top class."""

    name: str
    weight: Tensor | None  # of the classes here
    compiled_params: list[Tensor]
    inplace: bool
    impl: str

    def sums(self, wanted: Wanted) -> Tensor:
        result = self.rows.target.new_zeros((PARAMS, len(self.rows.target)), dtype=torch.float64)
        if self.classes:
            target, index = self.rows.for_passes
            rows = (target, self.weight, self.rows.statistics, index, self.compiled_params, self.name)
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
        self, needed: Sequence[bool], coefficients: Coefficients, shards: VocabularyShards | None
    ) -> Sequence[Tensor | None]:
        """There is no `u`; where g is 0, so are the others."""
        if not self.classes and self.form is None:
            return torch.zeros_like(self.sources[0]), None, None
        g, others, of_top, a, *_ = coefficients
        others = others if a is None else others - a
        others, shift = (torch.where(g == 0, 0, x / g) for x in (others, others + of_top))
        at_target = at_top = torch.zeros_like(g)
        if self.classes:
            p, q, _, d, top, _ = self._singled_out()
            at_target, at_top = (p * torch.where(top, q * d - others[:, None], d - shift[:, None])).unbind(1)
            at_top = torch.where(top[:, 0], at_target, at_top)
        target, index = self.rows.for_passes
        saved = (self.rows.statistics, index, torch.stack([shift, at_top, at_target, torch.zeros_like(g)]))
        tensors = (target, self.weight, *saved, g, self.compiled_params)
        return autograd.gradients(self.sources, self.form, needed, self.inplace, tensors, self.name, self.impl)

    def _singled_out(self) -> tuple[Tensor, ...]:
        """Of the target and the top class (N, 2): p, q, terms, d, whether it is the top class, which are elsewhere."""
        p, q, positive, top, columns = self.rows.singled_out()
        params = [x.expand(len(p)) for x in self.params]
        value, d, _ = self.derivatives(p, q, positive, columns.clamp(min=0), params)
        return p, q, value, d, top, columns < 0


def vjp(function: Callable[..., Tensor], inputs: Sequence[Any], wanted: Sequence[bool]) -> Any:
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
