"""The autograd functions over the operators. Thin: an operator forward, an operator backward.

A backward that is itself to be differentiated (create_graph=True) goes through the dense reference instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import reference
from .epilogue import Epilogue, Shared
from .statistics import Columns, Picks, dense_columns


def row_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    epilogue: Epilogue,
    shared: Shared,
    ignore_index: int,
    top_k: int,
    inplace: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (N,) by a compiled epilogue, with detached statistics and pick indices; differentiable in logits."""
    settings = (epilogue, shared, ignore_index, top_k, inplace, impl)
    return _RowLoss.apply(logits, target, weight, candidates, settings, *params)


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, target, weight, candidates, settings, *params):  # type: ignore[no-untyped-def]
        epilogue, shared, ignore_index, top_k, _, impl = settings
        loss, statistics, index, coefficients = ops.row_loss(
            logits,
            target,
            weight,
            candidates,
            list(params),
            epilogue.name,
            *shared,
            ignore_index,
            top_k,
            impl,
        )
        ctx.save_for_backward(logits, target, weight, candidates, statistics, index, coefficients, *params)
        ctx.settings = settings
        ctx.mark_non_differentiable(statistics, index)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        return loss, statistics, index

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        logits, target, weight, candidates, statistics, index, coefficients, *params = ctx.saved_tensors
        epilogue, shared, ignore_index, _, inplace, impl = ctx.settings
        if torch.is_grad_enabled():
            with torch.enable_grad():
                loss, _statistics = reference.row_losses(
                    logits, target, weight, candidates, params, epilogue, shared, ignore_index
                )
                (grad,) = torch.autograd.grad(loss, logits, grad_output, create_graph=True)
        else:
            grad = _gradient(
                logits,
                inplace,
                (target, weight, statistics, index, coefficients, grad_output, params),
                (epilogue.name, ignore_index, impl),
            )
        return grad, *([None] * (len(ctx.needs_input_grad) - 1))


def _gradient(logits: Tensor, inplace: bool, tensors: tuple[Any, ...], settings: tuple[Any, ...]) -> Tensor:
    if not inplace:
        return ops.row_gradient(logits, *tensors, *settings)
    grad = logits.detach()
    ops.row_gradient_(grad, *tensors, *settings)
    # A later use of the logits by autograd, a second backward above all, must fail rather than read gradients.
    torch.autograd.graph.increment_version(logits)
    return grad


def row_statistics(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    ignore_index: int,
    picks: Picks,
    inplace: bool,
    impl: str,
) -> tuple[Columns, Tensor]:
    """The statistics of rows as differentiable columns, and the picks' indices (K, N)."""
    *columns, index = _RowStatistics.apply(
        logits, target, weight, candidates, (ignore_index, tuple(picks), inplace, impl)
    )
    return Columns(*columns), index


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, target, weight, candidates, settings):  # type: ignore[no-untyped-def]
        ignore_index, picks, _, impl = settings
        statistics, index = ops.row_statistics(logits, target, weight, candidates, ignore_index, *picks, impl)
        ctx.save_for_backward(logits, target, weight, candidates, statistics, index)
        ctx.settings = settings
        ctx.mark_non_differentiable(index)
        m, ce = statistics[ops.MAX], statistics[ops.CE].clone()
        log_sum = statistics[ops.SUM_EXP].log()
        pick_logit = statistics[ops.STATISTICS :].clone()
        pick_ce = torch.where(index == target, ce, log_sum + (m - pick_logit))
        return (
            ce,
            statistics[ops.Q].clone(),
            m + log_sum,
            statistics[ops.TARGET_LOGIT].clone(),
            statistics[ops.MEAN_CE].clone(),
            pick_logit,
            pick_ce,
            index,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight, candidates, statistics, index = ctx.saved_tensors
        ignore_index, picks, inplace, impl = ctx.settings
        if torch.is_grad_enabled():
            grad = _dense_gradient(logits, target, weight, candidates, ignore_index, Picks(*picks), grads[:-1])
        else:
            coefficients = _coefficients(statistics, target, index, weight, Columns(*grads[:-1]), logits.shape[-1])
            grad = _gradient(
                logits,
                inplace,
                (target, weight, statistics, index, coefficients, None, []),
                ("", ignore_index, impl),
            )
        return grad, None, None, None, None


def _coefficients(
    statistics: Tensor, target: Tensor, index: Tensor, weight: Tensor | None, g: Columns, classes: int
) -> Tensor:
    """Of dL/dz_j = a p_j - u w_j - sum_k b_k [j == index_k], from the derivatives `g` by each column."""
    q, p = statistics[ops.Q], (-statistics[ops.CE]).exp()
    # A pick that is the target acts through the target's own statistics, which are the accurate ones.
    same = index == target
    g_ce = g.ce + (g.pick_ce * same).sum(0)
    g_target = g.target_logit + (g.pick_logit * same).sum(0)
    b = (g.pick_ce - g.pick_logit) * ~same
    u = g.mean_ce / classes
    weight_sum: Tensor | int = classes if weight is None else weight.sum()
    # d = a - b_target is summed without the terms that cancel in it
    d = g.lse + (g.pick_ce * ~same).sum(0) + u * weight_sum
    a = d + g_ce + g.q * p
    at_target = d + g_target - a * q
    valid_target = target.clamp(0, classes - 1)  # ignored rows may hold any index
    at_target = at_target - (u if weight is None else u * weight[valid_target])
    return torch.cat([torch.stack([a, u, at_target]), b])


def _dense_gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    ignore_index: int,
    picks: Picks,
    grads: tuple[Tensor, ...],
) -> Tensor:
    ignored = target == ignore_index
    with torch.enable_grad():
        z = logits.to(grads[0].dtype).masked_fill(ignored[:, None], 0)
        columns, _ = dense_columns(z, target.masked_fill(ignored, 0), weight, candidates, picks)
        pairs = [(c, g) for c, g in zip(columns, grads, strict=True) if c.requires_grad]
        (grad,) = torch.autograd.grad([c for c, _ in pairs], logits, [g for _, g in pairs], create_graph=True)
    return grad
