"""Losses over the classes that no backend has compiled: their definition in PyTorch, on a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import transforms
from ..backends import new_buffer
from ..definition import reference
from ..definition.epilogue import Epilogue
from ..definition.rows import Rows, Spec
from . import budgets
from .chunks import GradientsLaterError
from .functions import Reduction, called_with, differentiable, scaled_once, slopes_of

#: Bytes of probabilities that are held at a time, on a CPU.
DENSE_BYTES = 2 * 2**20


def losses(rows: Rows, spec: Spec, epilogue: Epilogue) -> Tensor:
    """Compute row losses (N,), a few rows at a time, which the backward computes again."""

    def some(z: Tensor, target: Tensor, *params: Tensor) -> Tensor:
        part = rows._replace(hidden=[z], target=target, params=list(params))
        return reference.losses_over_classes(part, epilogue, spec)

    loss = torch.cat(in_chunks(some, rows.classes, rows.logits, rows.target, *rows.params))
    # A constant has a gradient of 0.
    return loss if loss.requires_grad else loss + rows.logits[:0].sum()


def total(rows: Rows, spec: Spec, epilogue: Epilogue, reduction: Reduction) -> Tensor:
    """Compute their reduction, and with it the gradient by the logits where nothing else is differentiated."""
    differentiated = [x for x in (*rows.params, rows.scalars, *reduction) if isinstance(x, Tensor)]
    if (
        torch.is_grad_enabled()
        and rows.logits.requires_grad
        and not any(x.requires_grad for x in differentiated)
        # Where losses are scaled because gradients underflow, so would this one before it is.
        and rows.logits.dtype != torch.float16
        and not torch.compiler.is_compiling()
        and not transforms.traced()
    ):
        with suppress(GradientsLaterError):
            return _Total.apply(rows, spec, epilogue, reduction, rows.logits)
    return reduction.of(losses(rows, spec, epilogue))


def in_chunks(function: Callable[..., Tensor], classes: int, x: Tensor, *columns: Tensor | None) -> list[Tensor]:
    """Compute results of a few rows of `x` at a time, and again in the backward. Columns are 0-d or (N,)."""
    if torch.compiler.is_compiling():
        return [function(x, *columns)]
    step = _step(classes, x.device)
    parts = [None if c is None or c.dim() == 0 else c.split(step) for c in columns]
    results = []
    for i, part in enumerate(x.split(step)):
        own = [c if split is None else split[i] for c, split in zip(columns, parts, strict=True)]
        results.append(checkpoint(function, part, *own, use_reentrant=False))
    return results


def _step(classes: int, device: torch.device) -> int:
    return max(1, budgets.at_a_time(device, DENSE_BYTES) // (max(1, classes) * 4))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Rows, spec: Spec, epilogue: Epilogue, reduction: Reduction, logits: Tensor) -> Tensor:
        row_weight, step = reduction.upstream(rows), _step(rows.classes, logits.device)
        if row_weight is not None:
            row_weight = row_weight.expand(rows.target.shape)
        gradient, parts = new_buffer(logits, logits.shape), []
        for begin in range(0, max(1, len(rows.target)), step):
            part = slice(begin, begin + step)
            z, edges = called_with([logits[part].detach()], logits)
            params = [x[part] if x.dim() else x for x in rows.params]
            some = rows._replace(hidden=list(z), target=rows.target[part], params=params)
            with torch.enable_grad():
                loss = reference.losses_over_classes(some, epilogue, spec)
            upstream = None if row_weight is None else row_weight[part]
            (gradient[part],) = slopes_of(loss, z, edges, upstream, epilogue.function)
            parts.append(loss.detach())
        ctx.save_for_backward(logits, gradient)
        ctx.settings = rows._replace(hidden=[]), spec, epilogue, reduction
        return reduction.of(torch.cat(parts))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, gradient = ctx.saved_tensors
        rows, spec, epilogue, reduction = ctx.settings
        grad_output = grad_output.to(torch.promote_types(logits.dtype, torch.float32))
        if torch.is_grad_enabled():

            def outputs(z: Tensor) -> list[Tensor]:
                return [reduction.of(reference.losses_over_classes(rows._replace(hidden=[z]), epilogue, spec))]

            (by_logits,) = differentiable([logits], [True], outputs, [grad_output])
        else:
            by_logits = scaled_once(gradient, grad_output, spec.impl, logits.dtype)
        return None, None, None, None, by_logits
