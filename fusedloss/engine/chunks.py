"""The operators of hidden states, whose logits are made a chunk at a time and never stored.

A chunk holds whole rows, as many as a byte budget allows; its logits are read by the statistics pass, overwritten by
their gradient, and give way to the next one's. Nothing here knows a loss or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import new_buffer
from ..backends.base import Backend
from ..checks import IGNORED
from ..definition.rows import Job, Rows, Spec
from ..definition.statistics import Q
from ..distributed import sequence
from . import budgets

#: Classes of a block of the weight's gradient in half precision: the product that is added to its sum stays small.
WEIGHT_BLOCK = 4096

#: How many columns and rows of float16 matrices become float32 at a time where a CPU multiplies them.
PRODUCT_BLOCK = 1024

#: Rows and columns of the blocks in which a matrix gets its transpose added.
SQUARE = 512

_Losses = Callable[[Job, Tensor | None], None]


class GradientsLaterError(Exception):
    """The gradients of a loss function cannot be made with the loss."""


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients from linear forms: before the loss scale is known float16 has not the range."""
    return torch.float32 if dtype == torch.float16 else dtype


def new_gradients(rows: Rows, spec: Spec) -> list[Tensor]:
    """Gradients of the sources that need one, as the operators hand them over, to be written."""
    if not rows.is_linear:
        return [torch.empty_like(rows.logits, memory_format=torch.contiguous_format)]
    return [
        x.new_empty(x.shape, dtype=gradient_dtype(x.dtype))
        for x, need in zip(rows.sources, spec.needed, strict=True)
        if need
    ]


def put_top_q(job: Job, backend: Backend) -> None:
    """Write 1 - p of the top class, by another statistics pass for which that is the target."""
    top = job.index[0]
    target = top.masked_fill(top < 0, IGNORED)
    rows = job.rows._replace(target=target, class_weight=None, candidates=None, params=[])
    second = Job.new(rows, Spec(job.spec.impl, form=job.spec.form))
    backend.forward(second)
    job.statistics[-1] = second.statistics[Q]


