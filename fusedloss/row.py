"""The row form, shared by every loss: checks, choice of the implementation, reduction."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import autograd, backends, checks, ops
from .autograd import Source
from .backends import reference
from .epilogue import Epilogue, Shared
from .projection import Projection
from .statistics import Picks, RowStats, Statistics, assemble

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Bytes of probabilities that a class term without a compiled epilogue holds at a time.
DENSE_BYTES = 8 * 2**20


class RowOptions(TypedDict, total=False):
    """Options that every row loss shares."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    smoothing_over: str
    z_loss: float
    token_weight: Tensor | None
    normalizer: float | Tensor | str | None
    return_stats: bool
    inplace_backward: bool
    impl: str | None


_DEFAULTS: RowOptions = {
    "weight": None,
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "smoothing_over": "all",
    "z_loss": 0.0,
    "token_weight": None,
    "normalizer": None,
    "return_stats": False,
    "inplace_backward": False,
    "impl": None,
}

_OPTIONS_DOC = {
    "weight": "(V,) class weights w. A row's loss is multiplied by that of its target.",
    "ignore_index": "target value whose rows count for nothing: no loss, no gradient, not looked at.",
    "reduction": '"mean" over the targets not ignored, "sum", or "none" for losses of the target\'s shape.',
    "label_smoothing": "eps in [0, 1]: (1 - eps) * loss + (eps / V) * sum_j w_j (-log p_j).",
    "smoothing_over": """"all" V classes as above, or "others": eps / (V - 1) for each class but the target,
(1 - eps - eps / (V - 1)) * loss + eps / (V - 1) * sum_j w_j (-log p_j), as in fairseq.""",
    "z_loss": "adds z_loss * lse^2 to each row, lse = log sum_j exp z_j (weighted as the row is).",
    "token_weight": "tensor of the target's shape by which each target's loss is multiplied. Differentiated if it\n"
    "requires grad.",
    "normalizer": """number or 0-d tensor that replaces the divisor of "mean", for gradient accumulation; or
"token_weight" for the sum of the token weights of the targets that count.""",
    "return_stats": "also return :class:`~fusedloss.RowStats` of each row, detached.",
    "inplace_backward": """let the gradient take the logits' memory in the backward pass. The logits must not be
needed after that; a second backward raises. Needs an implementation with kernels. Under
torch.compile the gradient is a new tensor all the same.""",
    "impl": """"cpu", "triton" or "cuda" (GPUs), or "reference"; None takes FUSEDLOSS_IMPL or else the fastest
that is ready.""",
}

_SHAPES_DOC = """
Shapes:
    input (*, V) of float64, float32, bfloat16 or float16 with any strides; target (*) of int64 or int32. The loss is
    float32, float64 for float64 input. With no target to count, it is 0 and so are the gradients.

Raises:
    TypeError, ValueError: an argument of the wrong kind, shape or range.
    IndexError: a target outside [0, V) that is not ignore_index (on a GPU: that row's loss is NaN).
    RuntimeError: the named implementation cannot run here.
"""

_Loss = TypeVar("_Loss", bound=Callable[..., Any])


def row_form(*without: str) -> Callable[[_Loss], _Loss]:
    """Spells out the shared options in a loss's signature and docstring; `without`: those it does not take."""

    def document(loss: _Loss) -> _Loss:
        signature = inspect.signature(loss)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shared = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=value,
                annotation=RowOptions.__annotations__[name],
            )
            for name, value in _DEFAULTS.items()
            if name not in without
        ]
        loss.__signature__ = signature.replace(parameters=own + shared)  # type: ignore[attr-defined]
        options = "".join(
            textwrap.indent(f"{name}: {textwrap.indent(text, '    ').strip()}\n", "    ")
            for name, text in _OPTIONS_DOC.items()
            if name not in without
        )
        loss.__doc__ = f"{inspect.cleandoc(loss.__doc__ or '')}\n\nOptions of every row loss:\n{options}{_SHAPES_DOC}"
        return loss

    return document


