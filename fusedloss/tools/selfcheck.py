"""Every loss, in both forms, on every implementation that is ready, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..checks import DTYPES, IGNORED, compute_dtype
from ..losses._registry import EXAMPLES, Example

#: What an error may have beyond twice that of the formula in PyTorch, in units of the last place.
ULPS = 8

#: The reference in float64 is the truth of all else; its own is the formula, where 1 - p costs it half the digits.
REFERENCE_ALLOWED = 1e-7

QUICK_SHAPES = (
    (32, 1000),
    (2, 4099),  # few rows, which may be split between threads; odd
)
SHAPES = (*QUICK_SHAPES, (512, 9), (33, 2049), (16, 32000), (1, 131072))

#: Rows of a chunk of a linear form, and the most rows and columns of an identity that one of its factors is.
CHUNK_ROWS, MOST_OF_IDENTITY = 24, 1000


class Error(NamedTuple):
    """The largest error over the largest true value (of a gradient: in its row), and what the rule allows."""

    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.found <= self.allowed  # NaN does not pass

    @property
    def severity(self) -> float:
        return self.found / self.allowed if self.found == self.found else float("inf")


class Result(NamedTuple):
    """A loss on an implementation; the errors are those of the shape where they are worst."""

    name: str
    impl: str
    dtype: torch.dtype
    loss: Error
    gradient: Error

    @property
    def passed(self) -> bool:
        return self.loss.passed and self.gradient.passed


class _Problem(NamedTuple):
    logits: Tensor  # (N, V)
    target: Tensor  # (N,), one in eight ignored
    upstream: Tensor  # (N,) the gradient that reaches the rows' losses; the first that of a loss over the rows


def ready() -> list[str]:
    """What is ready and fit for use, which the interpreted kernels are not."""
    return [impl for impl in backends.IMPLS if unchecked(impl) is None]


def unchecked(impl: str) -> str | None:
    """Why the implementation is not checked; None if it is."""
    return backends.unavailable(impl) or backends.unavailable(impl, _device(impl))


def left_out() -> Iterator[tuple[str, str]]:
    """Everything that `check` does not cover here, each with the reason."""
    for impl in backends.IMPLS:
        reason = unchecked(impl)
        if reason is not None:
            yield impl, reason
    for impl in backends.PRODUCT_IMPLS:
        reason = unchecked(impl) or "this command checks the implementations of row forms"
        yield f"{impl}, the fused linear form on a GPU", reason
    yield "supcon_loss and losses against a teacher on this machine", "`make test` does"


def _device(impl: str) -> torch.device:
    return torch.device("cuda" if impl in ("triton", "triton_fused", "cuda") else "cpu")


def count() -> int:
    """How many results `check` gives."""
    return len(_forms()) * len(DTYPES) * len(ready())


def _forms() -> list[tuple[Example, bool]]:
    """Return the examples, each with whether the linear form is meant."""
    return [(example, linear) for example in EXAMPLES for linear in (False, True)[: 1 + (example.linear is not None)]]


def check(quick: bool = False) -> Iterator[Result]:
    """The rule: at most twice the error of the formula in PyTorch on the same logits, plus a few ulps.

    For bfloat16 and float16 logits the formula computes in float32 as the losses do, and its gradient is rounded.
    A linear form computes the same logits, as the product of an identity and the logits, and has the same rule.
    """
    problems = [_problem(*shape) for shape in (QUICK_SHAPES if quick else SHAPES)]
    for example, linear in _forms():
        for dtype in DTYPES:
            errors = [_errors(example, p._replace(logits=p.logits.to(dtype)), linear) for p in problems]
            for impl in ready():
                loss, gradient = zip(*(e for by_impl in errors for e in by_impl[impl]), strict=True)
                worst = [max(column, key=lambda error: error.severity) for column in (loss, gradient)]
                yield Result(f"{'linear_' * linear}{example}", impl, dtype, *worst)


def _problem(rows: int, classes: int) -> _Problem:
    generator = torch.Generator().manual_seed(rows + classes)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    # No ties among the largest, in any dtype: a formula may choose another of equals.
    top = logits.max().ceil() + torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    logits.scatter_(1, logits.topk(3).indices, top.expand(rows, 3))
    target = torch.randint(classes, (rows,), generator=generator)
    # From rows that are wrong to rows with 1 - p of about 1e-4. Beyond, the formulas themselves break down.
    at_target = torch.linspace(-2, 9 + float(logits.logsumexp(1).max()), rows, dtype=torch.float64)
    logits.scatter_(1, target[:, None], at_target.floor()[:, None] + 0.5)
    target[3::8] = IGNORED
    return _Problem(logits, target, torch.randn(rows, generator=generator, dtype=torch.float64))


def _errors(example: Example, problem: _Problem, linear: bool = False) -> dict[str, list[tuple[Error, Error]]]:
    """By implementation, of (loss, gradient), once for each way to run it."""
    logits, target, upstream = problem
    formula = partial(_formula, example=example, target=target)
    reference = partial(_fused, example=example, target=target, impl="reference")
    expected = _run(reference, logits.double(), upstream)
    plain = _distances(_run(formula, logits, upstream), expected)
    ulps = ULPS * torch.finfo(compute_dtype(logits.dtype)).eps
    errors: dict[str, list[tuple[Error, Error]]] = {}
    for impl in ready():
        if impl == "reference" and logits.dtype == torch.float64 and not linear:
            loss, gradient = (Error(error, REFERENCE_ALLOWED) for error in plain)
            errors[impl] = [(loss, gradient)]
            continue
        for result in (_linear_results if linear else _row_results)(example, problem, impl):
            found = _distances(result, expected)
            loss, gradient = (Error(e, 2 * p + ulps) for e, p in zip(found, plain, strict=True))
            errors.setdefault(impl, []).append((loss, gradient))
    return errors


def _row_results(example: Example, problem: _Problem, impl: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Loss and gradient of logits by each way to run it."""
    logits, target, upstream = problem
    fused = partial(_fused, example=example, target=target, impl=impl)
    yield _run(fused, logits, upstream)
    if example.works_in_place(impl, _device(impl)):
        yield _run(partial(fused, inplace_backward=True), logits, upstream)


