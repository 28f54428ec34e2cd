"""The autograd functions over the operators. Thin: an operator forward, an operator backward.

Their source is logits in hand, or a :class:`~fusedloss.definition.projection.Projection`: hidden states, weight and bias. A
backward that is itself to be differentiated (create_graph=True) goes through the dense reference instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..checks import IGNORED, compute_dtype
from ..definition import reference
from ..definition.epilogue import Epilogue, Overlap, Shared
from ..definition.projection import Form, Projection, dense_logits
from ..definition.statistics import Columns, Picks, Targets, dense_columns, statistics_with_top
from ..distributed import vocabulary
from ..distributed.vocabulary import VocabularyShards
from . import operators as ops

Source = Tensor | Projection


def apply(function: type[torch.autograd.Function], source: Source, settings: tuple[Any, ...], *tensors: Any) -> Any:
    if isinstance(source, Projection):
        return function.apply(source.hidden, source.weight, source.bias, (source.form, *settings), *tensors)
    return function.apply(source, None, None, (None, *settings), *tensors)


def row_loss(
    source: Source,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    common: Tensor | None,
    epilogue: Epilogue,
    shared: Shared,
    top_k: int,
    inplace: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (N,) by a compiled epilogue, differentiable, and detached statistics and pick indices."""
    settings = (epilogue, shared, top_k, inplace, impl)
    return apply(_RowLoss, source, settings, target, weight, candidates, common, *params)


