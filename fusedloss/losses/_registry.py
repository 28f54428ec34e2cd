"""The registry of all losses, for whatever runs over "every loss"; each loss registers itself in its own file.

`python -m fusedloss`, the benchmarks, the shared tests and the pages of the documentation find the losses here and know
none by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..engine.options import DEFAULTS, DISTILLATION_DEFAULTS, LINEAR_DEFAULTS
from . import _documents

_Loss = TypeVar("_Loss", bound=Callable[..., Any])


@dataclass(frozen=True)
class Example:
    """``loss(input, target, **arguments)`` and ``formula`` with the same arguments, which gives the rows' losses.

    The formula is plain PyTorch over logits (N, V) and targets (N,), differentiable, in the dtype of the logits and
    free of tricks: what users have without this package. The loss is the mean of what it gives.
    """

    loss: Callable[..., Any]
    formula: Callable[..., Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    over_rows: bool = False
    """Whether the formula gives something that is made of all the rows together, and so has no linear form."""
    over_classes: bool = False
    """Whether a row's loss is a sum over the classes, each with a term of its own."""

    def __str__(self) -> str:
        values = (f"{k}={getattr(v, '__name__', repr(v)).lstrip('_')}" for k, v in self.arguments.items())
        return f"{self.loss.__name__}({', '.join(values)})"

    @property
    def linear(self) -> Callable[..., Any] | None:
        """The linear form, if these arguments have one."""
        of_user, loss = self.over_classes and "loss_fn" in self.arguments, LOSSES.get(self.loss.__name__)
        return None if self.over_rows or of_user or loss is None else loss.linear

    def works_in_place(self, impl: str | None = None, device: torch.device | None = None) -> bool:
        """Whether `inplace_backward` makes the gradient take the logits' memory; some losses and some
        implementations refuse it or do without."""
        logits = torch.zeros(1, 3, requires_grad=True, device=device).clone()  # not a leaf
        target = torch.zeros(1, dtype=torch.int64, device=device)
        try:
            loss = self.loss(logits, target, **self.arguments, inplace_backward=True, impl=impl)
        except (TypeError, ValueError):  # of an option that it has not, too
            return False
        (gradient,) = torch.autograd.grad(loss, logits)
        return gradient.data_ptr() == logits.data_ptr()


@dataclass
class Loss:
    """A loss with its forms, source, options and examples."""

    row: Callable[..., Any]
    source: str | None
    """The paper, as "arXiv:1708.02002"."""
    without: tuple[str, ...]
    """Shared options that it does not take."""
    examples: list[Example]
    linear: Callable[..., Any] | None = None


#: By the names of the functions of logits.
LOSSES: dict[str, Loss] = {}

#: Of all the losses.
EXAMPLES: list[Example] = []

#: The losses against a teacher, which take no target alone, with the options that they share.
OF_TEACHERS: dict[Callable[..., Any], dict[str, Any]] = {}


def row_form(
    *examples: Callable[[Callable[..., Any]], Example], source: str | None = None, without: tuple[str, ...] = ()
) -> Callable[[_Loss], _Loss]:
    """Register the decorated loss of logits, and add the shared options to its docstring."""

    def register(loss: _Loss) -> _Loss:
        of_loss = [make(loss) for make in examples]
        LOSSES[loss.__name__] = Loss(loss, source, without, of_loss)
        EXAMPLES.extend(of_loss)
        loss.__doc__ = _documents.row_form(loss, without)
        return loss

    return register


def example(
    formula: Callable[..., Tensor], *, over_rows: bool = False, over_classes: bool = False, **arguments: Any
) -> Callable[[Callable[..., Any]], Example]:
    """Make an example of a loss, for :func:`row_form`."""
    return lambda loss: Example(loss, formula, arguments, over_rows, over_classes)


def linear_form(row: Callable[..., Any]) -> Callable[[_Loss], _Loss]:
    """Register the decorated function as the linear form of a loss, and write its docstring from the row form's."""

    def register(linear: _Loss) -> _Loss:
        LOSSES[row.__name__].linear = linear
        linear.__doc__ = _documents.linear_form(row, argument_names(linear))
        return linear

    return register


def teacher_form(options: Any) -> Callable[[_Loss], _Loss]:
    """Register the decorated function as a loss against a teacher, in either form, with the type of its options."""
    known = {**LINEAR_DEFAULTS, **DEFAULTS, **DISTILLATION_DEFAULTS}

    def register(loss: _Loss) -> _Loss:
        OF_TEACHERS[loss] = {name: known[name] for name in options.__annotations__}
        loss.__doc__ = _documents.of_teacher(loss, argument_names(loss))
        return loss

    return register


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the shared options of a loss in either form, its ``**options``, with their defaults."""
    if function in OF_TEACHERS:
        return OF_TEACHERS[function]
    for loss in LOSSES.values():
        if function in (loss.row, loss.linear):
            linear = function is loss.linear
            shared = (LINEAR_DEFAULTS if linear else {}) | DEFAULTS
            absent = (*loss.without, "return_stats", *(["inplace_backward"] if linear else []))
            return {name: value for name, value in shared.items() if name not in absent}
    return {}


def argument_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of all arguments of a loss in either form, its own before the shared ones."""
    own = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return [*own, *options_of(function)]
