"""The row operators of a backend, made of its two passes.

``statistics_pass(logits, target, weight, candidates, params, epilogue, shared, ignore_index, top_k, below, mean,
statistics, index, loss, coefficients)`` writes the last four; the last two are None where `epilogue` is.
``gradient_pass(grad, logits, ...)`` writes `grad`, which may be `logits`; then follows what ``row_gradient`` takes.
``loss_gradient_pass(grad, logits, ...)`` is both in one, for backends that have that: it takes what
``row_loss_gradient`` takes, and gives loss, statistics, index and coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..epilogue import Shared


class Product(NamedTuple):
    """Logits that are never stored: what they are made of."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float
    mask_target: bool


def _tensor(logits: Tensor | Product) -> Tensor:
    return logits.hidden if isinstance(logits, Product) else logits


def _forward_operators(statistics_pass: Callable[..., None]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def row_statistics(
        logits: Tensor | Product,
        target: Tensor,
        weight: Tensor | None,
        candidates: Tensor | None,
        ignore_index: int,
        top_k: int,
        below: bool,
        mean: bool,
    ) -> tuple[Tensor, Tensor]:
        statistics, index = ops.new_statistics(_tensor(logits), target, ops.picks_of(candidates, top_k, below))
        settings = (None, Shared(), ignore_index, top_k, below, mean)
        statistics_pass(logits, target, weight, candidates, [], *settings, statistics, index, None, None)
        return statistics, index

    def row_loss(
        logits: Tensor | Product,
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
        statistics, index = ops.new_statistics(_tensor(logits), target, ops.picks_of(candidates, top_k))
        loss, coefficients = ops.new_losses(statistics)
        shared = Shared(label_smoothing, smoothing_over, z_loss)
        settings = (epilogue, shared, ignore_index, top_k, False, label_smoothing != 0)
        outputs = (statistics, index, loss, coefficients)
        statistics_pass(logits, target, weight, candidates, params, *settings, *outputs)
        return loss, statistics, index, coefficients

    return row_statistics, row_loss


def column(values: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
    """Address and stride of a number for each row, which a kernel reads as `dtype`."""
    if values is None:
        return 0, 0
    if values.dtype != dtype:
        raise TypeError(f"a value for each row must be {dtype}, as the rows are computed in, got {values.dtype}")
    return values.data_ptr(), values.stride(0)


def empty_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def register(
    device: str,
    impl: str,
    statistics_pass: Callable[..., None],
    gradient_pass: Callable[..., None],
    new_gradient: Callable[[Tensor], Tensor] = empty_gradient,
    loss_gradient_pass: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
    **others: Callable[..., Any],
) -> None:
    """Registers the row operators and `others`, which may replace some of them, under a dispatch key."""

    row_statistics, row_loss = _forward_operators(statistics_pass)

    def two_passes(
        grad: Tensor,
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
        gradient_pass(grad, logits, target, weight, *result[1:], row_weight, params, epilogue, ignore_index)
        return result

    loss_and_gradient = loss_gradient_pass or two_passes

    def row_loss_gradient(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        grad = new_gradient(logits)
        return *loss_and_gradient(grad, logits, *arguments), grad

    def row_loss_gradient_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return loss_and_gradient(logits, logits, *arguments)

    def row_gradient(logits: Tensor, *arguments: Any) -> Tensor:
        grad = new_gradient(logits)
        gradient_pass(grad, logits, *arguments)
        return grad

    def row_gradient_(logits: Tensor, *arguments: Any) -> None:
        gradient_pass(logits, logits, *arguments)

    def scale_(gradient: Tensor, factor: Tensor) -> None:
        gradient.mul_(factor)

    kernels: dict[str, Callable[..., Any]] = {
        "row_statistics": row_statistics,
        "row_loss": row_loss,
        "row_loss_gradient": row_loss_gradient,
        "row_loss_gradient_": row_loss_gradient_,
        "row_gradient": row_gradient,
        "row_gradient_": row_gradient_,
        "scale_": scale_,
    }
    ops.register(device, impl, **(kernels | others))


def register_products(
    device: str, impl: str, statistics_pass: Callable[..., None], gradient_pass: Callable[..., None]
) -> None:
    """Registers the operators of products; the passes get a :class:`Product` for logits."""

    def of_product(operator: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: operator(Product(*arguments[:5]), *arguments[5:])

    def gradient_(gradient: Tensor, *arguments: Any) -> None:
        of_product(lambda product, *others: gradient_pass(gradient, product, *others))(*arguments)

    row_statistics, row_loss = map(of_product, _forward_operators(statistics_pass))
    ops.register(
        device,
        impl,
        product_row_statistics=row_statistics,
        product_row_loss=row_loss,
        product_row_gradient_=gradient_,
    )
