"""The Triton kernels for the operators: they allocate the outputs and launch. Triton is imported by the first."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import check_indices
from ..epilogue import Shared
from . import passes

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


def _run(kernel: Any, grid: tuple[int, ...], tile: Any, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel on the device of the logits, which are its first argument."""
    if 0 in grid:
        return
    options = {"ROWS": tile.rows, "BLOCK": tile.block, "num_warps": tile.warps, "enable_fp_fusion": True}
    if INTERPRETED:
        import numpy

        with numpy.errstate(all="ignore"):
            kernel[grid](*arguments, **constants, **options)
    else:
        with torch.cuda.device(arguments[0].device):
            kernel[grid](*arguments, **constants, **options)


def _term(name: str | None) -> dict[str, Any]:
    """The constants of a pass that say which class term it is for."""
    term = _modules()[0].CLASS_TERMS.get(name or "")
    return {"TERM": None, "EXPONENT": None} if term is None else {"TERM": term.term, "EXPONENT": term.exponent}


def _params(params: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(params), tuple(p.stride(0) if p.dim() else 0 for p in params)


def _statistics_pass(
    logits: Tensor,
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
) -> None:
    if epilogue is not None and not has_epilogue(epilogue):
        raise ValueError(f"no epilogue named {epilogue!r}")
    epilogues, launch, kernels = _modules()
    rows, classes = logits.shape
    if logits.device.type == "cpu":
        check_indices("target", target, classes, ignore_index)
        if candidates is not None:
            check_indices("candidate", candidates, classes, None)
    term = _term(epilogue)
    tile = launch.tile(classes, logits.element_size(), term["TERM"] is not None)
    row_blocks = -(-rows // tile.rows)
    # A class term reads its rows again, for which they would have to be split again; those programs take whole rows.
    spans = launch.spans(rows, classes, tile) if term["TERM"] is None else 1
    parts = [
        logits.new_empty((spans if spans > 1 else 0, 3, rows), dtype=kind)
        for kind in (torch.float64, statistics.dtype, torch.int32)
    ]
    arguments = (
        logits,
        logits.stride(0),
        target,
        weight,
        weight.sum(dtype=torch.float64) if mean and weight is not None else None,
        candidates,
        *_params(params),
        loss,
        statistics,
        index,
        coefficients,
        *parts,
        rows,
        classes,
        ignore_index,
        *shared.coefficients(classes),
        shared.z_loss,
    )
    constants = {
        "EPILOGUE": epilogues.ROW_EPILOGUES.get(epilogue),
        **term,
        "PARAMS": len(params),
        "TOP_K": top_k,
        "BELOW": below,
        "MEAN": mean,
        "PICKS": len(index),
        "PICK_BLOCK": 1 << max(0, len(index) - 1).bit_length(),
        "SPAN": launch.SPAN,
    }
    if spans > 1:
        _run(kernels.statistics_pass, (row_blocks, spans), tile, *arguments, **constants, SPLIT=True, MERGE=False)
    _run(kernels.statistics_pass, (row_blocks,), tile, *arguments, **constants, SPLIT=False, MERGE=spans > 1)


def _gradient_pass(
    grad: Tensor,
    logits: Tensor,
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
    _, launch, kernels = _modules()
    rows, classes = logits.shape
    term = _term(epilogue)
    if term["TERM"] is None:
        params = []  # they are in the coefficients
    tile = launch.tile(classes, logits.element_size(), term["TERM"] is not None)
    _run(
        kernels.gradient_pass,
        (-(-rows // tile.rows) * -(-classes // tile.block),),
        tile,
        logits,
        logits.stride(0),
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
        rows,
        classes,
        ignore_index,
        **term,
        PARAMS=len(params),
        PICKS=index.shape[0],
    )


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
    tile = launch.tile(classes, logits.element_size(), class_term=True)
    top_rest = statistics.new_empty(rows)
    _run(
        kernels.top_rest_pass,
        (-(-rows // tile.rows),),
        tile,
        logits,
        logits.stride(0),
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
        logits,
        logits.stride(0),
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
    # The statistics are computed anew: the logits are read for the terms in any case, right after.
    loss, coefficients = ops.new_losses(statistics)
    outputs = (torch.empty_like(statistics), torch.empty_like(index), loss, coefficients)
    settings = (epilogue, Shared(), ignore_index, 1, False, False)
    _statistics_pass(logits, target, weight, None, params, *settings, *outputs)
    return loss, coefficients


passes.register(
    "CPU" if INTERPRETED else "CUDA",
    "triton",
    _statistics_pass,
    _gradient_pass,
    class_sums=class_sums,
    class_terms=class_terms,
)
