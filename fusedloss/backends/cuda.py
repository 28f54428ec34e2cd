"""The CUDA kernels for the operators: how rows are cut into the blocks of a launch, and addresses handed over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_indices
from ..engine import operators as ops
from ..engine.contracts import Epilogues
from . import passes
from .passes import Backward, Forward

try:
    from .. import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _MISSING = (
        "it is not built; with nvcc on PATH, SKBUILD_CMAKE_DEFINE=FUSEDLOSS_CUDA=ON pip install . builds it"
        if find_spec("fusedloss._cuda") is None
        else f"its kernels did not load ({error})"
    )

#: What they were built with, and for.
TARGETS: str | None = _cuda.targets if _cuda else None

#: In the order in which the kernels number them.
EPILOGUES = Epilogues.of(_cuda)

#: The type of device whose memory the kernels read. Tests have a build of them for the CPU.
RUNS_ON = "cuda"

#: As csrc/cuda/job.h has them: threads of a block, bytes of a tile for each, tiles on their way and in hand, bytes of a
#: row for a block that sums over the rows.
MAX_THREADS, ITEM_BYTES, STAGES, SUM_BYTES = 256, 32, 6, 2048

#: Candidates have room in shared memory, as many as csrc/cuda/job.h says.
MAX_CANDIDATES = 64
MAX_CLASSES = 2**30

#: Bytes of shared memory with which three blocks share a multiprocessor of 228 KiB, so that some read while others
#: write; and what a block needs of it for other things than logits.
COMFORT = 74 * 1024
OVERHEAD = 6 * 1024
#: Blocks that may look at a row together, on GPUs that form clusters of them.
_PARTS = (1, 2, 4, 8)
#: Blocks that sums over the rows should have, before their rows are no longer cut into groups.
_SUM_BLOCKS = 512
#: Blocks that scale a gradient: as many as run at a time on a large GPU. More would take their time to do nothing.
_SCALE_BLOCKS = 1024

_DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def unavailable(device: torch.device | None = None) -> str | None:
    """Why the kernels cannot run, here or for tensors on `device`; None if they can."""
    if _cuda is None:
        return _MISSING
    if device is not None and device.type != RUNS_ON:
        return f"it runs on GPU tensors, but the input is on {device}"
    if RUNS_ON == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
        return "there is no NVIDIA GPU that torch can use"
    return None


def has_epilogue(name: str) -> bool:
    return name in EPILOGUES.rows or name in EPILOGUES.classes


@cache
def _limits(device: int) -> tuple[int, bool]:
    return _cuda.limits(device)


class Plan(NamedTuple):
    """The blocks that look at a row together, their threads, and the tiles of logits in the shared memory of each."""

    threads: int
    parts: int
    slots: int


def plan(classes: int, itemsize: int, shared_bytes: int, clusters: bool) -> Plan:
    """The row on chip, in as few blocks as have room for it; where none have, as much as is on its way there.

    Only the sizes and the kind of GPU count, so that a row's bits do not depend on the rows beside it.
    """
    # A tile or less of short rows, and no thread without a column.
    threads = min(MAX_THREADS, -(-classes * itemsize // (ITEM_BYTES * 32)) * 32)
    tile = threads * ITEM_BYTES
    choices = _PARTS if clusters else _PARTS[:1]
    packs = -(-classes * itemsize // 16)
    for parts, room in (*((parts, min(COMFORT, shared_bytes)) for parts in choices), (choices[-1], shared_bytes)):
        slots = -(-packs // (parts * tile // 16))
        if slots * (tile + threads // 2) + OVERHEAD <= room:
            return Plan(threads, parts, slots)
    return Plan(threads, choices[-1], STAGES)


def _run(job: _cuda.Job, logits: Tensor, on_chip: bool) -> None:
    """`on_chip`: whether the kernel looks at the logits more than once."""
    rows, classes = logits.shape
    if rows == 0:
        return
    if classes > MAX_CLASSES:
        raise ValueError(f"impl='cuda' takes at most {MAX_CLASSES} classes, got {classes}; use impl='reference'")
    threads, parts, slots = plan(classes, logits.element_size(), *_limits(logits.device.index or 0))
    if rows * parts >= 2**31:
        raise ValueError(f"impl='cuda' takes fewer than {2**31 // parts} rows of {classes} classes, got {rows}")
    job.threads, job.parts, job.slots = threads, parts, slots if on_chip else min(slots, STAGES)
    _launch(_cuda.run, job, logits)


def _launch(function: Callable[[_cuda.Job, int], None], job: _cuda.Job, logits: Tensor) -> None:
    """On the stream that is current where the logits are."""
    with torch.cuda.device(logits.device) if RUNS_ON == "cuda" else contextlib.nullcontext():
        job.stream = torch.cuda.current_stream().cuda_stream if RUNS_ON == "cuda" else 0
        function(job, _DTYPE_CODES[logits.dtype])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _job(logits: Tensor, target: Tensor, weight: Tensor | None) -> _cuda.Job:
    job = _cuda.Job()
    job.logits = logits.data_ptr()
    job.rows, job.classes = logits.shape
    job.row_stride = logits.stride(0)
    job.target = target.data_ptr()
    job.class_weight = _address(weight)
    job.epilogue = -1
    return job


def _set_epilogue(job: _cuda.Job, epilogue: str, names: Iterable[str], params: list[Tensor]) -> None:
    job.epilogue = list(names).index(epilogue)
    job.set_params([(p.data_ptr(), p.stride(0) if p.dim() else 0) for p in params])


def _set_gradient(job: _cuda.Job, grad: Tensor, upstream: Tensor | None) -> None:
    job.grad, job.grad_row_stride = grad.data_ptr(), grad.stride(0)
    job.upstream, job.upstream_stride = passes.column(upstream)


def _statistics_pass(x: Forward) -> None:
    classes = x.logits.shape[1]
    if x.logits.device.type == "cpu":
        check_indices(x.target, x.candidates, classes)
    job = _job(x.logits, x.target, x.weight)
    job.forward = True
    if x.candidates is not None:
        job.candidates, job.candidate_count = x.candidates.data_ptr(), x.candidates.shape[1]
        if job.candidate_count > MAX_CANDIDATES:
            raise ValueError(
                f"impl='cuda' takes at most {MAX_CANDIDATES} candidates for each target, got {job.candidate_count}; "
                "use another implementation"
            )
    job.top_k, job.below, job.mean = x.top_k, x.below, x.mean
    weight_sum = x.weight.sum(dtype=torch.float64) if x.mean and x.weight is not None else None
    job.weight_sum = _address(weight_sum)
    if x.epilogue is not None:
        job.class_term = x.epilogue in EPILOGUES.classes
        _set_epilogue(job, x.epilogue, EPILOGUES.classes if job.class_term else EPILOGUES.rows, x.params)
    job.common = _address(x.common)
    job.loss, job.coefficients = _address(x.loss), _address(x.coefficients)
    job.statistics, job.index = x.statistics.data_ptr(), x.index.data_ptr()
    if x.grad is not None:
        _set_gradient(job, x.grad, x.row_weight)
    _run(job, x.logits, on_chip=x.grad is not None or job.class_term)


def _gradient_pass(x: Backward) -> None:
    job = _job(x.logits, x.target, x.weight)
    job.candidate_count = x.index.shape[0]
    if x.epilogue in EPILOGUES.classes:  # what others have of their own is in the coefficients
        job.class_term = True
        _set_epilogue(job, x.epilogue, EPILOGUES.classes, x.params)
    job.statistics, job.index = x.statistics.data_ptr(), x.index.data_ptr()
    job.coefficients = x.coefficients.data_ptr()
    _set_gradient(job, x.grad, x.grad_output)
    _run(job, x.logits, on_chip=False)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """The kernel reads the factor, and leaves the gradient alone where that is 1."""
    if not gradient.is_contiguous():
        raise ValueError(f"the gradient must be contiguous, got strides {gradient.stride()}")
    job = _cuda.Job()
    job.grad, job.rows, job.upstream = gradient.data_ptr(), gradient.numel(), factor.data_ptr()
    job.groups = min(_SCALE_BLOCKS, -(-job.rows * gradient.element_size() // (MAX_THREADS * 16)))
    if job.rows:
        _launch(_cuda.scale, job, gradient)


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
    rows, classes = logits.shape
    job = _job(logits, target, None)
    _set_epilogue(job, epilogue, EPILOGUES.sums, params)
    job.statistics, job.index = statistics.data_ptr(), index.data_ptr()
    job.upstream, job.upstream_stride = passes.column(row_weight)
    top_rest = statistics.new_empty(rows)
    job.groups = max(1, min(rows // 64, _SUM_BLOCKS // -(-classes * logits.element_size() // SUM_BYTES)))
    sums = logits.new_empty((job.groups, 2, classes), dtype=torch.float64)
    job.top_q, job.top_rest, job.sums = _address(top_q), top_rest.data_ptr(), sums.data_ptr()
    if rows == 0:
        return sums[0].zero_()
    _launch(_cuda.sum, job, logits)
    return sums.sum(0) if job.groups > 1 else sums[0]


def class_terms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    statistics: Tensor,
    index: Tensor,
    params: list[Tensor],
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    # The statistics are computed anew: the logits are read for the terms in any case, right after.
    loss, coefficients = ops.new_losses(statistics)
    outputs = (torch.empty_like(statistics), torch.empty_like(index), loss, coefficients)
    settings = (None, epilogue, 1, False, False)
    _statistics_pass(Forward(logits, target, weight, None, params, *settings, *outputs))
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
    job = _job(logits, target, weight)
    job.class_term = True
    _set_epilogue(job, epilogue, EPILOGUES.classes, params)
    job.statistics, job.index, job.sums = statistics.data_ptr(), index.data_ptr(), sums.data_ptr()
    _run(job, logits, on_chip=False)
    return sums


def register(device: str) -> None:
    """Under a dispatch key."""
    passes.register(
        device,
        "cuda",
        lambda: EPILOGUES,
        _statistics_pass,
        _gradient_pass,
        one_read=lambda x: True,
        scale_=scale_,
        class_sums=class_sums,
        class_terms=class_terms,
        term_sums=term_sums,
    )


if _cuda:
    register("CUDA")
