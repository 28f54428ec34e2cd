"""The row operators of a backend, made of its two passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..epilogue import Shared


def empty_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def register(
    device: str,
    impl: str,
    statistics_pass: Callable[..., None],
    gradient_pass: Callable[..., None],
    new_gradient: Callable[[Tensor], Tensor] = empty_gradient,
    **others: Callable[..., Any],
) -> None:
    """Registers the row operators and `others`, which may replace some of them, under a dispatch key.

    ``statistics_pass(logits, target, weight, candidates, params, epilogue, shared, ignore_index, top_k, below, mean,
    statistics, index, loss, coefficients)`` writes the last four; the last two are None where `epilogue` is.
    ``gradient_pass(grad, logits, ...)`` writes `grad`, which may be `logits`; then follows what ``row_gradient`` takes.
    """

    def row_statistics(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        candidates: Tensor | None,
        ignore_index: int,
        top_k: int,
        below: bool,
        mean: bool,
    ) -> tuple[Tensor, Tensor]:
        statistics, index = ops.new_statistics(logits, target, ops.picks_of(candidates, top_k, below))
        settings = (None, Shared(), ignore_index, top_k, below, mean)
        statistics_pass(logits, target, weight, candidates, [], *settings, statistics, index, None, None)
        return statistics, index

    def row_loss(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        candidates: Tensor | None,
        params: list[Tensor],
        epilogue: str,
        label_smoothing: float,
        smoothing_over: str,
        z_loss: float,
        ignore_index: int,
        top_k: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        statistics, index = ops.new_statistics(logits, target, ops.picks_of(candidates, top_k))
        loss, coefficients = ops.new_losses(statistics)
        shared = Shared(label_smoothing, smoothing_over, z_loss)
        settings = (epilogue, shared, ignore_index, top_k, False, label_smoothing != 0)
        outputs = (statistics, index, loss, coefficients)
        statistics_pass(logits, target, weight, candidates, params, *settings, *outputs)
        return loss, statistics, index, coefficients

    def row_loss_gradient_(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        candidates: Tensor | None,
        params: list[Tensor],
        row_weight: Tensor | None,
        epilogue: str,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result = row_loss(logits, target, weight, candidates, params, epilogue, *arguments)
        ignore_index = arguments[-2]
        gradient_pass(logits, logits, target, weight, *result[1:], row_weight, params, epilogue, ignore_index)
        return result

    def row_gradient(logits: Tensor, *arguments: Any) -> Tensor:
        grad = new_gradient(logits)
        gradient_pass(grad, logits, *arguments)
        return grad

    def row_gradient_(logits: Tensor, *arguments: Any) -> None:
        gradient_pass(logits, logits, *arguments)

    kernels: dict[str, Callable[..., Any]] = {
        "row_statistics": row_statistics,
        "row_loss": row_loss,
        "row_loss_gradient_": row_loss_gradient_,
        "row_gradient": row_gradient,
        "row_gradient_": row_gradient_,
    }
    ops.register(device, impl, **(kernels | others))
