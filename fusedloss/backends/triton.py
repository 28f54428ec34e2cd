"""The Triton kernels: how a job is cut into programs. Triton is imported by the first."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import IGNORED, check_indices
from ..definition.projection import Form
from ..definition.rows import Job, Rows, Spec
from ..definition.statistics import COEFFICIENTS, SECONDS, Q
from .base import Backend, Epilogues, is_over_classes

#: Whether kernels are interpreted, on CPU tensors: Triton's own variable, read when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _kernels() -> Any:
    """The files that have the passes and what they are launched with."""
    from ..triton_kernels import passes

    return passes


@cache
def _epilogues(makes_logits: bool) -> Epilogues:
    tables = _kernels().epilogues
    # A teacher's logits are made by no pass.
    kinds = (tables.ROW_EPILOGUES, tables.CLASS_TERMS, {} if makes_logits else tables.PAIR_TERMS)
    rows, classes, pairs = ({name: x.params for name, x in kind.items()} for kind in kinds)
    return Epilogues(rows, classes, pairs, {name: classes[name] - 1 for name in tables.SUMMED_TERMS})


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter has none, and few rows to split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 32


class _Source(NamedTuple):
    """Logits as the kernels take them."""

    where: tuple[Any, ...]
    kind: Any
    rows: int
    classes: int
    tile: Any

    @property
    def blocks(self) -> tuple[int]:
        """The grid of a pass that writes each block of logits once."""
        return (-(-self.rows // self.tile.rows) * -(-self.classes // self.tile.block),)

    @property
    def spans(self) -> int:
        """Over how many programs to split each row."""
        multiprocessors = _multiprocessors(self.where[0].device)
        return _kernels().launch.spans(self.rows, self.classes, self.tile, multiprocessors)


def _source(job: Job, table: str) -> _Source:
    """With the tile from a table of launch.py."""
    launch, rows, form = _kernels().launch, job.rows, job.spec.form
    tiles = getattr(launch, table)
    first, factor = rows.hidden[0], _factor(job)
    if not rows.is_linear:
        count, classes = first.shape
        tile = launch.tile(classes, first.element_size(), tiles)
        return _Source((first, first.stride(0), *factor), None, count, classes, tile)
    (weight,), bias = rows.weight, rows.bias
    tile = launch.product_tile(len(first), first.element_size(), table == "CLASS_TILES")
    where = (first, *first.stride(), weight, *weight.stride(), first.shape[1])
    kind = launch.Product(tile.depth, _precision(first), form.softcap, form.mask_target, int(form.tempered))
    where = (*where, *factor, *([] if bias is None else [bias]))
    return _Source(where, kind, len(first), len(weight), tile)


def _factor(job: Job) -> tuple[Tensor | None, ...]:
    """What holds the factor of the logits, if they have one."""
    return (job.rows.scalars,) if job.spec.form.tempered else ()


def _precision(hidden: Tensor) -> str:
    """As torch's own products of float32. This attribute can be read whichever way the precision was set."""
    tf32 = hidden.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _run(
    kernel: Any, grid: tuple[int, ...], tile: Any, where: tuple[Any, ...], *arguments: Any, **constants: Any
) -> None:
    """Launches a kernel on the device of the logits."""
    if 0 in grid:
        return
    constants |= {"ROWS": tile.rows, "BLOCK": tile.block, "num_warps": tile.warps, "enable_fp_fusion": True}
    if tile.stages:
        constants["num_stages"] = tile.stages
    searches, means = constants.get("TOP_K", 0) > 0, constants.get("MEAN", False)
    name = kernel.__name__ + ", moments" * constants.get("MOMENTS", False)
    registers = _kernels().launch.registers(name, searches, means, where[0].element_size(), tile)
    if registers is not None:
        constants["maxnreg"] = registers
    _launch(kernel, grid, where[0].device, where, *arguments, **constants)


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    if INTERPRETED:
        import numpy

        with numpy.errstate(all="ignore"):
            kernel[grid](*arguments, **constants)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)