def _linear_results(example: Example, problem: _Problem, impl: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same where the logits are the weight, or the hidden states; gradients after the losses and with their sum."""
    logits, target, upstream = problem
    rows, classes = logits.shape
    linear, budget = example.linear, CHUNK_ROWS * classes * logits.element_size()
    assert linear is not None

    def of_weight(z: Tensor, target: Tensor, **options: Any) -> Tensor:
        return linear(torch.eye(rows).to(z), z.t(), target, **options)

    def of_hidden(z: Tensor, target: Tensor, **options: Any) -> Tensor:
        return linear(z, torch.eye(classes).to(z), target, **options)

    for form in (of_weight, of_hidden) if classes <= MOST_OF_IDENTITY else (of_weight,):
        fused = partial(_fused, example=replace(example, loss=form), target=target, impl=impl, budget=budget)
        loss, gradient = _run(fused, logits, upstream)
        yield loss, gradient
        total = partial(fused, reduction="sum", token_weight=upstream.to(_device(impl)))
        yield loss, _run(total, logits, torch.ones(1))[1]


def _formula(logits: Tensor, example: Example, target: Tensor) -> Tensor:
    ignored = target == IGNORED
    z = logits.to(compute_dtype(logits.dtype))
    if example.over_rows:
        return example.formula(z[~ignored], target[~ignored], **example.arguments).mean()
    rows = example.formula(z, target.masked_fill(ignored, 0), **example.arguments)
    return rows.masked_fill(ignored, 0)


def _fused(logits: Tensor, example: Example, target: Tensor, **options: Any) -> Tensor:
    shared = {"ignore_index": IGNORED, "reduction": "mean" if example.over_rows else "none"}
    device = _device(options["impl"])
    loss: Tensor = example.loss(logits.to(device), target.to(device), **example.arguments, **(shared | options))
    return loss.to(logits.device)


def _run(loss: Callable[[Tensor], Tensor], logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.detach().requires_grad_().clone()  # not a leaf, whose memory a gradient must not take
    result = loss(z)
    (gradient,) = torch.autograd.grad(result, z, (upstream if result.dim() else upstream[0]).to(result.dtype))
    return result.detach(), gradient


def _distances(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> list[float]:
    distances = []
    for value, right in zip(result, expected, strict=True):
        # A row below the normal numbers of its dtype has no digits left to compare, and an ignored one must be 0.
        scale = right.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
        distances.append(float(((value.double() - right).abs() / scale).max()))
    return distances