class Problem(NamedTuple):
    """A loss's arguments, checked, as the operators take them."""

    logits: Source  # (N, V)
    target: Tensor  # (N,)
    weight: Tensor | None
    candidates: Tensor | None
    params: list[Tensor]
    token_weight: Tensor | None
    impl: str
    inplace: bool
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
        if option not in _DEFAULTS or option in without or (linear and option == "inplace_backward"):
            raise TypeError(f"{'linear_' * linear}{name}() got an unexpected keyword argument {option!r}")
    o: RowOptions = {**_DEFAULTS, **options}
    _check(input, target, o)
    if candidates is not None:
        checks.check_candidates(candidates, target)
    impl = backends.resolve(o["impl"], input.device, linear)

    dtype = checks.compute_dtype(input.dtype)
    logits = input.flatten() if isinstance(input, Projection) else _matrix(input, o["inplace_backward"])
    # A compiled backward would not raise the logits' version, by which autograd knows that they are gone.
    inplace = o["inplace_backward"] and not torch.compiler.is_compiling()
    if inplace and impl == "reference":
        raise ValueError("inplace_backward needs a compiled implementation, but impl is 'reference'")
    index = target.reshape(-1).to(torch.int64).contiguous()
    weight = o["weight"]
    if weight is not None:
        weight = weight.to(dtype).contiguous()
    if candidates is not None:
        # Those of ignored rows may hold anything.
        count = candidates.shape[-1] if candidates.dim() > target.dim() else 1
        candidates = candidates.reshape(-1, count).to(torch.int64)
        candidates = candidates.masked_fill((index == o["ignore_index"])[:, None], 0).contiguous()
    columns = [parameter(p, dtype, input.device) for p in params]
    token_weight = o["token_weight"]
    if token_weight is not None:
        # Those of ignored rows may hold anything.
        token_weight = token_weight.reshape(-1).to(dtype).masked_fill(index == o["ignore_index"], 0)
    return Problem(logits, index, weight, candidates, columns, token_weight, impl, inplace, o)


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
    logits, index, weight, candidates, columns, token_weight, impl, inplace, o = problem
    shared = Shared(float(o["label_smoothing"]), o["smoothing_over"], float(o["z_loss"]))
    loss, stats = _dispatch(
        logits, index, weight, candidates, columns, token_weight, epilogue, shared, impl,
        o["ignore_index"], inplace, o["return_stats"], o["reduction"] == "none",
    )  # fmt: skip
    if o["reduction"] == "none":
        loss = loss.reshape(target.shape)
    elif o["reduction"] == "mean":
        loss = _mean(loss, index, weight if mean_over_weights else None, token_weight, o)
    return loss if stats is None else (loss, shaped_stats(stats, target))


def shaped_stats(stats: tuple[Tensor, ...], target: Tensor) -> RowStats:
    return RowStats(*(column.reshape(target.shape) for column in stats))


def _check(input: Source, target: Tensor, o: RowOptions) -> None:
    checks.check_logits(input, target)
    checks.check_choice("reduction", o["reduction"], checks.REDUCTIONS)
    checks.check_choice("smoothing_over", o["smoothing_over"], ("all", "others"))
    checks.check_number("label_smoothing", o["label_smoothing"], 0, 1)
    checks.check_number("z_loss", o["z_loss"], 0)
    if isinstance(o["ignore_index"], bool) or not isinstance(o["ignore_index"], int):
        raise TypeError(f"ignore_index must be an int, got {o['ignore_index']!r}")
    if o["weight"] is not None:
        checks.check_weight(o["weight"], input)
    if o["token_weight"] is not None:
        checks.check_token_weight(o["token_weight"], target)
    if o["normalizer"] is not None:
        checks.check_normalizer(o["normalizer"], o["reduction"], o["token_weight"])


def _matrix(input: Tensor, inplace: bool) -> Tensor:
    """(N, V) with unit stride along the rows, a view of the input wherever one exists."""
    classes = input.shape[-1]
    if inplace:
        try:
            matrix = input.view(-1, classes)
        except RuntimeError:
            matrix = None
        if matrix is None or (matrix.stride(1) != 1 and classes > 1) or (0 <= matrix.stride(0) < classes):
            raise ValueError(
                "inplace_backward needs logits whose rows lie one after the other in memory, got strides "
                f"{input.stride()} for shape {tuple(input.shape)}"
            )
        return matrix
    matrix = input.reshape(-1, classes)
    return matrix if matrix.stride(1) == 1 or classes == 1 else matrix.contiguous()


