"""What the C++ engine and the CUDA kernels are handed: addresses, sizes and strides of a job's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..definition.rows import Job
from .base import PAIRS

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

_Native = TypeVar("_Native")


def native(
    kind: Callable[..., _Native],
    job: Job,
    epilogue: tuple[int, int],
    searched: tuple[int, bool, bool, int] = (0, False, False, 0),
    given: int = 0,
    weight_sum: Tensor | None = None,
    sums: Tensor | None = None,
) -> _Native:
    """Return the job as an extension's `kind` of it.

    `epilogue` is its place in ``Epilogues.numbers``, `searched` are the ``Picks`` that a statistics pass is to find, or
    in a gradient pass whether there are slopes of moments; so many `given` picks are known: candidates, or in a
    gradient pass all of them.
    """
    rows = job.rows
    logits, upstream, grad = rows.hidden[0], job.upstream, job.grad
    count, classes = logits.shape
    number, epilogue_kind = epilogue
    # None for a pass that knows nothing of it.
    second = rows.teacher[0] if rows.teacher and epilogue_kind == PAIRS else None
    top_k, below, mean, moments = searched
    params = []
    for p in rows.params if number >= 0 else ():
        params.append((p.data_ptr(), p.stride(0) if p.dim() else 0))
    # In the order of bind_job in csrc/bindings.h. Conditions and not calls: a small batch is over in less time than
    # they would take.
    return kind(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        count,
        classes,
        logits.stride(0),
        rows.target.data_ptr(),
        0 if rows.candidates is None else rows.candidates.data_ptr(),
        given,
        top_k,
        below,
        mean,
        moments,
        0 if rows.class_weight is None else rows.class_weight.data_ptr(),
        0 if weight_sum is None else weight_sum.data_ptr(),
        number,
        epilogue_kind,
        params,
        0 if rows.scalars is None else rows.scalars.data_ptr(),
        0 if second is None else second.data_ptr(),
        0 if second is None else second.stride(0),
        0 if job.loss is None else job.loss.data_ptr(),
        job.statistics.data_ptr(),
        job.index.data_ptr(),
        0 if job.coefficients is None else job.coefficients.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if grad is None else grad.stride(0),
        0 if upstream is None else upstream.data_ptr(),
        0 if upstream is None or not upstream.dim() else upstream.stride(0),
        0 if sums is None else sums.data_ptr(),
        0 if job.top_q is None else job.top_q.data_ptr(),
        torch.get_num_threads(),
    )
