"""The Triton kernels for the operators: they allocate the outputs and launch. Triton is imported by the first."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_indices
from ..engine import operators as ops
from ..engine.contracts import Epilogues
from . import passes
from .passes import Backward, Forward, Product

#: Whether kernels are interpreted, on CPU tensors: Triton's own variable, read when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

#: The type of device whose tensors the kernels take.
RUNS_ON = "cpu" if INTERPRETED else "cuda"


def unavailable(device: torch.device | None = None) -> str | None:
    """Why the kernels cannot run, here or for tensors on `device`; None if they can."""
    if device is not None and device.type != RUNS_ON:
        kind = "CPU tensors while TRITON_INTERPRET is set" if INTERPRETED else "GPU tensors"
        return f"it runs on {kind}, but the input is on {device}"
    if device is None and not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    try:
        _modules()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "triton is not installed"
        return f"its kernels did not load ({type(error).__name__}: {error})"
    return None


def _modules() -> tuple[Any, Any, Any]:
    from ..triton_kernels import epilogues, launch, passes

    return epilogues, launch, passes


@cache
def epilogues() -> Epilogues:
    tables = _modules()[0]
    classes = {name: x.params for name, x in tables.CLASS_TERMS.items()}
    sums = {name: classes[name] - 1 for name in tables.SUMMED_TERMS}
    return Epilogues({name: x.params for name, x in tables.ROW_EPILOGUES.items()}, classes, sums)


def has_epilogue(name: str) -> bool:
    tables = _modules()[0]  # and not the cached tables: torch.compile warns of a cache in what it traces
    return name in tables.ROW_EPILOGUES or name in tables.CLASS_TERMS


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
    def spans(self) -> int:
        """Over how many programs to split each row."""
        multiprocessors = _multiprocessors(self.where[0].device)
        return _modules()[1].spans(self.rows, self.classes, self.tile, multiprocessors)


def _source(logits: Tensor | Product, table: str) -> _Source:
    """With the tile from a table of launch.py."""
    launch = _modules()[1]
    tiles = getattr(launch, table)
    if isinstance(logits, Tensor):
        rows, classes = logits.shape
        tile = launch.tile(classes, logits.element_size(), tiles)
        return _Source((logits, logits.stride(0)), None, rows, classes, tile)
    hidden, weight, bias, softcap, mask_target = logits
    tile = launch.product_tile(len(hidden), hidden.element_size(), table == "CLASS_TILES")
    where = (hidden, *hidden.stride(), weight, *weight.stride(), hidden.shape[1])
    kind = launch.Product(tile.depth, _precision(hidden), softcap, mask_target)
    return _Source(where if bias is None else (*where, bias), kind, len(hidden), len(weight), tile)


def _precision(hidden: Tensor) -> str:
    """As torch's own products of float32. This attribute can be read whichever way the precision was set."""
    tf32 = hidden.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _run(
    kernel: Any, grid: tuple[int, ...], tile: Any, where: tuple[Any, ...], *arguments: Any, **constants: Any
) -> None:
    """Launches a kernel on the device of the logits."""
    if 0 not in grid:
        constants |= launch_options(kernel, tile, where, constants)
        _launch(kernel, grid, where[0].device, where, *arguments, **constants)


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    if INTERPRETED:
        import numpy

        with numpy.errstate(all="ignore"):
            kernel[grid](*arguments, **constants)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)


def launch_options(kernel: Any, tile: Any, where: tuple[Any, ...], constants: dict[str, Any]) -> dict[str, Any]:
    options = {"ROWS": tile.rows, "BLOCK": tile.block, "num_warps": tile.warps, "enable_fp_fusion": True}
    if tile.stages:
        options["num_stages"] = tile.stages
    searches = constants.get("TOP_K", 0) > 0
    itemsize = where[0].element_size()
    registers = _modules()[1].registers(kernel.__name__, searches, constants.get("MEAN", False), itemsize, tile)
    return options if registers is None else options | {"maxnreg": registers}


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
    term = _modules()[0].CLASS_TERMS.get(name or "")
    return {"TERM": None, "EXPONENT": None} if term is None else {"TERM": term.term, "EXPONENT": term.exponent}