def _run_split(kernel: Any, spans: int, source: _Source, *arguments: Any, merge: bool = True, **constants: Any) -> None:
    """Over several programs for each of the rows, whose results another launch merges if asked to; or over one."""
    tile, merging = source.tile, source.tile._replace(rows=min(source.tile.rows, 32), warps=min(source.tile.warps, 4))
    apart = source.kind is None and source.classes % 16 > 0  # no loads of 16 bytes then
    constants |= {"SOURCE": source.kind, "SPAN": tile.span, "APART": apart}
    row_blocks, merged_blocks = (-(-source.rows // t.rows) for t in (tile, merging))
    if spans > 1 or not merge:
        _run(kernel, (row_blocks, spans), tile, source.where, *arguments, **constants, SPLIT=True, MERGE=False)
        if merge:
            _run(kernel, (merged_blocks,), merging, source.where, *arguments, **constants, SPLIT=False, MERGE=True)
    else:
        _run(kernel, (row_blocks,), tile, source.where, *arguments, **constants, SPLIT=False, MERGE=False)


def _parts(like: Tensor, spans: int, rows: int, *dtypes: torch.dtype) -> list[Tensor]:
    return [like.new_empty((spans if spans > 1 else 0, 3, rows), dtype=dtype) for dtype in dtypes]


def _term(name: str | None) -> dict[str, Any]:
    """The constants of a pass that say which class term it is for."""
    term = _kernels().epilogues.CLASS_TERMS.get(name or "")
    return {"TERM": None, "EXPONENT": None} if term is None else {"TERM": term.term, "EXPONENT": term.exponent}


def _params(params: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(params), tuple(_strided(p)[1] for p in params)


def _strided(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor and its first stride, which is 0 where there is none and of one number for all rows."""
    return x, 0 if x is None or x.dim() == 0 else x.stride(0)


class Triton(Backend):
    """Of logits in hand; or, with `makes_logits`, of logits that the kernels make wherever they look at them."""

    runs_on = "cpu" if INTERPRETED else "cuda"

    def __init__(self, name: str, makes_logits: bool) -> None:
        self.name, self.makes_logits = name, makes_logits

    def unavailable(self, device: torch.device | None = None) -> str | None:
        if device is not None and device.type != self.runs_on:
            kind = "CPU tensors while TRITON_INTERPRET is set" if INTERPRETED else "GPU tensors"
            return f"it runs on {kind}, but the input is on {device}"
        if device is None and not INTERPRETED and not torch.cuda.is_available():
            return "there is no GPU that torch can use"
        try:
            _kernels()
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "triton":
                return "triton is not installed"
            return f"its kernels did not load ({type(error).__name__}: {error})"
        return None

    @property
    def epilogues(self) -> Epilogues:
        # torch.compile warns of a cache in what it traces.
        of = _epilogues.__wrapped__ if torch.compiler.is_compiling() else _epilogues
        return of(self.makes_logits)

    def forward(self, job: Job) -> None:
        kernels, rows, spec = _kernels(), job.rows, job.spec
        heavy = rows.is_linear and (spec.top_k > 0 or spec.below or spec.moments > 0)
        tiles = "MOMENT_TILES" if spec.moments and not rows.is_linear else "CLASS_TILES" if heavy else "TILES"
        source = _source(job, "IN_ONE_TILES" if job.grad is not None else tiles)
        if rows.target.device.type == "cpu":
            check_indices(rows.target, rows.candidates, source.classes)
        spans = 1 if job.grad is not None else source.spans
        row_epilogue = kernels.epilogues.ROW_EPILOGUES.get(spec.epilogue)
        params = rows.params if row_epilogue else []
        picks, moments = len(job.index), None
        if spec.moments:
            shape = (spans if spans > 1 else 0, kernels.moments.COUNT.value, source.rows)
            moments = job.statistics.new_empty(shape, dtype=torch.float64)
        of_rows = (rows.target, rows.class_weight, job.weight_sum(), rows.candidates, *_params(params))
        parts = _parts(job.statistics, spans, source.rows, torch.float64, job.statistics.dtype, torch.int32)
        outputs = (job.loss, job.statistics, job.index, job.coefficients, *parts, *_strided(job.grad))
        sizes = (source.rows, source.classes, rows.scalars)
        _run_split(
            kernels.statistics.statistics_pass,
            spans,
            source,
            *of_rows,
            *outputs,
            *_strided(job.upstream),
            moments,
            *sizes,
            EPILOGUE=row_epilogue and row_epilogue.function,
            PARAMS=len(params),
            TOP_K=spec.top_k,
            BELOW=spec.below,
            MEAN=spec.mean,
            MOMENTS=spec.moments > 0,
            PICKS=picks,
            PICK_BLOCK=1 << max(0, picks - 1).bit_length(),
        )
        if spec.epilogue in kernels.epilogues.PAIR_TERMS:
            self._pair_losses(job)
        elif spec.epilogue and row_epilogue is None:
            _class_terms_pass(job)

    def _pair_losses(self, job: Job) -> None:
        rows, of_logits = job.rows, _kernels().epilogues.PAIR_TERMS[job.spec.epilogue].of_logits

        def statistics(logits: Tensor, target: Tensor, form: Form) -> Tensor:
            other = Job.new(Rows.of(logits, target, scalars=rows.scalars), Spec(self.name, form=form))
            self.forward(other)
            return other.statistics

        second = plain = None
        if of_logits:
            second = statistics(rows.teacher[0], rows.target, job.spec.form)
        if of_logits and job.spec.form.tempered:
            # Of rows that have no cross-entropy beside the term nothing is read.
            target = rows.target.masked_fill(rows.params[-1] == 0, IGNORED)
            plain = statistics(rows.logits, target, Form())
        _pair_terms_pass(job, second, plain)

    def with_gradient(self, job: Job) -> None:
        """Of one read where programs have whole rows."""
        in_hand = not self.makes_logits and job.spec.epilogue in _kernels().epilogues.ROW_EPILOGUES
        if in_hand and not job.spec.moments and _source(job, "TILES").spans == 1:
            self.forward(job)
        else:
            super().with_gradient(job)

    def backward(self, job: Job) -> None:
        assert job.grad is not None
        if job.spec.epilogue in _kernels().epilogues.PAIR_TERMS:
            return _pair_gradient_pass(job)
        rows, term = job.rows, _term(job.spec.epilogue)
        source = _source(job, "GRADIENT_TILES" if term["TERM"] is None else "CLASS_TILES")
        params = [] if term["TERM"] is None else rows.params  # those of a row epilogue are in the coefficients
        of_rows = (rows.target, rows.class_weight, job.statistics, job.index, job.coefficients)
        of_gradient = (*_strided(job.upstream), *_params(params), *_strided(job.grad))
        _run(
            _kernels().gradient.gradient_pass,
            source.blocks,
            source.tile,
            source.where,
            *of_rows,
            *of_gradient,
            source.rows,
            source.classes,
            **term,
            PARAMS=len(params),
            SOURCE=source.kind,
            PICKS=len(job.index),
            MOMENTS=job.spec.more_coefficients > 0,
        )

    def sums(self, job: Job) -> Tensor:
        if job.rows.teacher:
            return _pair_terms_pass(job, job.statistics[-SECONDS:], None).sum(0)
        return _class_sums(job) if job.spec.over_rows else _class_terms_pass(job)[:, 1:].sum(0)

    def terms(self, job: Job) -> None:
        _class_terms_pass(job)

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """The kernel reads the factor, and leaves the gradient alone where that is 1."""
        if not gradient.is_contiguous():
            raise ValueError(f"the gradient must be contiguous, got strides {gradient.stride()}")
        scale = _kernels().scale
        programs = min(scale.PROGRAMS, -(-gradient.numel() // scale.BLOCK))
        if programs:
            arguments = (gradient, factor, gradient.numel())
            options = {"BLOCK": scale.BLOCK, "num_warps": 4, "enable_fp_fusion": True}
            _launch(scale.scale_pass, (programs,), gradient.device, *arguments, **options)

    def units_(
        self, job: Job, largest_weight: Tensor | None, norms: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In one launch of one program: a chunk's rows are few beside its logits."""
        assert job.coefficients is not None
        scale, over_classes, count = _kernels().scale, is_over_classes(self, job.spec), job.statistics.shape[1]
        found = job.statistics.new_empty((2 + len(norms), count))
        changes = torch.empty_like(scales)
        of_rows = (job.coefficients, job.statistics[Q], *_strided(job.upstream), largest_weight, job.rows.scalars)
        _launch(
            scale.units_pass,
            (1,),
            scales.device,
            *of_rows,
            norms,
            scales,
            changes,
            found,
            count,
            SUMMED=COEFFICIENTS if over_classes else len(job.coefficients),
            OVER_CLASSES=over_classes,
            SUMS=len(norms),
            BLOCK=scale.UNIT_BLOCK,
            num_warps=scale.UNIT_WARPS,
            enable_fp_fusion=True,
        )
        job.upstream = found[1]
        return found[0], found[2:], changes


def _class_terms_pass(job: Job) -> Tensor:
    kernel = _kernels().class_terms.class_terms_pass
    return _terms_pass(job, kernel, "CLASS_TILES", job.index, **_term(job.spec.epilogue))


def _pair_terms_pass(job: Job, second_statistics: Tensor | None, plain_statistics: Tensor | None) -> Tensor:
    statistics = (second_statistics, plain_statistics, job.statistics[-SECONDS:])
    term = _kernels().epilogues.PAIR_TERMS[job.spec.epilogue]
    constants = _pair_term(job) | {"CURVATURE": term.curvature, "PICKS": len(job.index)}
    kernel = _kernels().pair_terms.pair_terms_pass
    return _terms_pass(job, kernel, "PAIR_TILES", _second(job), *statistics, **constants)


def _terms_pass(job: Job, kernel: Any, table: str, *own: Any, **constants: Any) -> Tensor:
    """Writes losses and coefficients; without them gives the sums of the rows' spans (S, 3, N)."""
    rows, source = job.rows, _source(job, table)
    merge = job.loss is not None
    spans = source.spans if merge else _kernels().launch.all_spans(source.classes, source.tile)
    shape = (spans if spans > 1 or not merge else 0, 3, source.rows)
    parts = job.statistics.new_empty(shape, dtype=torch.float64)
    of_rows = (rows.target, rows.class_weight, *_params(rows.params), job.statistics, *own)
    outputs = (job.loss, job.coefficients, parts, source.rows, source.classes, rows.scalars)
    constants |= {"PARAMS": len(rows.params)}
    _run_split(kernel, spans, source, *of_rows, *outputs, merge=merge, **constants)
    return parts


def _pair_gradient_pass(job: Job) -> None:
    assert job.grad is not None
    rows, source = job.rows, _source(job, "CLASS_TILES")
    of_rows = (_second(job), rows.target, rows.class_weight, *_params(rows.params))
    saved = (job.statistics, job.statistics[-SECONDS:], job.coefficients)
    outputs = (*_strided(job.upstream), *_strided(job.grad), source.rows, source.classes, rows.scalars)
    constants = _pair_term(job) | {"PARAMS": len(rows.params)}
    kernel = _kernels().pair_terms.pair_gradient_pass
    _run(kernel, source.blocks, source.tile, source.where, *of_rows, *saved, *outputs, **constants)


def _pair_term(job: Job) -> dict[str, Any]:
    """The constants of a pass that say which pair term it is for."""
    term = _kernels().epilogues.PAIR_TERMS[job.spec.epilogue]
    return {"TERM": term.term, "OF_LOGITS": term.of_logits}


def _second(job: Job) -> tuple[Any, ...]:
    """The second row as the kernels take it: logits have the factor of the others."""
    (second,) = job.rows.teacher
    factor = _factor(job) if _pair_term(job)["OF_LOGITS"] else ()
    return second, second.stride(0), *factor


def _class_sums(job: Job) -> Tensor:
    kernels, launch = _kernels().class_sums, _kernels().launch
    logits, target, top_q = job.rows.logits, job.rows.target, job.top_q
    rows, classes = logits.shape
    term = _kernels().epilogues.CLASS_TERMS[job.spec.epilogue]
    where = (logits, logits.stride(0), *_factor(job))
    if top_q is None:
        tile = launch.tile(classes, logits.element_size(), launch.CLASS_TILES)
        top_q = job.statistics.new_empty(rows)
        arguments = (target, job.statistics, job.index, top_q, rows, classes)
        _run(kernels.top_rest_pass, (-(-rows // tile.rows),), tile, where, *arguments)
    tile = launch.column_tile(classes, logits.element_size())
    groups = launch.row_groups(rows, classes, tile, _multiprocessors(logits.device))
    sums = logits.new_empty((groups, 2, classes), dtype=torch.float64)
    of_rows = (target, *_strided(job.upstream), job.statistics, job.index, top_q, *_params(job.rows.params))
    grid, sizes = (-(-classes // tile.block), groups), (rows, classes, -(-rows // (groups * tile.rows)) * tile.rows)
    constants = {"OVERLAP": term.overlap, "EXPONENT": term.exponent, "PARAMS": len(job.rows.params)}
    _run(kernels.class_sums_pass, grid, tile, where, *of_rows, sums, *sizes, **constants)
    return sums.sum(0) if groups > 1 else sums[0]
