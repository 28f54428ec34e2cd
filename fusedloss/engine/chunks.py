"""The linear forms: losses of hidden states, whose logits are made a chunk at a time and never stored.

The operators here know no loss and no device: they are matrix products around the row operators. A chunk holds whole
rows, as many as a byte budget allows; its logits are read by the statistics pass, overwritten by their gradient, and
give way to the next one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..checks import IGNORED, compute_dtype
from ..definition.epilogue import is_class_term
from ..definition.projection import Form
from ..definition.statistics import Picks, statistics_with_top
from ..distributed import vocabulary
from . import budgets as chunking
from . import operators as ops

#: Classes of a block of the weight's gradient in half precision: the product that is added to its sum stays small.
WEIGHT_BLOCK = 4096

#: The gradients that passes which make none are to give.
_NONE = (False, False, False)

#: How many columns and rows of float16 matrices become float32 at a time where a CPU multiplies them.
PRODUCT_BLOCK = 1024


class _RowGradients(NamedTuple):
    """The gradients of a chunk's logits by the products, before the softcap."""

    values: Tensor  # (n, V)
    unit: Tensor | None
    """What each row of the values is to be multiplied by, (n,) powers of two in float32; None for 1."""


def _units(
    weight: Tensor | None, statistics: Tensor, coefficients: Tensor, upstream: Tensor | None, epilogue: str
) -> Tensor:
    """Compute the power of two by which each row's gradient is divided, so that it fills the range of float16.

    A gradient that is made with the loss comes before the loss scale, and has small token weights, class weights or
    focal factors in it already: in float16 it would underflow.
    """
    bounds = coefficients.clone() if upstream is None else coefficients * upstream
    largest_weight = None if weight is None else weight.abs().amax()
    if is_class_term(epilogue):
        # Beside the target and the top class p df/dp is below 64 times the class weight, for all that float32 can hold.
        terms = bounds.new_full((), 64) if largest_weight is None else 64 * largest_weight
        terms = terms if upstream is None else terms * upstream.abs()
        bound = torch.linalg.vector_norm(bounds[: ops.COEFFICIENTS], 1, dim=0).add_(terms)
    else:
        bounds[ops.A].mul_(statistics[ops.Q])  # the most that the probability of another class can be
        if largest_weight is not None:
            bounds[ops.U].mul_(largest_weight)
        bound = torch.linalg.vector_norm(bounds, 1, dim=0)
    # The bound over its unit lies between 2^14 and 2^15. A row that is not finite must not decide for the others.
    unit = _power_of_two(bound.mul_(2.0**-14).clamp_(min=2.0**-78))
    return unit.nan_to_num_(posinf=2.0**-14)


