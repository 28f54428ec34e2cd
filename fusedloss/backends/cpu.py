"""The C++ engine, on CPUs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checks import IGNORED, check_number, raise_index_error
from ..definition.rows import Job, Rows
from . import buffer_pool
from .base import Backend, Epilogues
from .native import native

try:
    from .. import _engine
except ImportError as error:
    _engine = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)
    # Python prefers the folder that it is started in to what is installed.
    _SOURCES = Path(__file__).parents[2]
    if (_SOURCES / "csrc").is_dir():
        _IMPORT_ERROR += (
            f"): these are the sources in {_SOURCES}; start Python in another folder, or install them (pip install -e ."
        )
        warnings.warn(f"losses run in plain PyTorch: no C++ extension ({_IMPORT_ERROR})", RuntimeWarning, stacklevel=2)

_LOWEST = -(2**63)


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

    def one_read(self, rows: Rows) -> bool:
        # Up to 64 columns are computed side by side. The terms of two rows take longer to compute than to keep.
        return rows.hidden[0].shape[1] <= 64 or len(rows.teacher) > 0

    def count(self, target: Tensor) -> int:
        if type(target) is not Tensor:  # which may hold no memory of its own
            return super().count(target)
        return int(_engine.count_valid(target.data_ptr(), target.numel(), IGNORED))

    def forward(self, job: Job) -> None:
        rows, spec, target, classes = job.rows, job.spec, job.rows.target, job.rows.hidden[0].shape[1]
        if _engine.first_invalid(target.data_ptr(), target.numel(), classes, IGNORED) >= 0:
            _check("target", target, classes, IGNORED)
        count, weight_sum = 0, job.weight_sum() if spec.mean else None
        if rows.candidates is not None:
            _check("candidate", rows.candidates, classes, 0)
            count = rows.candidates.shape[1]
        searched = (spec.top_k, spec.below, spec.mean, spec.moments)
        number = self.epilogues.numbers[spec.epilogue]
        _engine.forward(native(_engine.Job, job, number, searched, count, weight_sum))

    with_gradient = forward

    def backward(self, job: Job) -> None:
        target, index, classes = job.rows.target, job.index, job.rows.hidden[0].shape[1]
        # It leaves out what is negative, and would write to any other column.
        if (
            _engine.first_invalid(target.data_ptr(), target.numel(), classes, IGNORED, _LOWEST) >= 0
            or _engine.first_invalid(index.data_ptr(), index.numel(), classes, -1, _LOWEST) >= 0
        ):
            _check_saved(job)
        number, moments = self.epilogues.numbers[job.spec.epilogue], job.moments_of_gradient if job.spec.moments else 0
        _engine.backward(native(_engine.Job, job, number, (0, False, False, moments), given=index.shape[0]))

    def sums(self, job: Job) -> Tensor:
        rows, over_rows = job.rows, job.spec.over_rows
        count = (2, rows.classes) if over_rows else (3 if rows.teacher else 2, len(rows.target))
        sums = rows.logits.new_empty(count, dtype=torch.float64)
        epilogue = (self.epilogues.numbers_in_sums if over_rows else self.epilogues.numbers)[job.spec.epilogue]
        run = _engine.class_sums if over_rows else _engine.term_sums
        moments = (0, False, False, job.moments_of_gradient)
        run(native(_engine.Job, job, epilogue, moments, given=job.index.shape[0], sums=sums))
        return sums

    def terms(self, job: Job) -> None:
        _check("target", job.rows.target, job.rows.classes, IGNORED)
        _check_saved(job)
        epilogue = self.epilogues.numbers_in_sums[job.spec.epilogue]
        _engine.class_terms(native(_engine.Job, job, epilogue, (1, False, False, 0)))

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        # A loss that ends a graph has the factor 1.
        if (number := factor.item()) != 1:
            gradient.mul_(factor if math.isfinite(number) else torch.where(gradient == 0, 1, factor))

    def new_gradient(self, logits: Tensor) -> Tensor:
        return new_memory(logits.shape, logits.dtype)