def linear_sum(
    source: Projection,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    common: Tensor | None,
    row_weight: Tensor | None,
    epilogue: Epilogue,
    shared: Shared,
    top_k: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the row losses times `row_weight`, whose gradients are made with it, while the logits are at hand."""
    # Asked here, because within the function gradients are off, and ctx.needs_input_grad knows nothing of no_grad.
    needed = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (source.hidden, source.weight, source.bias)
    ]
    settings = (epilogue, shared, top_k, needed, impl)
    return apply(_LinearSum, source, settings, target, weight, candidates, row_weight, common, *params)


def row_sum(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    common: Tensor | None,
    token_weight: Tensor | None,
    divisor: float | Tensor | None,
    epilogue: Epilogue,
    shared: Shared,
    top_k: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the row losses times `token_weight`, over the divisor, whose gradient is made with it.

    Divided before and not after, so that in training the gradient is that of an upstream gradient of 1.
    """
    settings = (divisor, epilogue, shared, top_k, impl)
    return _RowSum.apply(logits, settings, target, weight, candidates, token_weight, common, *params)


def class_sums(
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    params: list[Tensor],
    overlap: Overlap,
    inplace: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows (2, V) of error and agreement, differentiable, and detached statistics and pick indices."""
    return _ClassSums.apply(logits, row_weight, (overlap, inplace, impl), target, *params)


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, logits, linear_weight, linear_bias, settings, target, weight, candidates, common, *params
    ):
        form, epilogue, shared, top_k, _, impl = settings
        rows = (target, weight, candidates, list(params), common)
        names = (epilogue.name, shared.smooths, top_k)
        if form is None:
            result = ops.row_loss(logits, *rows, *names, impl)
        else:
            no_gradients = (None, [False] * 3)
            result = ops.linear_row_loss(logits, linear_weight, linear_bias, *rows, *no_gradients, *names, *form, impl)
        loss, statistics, index, coefficients = result[:4]
        ctx.save_for_backward(
            logits, linear_weight, linear_bias, target, weight, candidates, statistics, index, coefficients, *params
        )
        ctx.settings = settings
        ctx.mark_non_differentiable(statistics, index)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        return loss, statistics, index

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad_output is None:
            return (None, None, None, *nothing)
        saved = ctx.saved_tensors  # once: under activation checkpointing a second look computes all anew
        *sources, target, weight, candidates, statistics, index, coefficients = saved[:9]
        params = list(saved[9:])
        form, epilogue, shared, _, inplace, impl = ctx.settings
        needed = ctx.needs_input_grad[:3]
        if transforms.plain_backward(grad_output, inplace=inplace):

            def losses(z: Tensor) -> tuple[Tensor]:
                rows, _ = reference.row_losses(z, target, weight, candidates, params, epilogue, shared)
                return (rows,)

            grads = _dense_gradients(sources, form, target, needed, losses, [grad_output])
        else:
            tensors = (target, weight, statistics, index, coefficients, grad_output, params)
            grads = gradients(sources, form, needed, inplace, tensors, epilogue.name, impl)
        return *grads, *nothing


class _RowSum(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, logits, settings, target, weight, candidates, token_weight, common, *params
    ):
        divisor, epilogue, shared, top_k, impl = settings
        row_weight = row_weights(logits, target, token_weight, divisor)
        rows = (target, weight, candidates, list(params), common)
        loss, statistics, index, _, gradient = ops.row_loss_gradient(
            logits, *rows, row_weight, epilogue.name, shared.smooths, top_k, impl
        )
        ctx.save_for_backward(logits, target, weight, candidates, row_weight, gradient, *params)
        ctx.settings = (epilogue, shared, impl)
        ctx.mark_non_differentiable(statistics, index)
        ctx.set_materialize_grads(False)
        return divided(weighted_sum(loss, token_weight), divisor), statistics, index

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(ctx.needs_input_grad) - 1)
        if grad_output is None:
            return (None, *nothing)
        saved = ctx.saved_tensors
        logits, target, weight, candidates, row_weight, gradient = saved[:6]
        params = list(saved[6:])
        epilogue, shared, impl = ctx.settings
        grad_output = grad_output.to(compute_dtype(logits.dtype))  # a divisor in float64 makes the loss that
        if torch.is_grad_enabled():

            def total(z: Tensor) -> tuple[Tensor]:
                rows, _ = reference.row_losses(z, target, weight, candidates, params, epilogue, shared)
                return (weighted_sum(rows, row_weight),)

            return *_dense_gradients((logits,), None, target, (True,), total, [grad_output]), *nothing
        return scaled_once(gradient, grad_output, impl), *nothing


class _LinearSum(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden, linear_weight, linear_bias, settings, target, weight, candidates, row_weight, common, *params
    ):
        form, epilogue, shared, top_k, needed, impl = settings
        loss, statistics, index, _, *gradients = ops.linear_row_loss(
            hidden,
            linear_weight,
            linear_bias,
            target,
            weight,
            candidates,
            list(params),
            common,
            row_weight,
            needed,
            epilogue.name,
            shared.smooths,
            top_k,
            *form,
            impl,
        )
        ctx.save_for_backward(
            hidden, linear_weight, linear_bias, target, weight, candidates, row_weight, *gradients, *params
        )
        ctx.settings = settings
        ctx.mark_non_differentiable(statistics, index)
        ctx.set_materialize_grads(False)
        return weighted_sum(loss, row_weight), statistics, index

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad_output is None:
            return (None, None, None, *nothing)
        saved = ctx.saved_tensors
        *sources, target, weight, candidates, row_weight = saved[:7]
        gradients, params = saved[7:10], list(saved[10:])
        form, epilogue, shared, _, needed, impl = ctx.settings
        if torch.is_grad_enabled():

            def total(z: Tensor) -> tuple[Tensor]:
                rows, _ = reference.row_losses(z, target, weight, candidates, params, epilogue, shared)
                return (weighted_sum(rows, row_weight),)

            return *_dense_gradients(sources, form, target, needed, total, [grad_output]), *nothing
        scaled = (
            scaled_once(gradient, grad_output, impl, source.dtype) if need else None
            for need, gradient, source in zip(needed, gradients, sources, strict=True)
        )
        return *scaled, *nothing


class _ClassSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, row_weight, settings, target, *params):  # type: ignore[no-untyped-def]
        overlap, _, impl = settings
        statistics, index = ops.row_statistics(logits, target, None, None, *Picks(1), impl)
        name = overlap.over_rows
        sums = ops.class_sums(logits, target, row_weight, statistics, index, list(params), name, None, impl)
        ctx.save_for_backward(logits, row_weight, target, statistics, index, *params)
        ctx.settings = settings
        ctx.mark_non_differentiable(statistics, index)
        ctx.set_materialize_grads(False)
        return sums, statistics, index

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(ctx.needs_input_grad) - 2)
        if grad_sums is None:
            return (None, None, *nothing)
        saved = ctx.saved_tensors
        logits, row_weight, target, statistics, index = saved[:5]
        params = list(saved[5:])
        overlap, inplace, impl = ctx.settings
        needed = ctx.needs_input_grad[:2]
        if transforms.plain_backward(grad_sums, inplace=inplace):

            def sums(z: Tensor, w: Tensor | None) -> list[Tensor]:
                return [reference.class_sums(z, target, w, params, overlap.function)[0]]

            return *differentiable((logits, row_weight), needed, sums, [grad_sums]), *nothing
        # Each row has a loss of its own: its errors and its agreement, each times the derivative by their sum.
        error, agreement = grad_sums.to(compute_dtype(logits.dtype)).contiguous().unbind()
        params.append(agreement[Targets.of(target, logits.shape[1]).safe])
        name = overlap.over_rows
        loss, coefficients = ops.class_terms(logits, target, error, statistics, index, params, name, impl)
        gradient = None
        if needed[0]:
            tensors = (target, error, statistics, index, coefficients, row_weight, params)
            gradient = gradients((logits, None, None), None, needed, inplace, tensors, name, impl)[0]
        return gradient, loss if needed[1] else None, *nothing


def weighted_sum(rows: Tensor, row_weight: Tensor | None) -> Tensor:
    """Of the losses of rows (N,), those of ignored ones 0."""
    return rows.sum() if row_weight is None else (rows * row_weight).sum()  # autocast would round a dot product


def row_weights(
    logits: Tensor, target: Tensor, token_weight: Tensor | None, divisor: float | Tensor | None
) -> Tensor | None:
    """Of the rows' losses in their sum over the divisor."""
    if divisor is None:
        return token_weight
    dtype = compute_dtype(logits.dtype)
    share = (torch.ones((), dtype=dtype, device=logits.device) / divisor).to(dtype)
    return share.expand(len(target)) if token_weight is None else share * token_weight


def divided(total: Tensor, divisor: float | Tensor | None) -> Tensor:
    return total if divisor is None else total / divisor


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running may run again (retain_graph); True where that cannot be known."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None or torch.compiler.is_compiling() else bool(asked())


def scaled_once(gradient: Tensor, factor: Tensor, impl: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a saved gradient times a factor, in place where nobody will look at it again; in a dtype if told."""
    dtype = dtype or gradient.dtype
    if transforms.active(factor) or torch.compiler.is_compiling():
        # A 0-d factor would be rounded to the gradient's dtype.
        return (gradient.to(factor.dtype) * factor).to(dtype)
    if dtype != gradient.dtype and gradient.device.type != "cpu":
        # One launch. On a CPU it would take memory of the wider dtype.
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    if _graph_is_kept():
        gradient = gradient.clone()
    ops.scale_(gradient, factor, impl)
    return gradient.to(dtype)


def gradients(
    sources: Sequence[Any],
    form: Form | None,
    needed: Sequence[bool],
    inplace: bool,
    tensors: tuple[Any, ...],
    epilogue: str,
    impl: str,
) -> tuple[Tensor | None, ...]:
    """By the gradient pass. `tensors`: of the rows, up to the parameters."""
    logits, linear_weight, linear_bias = sources
    if form is not None:
        grads = ops.linear_gradient(logits, linear_weight, linear_bias, *tensors, list(needed), epilogue, *form, impl)
        return tuple(
            grad.to(source.dtype) if need else None for need, grad, source in zip(needed, grads, sources, strict=True)
        )
    if not inplace:
        return ops.row_gradient(logits, *tensors, epilogue, impl), None, None
    grad = logits.detach()
    ops.row_gradient_(grad, *tensors, epilogue, impl)
    # A later use of the logits by autograd, a second backward above all, must fail rather than read gradients.
    torch.autograd.graph.increment_version(logits)
    return grad, None, None


def _dense_gradients(
    sources: Sequence[Any],
    form: Form | None,
    target: Tensor,
    needed: Sequence[bool],
    outputs_of: Callable[[Tensor], Sequence[Tensor]],
    grad_outputs: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients by `sources` of a function of their logits, in plain PyTorch."""

    def outputs(first: Tensor, weight: Any = None, bias: Any = None) -> Sequence[Tensor]:
        return outputs_of(first if form is None else dense_logits(first, weight, bias, form, target))

    return differentiable(sources, needed, outputs, grad_outputs)


def differentiable(
    inputs: Sequence[Any],
    needed: Sequence[bool],
    outputs_of: Callable[..., Sequence[Tensor]],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs that are needed, themselves differentiable where the backward is."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An input that was made of another must not pass its gradient on to that.
        own = [x.view_as(x) if need else x for x, need in zip(inputs, needed, strict=True)]
        outputs = outputs_of(*own)
    pairs = [(x, g) for x, g in zip(outputs, grad_outputs, strict=True) if x.requires_grad and g is not None]
    wanted = [x for x, need in zip(own, needed, strict=True) if need]
    grads = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph))
    return tuple(next(grads) if need else None for need in needed)


def row_statistics(
    source: Source,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    picks: Picks,
    inplace: bool,
    impl: str,
    shards: VocabularyShards | None = None,
) -> tuple[Columns, Tensor]:
    """The statistics of rows as differentiable columns, and the picks' indices (K, N).

    With `shards` the source has this rank's classes; all else is of the classes of all ranks.
    """
    settings = (tuple(picks), inplace, impl, shards)
    *columns, index = apply(_RowStatistics, source, settings, target, weight, candidates)
    return Columns(*columns), index


def detached_statistics(
    source: Source, target: Tensor, weight: Tensor | None, picks: Picks, impl: str
) -> tuple[Tensor, Tensor]:
    """The operator's statistics and pick indices."""
    rows = (target, weight, None, picks, impl)
    if not isinstance(source, Projection):
        return statistics_of((source.detach(), None, None), None, *rows)[:2]
    sources = [None if x is None else x.detach() for x in (source.hidden, source.weight, source.bias)]
    return statistics_of(sources, source.form, *rows)[:2]


def statistics_of(
    sources: Sequence[Any],
    form: Form | None,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    picks: Picks,
    impl: str,
    of_top: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics, indices of the picks and, if asked for, 1 - p of the top class."""
    rows = (target, weight, candidates)
    if form is not None:
        return ops.linear_row_statistics(*sources, *rows, *picks, of_top, *form, impl)

    def of_rows(*arguments: Any) -> tuple[Tensor, Tensor]:
        return ops.row_statistics(sources[0], *arguments, impl)

    return statistics_with_top(of_rows, *rows, picks, of_top)


def merged_statistics(
    sources: Sequence[Any],
    form: Form | None,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    picks: Picks,
    impl: str,
    shards: VocabularyShards,
    of_top: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of the classes of all ranks. `of_top`: at last 1 - p of the top class, from another look at the logits."""
    own = shards.sizes[shards.rank]
    rows = vocabulary.rows_here(shards, target, weight, candidates)
    if own:
        here = picks._replace(top_k=min(picks.top_k, own))
        statistics, index, top_q = statistics_of(sources, form, *rows, here, impl, of_top)
    else:
        statistics, index = vocabulary.nothing_here(sources[0], target, ops.picks_of(candidates, 0))
        top_q = statistics[ops.Q]
    own_top = top_q if of_top else None
    return vocabulary.merge(shards, statistics, index, target, weight, candidates, picks, own_top)


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, logits, linear_weight, linear_bias, settings, target, weight, candidates
    ):
        form, picks, _, impl, shards = settings
        sources, rows = (logits, linear_weight, linear_bias), (target, weight, candidates, Picks(*picks))
        if shards is None:
            statistics, index, _ = statistics_of(sources, form, *rows, impl)
        else:
            statistics, index, _ = merged_statistics(sources, form, *rows, impl, shards)
        ctx.save_for_backward(*sources, target, weight, candidates, statistics, index)
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
        *sources, target, weight, candidates, statistics, index = ctx.saved_tensors
        form, picks, inplace, impl, shards = ctx.settings
        needed = ctx.needs_input_grad[:3]
        if shards is not None:
            vocabulary.differentiated_once(*grads)
        if transforms.plain_backward(*grads, inplace=inplace):

            def columns(z: Tensor) -> Columns:
                index, ignored, _ = Targets.of(target, z.shape[-1])
                z = z.to(grads[0].dtype).masked_fill(ignored[:, None], 0)
                return dense_columns(z, index, weight, candidates, Picks(*picks))[0]

            result = _dense_gradients(sources, form, target, needed, columns, grads[:-1])
        else:
            own = sources[0].shape[-1] if form is None else sources[1].shape[0]
            classes = own if shards is None else shards.classes
            coefficients = _coefficients(statistics, target, index, weight, Columns(*grads[:-1]), classes)
            if shards is not None:
                if not own and form is None:
                    return torch.zeros_like(sources[0]), None, None, None, None, None, None
                target = shards.here(target)[0].masked_fill(target == IGNORED, IGNORED)
                index, weight = shards.here(index)[0], shards.weight(weight)
            tensors: tuple[Any, ...] = (target, weight, statistics, index, coefficients, None, [])
            result = gradients(sources, form, needed, inplace, tensors, "", impl)
        return *result, None, None, None, None


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
    a = d + g_ce + torch.where(p == 0, 0, g.q * p)  # of an infinite ce, whatever the loss does with it
    at_target = d + g_target - a * q
    valid_target = target.clamp(0, classes - 1)  # ignored rows may hold any index
    at_target = at_target - (u if weight is None else u * weight[valid_target])
    return torch.cat([torch.stack([a, u, at_target]), b])
