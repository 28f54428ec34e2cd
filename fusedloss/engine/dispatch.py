"""The row form, shared by every loss: checks, choice of the implementation, reduction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backends, checks, transforms
from ..definition import reference
from ..definition.epilogue import Epilogue, Shared
from ..definition.projection import Projection
from ..definition.statistics import Picks, RowStats, Statistics, Targets, assemble
from ..distributed import vocabulary
from ..distributed.vocabulary import VocabularyShards
from . import class_terms, constants, over_classes
from . import functions as autograd
from . import operators as ops
from .functions import Source
from .options import DEFAULTS, RowOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Problem(NamedTuple):
    """A loss's arguments, checked, as the operators take them."""

    logits: Source  # (N, V)
    target: Tensor  # (N,)
    weight: Tensor | None
    candidates: Tensor | None
    params: list[Tensor]
    common: Tensor | None  # as fusedloss.engine.operators says
    shared: Shared
    token_weight: Tensor | None
    impl: str
    inplace: bool
    shards: VocabularyShards | None
    classes: int  # of all ranks
    options: RowOptions  # with their defaults


def prepare(
    name: str,
    input: Source,
    target: Tensor,
    params: Sequence[float | Tensor],
    without: tuple[str, ...],
    candidates: Tensor | None,
    options: RowOptions,
) -> Problem:
    """Checks the arguments of a loss; `name` is the public function's on logits."""
    linear = isinstance(input, Projection)
    for option in options:
        if option not in DEFAULTS or option in without or (linear and option == "inplace_backward"):
            raise TypeError(f"{'linear_' * linear}{name}() got an unexpected keyword argument {option!r}")
    o: RowOptions = {**DEFAULTS, **options}
    checks.check_logits(input, target)
    given = input
    if checks.is_dtensor(input):
        if o["group"] is not None:
            raise ValueError(f"group is for tensors of this rank, and a DTensor names its own, got {o['group']!r}")
        input, o["group"] = vocabulary.local_part("input", input, -1)
    target = vocabulary.local_rows(target)
    shards = vocabulary.shards_of(o["group"], input)
    classes = input.shape[-1] if shards is None else shards.classes
    if shards is not None:
        vocabulary.check_ranks(shards, name, input, target, params, o)
    _check(input, target, classes, o)
    target = checks.normalized_targets(target, o["ignore_index"])
    count = 0
    if candidates is not None:
        checks.check_candidates(candidates, target)
        count = candidates.shape[-1] if candidates.dim() > target.dim() else 1
    impl = backends.resolve(o["impl"], input.device, linear, input.dtype, input.shape[-1], count)
    if transforms.active():
        impl = "reference"
        if o["inplace_backward"]:
            transforms.refuse("inplace_backward=True")
    if isinstance(input, Projection) and impl != "reference":
        checks.check_readable("linear_weight", input.weight)
    if shards is not None:
        if impl == "reference":
            source = backends.named_by(o["impl"])
            raise ValueError(f"group needs an implementation with kernels, but {source} is 'reference'")
        if checks.may_read(target):
            checks.check_indices(target, None, classes)
        if isinstance(input, Projection):
            input = replace(input, form=vocabulary.form_for(shards, input))

    dtype = checks.compute_dtype(input.dtype)
    logits = input.flatten() if isinstance(input, Projection) else _matrix(input, o["inplace_backward"])
    # A compiled backward would not raise the logits' version, by which autograd knows that they are gone.
    inplace = o["inplace_backward"] and not torch.compiler.is_compiling()
    if inplace and impl == "reference":
        source = backends.named_by(o["impl"])
        raise ValueError(f"inplace_backward needs a compiled implementation, but {source} is 'reference'")
    if inplace:
        assert isinstance(given, Tensor)
        checks.check_no_leaf(given)
    index = target.reshape(-1).contiguous()
    weight = o["weight"]
    if weight is not None:
        weight = weight.to(dtype).contiguous()
    if candidates is not None:
        # Those of ignored rows may hold anything.
        candidates = candidates.reshape(-1, count).to(torch.int64)
        candidates = candidates.masked_fill((index == checks.IGNORED)[:, None], 0).contiguous()
        if shards is not None and checks.may_read(candidates):
            checks.check_indices(index, candidates, classes)
    shared = Shared(float(o["label_smoothing"]), o["smoothing_over"], float(o["z_loss"]))
    numbers, common = constants.parameters(params, shared.numbers(classes), dtype, input.device)
    token_weight = o["token_weight"]
    if token_weight is not None:
        # Those of ignored rows may hold anything.
        token_weight = token_weight.reshape(-1).to(dtype).masked_fill(index == checks.IGNORED, 0)
    return Problem(
        logits, index, weight, candidates, numbers, common, shared, token_weight, impl, inplace, shards, classes, o
    )