def _power_of_two(x: Tensor) -> Tensor:
    """Round positive float32 numbers down to powers of two, and what is not finite to infinity."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


class _Chunks:
    """Chunks of logits, each in the place of the one before."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        form: Form,
        valid: int,
        needed: Sequence[bool],
        impl: str,
    ):
        self.hidden, self.weight, self.bias, self.target = hidden, weight, bias, target
        self.form, self.valid, self.impl = form, valid, impl
        self._has_units = hidden.dtype == torch.float16
        rows, classes = target.shape[0], weight.shape[0]
        copies = self._copies(any(needed))
        row = classes * hidden.element_size() * copies
        budget = form.budget or chunking.default_budget(
            hidden.device, hidden.dtype, rows * row, weight.numel(), gradient=needed[1]
        )
        if form.most_rows:
            row, budget = 1, form.most_rows
        self.count, self.rows = chunking.chunk_rows(rows, row, budget) if row else (1, rows)
        self._buffers = [backends.new_buffer(hidden, (self.rows, classes)) for _ in range(copies)]
        self._fetched: slice | None = None
        self._rows = hidden.new_empty((self.rows if form.row_parts > 1 else 0, hidden.shape[1]))

    def _copies(self, gradient: bool) -> int:
        """How many tensors as large as a chunk's logits there are."""
        return 2 if gradient and self.form.softcap else 1

    def free(self) -> None:
        """Give the memory of the logits back."""
        self._buffers.clear()

    def __iter__(self) -> Iterator[slice]:
        rows = self.target.shape[0]
        for begin in range(0, max(rows, 1), max(self.rows, 1)):
            yield slice(begin, min(begin + self.rows, rows))

    def rows_of_hidden(self, rows: slice) -> Tensor:
        if self.form.row_parts == 1:
            return self.hidden[rows]
        if self._fetched != rows:
            self._fetched, size = rows, rows.stop - rows.start
            self._rows = vocabulary.fetch_rows(self.hidden, rows, self._rows[:size], self.form.group)
        return self._rows[: rows.stop - rows.start]

    def statistics(self, rows: slice, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits = self._logits(rows)

        def statistics_of(*arguments: Any) -> tuple[Tensor, Tensor]:
            return ops.row_statistics(logits, *arguments, self.impl)

        return statistics_with_top(statistics_of, self.target[rows], *arguments)

    def loss(self, rows: slice, *arguments: Any) -> tuple[Tensor, ...]:
        return ops.row_loss(self._logits(rows), self.target[rows], *arguments, self.impl)

    def term_sums(self, rows: slice, *arguments: Any) -> Tensor:
        return ops.term_sums(self._logits(rows), self.target[rows], *arguments, self.impl)

    def loss_and_gradient(
        self,
        rows: slice,
        weight: Tensor | None,
        candidates: Tensor | None,
        params: list[Tensor],
        common: Tensor | None,
        row_weight: Tensor | None,
        epilogue: str,
        mean: bool,
        top_k: int,
    ) -> tuple[tuple[Tensor, ...], _RowGradients]:
        logits, settings = self._logits(rows), (epilogue, mean, top_k, self.impl)
        tensors = (self.target[rows], weight, candidates, params, common)
        if not self._has_units:
            result = ops.row_loss_gradient_(logits, *tensors, row_weight, *settings)
            return result, _RowGradients(self._before_softcap(logits), None)
        # The units come from the coefficients, between the passes.
        result = ops.row_loss(logits, *tensors, *settings)
        saved = (weight, *result[1:], row_weight, params, epilogue)
        return result, self._gradient(logits, rows, *saved)

    def gradient(self, rows: slice, *arguments: Any) -> _RowGradients:
        return self._gradient(self._logits(rows), rows, *arguments)

    def _gradient(
        self,
        memory: Tensor,
        rows: slice,
        weight: Tensor | None,
        statistics: Tensor,
        index: Tensor,
        coefficients: Tensor,
        upstream: Tensor | None,
        params: list[Tensor],
        epilogue: str,
    ) -> _RowGradients:
        """Write them to `memory`, in which the logits are where they are stored."""
        unit = None
        if self._has_units:
            unit = _units(weight, statistics, coefficients, upstream, epilogue)
            upstream = 1 / unit if upstream is None else upstream / unit
        saved = (self.target[rows], weight, statistics, index, coefficients, upstream, params)
        self._write_gradient(memory, rows, *saved, epilogue, self.impl)
        return _RowGradients(self._before_softcap(memory), unit)

    def _write_gradient(self, memory: Tensor, rows: slice, *arguments: Any) -> None:
        ops.row_gradient_(memory, *arguments)

    def _logits(self, rows: slice) -> Tensor:
        hidden, softcap = self.rows_of_hidden(rows), self.form.softcap
        logits, *slope = (buffer[: len(hidden)] for buffer in self._buffers)
        if rows.start >= self.valid:
            return logits
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
        if softcap:
            logits.div_(softcap).tanh_()
            for s in slope:
                torch.mul(logits, logits, out=s).neg_().add_(1)
            logits.mul_(softcap)
        if self.form.mask_target:
            logits.scatter_(1, self.target[rows].clamp(min=0)[:, None], -torch.inf)
        return logits

    def _before_softcap(self, gradient: Tensor) -> Tensor:
        """The gradient of a chunk's logits as that of its products, in place."""
        for slope in self._buffers[1:]:
            gradient.mul_(slope[: len(gradient)])
        return gradient


class _ProductChunks(_Chunks):
    """Chunks of gradients alone: kernels make the logits wherever they look at them, and store none."""

    def _copies(self, gradient: bool) -> int:
        return int(gradient)

    def statistics(self, rows: slice, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        product = self._product(rows)

        def statistics_of(*arguments: Any) -> tuple[Tensor, Tensor]:
            return ops.product_row_statistics(*product, *arguments, self.impl)

        return statistics_with_top(statistics_of, self.target[rows], *arguments)

    def loss(self, rows: slice, *arguments: Any) -> tuple[Tensor, ...]:
        return ops.product_row_loss(*self._product(rows), self.target[rows], *arguments, self.impl)

    def term_sums(self, rows: slice, *arguments: Any) -> Tensor:
        return ops.product_term_sums(*self._product(rows), self.target[rows], *arguments, self.impl)

    def loss_and_gradient(
        self,
        rows: slice,
        weight: Tensor | None,
        candidates: Tensor | None,
        params: list[Tensor],
        common: Tensor | None,
        row_weight: Tensor | None,
        epilogue: str,
        mean: bool,
        top_k: int,
    ) -> tuple[tuple[Tensor, ...], _RowGradients]:
        result = self.loss(rows, weight, candidates, params, common, epilogue, mean, top_k)
        return result, self.gradient(rows, weight, *result[1:], row_weight, params, epilogue)

    def gradient(self, rows: slice, *arguments: Any) -> _RowGradients:
        return self._gradient(self._buffers[0][: rows.stop - rows.start], rows, *arguments)

    def _write_gradient(self, memory: Tensor, rows: slice, *arguments: Any) -> None:
        ops.product_row_gradient_(memory, *self._product(rows), *arguments)

    def _product(self, rows: slice) -> tuple[Any, ...]:
        form = self.form
        bias = None if self.bias is None else self.bias.contiguous()
        return self.rows_of_hidden(rows), self.weight, bias, form.softcap, form.mask_target


def _kind(impl: str) -> type[_Chunks]:
    return _ProductChunks if impl in backends.PRODUCT_IMPLS else _Chunks


class _Gradients:
    """Gradients of hidden states, weight and bias, by chunks; (0,) where not needed; sums are in float32 at least."""

    def __init__(self, chunks: _Chunks, needed: Sequence[bool]):
        self._chunks, self._needed = chunks, needed
        hidden, weight = chunks.hidden, chunks.weight
        self._dtype, dtype = ops.gradient_dtype(weight.dtype), compute_dtype(weight.dtype)
        self._hidden = backends.new_buffer(hidden, hidden.shape if needed[0] else (0,), self._dtype)
        # Of one chunk the product is the gradient, and needs no sum.
        weight_dtype = self._dtype if chunks.count == 1 else dtype
        self._weight = backends.new_buffer(weight, weight.shape if needed[1] else (0,), weight_dtype)
        self._bias = weight.new_zeros(weight.shape[0] if needed[2] else 0, dtype=dtype)
        self._scaled = [_ScaledSum(x, chunks.impl) for x in (self._weight, self._bias[:, None])]
        self._pending: Any = None

    def add(self, rows: slice, gradient: _RowGradients) -> None:
        chunks = self._chunks
        first = rows.start == 0
        parts: list[Any] = []
        if self._needed[0] and chunks.form.row_parts == 1:
            self._write_hidden(self._hidden[rows], gradient)
            self._sum_over_ranks(rows)
        elif self._needed[0]:
            part = self._hidden.new_empty(len(gradient.values), self._hidden.shape[1])
            self._write_hidden(part, gradient)
            parts = vocabulary.send_rows(part, rows, self._hidden, chunks.form.group)
        if gradient.unit is not None:
            of_weight, of_bias = self._scaled
            unit = gradient.unit[:, None]
            if self._needed[1]:
                of_weight.add(gradient.values, chunks.rows_of_hidden(rows) * unit)
            if self._needed[2]:
                of_bias.add(gradient.values, unit)
        else:
            if self._needed[1]:
                self._add_weight(gradient.values.t(), chunks.rows_of_hidden(rows), first)
            if self._needed[2]:
                self._bias.add_(gradient.values.sum(0, dtype=self._bias.dtype))
        for arrive in parts:
            arrive()

    def add_nothing(self, rows: slice) -> None:
        """Take rows that have no gradient."""
        if self._needed[0]:
            self._hidden[rows] = 0
            self._sum_over_ranks(rows)
        if self._needed[1] and rows.start == 0:
            self._weight.zero_()

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients as the operators hand them over, when all rows are through."""
        self._chunks.free()  # which makes room for the weight's gradient beside its sum
        for total in self._scaled:
            total.finish()
        if self._pending is not None:
            self._pending.wait()
        return self._hidden, self._weight.to(self._dtype), self._bias.to(self._dtype)

    def _write_hidden(self, out: Tensor, gradient: _RowGradients) -> None:
        _product(gradient.values, self._chunks.weight, out)
        if gradient.unit is not None:
            out.mul_(gradient.unit[:, None])

    def _sum_over_ranks(self, rows: slice) -> None:
        """With the last rows, while the weight's product goes on."""
        if self._chunks.form.group and rows.stop == len(self._hidden):
            self._pending = vocabulary.sum_in_place(self._hidden, self._chunks.form.group)

    def _add_weight(self, gradient: Tensor, hidden: Tensor, first: bool) -> None:
        if self._weight.dtype == gradient.dtype or chunking.sums_in_float32(gradient.device):
            _product(gradient, hidden, self._weight, add=not first)
            return
        # The product comes rounded to bfloat16, and a second one gives what was lost.
        for begin in range(0, len(self._weight), WEIGHT_BLOCK):
            part, total = gradient[begin : begin + WEIGHT_BLOCK], self._weight[begin : begin + WEIGHT_BLOCK]
            product = torch.mm(part, hidden)
            if first:
                total.copy_(product)
            else:
                total.add_(product)
            total.add_(torch.addmm(product, part, hidden, beta=-1))


class _ScaledSum:
    """A sum over chunks of float16 gradients (n, V), transposed, times float32 factors (n, K).

    The products are those of float16, so that the largest factor goes to the top of its range, where small ones keep
    their digits. What it was divided by grows with the factors, and the sum shrinks; at last it is multiplied by it.
    """

    def __init__(self, total: Tensor, impl: str):
        self._total, self._impl = total, impl
        self._unit: Tensor | None = None

    def add(self, gradient: Tensor, factor: Tensor) -> None:
        before = self._unit
        largest = torch.linalg.vector_norm(factor, torch.inf) if factor.numel() else factor.new_ones(())
        unit = _power_of_two((largest * 2.0**-14).clamp_(min=2.0**-114 if before is None else before))
        self._unit = unit  # a power of two, so that nothing is rounded by it
        if before is not None:
            ops.scale_(self._total, before / unit, self._impl)
        scaled = torch.div(factor, unit, out=torch.empty_like(factor, dtype=gradient.dtype))
        _product(gradient.t(), scaled, self._total, add=before is not None)

    def finish(self) -> None:
        if self._unit is not None:
            ops.scale_(self._total, self._unit, self._impl)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write the product of two matrices, or add it to what is there; of half precision perhaps into float32."""
    if out.dtype == a.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif chunking.sums_in_float32(out.device):
        _float32_product(a, b, out, add)
    else:
        _blocked_product(a, b, out, add)


def _float32_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """On a GPU that has such products: one launch, and nothing is rounded on the way."""
    if add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _blocked_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Elsewhere. On most CPUs products of float16 are far slower than those of float32."""
    if not add:
        out.zero_()
    for top in range(0, len(a), WEIGHT_BLOCK):
        some = slice(top, top + WEIGHT_BLOCK)
        for begin in range(0, len(b), PRODUCT_BLOCK):
            block = slice(begin, begin + PRODUCT_BLOCK)
            out[some].addmm_(a[some, block].float(), b[block].float())


def _order(target: Tensor, drop_ignored: bool) -> tuple[Tensor | None, int]:
    """An order of the rows with the ignored ones last, None for that in hand, and the number of the others."""
    if not drop_ignored:
        return None, len(target)
    ignored = target == IGNORED
    valid = len(target) - int(ignored.sum())
    return (None if valid == len(target) else ignored.to(torch.int8).argsort(stable=True)), valid


def _take(order: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """Rows (dimension 0) in that order; what is not by rows stays."""
    if order is None:
        return list(tensors)
    return [x if x is None or x.dim() == 0 else x.index_select(0, order) for x in tensors]


def _take_columns(order: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return list(tensors) if order is None else [x.index_select(1, order) for x in tensors]


def _put_back(order: Tensor | None, dim: int, *tensors: Tensor) -> list[Tensor]:
    if order is None:
        return list(tensors)
    return [torch.empty_like(x).index_copy_(dim, order, x) for x in tensors]


def _part(rows: slice, tensors: list[Tensor]) -> list[Tensor]:
    return [x[rows] if x.dim() else x for x in tensors]


def _optional_part(rows: slice, x: Tensor | None) -> Tensor | None:
    return None if x is None else x[rows]


def linear_row_statistics(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    top_k: int,
    below: bool,
    mean: bool,
    of_top: bool,
    softcap: float,
    budget: int,
    drop_ignored: bool,
    mask_target: bool,
    group: str,
    row_parts: int,
    most_rows: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    order, valid = _order(target, drop_ignored)
    hidden, target, candidates = _take(order, hidden, target, candidates)
    form = Form(softcap, budget, drop_ignored, mask_target, group, row_parts, most_rows)
    chunks = _kind(impl)(hidden, linear_weight, linear_bias, target, form, valid, _NONE, impl)
    picks = Picks(top_k, below, mean)
    parts = [chunks.statistics(rows, weight, _optional_part(rows, candidates), picks, of_top) for rows in chunks]
    statistics, index, top_q = (torch.cat(columns, -1) for columns in zip(*parts, strict=True))
    statistics, index = _put_back(order, 1, statistics, index)
    (top_q,) = _put_back(order if of_top else None, 0, top_q)
    return statistics, index, top_q


def linear_row_loss(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    common: Tensor | None,
    row_weight: Tensor | None,
    needed: list[bool],
    epilogue: str,
    mean: bool,
    top_k: int,
    softcap: float,
    budget: int,
    drop_ignored: bool,
    mask_target: bool,
    group: str,
    row_parts: int,
    most_rows: int,
    impl: str,
) -> tuple[Tensor, ...]:
    order, valid = _order(target, drop_ignored)
    hidden, target, candidates, row_weight, *params = _take(order, hidden, target, candidates, row_weight, *params)
    form = Form(softcap, budget, drop_ignored, mask_target, group, row_parts, most_rows)
    chunks = _kind(impl)(hidden, linear_weight, linear_bias, target, form, valid, needed, impl)
    gradients = _Gradients(chunks, needed)
    parts = []
    for rows in chunks:
        tensors = (weight, _optional_part(rows, candidates), _part(rows, params), common)
        if any(needed):
            upstream = _optional_part(rows, row_weight)
            result, gradient = chunks.loss_and_gradient(rows, *tensors, upstream, epilogue, mean, top_k)
            if rows.start < valid:
                gradients.add(rows, gradient)
            else:
                gradients.add_nothing(rows)
            del gradient  # in the chunk's memory
        else:
            result = chunks.loss(rows, *tensors, epilogue, mean, top_k)
        parts.append(result)
    columns = parts[0] if len(parts) == 1 else [torch.cat(column, -1) for column in zip(*parts, strict=True)]
    (loss,) = _put_back(order, 0, columns[0])
    statistics, index, coefficients = _put_back(order, 1, *columns[1:])
    grad_hidden, grad_weight, grad_bias = gradients.finish()
    (grad_hidden,) = _put_back(order if needed[0] else None, 0, grad_hidden)
    return loss, statistics, index, coefficients, grad_hidden, grad_weight, grad_bias


def linear_term_sums(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    index: Tensor,
    params: list[Tensor],
    epilogue: str,
    softcap: float,
    budget: int,
    drop_ignored: bool,
    mask_target: bool,
    group: str,
    row_parts: int,
    most_rows: int,
    impl: str,
) -> Tensor:
    order, valid = _order(target, drop_ignored)
    hidden, target, *params = _take(order, hidden, target, *params)
    statistics, index = _take_columns(order, statistics, index)
    form = Form(softcap, budget, drop_ignored, mask_target, group, row_parts, most_rows)
    chunks = _kind(impl)(hidden, linear_weight, linear_bias, target, form, valid, _NONE, impl)
    parts = []
    for rows in chunks:
        saved = (x[:, rows].contiguous() for x in (statistics, index))
        parts.append(chunks.term_sums(rows, weight, *saved, _part(rows, params), epilogue))
    (sums,) = _put_back(order, 1, torch.cat(parts, 1))
    return sums


def linear_gradient(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    index: Tensor,
    coefficients: Tensor,
    grad_output: Tensor | None,
    params: list[Tensor],
    needed: list[bool],
    epilogue: str,
    softcap: float,
    budget: int,
    drop_ignored: bool,
    mask_target: bool,
    group: str,
    row_parts: int,
    most_rows: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    order, valid = _order(target, drop_ignored)
    hidden, target, grad_output, *params = _take(order, hidden, target, grad_output, *params)
    statistics, index, coefficients = _take_columns(order, statistics, index, coefficients)
    form = Form(softcap, budget, drop_ignored, mask_target, group, row_parts, most_rows)
    valid = valid if len(linear_weight) else 0  # a rank without classes adds nothing to the sums of others
    chunks = _kind(impl)(hidden, linear_weight, linear_bias, target, form, valid, needed, impl)
    gradients = _Gradients(chunks, needed)
    for rows in chunks:
        if rows.start >= valid:
            gradients.add_nothing(rows)
            continue
        saved = (x[:, rows].contiguous() for x in (statistics, index, coefficients))
        upstream = _optional_part(rows, grad_output)
        arguments = (*saved, upstream, _part(rows, params), epilogue)
        gradients.add(rows, chunks.gradient(rows, weight, *arguments))
    grad_hidden, grad_weight, grad_bias = gradients.finish()
    (grad_hidden,) = _put_back(order if needed[0] else None, 0, grad_hidden)
    return grad_hidden, grad_weight, grad_bias


ops.register_for_every_device(
    **{
        operator.__name__: ops.checked(operator.__name__, operator)
        for operator in (linear_row_statistics, linear_row_loss, linear_term_sums, linear_gradient)
    }
)
