"""The CUDA kernels: how rows are cut into the blocks of a launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_indices
from ..definition.rows import Job, Rows
from ..definition.statistics import Picks
from .base import CLASSES, PAIRS, ROWS, Backend, Epilogues
from .native import DTYPES, native

try:
    from .. import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _MISSING = (
        "it is not built; with nvcc on PATH, SKBUILD_CMAKE_DEFINE=FUSEDLOSS_CUDA=ON pip install -e . builds it"
        if find_spec("fusedloss._cuda") is None
        else f"its kernels did not load ({error})"
    )

#: What they were built with, and for.
TARGETS: str | None = _cuda.targets if _cuda else None

#: As csrc/cuda/launch.h has them: threads of a block, bytes of a tile for each, tiles on their way and in hand, bytes
#: of a row for a block that sums over the rows.
MAX_THREADS, ITEM_BYTES, STAGES, SUM_BYTES = 256, 32, 6, 2048

#: Candidates have room in shared memory, as many as csrc/cuda/launch.h says.
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


class Cuda(Backend):
    name = "cuda"
    runs_on = "cuda"  # tests have a build of the kernels for the CPU
    epilogues = Epilogues.of(_cuda)
    """In the order in which the kernels number them."""

    def unavailable(self, device: torch.device | None = None) -> str | None:
        if _cuda is None:
            return _MISSING
        if device is not None and device.type != self.runs_on:
            return f"it runs on GPU tensors, but the input is on {device}"
        if self.runs_on == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
            return "there is no NVIDIA GPU that torch can use"
        return None

    def forward(self, job: Job) -> None:
        rows, spec = job.rows, job.spec
        if rows.target.device.type == "cpu":
            check_indices(rows.target, rows.candidates, rows.classes)
        count, weight_sum = 0 if rows.candidates is None else rows.candidates.shape[1], job.weight_sum()
        if count > MAX_CANDIDATES:
            raise ValueError(
                f"impl='cuda' takes at most {MAX_CANDIDATES} candidates for each target, got {count}, of which the k "
                "classes of a top-k teacher are some; use another implementation"
            )
        epilogue = self.epilogues.numbers[spec.epilogue]
        launch = native(_cuda.Launch, job, epilogue, spec.picks, count, weight_sum)
        launch.forward = True
        looks_again = epilogue[1] == CLASSES or (job.grad is not None and epilogue[1] != PAIRS)
        self._run(launch, rows.logits, on_chip=looks_again)

    def one_read(self, rows: Rows) -> bool:
        return True

    def with_gradient(self, job: Job) -> None:
        self.forward(job)

    def backward(self, job: Job) -> None:
        number, kind = self.epilogues.numbers[job.spec.epilogue]
        # What a loss of the rows has of its own is in the coefficients.
        epilogue = (-1, ROWS) if kind == ROWS else (number, kind)
        moments = (0, False, False, job.moments_of_gradient)
        launch = native(_cuda.Launch, job, epilogue, moments, given=job.index.shape[0])
        self._run(launch, job.rows.logits, on_chip=False)

    def sums(self, job: Job) -> Tensor:
        return self._class_sums(job) if job.spec.over_rows else self._term_sums(job)

    def _class_sums(self, job: Job) -> Tensor:
        logits = job.rows.logits
        rows, classes = logits.shape
        groups = max(1, min(rows // 64, _SUM_BLOCKS // -(-classes * logits.element_size() // SUM_BYTES)))
        top_rest = job.statistics.new_empty(rows)
        sums = logits.new_empty((groups, 2, classes), dtype=torch.float64)
        if rows == 0:
            return sums[0].zero_()
        launch = native(_cuda.Launch, job, self.epilogues.numbers_in_sums[job.spec.epilogue], sums=sums)
        launch.groups = groups
        launch.set_top_rest(top_rest.data_ptr())
        self._launch(_cuda.sum, launch, logits)
        return sums.sum(0) if groups > 1 else sums[0]

    def _term_sums(self, job: Job) -> Tensor:
        logits = job.rows.logits
        sums = logits.new_empty((3 if job.rows.teacher else 2, logits.shape[0]), dtype=torch.float64)
        epilogue, moments = self.epilogues.numbers[job.spec.epilogue], (0, False, False, job.moments_of_gradient)
        launch = native(_cuda.Launch, job, epilogue, moments, given=job.index.shape[0], sums=sums)
        self._run(launch, logits, on_chip=False)
        return sums

    def terms(self, job: Job) -> None:
        # The statistics are computed anew: the logits are read for the terms in any case, right after.
        spec = job.spec.of_picks(Picks(1))
        outputs = (torch.empty_like(job.statistics), torch.empty_like(job.index), job.loss, job.coefficients)
        self.forward(Job(job.rows.without_factors(spec.form), spec, *outputs))

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """The kernel reads the factor, and leaves the gradient alone where that is 1."""
        if not gradient.is_contiguous():
            raise ValueError(f"the gradient must be contiguous, got strides {gradient.stride()}")
        count = gradient.numel()
        blocks = min(_SCALE_BLOCKS, -(-count * gradient.element_size() // (MAX_THREADS * 16)))
        if blocks:
            with self._stream_of(gradient) as stream:
                _cuda.scale(DTYPES[gradient.dtype], gradient.data_ptr(), count, factor.data_ptr(), blocks, stream)

    def _run(self, launch: _cuda.Launch, logits: Tensor, on_chip: bool) -> None:
        """`on_chip`: whether the kernel looks at the logits more than once."""
        rows, classes = logits.shape
        if rows == 0:
            return
        if classes > MAX_CLASSES:
            raise ValueError(f"impl='cuda' takes at most {MAX_CLASSES} classes, got {classes}; use impl='reference'")
        threads, parts, slots = plan(classes, logits.element_size(), *_limits(logits.device.index or 0))
        if rows * parts >= 2**31:
            raise ValueError(f"impl='cuda' takes fewer than {2**31 // parts} rows of {classes} classes, got {rows}")
        launch.threads, launch.parts, launch.slots = threads, parts, slots if on_chip else min(slots, STAGES)
        self._launch(_cuda.run, launch, logits)

    def _launch(self, function: Callable[[_cuda.Launch], None], launch: _cuda.Launch, logits: Tensor) -> None:
        with self._stream_of(logits) as stream:
            launch.set_stream(stream)
            function(launch)

    @contextlib.contextmanager
    def _stream_of(self, tensor: Tensor) -> Iterator[int]:
        """That which is current where the tensor is."""
        if self.runs_on != "cuda":
            yield 0
            return
        with torch.cuda.device(tensor.device):
            yield torch.cuda.current_stream().cuda_stream