def row_loss(
    name: str,
    input: Source,
    target: Tensor,
    epilogue: Epilogue,
    params: Sequence[float | Tensor] = (),
    *,
    without: tuple[str, ...] = (),
    candidates: Tensor | None = None,
    mean_over_weights: bool = False,
    **options: Unpack[RowOptions],
) -> Any:
    """The loss `epilogue` of logits in hand or of a projection; `name` is the public function's on logits."""
    problem = prepare(name, input, target, params, without, candidates, options)
    _check_picks(epilogue.picks, problem)
    index, weight, token_weight, o = problem.target, problem.weight, problem.token_weight, problem.options
    over = weight if mean_over_weights else None
    divisor, normalizer = _divisor(index, over, token_weight, checks.compute_dtype(problem.logits.dtype), o)
    loss, stats = _dispatch(problem, epilogue, divisor)
    if o["reduction"] == "none":
        loss = loss.reshape(target.shape)
    elif isinstance(normalizer, Tensor):
        # Over a count of no targets at all it stays 0; anything else over 0 is infinite.
        loss = loss / torch.where((normalizer == 0) & (loss != 0), 0, 1)
    return loss if stats is None else (loss, shaped_stats(stats, target, o["ignore_index"]))


def shaped_stats(stats: tuple[Tensor, ...], target: Tensor, ignore_index: int) -> RowStats:
    """The argmax of an ignored row equals no target."""
    lse, log_prob, argmax, argmax_log_prob = (column.reshape(target.shape) for column in stats)
    if ignore_index == -1:
        argmax = argmax.masked_fill(argmax == -1, -2)
    return RowStats(lse, log_prob, argmax, argmax_log_prob)


def _check(input: Source, target: Tensor, classes: int, o: RowOptions) -> None:
    checks.check_classes(classes, input)
    checks.check_choice("reduction", o["reduction"], checks.REDUCTIONS)
    checks.check_choice("smoothing_over", o["smoothing_over"], ("all", "others"))
    checks.check_number("label_smoothing", o["label_smoothing"], 0, 1)
    checks.check_number("z_loss", o["z_loss"], 0)
    o["ignore_index"] = checks.check_int("ignore_index", o["ignore_index"])
    if o["weight"] is not None:
        checks.check_weight(o["weight"], input, classes)
    if o["token_weight"] is not None:
        checks.check_token_weight(o["token_weight"], target)
    if o["normalizer"] is not None:
        checks.check_normalizer(o["normalizer"], o["reduction"], o["token_weight"])


def _check_picks(picks: Picks, problem: Problem) -> None:
    if picks.top_k > problem.classes:
        raise ValueError(f"the second largest logit needs at least 2 classes, got {problem.classes}")
    if picks.below and problem.shards is not None:
        raise ValueError("statistics 'below' are those below the target's logit, which a rank of a group need not have")


def _matrix(input: Tensor, inplace: bool) -> Tensor:
    """(N, V) with unit stride along the rows, a view of the input wherever one exists."""
    classes = input.shape[-1]
    if inplace:
        try:
            matrix = input.view(math.prod(input.shape[:-1]), classes)
        except RuntimeError:
            matrix = None
        if matrix is None or (matrix.stride(1) != 1 and classes > 1) or (0 <= matrix.stride(0) < classes):
            raise ValueError(
                "inplace_backward needs logits whose rows lie one after the other in memory, got strides "
                f"{input.stride()} for shape {tuple(input.shape)}"
            )
        return matrix
    matrix = input.reshape(math.prod(input.shape[:-1]), classes)
    return matrix if matrix.stride(1) == 1 or classes == 1 else matrix.contiguous()


