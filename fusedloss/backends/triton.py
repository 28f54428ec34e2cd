"""The Triton kernels for the operators: they allocate the outputs and launch. Triton is imported by the first."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..checks import check_indices
from ..epilogue import Shared
from . import passes
from .passes import Product

#: Whether kernels are interpreted, on CPU tensors: Triton's own variable, read when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def unavailable(device: torch.device | None = None) -> str | None:
    """Why the kernels cannot run, here or for tensors on `device`; None if they can."""
    runs_on = "cpu" if INTERPRETED else "cuda"
    if device is not None and device.type != runs_on:
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


def has_epilogue(name: str) -> bool:
    epilogues = _modules()[0]
    return name in epilogues.ROW_EPILOGUES or name in epilogues.CLASS_TERMS


class _Source(NamedTuple):
    """Logits as the kernels take them."""

    where: tuple[Any, ...]
    kind: Any
    rows: int
    classes: int
    tile: Any


def _source(logits: Tensor | Product, table: str) -> _Source:
    """With the tile from a table of launch.py."""
    launch = _modules()[1]
    tiles = getattr(launch, table)
    if isinstance(logits, Tensor):
        rows, classes = logits.shape
        tile = launch.tile(classes, logits.element_size(), tiles)
        return _Source((logits, logits.stride(0)), None, rows, classes, tile)
    hidden, weight, bias, softcap, mask_target = logits
    tile = launch.product_tile(len(hidden), hidden.element_size(), table != "TILES")
    where = (hidden, *hidden.stride(), weight, *weight.stride(), hidden.shape[1])
    kind = launch.Product(tile.depth, _precision(hidden), softcap, mask_target)
    return _Source(where if bias is None else (*where, bias), kind, len(hidden), len(weight), tile)


def _precision(hidden: Tensor) -> str:
    """As torch's own products of float32."""
    tf32 = hidden.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def _run(
    kernel: Any, grid: tuple[int, ...], tile: Any, where: tuple[Any, ...], *arguments: Any, **constants: Any
) -> None:
    """Launches a kernel on the device of the logits."""
    if 0 in grid:
        return
    constants |= launch_options(kernel, tile, where, constants)
    if INTERPRETED:
        import numpy

        with numpy.errstate(all="ignore"):
            kernel[grid](where, *arguments, **constants)
    else:
        with torch.cuda.device(where[0].device):
            kernel[grid](where, *arguments, **constants)


def launch_options(kernel: Any, tile: Any, where: tuple[Any, ...], constants: dict[str, Any]) -> dict[str, Any]:
    options = {"ROWS": tile.rows, "BLOCK": tile.block, "num_warps": tile.warps, "enable_fp_fusion": True}
    if tile.stages:
        options["num_stages"] = tile.stages
    searches = constants.get("TOP_K", 0) > 0
    itemsize, aligned = where[0].element_size(), where[1] % 16 == 0
    registers = _modules()[1].registers(kernel.__name__, searches, itemsize, tile, aligned)
    return options if registers is None else options | {"maxnreg": registers}


