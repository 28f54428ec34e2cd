"""Times of losses beside what none can do without, in turn: what slows a machine down for a while slows all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..losses._registry import Example

#: The least memory traffic of a row loss (read, read and write the gradient) over that of a copy (read and write).
FLOOR = 1.5

#: How far results may be from those of the formula in float32, as `distance` counts; bfloat16 formulas come to 0.01.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.03}

#: What the gradient of a loss is multiplied by, as a gradient scaler does in training: float16 has no digits for the
#: gradient of a mean over many rows and classes.
LOSS_SCALE = {torch.float16: 2.0**14}


class WrongResult(RuntimeError):
    """A candidate does not compute what it is timed for."""


class Step(NamedTuple):
    """Seconds of a training step's share in the loss."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def candidates(example: Example, target: Tensor, compiled: bool = True) -> dict[str, Callable[[Tensor], Tensor]]:
    """The mean loss of logits (N, V) by each way to have it, to be timed."""

    def eager(logits: Tensor) -> Tensor:
        return example.formula(logits, target, **example.arguments).mean()

    def fused(logits: Tensor, **options: bool) -> Tensor:
        return example.loss(logits, target, **example.arguments, **options)

    ways: dict[str, Callable[[Tensor], Tensor]] = {"fused": fused}
    if example.works_in_place():
        ways["in place"] = partial(fused, inplace_backward=True)
    ways["eager"] = eager
    if compiled:
        ways["compiled"] = compile_when_called(eager)
    return ways


def compile_when_called(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By torch.compile, whose import takes seconds that a process without a call of it shall not pay."""

    @cache
    def compiled() -> Callable[..., Tensor]:
        # What was compiled before must not make this one general in its shapes.
        torch.compiler.reset()
        return torch.compile(function)

    return lambda *inputs: compiled()(*inputs)


class Contest:
    """Losses of the same logits, each a function of them that gives a scalar, to be timed in turn.

    Before every turn the logits are written anew, untimed, as in training the output layer just wrote them; so a loss
    may also destroy them. Gradients are taken by torch.autograd.grad into new memory and freed after the clock stops.
    """

    #: The floor over the yardstick.
    FLOOR = FLOOR

    def __init__(self, logits: Tensor, losses: dict[str, Callable[..., Tensor]]) -> None:
        self.logits = logits
        self.losses = losses
        self.steps: dict[str, list[Step]] = {name: [] for name in losses}
        self.copies: list[float] = []
        self._written = logits.clone()
        self._copied = logits.clone()
        self._result: tuple[Tensor, ...] | None = None

    def result(self, name: str) -> tuple[Tensor, ...]:
        """Loss and gradients of an untimed step, which also compiles. The next step may overwrite them."""
        self.write()
        self.step(name)
        self.steps[name].pop()
        assert self._result is not None
        return self._result

    def prepare(self, name: str) -> None:
        """All that is not timed in the turn of a loss.

        It runs once, to free the memory that it will get again, as from one training step to the next. Memory that was
        freed a while ago may have gone from a virtual machine to its host, and takes far longer to come back.
        """
        self.result(name)
        self.write()

    def step(self, name: str) -> Step:
        """Forward and backward of one loss, after `prepare`."""
        inputs = self.inputs()
        start = perf_counter()
        loss = self.losses[name](*inputs)
        middle = perf_counter()
        gradients = torch.autograd.grad(loss, inputs, _upstream(loss, inputs[0].dtype))
        end = perf_counter()
        self._result = loss.detach(), *gradients
        self.steps[name].append(Step(middle - start, end - middle))
        return self.steps[name][-1]

    def inputs(self) -> tuple[Tensor, ...]:
        """What a loss is called with and differentiated by: computed logits. A leaf's memory no gradient may take."""
        return (self._written.detach().add_(self._written.new_zeros((), requires_grad=True)),)

    def copy(self) -> None:
        """The yardstick: copy_() of the logits into memory that has been used before."""
        self.write()
        start = perf_counter()
        self._copied.copy_(self._written)
        self.copies.append(perf_counter() - start)

    def round(self, leave_out: str | None = None) -> None:
        """The yardstick, then every loss once."""
        self.copy()
        for name in self.losses:
            if name != leave_out:
                self.prepare(name)
                self.step(name)

    def write(self) -> None:
        """Fresh logits; drops the last result."""
        self._result = None
        self._written.copy_(self.logits)

    @property
    def floor(self) -> float:
        return self.FLOOR * statistics.median(self.copies)

    @property
    def noise(self) -> float:
        """How far the yardstick's times spread, third quartile over first: about 1 where nothing else runs."""
        if len(self.copies) < 2:
            return 1.0
        low, _, high = statistics.quantiles(self.copies, n=4)
        return high / low

    def median(self, name: str) -> float:
        return statistics.median(step.both for step in self.steps[name])


class ProductContest(Contest):
    """Losses of leaves, such as hidden states and a weight. The yardstick and the floor are their matrix products."""

    FLOOR = 1.0

    def __init__(
        self, sources: Sequence[Tensor], products: Callable[[], object], losses: dict[str, Callable[..., Tensor]]
    ) -> None:
        super().__init__(torch.empty(0), losses)
        self.sources, self.products = sources, products

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(x.detach().requires_grad_() for x in self.sources)

    def copy(self) -> None:
        self.write()
        self.products()  # untimed, as every loss has an untimed step before its turn
        start = perf_counter()
        self.products()
        self.copies.append(perf_counter() - start)


def _upstream(loss: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient that reaches a loss of such inputs."""
    return torch.full_like(loss, LOSS_SCALE[dtype]) if dtype in LOSS_SCALE else None


def expected(example: Example, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Mean loss and gradient by the formula, in the dtype in which losses compute."""
    return expected_of(lambda z: example.formula(z, target, **example.arguments).mean(), logits)


def expected_of(formula: Callable[..., Tensor], *sources: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients of what a contest's inputs are made of, in the dtype in which losses compute."""
    leaves = [x.detach().to(compute_dtype(x.dtype), copy=True).requires_grad_() for x in sources]
    loss = formula(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves, _upstream(loss, sources[0].dtype))


def require(name: str, result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raises WrongResult for a loss and gradients whose time would mean nothing."""
    error, allowed = distance(result, expected), TOLERANCE[result[1].dtype]
    if not error <= allowed:
        raise WrongResult(f"{name} is wrong by {error:.1e} where {allowed:.0e} is allowed; it is not timed")


def distance(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The relative errors of loss and gradients, added, each in the sum of absolute values.

    In that norm the target's element of a row's gradient weighs as much as all the others together.
    """
    total = 0.0
    for value, right in zip(result, expected, strict=True):
        difference = (value.to(right.dtype) - right).abs_().sum(dtype=torch.float64)
        total += float(difference / right.abs().sum(dtype=torch.float64))
    return total