def _dispatch(
    problem: Problem, epilogue: Epilogue, divisor: float | Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Row losses (N,) or their sum over the divisor, times the token weights; columns of RowStats where asked."""
    logits, target, weight, candidates, params, common, shared, token_weight, impl, inplace, shards, _, o = problem
    return_stats, unreduced = o["return_stats"], o["reduction"] == "none"

    def reduced(rows: Tensor) -> Tensor:
        if unreduced:
            return rows if token_weight is None else rows * token_weight
        return autograd.divided(autograd.weighted_sum(rows, token_weight), divisor)

    if impl == "reference":
        dense = logits.logits(target) if isinstance(logits, Projection) else logits
        rows, s = reference.row_losses(dense, target, weight, candidates, params, epilogue, shared)
        return reduced(rows), dense_row_stats(s, target) if return_stats else None

    compiled = has_compiled(epilogue.name, problem)
    fixed = token_weight is None or not token_weight.requires_grad
    if compiled and shards is None:
        # An epilogue takes every pick for its own, so that the top class can ride along only where there is no other.
        top_k = max(epilogue.picks.top_k, int(return_stats and candidates is None))
        # A trace would keep which gradients were asked for.
        if isinstance(logits, Projection) and not unreduced and fixed and not transforms.traced():
            loss, statistics, index = autograd.linear_sum(
                logits, target, weight, candidates, params, common, token_weight, epilogue, shared, top_k, impl
            )
            loss = autograd.divided(loss, divisor)
        elif isinstance(logits, Tensor) and not unreduced and fixed and _of_one_read(logits, divisor, inplace, impl):
            loss, statistics, index = autograd.row_sum(
                logits, target, weight, candidates, params, common, token_weight, divisor,
                epilogue, shared, top_k, impl,
            )  # fmt: skip
        else:
            rows, statistics, index = autograd.row_loss(
                logits, target, weight, candidates, params, common, epilogue, shared, top_k, inplace, impl
            )
            loss = reduced(rows)
    elif epilogue.over == "rows" or shards is not None:
        compose = _composed if epilogue.over == "rows" else _composed_over_classes
        rows, s = compose(problem, epilogue)
        return reduced(rows), dense_row_stats(s, target) if return_stats else None
    elif isinstance(logits, Projection):
        raise ValueError(
            "a linear form over the classes needs a compiled epilogue, which a loss function over the classes and "
            "parameters that require grad have not; compute the logits and use the row form"
        )
    else:
        if inplace:
            raise ValueError("inplace_backward needs a compiled epilogue, which this loss over the classes has not")
        top_k = 0
        if torch.compiler.is_compiling() and _holds_gradients(epilogue, problem):
            loss = reduced(_dense_chunks(logits, target, weight, params, epilogue, shared))
        else:
            try:
                if unreduced or not fixed or not _may_scale(logits, divisor, params):
                    rows, s = _composed_over_classes(problem, epilogue)
                    return reduced(rows), dense_row_stats(s, target) if return_stats else None
                loss, statistics, index = over_classes.row_sum(
                    logits, target, weight, params, token_weight, divisor, epilogue, shared, impl
                )
                top_k = 1
            except class_terms.OwnGradientsError:
                loss = reduced(_dense_chunks(logits, target, weight, params, epilogue, shared))
    if not return_stats:
        return loss, None
    if top_k == 0:
        statistics, index = autograd.detached_statistics(logits, target, weight, Picks(1), impl)
    return loss, row_stats(statistics, index, target)


def _of_one_read(logits: Tensor, divisor: float | Tensor | None, inplace: bool, impl: str) -> bool:
    """Whether to make the gradient of a sum with the loss. `inplace`: not while others need the logits."""
    return impl in backends.ONE_READ_IMPLS and not inplace and _may_scale(logits, divisor, [])


def _may_scale(logits: Tensor, divisor: float | Tensor | None, params: list[Tensor]) -> bool:
    """Whether a sum has a gradient that may be made with it, to be scaled by what comes from above."""
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in (logits, *params))
        and not (isinstance(divisor, Tensor) and divisor.requires_grad)
        # Where losses are scaled because gradients underflow, so would this one before it is; and 1 is rare.
        and logits.dtype != torch.float16
        # A compiled backward would not know whether it may scale in place, and copy.
        and not torch.compiler.is_compiling()
        and not transforms.traced()
    )


def _composed(problem: Problem, epilogue: Epilogue) -> tuple[Tensor, Statistics]:
    """A loss in PyTorch between the two passes, and the statistics."""
    logits, target, weight, candidates, params, _, shared, _, impl, inplace, shards, classes, o = problem
    mean = epilogue.picks.mean or shared.smooths
    picks = epilogue.picks._replace(top_k=max(epilogue.picks.top_k, int(o["return_stats"])), mean=mean)
    columns, index = autograd.row_statistics(logits, target, weight, candidates, picks, inplace, impl, shards)
    targets = Targets.of(target, classes)
    s = assemble(columns, targets.safe, index, picks, weight)
    loss = shared.apply(epilogue.of_rows(s, params), s, weight, classes, weighted=False)
    return loss.masked_fill(targets.ignored, 0).masked_fill(targets.invalid, torch.nan), s


def has_compiled(name: str, problem: Problem) -> bool:
    """Whether the passes have the epilogue of that name, and all gradients that are asked for."""
    return backends.has_epilogue(problem.impl, name) and not any(p.requires_grad for p in problem.params)


_OWN_GRADIENTS = (
    "with a group, a loss function over the classes has no gradients for tensors of its own, but it holds one that "
    "requires grad; detach it"
)


def _composed_over_classes(problem: Problem, epilogue: Epilogue) -> tuple[Tensor, Statistics]:
    """A class term; over the classes of all ranks, of which each sums its own. Without ranks it is not compiled."""
    logits, target, weight, _, params, _, shared, _, impl, inplace, shards, classes, _ = problem
    compiled = has_compiled(epilogue.name, problem)
    if inplace and not compiled:
        raise ValueError("inplace_backward needs a compiled epilogue, which this loss over the classes has not")
    # Asked beforehand: where torch.compile breaks its graph, parts of a trace would not see it.
    if shards is not None and not compiled and _holds_gradients(epilogue, problem):
        raise ValueError(_OWN_GRADIENTS)
    settings = (epilogue, shared.smooths, compiled, inplace, impl, shards)
    try:
        base, s = over_classes.row_losses(logits, target, weight, params, *settings)
    except class_terms.OwnGradientsError:
        if shards is None:
            raise
        raise ValueError(_OWN_GRADIENTS) from None
    loss = shared.apply(base, s, weight, classes, weighted=True)
    return loss.masked_fill(target == checks.IGNORED, 0), s


def _holds_gradients(epilogue: Epilogue, problem: Problem) -> bool:
    """Whether a traced loss function over the classes has tensors of its own that require grad.

    The graph of its result cannot be looked at in a trace, so the function is traced once more, on one row.
    """
    logits = problem.logits
    p = torch.ones((1, logits.shape[-1]), dtype=checks.compute_dtype(logits.dtype), device=logits.device)
    p = p / logits.shape[-1]
    positive = torch.arange(logits.shape[-1], device=logits.device)[None] == 0
    result = epilogue.function(p, 1 - p, positive, *(p.new_ones(()) for _ in problem.params))
    return isinstance(result, Tensor) and result.requires_grad


def _dense_chunks(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    params: list[Tensor],
    epilogue: Epilogue,
    shared: Shared,
) -> Tensor:
    """A class term in PyTorch: the dense reference on a few rows at a time, once more in the backward."""

    def losses(z: Tensor, t: Tensor, *p: Tensor) -> Tensor:
        return reference.row_losses(z, t, weight, None, list(p), epilogue, shared)[0]

    return torch.cat(in_chunks(losses, logits.shape[-1], logits, target, *params))


def in_chunks(function: Callable[..., Tensor], classes: int, x: Tensor, *columns: Tensor | None) -> list[Tensor]:
    """Results for a few of the rows of `x` at a time, once more in the backward. Columns are 0-d or (N,)."""
    if torch.compiler.is_compiling():
        return [function(x, *columns)]
    rows = class_terms.rows_at_once(len(x), classes)
    parts = [None if c is None or c.dim() == 0 else c.split(rows) for c in columns]
    results = []
    for i, part in enumerate(x.split(rows)):
        own = [c if split is None else split[i] for c, split in zip(columns, parts, strict=True)]
        results.append(checkpoint(function, part, *own, use_reentrant=False))
    return results


def row_stats(statistics: Tensor, index: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The columns of RowStats from the operators' statistics with the top class as the first pick."""
    log_sum = statistics[ops.SUM_EXP].log()
    return _row_stats(statistics[ops.MAX] + log_sum, statistics[ops.CE], index[0], log_sum, target)


def dense_row_stats(s: Statistics, target: Tensor) -> tuple[Tensor, ...]:
    return _row_stats(s.lse.detach(), s.ce.detach(), s.top_index, s.top_ce.detach(), target)


def _row_stats(lse: Tensor, ce: Tensor, argmax: Tensor, argmax_ce: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    ignored = target == checks.IGNORED
    return (
        lse.masked_fill(ignored, torch.nan),
        (-ce).masked_fill(ignored, torch.nan),
        argmax.masked_fill(ignored, -1),
        (-argmax_ce).masked_fill(ignored, torch.nan),
    )


def _divisor(
    target: Tensor, weight: Tensor | None, token_weight: Tensor | None, dtype: torch.dtype, o: RowOptions
) -> tuple[float | Tensor | None, float | Tensor | None]:
    """What "mean" divides by, which is never 0, and the normalizer that it is, which may be: 1 stands in for it."""
    if o["reduction"] != "mean":
        return None, None
    normalizer = o["normalizer"]
    if isinstance(normalizer, str):  # "token_weight"
        assert token_weight is not None
        normalizer = token_weight.detach().sum()
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(dtype)  # a float64 count is no reason for a float64 loss
    if normalizer is not None:
        return _not_zero(normalizer) if isinstance(normalizer, Tensor) else normalizer, normalizer
    if weight is None:
        return (target != checks.IGNORED).sum().clamp(min=1), None
    # The loss has yet to say what it thinks of targets that are out of range.
    index, ignored, _ = Targets.of(target, len(weight))
    return _not_zero(weight[index].masked_fill(ignored, 0).sum()), None


def _not_zero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1, divisor)