def _run_split(kernel: Any, spans: int, source: _Source, *arguments: Any, **constants: Any) -> None:
    """Over several programs for each of the rows, whose results another launch merges; or over one."""
    tile, merging = source.tile, source.tile._replace(rows=min(source.tile.rows, 32), warps=min(source.tile.warps, 4))
    constants |= {"SOURCE": source.kind, "SPAN": tile.span}
    row_blocks, merged_blocks = (-(-source.rows // t.rows) for t in (tile, merging))
    if spans > 1:
        _run(kernel, (row_blocks, spans), tile, source.where, *arguments, **constants, SPLIT=True, MERGE=False)
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


def _statistics_pass(
    logits: Tensor | Product,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    epilogue: str | None,
    shared: Shared,
    ignore_index: int,
    top_k: int,
    below: bool,
    mean: bool,
    statistics: Tensor,
    index: Tensor,
    loss: Tensor | None,
    coefficients: Tensor | None,
    grad: Tensor | None = None,
    grad_output: Tensor | None = None,
) -> None:
    """With `grad`, also the gradient, for row epilogues."""
    if epilogue is not None and not has_epilogue(epilogue):
        raise ValueError(f"no epilogue named {epilogue!r}")
    epilogues, launch, kernels = _modules()
    heavy = top_k > 0 or below
    table = (
        "GRADIENT_TILES" if grad is not None else "CLASS_TILES" if heavy and isinstance(logits, Product) else "TILES"
    )
    source = _source(logits, table)
    if target.device.type == "cpu":
        check_indices("target", target, source.classes, ignore_index)
        if candidates is not None:
            check_indices("candidate", candidates, source.classes, None)
    spans = 1 if grad is not None else launch.spans(source.rows, source.classes, source.tile)
    row_epilogue = epilogues.ROW_EPILOGUES.get(epilogue)
    picks = len(index)
    _run_split(
        kernels.statistics_pass,
        spans,
        source,
        target,
        weight,
        weight.sum(dtype=torch.float64) if mean and weight is not None else None,
        candidates,
        *_params(params if row_epilogue else []),
        loss,
        statistics,
        index,
        coefficients,
        *_parts(statistics, spans, source.rows, torch.float64, statistics.dtype, torch.int32),
        grad,
        0 if grad is None else grad.stride(0),
        grad_output,
        0 if grad_output is None else grad_output.stride(0),
        source.rows,
        source.classes,
        ignore_index,
        *shared.coefficients(source.classes),
        shared.z_loss,
        EPILOGUE=row_epilogue,
        PARAMS=len(params) if row_epilogue else 0,
        TOP_K=top_k,
        BELOW=below,
        MEAN=mean,
        PICKS=picks,
        PICK_BLOCK=1 << max(0, picks - 1).bit_length(),
    )
    if epilogue is not None and row_epilogue is None:
        rows = (logits, target, weight, statistics, index, params, epilogue, ignore_index)
        _class_terms_pass(*rows, shared.z_loss, loss, coefficients)


def _class_terms_pass(
    logits: Tensor | Product,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    index: Tensor,
    params: list[Tensor],
    epilogue: str,
    ignore_index: int,
    z_loss: float,
    loss: Tensor | None,
    coefficients: Tensor | None,
) -> None:
    _, launch, kernels = _modules()
    source = _source(logits, "CLASS_TILES")
    spans = launch.spans(source.rows, source.classes, source.tile)
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
        *_parts(statistics, spans, source.rows, torch.float64),
        source.rows,
        source.classes,
        ignore_index,
        z_loss,
        **_term(epilogue),
        PARAMS=len(params),
    )


def _gradient_pass(
    grad: Tensor,
    logits: Tensor | Product,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    index: Tensor,
    coefficients: Tensor,
    grad_output: Tensor | None,
    params: list[Tensor],
    epilogue: str,
    ignore_index: int,
) -> None:
    kernels = _modules()[2]
    term = _term(epilogue)
    source = _source(logits, "TILES" if term["TERM"] is None else "CLASS_TILES")
    tile = source.tile
    if term["TERM"] is None:
        params = []  # they are in the coefficients
    _run(
        kernels.gradient_pass,
        (-(-source.rows // tile.rows) * -(-source.classes // tile.block),),
        tile,
        source.where,
        target,
        weight,
        statistics,
        index,
        coefficients,
        grad_output,
        0 if grad_output is None else grad_output.stride(0),
        *_params(params),
        grad,
        grad.stride(0),
        source.rows,
        source.classes,
        ignore_index,
        **term,
        PARAMS=len(params),
        SOURCE=source.kind,
        PICKS=len(index),
    )


def _loss_gradient_pass(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    row_weight: Tensor | None,
    epilogue: str,
    label_smoothing: float,
    smoothing_over: str,
    z_loss: float,
    ignore_index: int,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In one launch where its programs have whole rows, and in passes otherwise."""
    epilogues, launch, _ = _modules()
    source = _source(logits, "TILES")
    statistics, index = ops.new_statistics(logits, target, ops.picks_of(candidates, top_k))
    loss, coefficients = ops.new_losses(statistics)
    shared = Shared(label_smoothing, smoothing_over, z_loss)
    settings = (epilogue, shared, ignore_index, top_k, False, label_smoothing != 0)
    whole = launch.spans(source.rows, source.classes, source.tile) == 1
    together = whole and epilogue in epilogues.ROW_EPILOGUES
    gradient = (grad, row_weight) if together else (None, None)
    saved = (statistics, index, coefficients)
    _statistics_pass(
        logits, target, weight, candidates, params, *settings, statistics, index, loss, coefficients, *gradient
    )
    if not together:
        _gradient_pass(grad, logits, target, weight, *saved, row_weight, params, epilogue, ignore_index)
    return loss, *saved


def class_sums(
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    statistics: Tensor,
    index: Tensor,
    params: list[Tensor],
    epilogue: str,
    ignore_index: int,
) -> Tensor:
    epilogues, launch, kernels = _modules()
    rows, classes = logits.shape
    term = epilogues.CLASS_TERMS[epilogue]
    tile = launch.tile(classes, logits.element_size(), launch.CLASS_TILES)
    top_rest = statistics.new_empty(rows)
    _run(
        kernels.top_rest_pass,
        (-(-rows // tile.rows),),
        tile,
        (logits, logits.stride(0)),
        target,
        statistics,
        index,
        top_rest,
        rows,
        classes,
        ignore_index,
    )
    tile = launch.column_tile(classes, logits.element_size())
    groups = launch.row_groups(rows, classes, tile)
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
        top_rest,
        *_params(params),
        sums,
        rows,
        classes,
        ignore_index,
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
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    loss, coefficients = ops.new_losses(statistics)
    _class_terms_pass(
        logits, target, weight, statistics, index, params, epilogue, ignore_index, 0.0, loss, coefficients
    )
    return loss, coefficients


_DEVICE = "CPU" if INTERPRETED else "CUDA"
passes.register(
    _DEVICE,
    "triton",
    _statistics_pass,
    _gradient_pass,
    loss_gradient_pass=_loss_gradient_pass,
    class_sums=class_sums,
    class_terms=class_terms,
)
passes.register_products(_DEVICE, "triton_fused", _statistics_pass, _gradient_pass)