def parameter(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(-1 if value.dim() else ()).to(device, dtype)
    if torch.compiler.is_compiling():
        # A factor stays a variable of the graph; a fill value would compile anew for each number.
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def _dispatch(
    logits: Source,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    token_weight: Tensor | None,
    epilogue: Epilogue,
    shared: Shared,
    impl: str,
    ignore_index: int,
    inplace: bool,
    return_stats: bool,
    unreduced: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Row losses (N,) or their sum, times the token weights, and the columns of RowStats where asked."""

    def reduced(rows: Tensor) -> Tensor:
        if unreduced:
            return rows if token_weight is None else rows * token_weight
        return autograd.weighted_sum(rows, token_weight)

    picks = epilogue.picks
    tensors = (logits, target, weight, candidates)
    if impl == "reference":
        dense = logits.logits(target) if isinstance(logits, Projection) else logits
        rows, s = reference.row_losses(dense, target, weight, candidates, params, epilogue, shared, ignore_index)
        return reduced(rows), dense_row_stats(s, target, ignore_index) if return_stats else None

    fused = backends.has_epilogue(impl, epilogue.name) and not any(p.requires_grad for p in params)
    if fused:
        # An epilogue takes every pick for its own, so that the top class can ride along only where there is no other.
        top_k = max(picks.top_k, int(return_stats and candidates is None))
        fixed = token_weight is None or not token_weight.requires_grad
        if isinstance(logits, Projection) and not unreduced and fixed:
            loss, statistics, index = autograd.linear_sum(
                logits, target, weight, candidates, params, token_weight, epilogue, shared, ignore_index, top_k, impl
            )
        else:
            rows, statistics, index = autograd.row_loss(
                *tensors, params, epilogue, shared, ignore_index, top_k, inplace, impl
            )
            loss = reduced(rows)
    elif epilogue.over == "rows":
        top_k = max(picks.top_k, int(return_stats))
        picks = picks._replace(top_k=top_k, mean=picks.mean or shared.label_smoothing != 0)
        loss = reduced(_composed(*tensors, params, epilogue, shared, ignore_index, picks, inplace, impl))
        top_k = 0
    elif isinstance(logits, Projection):
        raise ValueError(
            "a linear form over the classes needs a compiled epilogue, which a loss function over the classes and "
            "parameters that require grad have not; compute the logits and use the row form"
        )
    else:
        if inplace:
            raise ValueError("inplace_backward needs a compiled epilogue, which this loss over the classes has not")
        loss = reduced(_dense_chunks(logits, target, weight, params, epilogue, shared, ignore_index))
        top_k = 0
    if not return_stats:
        return loss, None
    if top_k == 0:
        statistics, index = autograd.detached_statistics(logits, target, weight, ignore_index, Picks(1), impl)
    return loss, row_stats(statistics, index, target, ignore_index)


def _composed(
    logits: Source,
    target: Tensor,
    weight: Tensor | None,
    candidates: Tensor | None,
    params: list[Tensor],
    epilogue: Epilogue,
    shared: Shared,
    ignore_index: int,
    picks: Picks,
    inplace: bool,
    impl: str,
) -> Tensor:
    """A loss in PyTorch between the two passes."""
    columns, index = autograd.row_statistics(logits, target, weight, candidates, ignore_index, picks, inplace, impl)
    ignored = target == ignore_index
    valid_target = target.masked_fill(ignored, 0)
    s = assemble(columns, valid_target, index, picks, weight)
    base = epilogue.of_rows(s, params)
    loss = shared.apply(base, s, weight, logits.shape[-1], weighted=False)
    return loss.masked_fill(ignored, 0)


def _dense_chunks(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    params: list[Tensor],
    epilogue: Epilogue,
    shared: Shared,
    ignore_index: int,
) -> Tensor:
    """A class term in PyTorch: the dense reference on a few rows at a time, once more in the backward."""

    def losses(z: Tensor, t: Tensor, *p: Tensor) -> Tensor:
        return reference.row_losses(z, t, weight, None, list(p), epilogue, shared, ignore_index)[0]

    return torch.cat(in_chunks(losses, logits, target, *params))


def in_chunks(function: Callable[..., Tensor], logits: Tensor, target: Tensor, *columns: Tensor | None) -> list[Tensor]:
    """Results for a few rows at a time, which are computed once more in the backward. Columns are 0-d or (N,)."""
    rows = max(1, DENSE_BYTES // (logits.shape[-1] * 4))
    parts = [None if c is None or c.dim() == 0 else c.split(rows) for c in columns]
    results = []
    for i, (z, t) in enumerate(zip(logits.split(rows), target.split(rows), strict=True)):
        own = [c if part is None else part[i] for c, part in zip(columns, parts, strict=True)]
        results.append(checkpoint(function, z, t, *own, use_reentrant=False))
    return results


def row_stats(statistics: Tensor, index: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """The columns of RowStats from the operators' statistics with the top class as the first pick."""
    log_sum = statistics[ops.SUM_EXP].log()
    return _row_stats(statistics[ops.MAX] + log_sum, statistics[ops.CE], index[0], log_sum, target, ignore_index)


def dense_row_stats(s: Statistics, target: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    return _row_stats(s.lse.detach(), s.ce.detach(), s.top_index, s.top_ce.detach(), target, ignore_index)


def _row_stats(
    lse: Tensor, ce: Tensor, argmax: Tensor, argmax_ce: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, ...]:
    ignored = target == ignore_index
    nowhere = -1 if ignore_index != -1 else -2  # equals no target
    return (
        lse.masked_fill(ignored, torch.nan),
        (-ce).masked_fill(ignored, torch.nan),
        argmax.masked_fill(ignored, nowhere),
        (-argmax_ce).masked_fill(ignored, torch.nan),
    )


def _mean(total: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, o: RowOptions) -> Tensor:
    normalizer = o["normalizer"]
    if normalizer == "token_weight":
        assert token_weight is not None
        normalizer = token_weight.detach().sum()
    if isinstance(normalizer, Tensor):
        # A count of no targets at all; anything else over 0 stays infinite.
        nothing = (normalizer == 0) & (total == 0)
        return total / torch.where(nothing, 1, normalizer)
    if normalizer is not None:
        assert not isinstance(normalizer, str)
        return total / normalizer
    counted = target != o["ignore_index"]
    if weight is None:
        return total / counted.sum().clamp(min=1)
    row_weight = weight[target.masked_fill(~counted, 0)] * counted
    divisor = row_weight.sum()
    return total / torch.where(divisor == 0, 1, divisor)


__all__ = ["RowOptions", "Statistics", "row_form", "row_loss"]
