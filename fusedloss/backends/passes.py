"""The row operators of a backend, made of its two passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine import operators as ops
from ..engine.contracts import Epilogues


class Product(NamedTuple):
    """Logits that are never stored: what they are made of."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float
    mask_target: bool


@dataclass(slots=True)
class Forward:
    """A statistics pass and, where there is an epilogue, its loss. It writes the last, from `statistics` to `grad`."""

    logits: Any  # a tensor, or a Product
    target: Tensor
    weight: Tensor | None
    candidates: Tensor | None
    params: list[Tensor]
    common: Tensor | None
    epilogue: str | None
    top_k: int
    below: bool
    mean: bool
    statistics: Tensor
    index: Tensor
    loss: Tensor | None = None
    coefficients: Tensor | None = None
    # The gradient of the losses' sum, of rows with these weights, for a backend that has it of one read.
    row_weight: Tensor | None = None
    grad: Tensor | None = None


@dataclass(slots=True)
class Backward:
    """A gradient pass: it writes `grad`, which may be the logits."""

    grad: Tensor
    logits: Any
    target: Tensor
    weight: Tensor | None
    statistics: Tensor
    index: Tensor
    coefficients: Tensor
    grad_output: Tensor | None
    params: list[Tensor]
    epilogue: str


def _forward(
    logits: Tensor | Product,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    common: Tensor | None,
    epilogue: str,
    mean: bool,
    top_k: int,
) -> Forward:
    """With new outputs; from the arguments of ``row_loss``."""
    statistics, index = _new_statistics(logits, target, candidates, top_k)
    settings = (common, epilogue, top_k, False, mean)
    return Forward(
        logits, target, weight, candidates, params, *settings, statistics, index, *ops.new_losses(statistics)
    )


def _new_statistics(
    logits: Tensor | Product, target: Tensor, candidates: Tensor | None, top_k: int, below: bool = False
) -> tuple[Tensor, Tensor]:
    like = logits.hidden if isinstance(logits, Product) else logits
    return ops.new_statistics(like, target, ops.picks_of(candidates, top_k, below))


def _results(x: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert x.loss is not None and x.coefficients is not None
    return x.loss, x.statistics, x.index, x.coefficients


def _forward_operators(statistics_pass: Callable[[Forward], None]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def row_statistics(
        logits: Tensor | Product,
        target: Tensor,
        weight: Tensor | None,
        candidates: Tensor | None,
        top_k: int,
        below: bool,
        mean: bool,
    ) -> tuple[Tensor, Tensor]:
        outputs = _new_statistics(logits, target, candidates, top_k, below)
        settings = (None, None, top_k, below, mean)
        statistics_pass(Forward(logits, target, weight, candidates, [], *settings, *outputs))
        return outputs

    def row_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = _forward(*arguments)
        statistics_pass(x)
        return _results(x)

    return row_statistics, row_loss


def column(values: Tensor | None) -> tuple[int, int]:
    """Address and stride of a number for each row."""
    if values is None:
        return 0, 0
    return values.data_ptr(), values.stride(0)


def empty_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def register(
    device: str,
    impl: str,
    epilogues: Callable[[], Epilogues],
    statistics_pass: Callable[[Forward], None],
    gradient_pass: Callable[[Backward], None],
    new_gradient: Callable[[Tensor], Tensor] = empty_gradient,
    one_read: Callable[[Forward], bool] = lambda x: False,
    **others: Callable[..., Any],
) -> None:
    """Registers the row operators and `others`, which may replace some of them, under a dispatch key.

    `one_read`: whether the statistics pass writes the gradient, too.
    """
    row_statistics, row_loss = _forward_operators(statistics_pass)

    def loss_and_gradient(
        grad: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        candidates: Tensor | None,
        params: list[Tensor],
        common: Tensor | None,
        row_weight: Tensor | None,
        epilogue: str,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = _forward(logits, target, weight, candidates, params, common, epilogue, *arguments)
        results = _results(x)
        if one_read(x):
            x.grad, x.row_weight = grad, row_weight
            statistics_pass(x)
        else:
            statistics_pass(x)
            saved = (*results[1:], row_weight, params, epilogue)
            gradient_pass(Backward(grad, logits, target, weight, *saved))
        return results

    def row_loss_gradient(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        grad = new_gradient(logits)
        return *loss_and_gradient(grad, logits, *arguments), grad

    def row_loss_gradient_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return loss_and_gradient(logits, logits, *arguments)

    def row_gradient(logits: Tensor, *arguments: Any) -> Tensor:
        grad = new_gradient(logits)
        gradient_pass(Backward(grad, logits, *arguments))
        return grad

    def row_gradient_(logits: Tensor, *arguments: Any) -> None:
        gradient_pass(Backward(logits, logits, *arguments))

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
    ops.register(device, impl, epilogues, **(kernels | others))


def register_products(
    device: str,
    impl: str,
    epilogues: Callable[[], Epilogues],
    statistics_pass: Callable[[Forward], None],
    gradient_pass: Callable[[Backward], None],
    term_sums: Callable[..., Tensor],
    scale_: Callable[[Tensor, Tensor], None],
) -> None:
    """Registers the operators of products, and that which scales their gradients."""

    def of_product(operator: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: operator(Product(*arguments[:5]), *arguments[5:])

    def gradient_(gradient: Tensor, *arguments: Any) -> None:
        of_product(lambda product, *others: gradient_pass(Backward(gradient, product, *others)))(*arguments)

    row_statistics, row_loss = map(of_product, _forward_operators(statistics_pass))
    ops.register(
        device,
        impl,
        epilogues,
        product_row_statistics=row_statistics,
        product_row_loss=row_loss,
        product_row_gradient_=gradient_,
        product_term_sums=of_product(term_sums),
        scale_=scale_,
    )
