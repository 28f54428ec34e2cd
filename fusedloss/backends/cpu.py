"""The C++ engine: addresses, sizes and strides of a job's tensors are handed over."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import IGNORED, check_number, raise_index_error
from ..definition.rows import Job
from . import buffer_pool
from .base import Backend, Epilogues, column

try:
    from .. import _engine
except ImportError as error:
    _engine = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)

_LOWEST = -(2**63)
_NO_PICKS, _TOP = (0, False, False), (1, False, False)
_DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def set_threads_after_fork(threads: int) -> None:
    """Let the C++ engine use `threads` threads in this process, which was forked from another.

    The threads of torch are not in a forked process, where its own operators may wait for them for ever. The engine
    runs on one thread there, which is right for a worker of a ``DataLoader``. A forked process that trains calls this
    when it starts; the engine then makes that many threads for each pass. Processes that are forked from it begin with
    one again. In a process that was not forked, ``torch.get_num_threads()`` counts, and this changes nothing.
    """
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an int, got {threads!r}")
    check_number("threads", threads, 1, 2**15)
    if _engine:
        _engine.set_threads_after_fork(threads)


def new_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, in pages as large as can be: page faults would cost more than the arithmetic."""
    if math.prod(shape) * dtype.itemsize < buffer_pool.SMALL:
        return torch.empty(shape, dtype=dtype, device="cpu")
    tensor = buffer_pool.empty(shape, dtype)
    if _engine:
        _engine.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor


def _params(params: list[Tensor]) -> list[tuple[int, int]]:
    result = []
    for p in params:
        result.append((p.data_ptr(), p.stride(0) if p.dim() else 0))
    return result


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(job: Job, candidate_count: int = 0, picks: tuple[int, bool, bool] = _NO_PICKS) -> _engine.Rows:
    """`picks`: what a statistics pass searches for. In a gradient pass all picks are like candidates."""
    rows, (top_k, below, mean) = job.rows, picks
    logits, weight, candidates = rows.hidden[0], rows.class_weight, rows.candidates
    count, classes = logits.shape
    return _engine.Rows(
        _DTYPE_CODES[logits.dtype],
        logits.data_ptr(),
        count,
        classes,
        logits.stride(0),
        rows.target.data_ptr(),
        0 if candidates is None else candidates.data_ptr(),
        candidate_count,
        top_k,
        below,
        mean,
        0 if weight is None else weight.data_ptr(),
        float(weight.sum(dtype=torch.float64)) if mean and weight is not None else float(classes),
        torch.get_num_threads(),
    )


def _check_saved(job: Job) -> None:
    """Raise IndexError for those of a gradient pass that are not below the number of classes."""
    classes = job.rows.logits.shape[1]
    _check("target", job.rows.target, classes, IGNORED, _LOWEST)
    _check("pick", job.index, classes, -1, _LOWEST)


def _check(name: str, index: Tensor, classes: int, ignored: int, lowest: int = 0) -> None:
    bad = _engine.first_invalid(index.data_ptr(), index.numel(), classes, ignored, lowest)
    if bad >= 0:
        raise_index_error(name, int(index.view(-1)[bad]), classes)


class Cpu(Backend):
    name = "cpu"
    epilogues = Epilogues.of(_engine)

    def unavailable(self, device: torch.device | None = None) -> str | None:
        if device is not None and device.type != self.runs_on:
            return f"it runs on CPU tensors, but the input is on {device}"
        return None if _engine else f"the C++ extension did not load ({_IMPORT_ERROR})"

    def forward(self, job: Job) -> None:
        rows, spec, loss, coefficients = job.rows, job.spec, job.loss, job.coefficients
        target, scalars, classes = rows.target, rows.scalars, rows.hidden[0].shape[1]
        if _engine.first_invalid(target.data_ptr(), target.numel(), classes, IGNORED) >= 0:
            _check("target", target, classes, IGNORED)
        count = 0
        if rows.candidates is not None:
            _check("candidate", rows.candidates, classes, 0)
            count = rows.candidates.shape[1]
        _engine.forward(
            _rows(job, count, (spec.top_k, spec.below, spec.mean)),
            spec.epilogue,
            _params(rows.params),
            0 if scalars is None else scalars.data_ptr(),
            0 if loss is None else loss.data_ptr(),
            job.statistics.data_ptr(),
            job.index.data_ptr(),
            0 if coefficients is None else coefficients.data_ptr(),
        )

    def backward(self, job: Job) -> None:
        assert job.coefficients is not None and job.grad is not None
        target, index, upstream, classes = job.rows.target, job.index, job.upstream, job.rows.hidden[0].shape[1]
        # It leaves out what is negative, and would write to any other column.
        if (
            _engine.first_invalid(target.data_ptr(), target.numel(), classes, IGNORED, _LOWEST) >= 0
            or _engine.first_invalid(index.data_ptr(), index.numel(), classes, -1, _LOWEST) >= 0
        ):
            _check_saved(job)
        _engine.backward(
            _rows(job, index.shape[0]),
            job.spec.epilogue,
            _params(job.rows.params),
            job.statistics.data_ptr(),
            index.data_ptr(),
            job.coefficients.data_ptr(),
            0 if upstream is None else upstream.data_ptr(),
            0 if upstream is None else upstream.stride(0),
            job.grad.data_ptr(),
            job.grad.stride(0),
        )

    def sums(self, job: Job) -> Tensor:
        rows, spec = job.rows, job.spec
        arguments = (_rows(job), spec.epilogue, _params(rows.params), job.statistics.data_ptr(), job.index.data_ptr())
        count = rows.classes if spec.over_rows else len(rows.target)
        sums = rows.logits.new_empty((2, count), dtype=torch.float64)
        if spec.over_rows:
            _engine.class_sums(*arguments, *column(job.upstream), _address(job.top_q), sums.data_ptr())
        else:
            _engine.term_sums(*arguments, sums.data_ptr())
        return sums

    def terms(self, job: Job) -> None:
        assert job.loss is not None and job.coefficients is not None
        _check("target", job.rows.target, job.rows.classes, IGNORED)
        _check_saved(job)
        _engine.class_terms(
            _rows(job, picks=_TOP),
            job.spec.epilogue,
            _params(job.rows.params),
            job.statistics.data_ptr(),
            job.index.data_ptr(),
            job.loss.data_ptr(),
            job.coefficients.data_ptr(),
        )

    def new_gradient(self, logits: Tensor) -> Tensor:
        return new_memory(logits.shape, logits.dtype)