def _params(params: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(params), tuple(p.stride(0) if p.dim() else 0 for p in params)


def _statistics_pass(x: Forward) -> None:
    tables, _, kernels = _modules()
    heavy = x.top_k > 0 or x.below
    table = (
        "IN_ONE_TILES" if x.grad is not None else "CLASS_TILES" if heavy and isinstance(x.logits, Product) else "TILES"
    )
    source = _source(x.logits, table)
    if x.target.device.type == "cpu":
        check_indices(x.target, x.candidates, source.classes)
    spans = 1 if x.grad is not None else source.spans
    row_epilogue = tables.ROW_EPILOGUES.get(x.epilogue)
    params = x.params if row_epilogue else []
    picks = len(x.index)
    _run_split(
        kernels.statistics_pass,
        spans,
        source,
        x.target,
        x.weight,
        x.weight.sum(dtype=torch.float64) if x.mean and x.weight is not None else None,
        x.candidates,
        *_params(params),
        x.loss,
        x.statistics,
        x.index,
        x.coefficients,
        *_parts(x.statistics, spans, source.rows, torch.float64, x.statistics.dtype, torch.int32),
        x.grad,
        0 if x.grad is None else x.grad.stride(0),
        x.row_weight,
        0 if x.row_weight is None else x.row_weight.stride(0),
        source.rows,
        source.classes,
        x.common,
        EPILOGUE=row_epilogue and row_epilogue.function,
        PARAMS=len(params),
        TOP_K=x.top_k,
        BELOW=x.below,
        MEAN=x.mean,
        PICKS=picks,
        PICK_BLOCK=1 << max(0, picks - 1).bit_length(),
    )
    if x.epilogue is not None and row_epilogue is None:
        rows = (x.logits, x.target, x.weight, x.statistics, x.index, x.params, x.epilogue)
        _class_terms_pass(*rows, x.common, x.loss, x.coefficients)


def _class_terms_pass(
    logits: Tensor | Product,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    index: Tensor,
    params: list[Tensor],
    epilogue: str,
    common: Tensor | None = None,
    loss: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> Tensor:
    """Writes losses and coefficients; without them gives the sums of the rows' spans (S, 3, N)."""
    _, launch, kernels = _modules()
    source = _source(logits, "CLASS_TILES")
    merge = loss is not None
    spans = launch.all_spans(source.classes, source.tile)
    if merge:
        spans = source.spans
    parts = statistics.new_empty((spans if spans > 1 or not merge else 0, 3, source.rows), dtype=torch.float64)
    _run_split(
        kernels.class_terms_pass,
        spans,
        source,
        target,
        weight,
        *_params(params),
        statistics,
        index,
        loss,
        coefficients,
        parts,
        source.rows,
        source.classes,
        common,
        merge=merge,
        **_term(epilogue),
        PARAMS=len(params),
    )
    return parts


def _gradient_pass(x: Backward) -> None:
    kernels = _modules()[2]
    term = _term(x.epilogue)
    source = _source(x.logits, "GRADIENT_TILES" if term["TERM"] is None else "CLASS_TILES")
    tile = source.tile
    params = [] if term["TERM"] is None else x.params  # those of a row epilogue are in the coefficients
    _run(
        kernels.gradient_pass,
        (-(-source.rows // tile.rows) * -(-source.classes // tile.block),),
        tile,
        source.where,
        x.target,
        x.weight,
        x.statistics,
        x.index,
        x.coefficients,
        x.grad_output,
        0 if x.grad_output is None else x.grad_output.stride(0),
        *_params(params),
        x.grad,
        x.grad.stride(0),
        source.rows,
        source.classes,
        **term,
        PARAMS=len(params),
        SOURCE=source.kind,
        PICKS=len(x.index),
    )


def _one_read(x: Forward) -> bool:
    """Where programs have whole rows."""
    tables = _modules()[0]
    source = _source(x.logits, "TILES")
    return x.epilogue in tables.ROW_EPILOGUES and source.spans == 1


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
    tables, launch, kernels = _modules()
    rows, classes = logits.shape
    term = tables.CLASS_TERMS[epilogue]
    if top_q is None:
        tile = launch.tile(classes, logits.element_size(), launch.CLASS_TILES)
        top_q = statistics.new_empty(rows)
        _run(
            kernels.top_rest_pass,
            (-(-rows // tile.rows),),
            tile,
            (logits, logits.stride(0)),
            target,
            statistics,
            index,
            top_q,
            rows,
            classes,
        )
    tile = launch.column_tile(classes, logits.element_size())
    groups = launch.row_groups(rows, classes, tile, _multiprocessors(logits.device))
    sums = logits.new_empty((groups, 2, classes), dtype=torch.float64)
    _run(
        kernels.class_sums_pass,
        (-(-classes // tile.block), groups),
        tile,
        (logits, logits.stride(0)),
        target,
        row_weight,
        0 if row_weight is None else row_weight.stride(0),
        statistics,
        index,
        top_q,
        *_params(params),
        sums,
        rows,
        classes,
        -(-rows // (groups * tile.rows)) * tile.rows,
        OVERLAP=term.overlap,
        EXPONENT=term.exponent,
        PARAMS=len(params),
    )
    return sums.sum(0) if groups > 1 else sums[0]


def class_terms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    statistics: Tensor,
    index: Tensor,
    params: list[Tensor],
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    loss, coefficients = ops.new_losses(statistics)
    _class_terms_pass(logits, target, weight, statistics, index, params, epilogue, None, loss, coefficients)
    return loss, coefficients


def term_sums(*arguments: Any) -> Tensor:
    return _class_terms_pass(*arguments)[:, 1:].sum(0)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """The kernel reads the factor, and leaves the gradient alone where that is 1."""
    from ..triton_kernels import scale

    if not gradient.is_contiguous():
        raise ValueError(f"the gradient must be contiguous, got strides {gradient.stride()}")
    programs = min(scale.PROGRAMS, -(-gradient.numel() // scale.BLOCK))
    if programs:
        arguments = (gradient, factor, gradient.numel())
        options = {"BLOCK": scale.BLOCK, "num_warps": 4, "enable_fp_fusion": True}
        _launch(scale.scale_pass, (programs,), gradient.device, *arguments, **options)


_DEVICE = "CPU" if INTERPRETED else "CUDA"
passes.register(
    _DEVICE,
    "triton",
    epilogues,
    _statistics_pass,
    _gradient_pass,
    one_read=_one_read,
    class_sums=class_sums,
    class_terms=class_terms,
    term_sums=term_sums,
    scale_=scale_,
)
passes.register_products(_DEVICE, "triton_fused", epilogues, _statistics_pass, _gradient_pass, term_sums, scale_)