# An exported graph calls operators with gradients on: autograd must not look inside.
@torch.no_grad()
def forward(
    rows: Rows,
    row_weight: Tensor | None,
    spec: Spec,
    backend: Backend,
    losses: _Losses | None = None,
    per_chunk: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Run the operator ``forward``; `losses` stands for an epilogue, with the upstream gradient in its coefficients.

    If all rows fit one chunk, `losses` is called once, with the rows in their own order. Otherwise it is called once a
    chunk or, without `per_chunk`, GradientsLaterError is raised.
    """
    order, chunks = _chunks(rows, spec, backend, several=per_chunk)
    if losses is not None and chunks.count == 1:
        return _forward_at_once(rows, row_weight, order, chunks, losses)
    if row_weight is not None and order is not None:
        row_weight = row_weight[order]
    gradients = _Gradients(chunks) if any(spec.needed) else None
    jobs: list[Sequence[Any]] = []
    for part in chunks:
        job = Job.new(chunks.rows_of(part), spec)
        upstream, counts = None if row_weight is None else row_weight[part], part.start < chunks.valid
        with_loss = losses is None and gradients is not None and counts
        if with_loss:
            job.upstream = upstream
        else:
            backend.forward(job)
        if losses is not None:
            losses(job, upstream)
        if gradients is not None and counts:
            gradients.add(part, job, with_loss)
        elif gradients is not None:
            gradients.add_nothing(part)
        if spec.top_q:
            put_top_q(job, backend)
        jobs.append((job.statistics, job.index, job.loss, job.coefficients))
        del job  # whose logits are the chunk's memory
    statistics, index, loss, coefficients = jobs[0] if len(jobs) == 1 else _in_order(order, *jobs)
    if loss is None:
        loss, coefficients = statistics.new_empty(0), statistics.new_empty((0, 0))
    return loss, statistics, index, coefficients, [] if gradients is None else gradients.finish(order)


def _forward_at_once(
    rows: Rows, row_weight: Tensor | None, order: Tensor | None, chunks: _Chunks, losses: _Losses
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The same where the logits are of a single chunk, so that they are still there when all rows have their losses."""
    parts = [(part, Job.new(chunks.rows_of(part), chunks.spec)) for part in chunks]
    for _, job in parts:
        chunks.backend.forward(job)
    whole = Job(rows, chunks.spec, *_in_order(order, *[(job.statistics, job.index) for _, job in parts]))
    losses(whole, row_weight)
    (coefficients,), gradients = _take(order, whole.coefficients), _Gradients(chunks)
    for part, job in parts:
        if part.start >= chunks.valid:
            gradients.add_nothing(part)
        else:
            job.coefficients = coefficients[:, part].contiguous()
            gradients.add(part, job)
    assert whole.loss is not None and whole.coefficients is not None
    return whole.loss, whole.statistics, whole.index, whole.coefficients, gradients.finish(order)


def _in_order(order: Tensor | None, *chunks: Sequence[Any]) -> list[Any]:
    """What each chunk has given, None or with a number for each row in its last dimension, in the rows' own order."""
    results: list[Any] = []
    for parts in zip(*chunks, strict=True):
        whole = None if parts[0] is None else torch.cat(parts, -1)
        if whole is not None and order is not None:
            whole = torch.empty_like(whole).index_copy_(whole.dim() - 1, order, whole)
        results.append(whole)
    return results


@torch.no_grad()
def backward(
    rows: Rows,
    statistics: Tensor,
    index: Tensor,
    coefficients: Tensor,
    upstream: Tensor | None,
    spec: Spec,
    backend: Backend,
) -> list[Tensor]:
    order, chunks = _chunks(rows, spec, backend)
    statistics, index, coefficients, upstream = _take(order, statistics, index, coefficients, upstream)
    gradients = _Gradients(chunks)
    for part in chunks:
        # A rank without classes adds nothing to the sums of others.
        if part.start >= chunks.valid or rows.classes == 0:
            gradients.add_nothing(part)
            continue
        saved = [x[:, part].contiguous() for x in (statistics, index, coefficients)]
        job = Job(chunks.rows_of(part), spec, saved[0], saved[1], None, saved[2])
        job.upstream = None if upstream is None else upstream[part]
        gradients.add(part, job)
    return gradients.finish(order)


@torch.no_grad()
def sums(rows: Rows, statistics: Tensor, index: Tensor, spec: Spec, backend: Backend) -> Tensor:
    """Sums of a class term over the classes."""
    order, chunks = _chunks(rows, spec, backend)
    statistics, index = _take(order, statistics, index)
    parts = []
    for part in chunks:
        saved = [x[:, part].contiguous() for x in (statistics, index)]
        parts.append((backend.sums(Job(chunks.rows_of(part), spec, saved[0], saved[1])),))
    return _in_order(order, *parts)[0]


class _Chunks:
    """Chunks of logits, each in the place of the one before; or, where the backend makes them, of gradients alone."""

    def __init__(self, rows: Rows, spec: Spec, backend: Backend, valid: int) -> None:
        self.rows, self.spec, self.backend, self.valid = rows, spec, backend, valid
        first, form, gradient = rows.hidden[0], spec.form, any(spec.needed)
        classes = rows.weight[0].shape[0]
        # The logits and, where the softcap's derivative is needed, its tanh.
        copies = 2 if gradient and form.softcap else 1
        if backend.makes_logits:
            copies = int(gradient)
            self.rows = rows._replace(bias=None if rows.bias is None else rows.bias.contiguous())
        row, most, of_weights = classes * first.element_size() * copies, classes, spec.needed[len(rows.hidden) :]
        if form.most_classes:
            # The ranks must agree on the chunks, and none knows whether the weight of another is frozen.
            most, of_weights = form.most_classes, (True,) * len(rows.weight)
            row = most * first.element_size() * (2 if form.softcap else 1)
        if rows.teacher:
            row += most * first.element_size()
        budget = form.budget or budgets.DEFAULT_BUDGET
        if not form.budget and first.device.type != "cpu":
            features = sum([w.shape[1] for w, need in zip(rows.weight, of_weights, strict=False) if need])
            budget = budgets.default_budget(first.device, first.dtype, valid * row, most * features, features > 0)
        self.count, self.size = budgets.chunk_rows(valid, row, budget) if row else (1, valid)
        # With a teacher, its logits are the last.
        self.buffers: list[Tensor] = []
        for _ in range(copies + len(rows.teacher[:1])):
            self.buffers.append(new_buffer(first, (max(self.size, 1), classes)))
        self._slopes = slice(1, copies)
        self._fetched: slice | None = None
        self._parts: list[Tensor] = []
        if form.row_parts > 1:
            self._parts = [h.new_empty((self.size, h.shape[1])) for h in rows.hidden]

    def __iter__(self) -> Iterator[slice]:
        """Yield the chunks of valid rows and then the ignored rows, all at once."""
        rows = self.rows.target.shape[0]
        for begin in range(0, self.valid, max(self.size, 1)):
            yield slice(begin, min(begin + self.size, self.valid))
        if self.valid < max(rows, 1):
            yield slice(self.valid, rows)

    def hidden(self, part: slice) -> list[Tensor]:
        if not self._parts:
            first, *others = self.rows.hidden
            return [first[part], *(h[part] for h in others)] if others else [first[part]]
        form, size = self.spec.form, part.stop - part.start
        if self._fetched != part:
            self._fetched = part
            for own, buffer in zip(self.rows.hidden, self._parts, strict=True):
                sequence.fetch_rows(own, part, buffer[:size], form.group)
        return [buffer[:size] for buffer in self._parts]

    def rows_of(self, part: slice) -> Rows:
        """The rows of a chunk as a backend takes them: of logits in hand where it does not make them."""
        rows = _part(self.rows, part, self.hidden(part))
        return rows if self.backend.makes_logits else self._with_logits(rows, part.start < self.valid)

    def _with_logits(self, rows: Rows, make: bool) -> Rows:
        (first, *others), (weight, *other_weights), softcap = rows.hidden, rows.weight, self.spec.form.softcap
        # A pass does not read those of ignored rows, which may lie on one another.
        logits = self.buffers[0][: first.shape[0]] if make else self.buffers[0][:1].expand(first.shape[0], -1)
        if make:
            if rows.bias is None:
                torch.mm(first, weight.t(), out=logits)
            else:
                torch.addmm(rows.bias, first, weight.t(), out=logits)
            for h, w in zip(others, other_weights, strict=True):
                for some in _rows_in_cache(logits, w):
                    logits[some].addmm_(h[some], w.t())
            if softcap:
                tanh = torch.tanh(logits.div_(softcap), out=self.buffers[self._slopes.stop - 1][: first.shape[0]])
                torch.mul(tanh, softcap, out=logits)
            if self.spec.form.mask_target:
                logits.scatter_(1, rows.target.clamp(min=0)[:, None], -torch.inf)
        teacher = [self._teachers_logits(rows, make)] if rows.teacher else []
        return rows._replace(hidden=[logits], weight=[], bias=None, teacher=teacher)

    def _teachers_logits(self, rows: Rows, make: bool) -> Tensor:
        hidden, weight, *bias = rows.teacher
        logits, softcap = self.buffers[-1], self.spec.form.teacher_softcap
        logits = logits[: hidden.shape[0]] if make else logits[:1].expand(hidden.shape[0], -1)
        if make:
            if bias:
                torch.addmm(bias[0], hidden, weight.t(), out=logits)
            else:
                torch.mm(hidden, weight.t(), out=logits)
            if softcap:
                logits.div_(softcap).tanh_().mul_(softcap)
        return logits

    def gradient(self, job: Job, with_loss: bool) -> Tensor:
        """Write the gradient of a chunk's products; where its logits are stored, in their place."""
        gradient = job.grad = self.buffers[0][: job.rows.target.shape[0]]
        if with_loss:
            self.backend.with_gradient(job)
        else:
            self.backend.backward(job)
        for tanh in self.buffers[self._slopes]:
            torch.ops.aten.tanh_backward.grad_input(gradient, tanh[: gradient.shape[0]], grad_input=gradient)
        return gradient


class _Gradients:
    """Gradients of what needs one, by chunks; sums over the chunks are float32 at least, but of few."""

    def __init__(self, chunks: _Chunks) -> None:
        self._chunks = chunks
        rows, needed, storage = chunks.rows, iter(chunks.spec.needed), chunks.rows.hidden[0].dtype
        self._dtype = torch.float32 if storage == torch.float16 else storage  # as gradient_dtype says
        dtype = torch.float64 if storage == torch.float64 else torch.float32
        self._hidden: list[Tensor | None] = []
        for x in rows.hidden:
            new = _by_columns if self._hidden and not chunks.spec.form.group else new_buffer
            self._hidden.append(new(x, x.shape, self._dtype) if next(needed) else None)
            total = self._hidden[-1]
            if total is not None and chunks.valid < rows.target.shape[0]:
                total[chunks.valid :] = 0
        # In a single chunk, in order, both parts of a symmetric form's gradient are one product, (G + G^T) H.
        symmetric = chunks.spec.form.symmetric and self._hidden[0] is not None
        in_order = chunks.valid == rows.target.shape[0]
        self._at_once = symmetric and chunks.count == 1 and in_order and storage != torch.float16
        self._in_parts = symmetric and not self._at_once
        of_weight = self._dtype if chunks.count <= budgets.most_rounded(rows.hidden[0].device) else dtype
        self._weight: list[Tensor | None] = []
        for x in rows.weight:
            new = _by_columns if self._weight else new_buffer
            self._weight.append(new(x, x.shape, of_weight) if next(needed) or self._in_parts else None)
        bias = rows.bias
        self._bias = bias.new_zeros(bias.shape[0], dtype=dtype) if bias is not None and next(needed) else None
        self._scaled: _ScaledSums | None = None
        if storage == torch.float16:
            self._scaled = _ScaledSums(chunks, [*self._weight, None if self._bias is None else self._bias[:, None]])
        self._pending: list[Any] = []

    def add(self, part: slice, job: Job, with_loss: bool = False) -> None:
        """Make the gradients of a chunk, from its coefficients or with its loss."""
        chunks, hidden, first, scaled = self._chunks, self._chunks.hidden(part), part.start == 0, self._scaled
        if scaled is not None:
            if with_loss:
                chunks.backend.forward(job)
            unit, with_loss = scaled.units(job, hidden), False  # between the passes: it comes from the coefficients
        gradient = chunks.gradient(job, with_loss)
        if self._at_once:
            _add_transposed_(gradient)
        arriving: list[Any] = []
        for total, weight in zip(self._hidden, chunks.rows.weight, strict=True):
            if total is None:
                continue
            whole = chunks.spec.form.row_parts == 1
            some = total[part] if whole else total.new_empty(gradient.shape[0], total.shape[1])
            _product(gradient, weight, some)
            if scaled is not None:
                some.mul_(unit[:, None])
            if not whole:
                arriving += sequence.send_rows(some, part, total, chunks.spec.form.group)
            elif chunks.spec.form.group:
                self._sum_over_ranks(total, part)
        if scaled is not None:
            scaled.add(gradient, hidden, first)
        else:
            for i, (total, h) in enumerate(zip(self._weight, hidden, strict=True)):
                if total is None:
                    continue
                for which in _rows_in_cache(gradient, h) if i else (slice(0, None),):
                    _add_weight(total, gradient[which].t(), h[which], first and not which.start)
            if self._bias is not None:
                self._bias.add_(gradient.sum(0, dtype=self._bias.dtype))
        for arrive in arriving:
            arrive()

    def add_nothing(self, part: slice) -> None:
        """Take rows that have no gradient."""
        if part.start >= self._chunks.valid > 0:
            return  # whose gradients are 0 from the first
        for total in self._hidden:
            if total is not None:
                total[part] = 0
                if self._chunks.spec.form.group:
                    self._sum_over_ranks(total, part)
        for total in self._weight:
            if total is not None and part.start == 0:
                total.zero_()

    def finish(self, order: Tensor | None) -> list[Tensor]:
        """Return the gradients as the operators hand them over, when all rows are through."""
        self._chunks.buffers.clear()  # which makes room for the weight's gradient beside its sum
        if self._scaled is not None:
            self._scaled.finish()
        for work in self._pending:
            work.wait()
        result = []
        for x in self._hidden:
            if x is not None:
                result.append(x.contiguous() if order is None else x.new_empty(x.shape).index_copy_(0, order, x))
        if self._in_parts and (by_weight := self._weight.pop()) is not None:
            result[0].add_(by_weight)
        for x in (*self._weight, self._bias):
            if x is not None:
                result.append(x.to(self._dtype).contiguous())
        return result

    def _sum_over_ranks(self, total: Tensor, part: slice) -> None:
        """With the last rows that have a gradient, while the weight's product goes on."""
        if part.stop >= self._chunks.valid:
            self._pending.append(sequence.sum_in_place(total, self._chunks.spec.form.group))


def _add_transposed_(x: Tensor) -> None:
    """Add its transpose to a square matrix in place, one pair of blocks at a time."""
    for i in range(0, x.shape[0], SQUARE):
        for j in range(i, x.shape[0], SQUARE):
            here, there = x[i : i + SQUARE, j : j + SQUARE], x[j : j + SQUARE, i : i + SQUARE]
            # To copy a transposed block first is faster than to add it. contiguous() would not copy a block of one row.
            turned = there.t().clone(memory_format=torch.contiguous_format)
            if i != j:
                there += here.t().clone(memory_format=torch.contiguous_format)
            here += turned


def _by_columns(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return memory for the gradient of an adapter's matrix, column after column where that is faster."""
    # Of one row or column, or of nothing, both ways are one, and the fakes have strides of rows.
    by_columns = budgets.is_narrow(x) and min(x.shape) > 1
    return new_buffer(x, shape[::-1], dtype).t() if by_columns else new_buffer(x, shape, dtype)


def _rows_in_cache(chunk: Tensor, factor: Tensor) -> Iterator[slice]:
    """Yield the rows of a chunk, all at once or, for a product with few columns, as many as stay in the cache."""
    rows, row = chunk.shape[0], max(1, chunk.shape[1] * chunk.element_size())
    step = max(1, budgets.CACHED * torch.get_num_threads() // row) if budgets.is_narrow(factor) else max(1, rows)
    for begin in range(0, max(1, rows), step):
        yield slice(begin, begin + step)


def _add_weight(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    if total.dtype == gradient.dtype or budgets.sums_in_float32(gradient.device):
        return _product(gradient, hidden, total, add=not first)
    # The product comes rounded to bfloat16, and a second one gives what was lost.
    for begin in range(0, total.shape[0], WEIGHT_BLOCK):
        part, some = gradient[begin : begin + WEIGHT_BLOCK], total[begin : begin + WEIGHT_BLOCK]
        product = torch.mm(part, hidden)
        if first:
            some.copy_(product)
        else:
            some.add_(product)
        some.add_(torch.addmm(product, part, hidden, beta=-1))


class _ScaledSums:
    """Sums over chunks of float16 gradients (n, V), transposed, times hidden states (n, D) and the units of the rows.

    The products are those of float16, so that the largest factor goes to the top of its range, where small ones keep
    their digits. The power of two that factors are divided by grows with them, and the sum shrinks; at last the sum is
    multiplied by it.
    """

    def __init__(self, chunks: _Chunks, totals: list[Tensor | None]) -> None:
        """The last of the totals (V, D) is the bias's, of hidden states that are 1."""
        self._totals, self._backend, weight = totals, chunks.backend, chunks.rows.class_weight
        self._norms = chunks.rows.hidden[0].new_ones(len(totals), dtype=torch.float32)
        self._scales = torch.zeros_like(self._norms)
        self._largest_weight = None if weight is None else _put_norm(weight, torch.ones_like(self._norms[0]))

    def units(self, job: Job, hidden: list[Tensor]) -> Tensor:
        """Divide the job's upstream gradient by the units of its rows, and return them."""
        for norm, total, h in zip(self._norms, self._totals[:-1], hidden, strict=False):
            if total is not None:
                _put_norm(h, norm)
        unit, *self._changes = self._backend.units_(job, self._largest_weight, self._norms, self._scales)
        return unit

    def add(self, gradient: Tensor, hidden: list[Tensor], first: bool) -> None:
        for total, h, factor, change in zip(self._totals, [*hidden, None], *self._changes, strict=True):
            if total is None:
                continue
            scaled = gradient.new_empty(gradient.shape[0], total.shape[1])
            if h is None:
                scaled.copy_(factor[:, None])
            else:
                torch.mul(h, factor[:, None], out=scaled)
            if not first:
                self._backend.scale_(total, change)
            _product(gradient.t(), scaled, total, add=not first)

    def finish(self) -> None:
        for total, scale in zip(self._totals, self._scales, strict=True):
            if total is not None:
                self._backend.scale_(total, scale)


def _put_norm(x: Tensor, norm: Tensor) -> Tensor:
    """Write the largest magnitude; where there is none, leave what is there."""
    return torch.linalg.vector_norm(x, torch.inf, dtype=norm.dtype, out=norm) if x.numel() else norm


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write the product of two matrices, or add it to what is there; of half precision perhaps into float32."""
    if out.dtype == a.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif budgets.sums_in_float32(out.device):
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


def _chunks(rows: Rows, spec: Spec, backend: Backend, several: bool = True) -> tuple[Tensor | None, _Chunks]:
    """An order of the rows with the ignored ones last, None for that in hand, and the chunks of rows in that order."""
    count, order, ignored = rows.target.shape[0], None, None
    valid = count
    if spec.form.drop_ignored:
        ignored = rows.target == IGNORED
        valid -= int(ignored.sum())
    chunks = _Chunks(rows, spec, backend, valid)
    if not several and chunks.count > 1:
        raise GradientsLaterError
    if ignored is not None and valid != count:
        order = ignored.to(torch.int8).argsort(stable=True)
        chunks.rows = _part(chunks.rows, order, [h[order] for h in chunks.rows.hidden])
    return order, chunks


def _part(rows: Rows, which: slice | Tensor, hidden: list[Tensor]) -> Rows:
    """Select some of the rows; `hidden` are their hidden states."""
    target, candidates, teacher, params = rows.target[which], rows.candidates, rows.teacher, []
    for x in rows.params:
        params.append(x[which] if x.dim() else x)
    if candidates is not None:
        candidates = candidates[which]
    if teacher:
        teacher = [teacher[0][which], *teacher[1:]]
    return rows._replace(hidden=hidden, teacher=teacher, target=target, candidates=candidates, params=params)


def _take(order: Tensor | None, *tensors: Any) -> list[Any]:
    """What has a number for each row, in its last dimension, in that order."""
    if order is None:
        return list(tensors)
    return [None if x is None else x.index_select(-1, order) for x in tensors]
