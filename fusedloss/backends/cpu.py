"""The C++ engine's kernels for the operators: they allocate the outputs and hand over addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import IGNORED, check_number, raise_index_error
from ..engine import operators as ops
from ..engine.contracts import Epilogues
from . import buffer_pool as memory
from . import passes
from .passes import Backward, Forward

try:
    from .. import _engine
except ImportError as error:
    _engine = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)

EPILOGUES = Epilogues.of(_engine)

_DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def unavailable() -> str | None:
    """Why the engine cannot run; None if it can."""
    return None if _engine else f"the C++ extension did not load ({_IMPORT_ERROR})"


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


def advise_huge_pages(tensor: Tensor) -> None:
    """Before memory is first written: page faults would cost more than the arithmetic."""
    if _engine:
        _engine.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None = None,
    candidate_count: int = 0,
    top_k: int = 0,
    below: bool = False,
    mean: bool = False,
) -> _engine.Rows:
    rows, classes = logits.shape
    return _engine.Rows(
        _DTYPE_CODES[logits.dtype],
        logits.data_ptr(),
        rows,
        classes,
        logits.stride(0),
        target.data_ptr(),
        _address(candidates),
        candidate_count,
        top_k,
        below,
        mean,
        _address(weight),
        float(weight.sum(dtype=torch.float64)) if mean and weight is not None else float(classes),
        torch.get_num_threads(),
    )


def _params(params: list[Tensor]) -> list[tuple[int, int]]:
    return [(p.data_ptr(), p.stride(0) if p.dim() else 0) for p in params]


def _check_saved(target: Tensor, index: Tensor, classes: int) -> None:
    """Check those of a gradient pass, which leaves out what is negative, and would write to any other column."""
    lowest = -(2**63)
    bad = _engine.first_invalid(target.data_ptr(), target.numel(), classes, IGNORED, lowest)
    if bad >= 0:
        raise_index_error("target", int(target[bad]), classes)
    bad = _engine.first_invalid(index.data_ptr(), index.numel(), classes, -1, lowest)
    if bad >= 0:
        raise_index_error("pick", int(index.view(-1)[bad]), classes)


def _check_indices(target: Tensor, candidates: Tensor | None, classes: int) -> None:
    bad = _engine.first_invalid(target.data_ptr(), target.numel(), classes, IGNORED)
    if bad >= 0:
        raise_index_error("target", int(target[bad]), classes)
    if candidates is not None:
        bad = _engine.first_invalid(candidates.data_ptr(), candidates.numel(), classes, 0)
        if bad >= 0:
            raise_index_error("candidate", int(candidates.view(-1)[bad]), classes)


def _statistics_pass(x: Forward) -> None:
    classes = x.logits.shape[1]
    _check_indices(x.target, x.candidates, classes)
    candidate_count = 0 if x.candidates is None else x.candidates.shape[1]
    settings = (x.candidates, candidate_count, x.top_k, x.below, x.mean)
    _engine.forward(
        _rows(x.logits, x.target, x.weight, *settings),
        x.epilogue or "",
        _params(x.params),
        _address(x.common),
        _address(x.loss),
        x.statistics.data_ptr(),
        x.index.data_ptr(),
        _address(x.coefficients),
    )


def _new_gradient(logits: Tensor) -> Tensor:
    grad = memory.empty(logits.shape, logits.dtype)
    advise_huge_pages(grad)
    return grad


def _gradient_pass(x: Backward) -> None:
    _check_saved(x.target, x.index, x.logits.shape[1])
    _engine.backward(
        _rows(x.logits, x.target, x.weight, candidate_count=x.index.shape[0]),
        x.epilogue,
        _params(x.params),
        x.statistics.data_ptr(),
        x.index.data_ptr(),
        x.coefficients.data_ptr(),
        *passes.column(x.grad_output),
        x.grad.data_ptr(),
        x.grad.stride(0),
    )


def class_sums(
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    statistics: Tensor,
    index: Tensor,
    params: list[Tensor],
    epilogue: str,
    top_q: Tensor | None,
) -> Tensor:
    sums = ops.new_class_sums(logits)
    _engine.class_sums(
        _rows(logits, target, None),
        epilogue,
        _params(params),
        statistics.data_ptr(),
        index.data_ptr(),
        *passes.column(row_weight),
        _address(top_q),
        sums.data_ptr(),
    )
    return sums


def class_terms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    statistics: Tensor,
    index: Tensor,
    params: list[Tensor],
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    _check_indices(target, None, logits.shape[1])
    _check_saved(target, index, logits.shape[1])
    loss, coefficients = ops.new_losses(statistics)
    _engine.class_terms(
        _rows(logits, target, weight, top_k=1),
        epilogue,
        _params(params),
        statistics.data_ptr(),
        index.data_ptr(),
        loss.data_ptr(),
        coefficients.data_ptr(),
    )
    return loss, coefficients


def term_sums(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    index: Tensor,
    params: list[Tensor],
    epilogue: str,
) -> Tensor:
    sums = ops.new_term_sums(statistics)
    rows = _rows(logits, target, weight)
    saved = (statistics.data_ptr(), index.data_ptr())
    _engine.term_sums(rows, epilogue, _params(params), *saved, sums.data_ptr())
    return sums


if _engine:
    passes.register(
        "CPU",
        "cpu",
        lambda: EPILOGUES,
        _statistics_pass,
        _gradient_pass,
        _new_gradient,
        class_sums=class_sums,
        class_terms=class_terms,
        term_sums=term_sums,
    )
