"""Each loss with example arguments and the formula that one would write for it in PyTorch.

The losses declare theirs beside themselves; whatever runs over "every loss" (`python -m fusedloss`, the benchmarks)
finds them here and knows none by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

_Loss = TypeVar("_Loss", bound=Callable[..., Any])


@dataclass(frozen=True)
class Example:
    """``loss(input, target, **arguments)`` and ``formula`` with the same arguments, which gives the rows' losses.

    With ``over_rows`` it gives something else that is made of all the rows together. The loss is the mean in any case.
    The formula is plain PyTorch over logits (N, V) and targets (N,), differentiable, in the dtype of the logits and
    free of tricks: what users have without this package.
    """

    loss: Callable[..., Any]
    formula: Callable[..., Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    over_rows: bool = False

    def __str__(self) -> str:
        values = (f"{k}={getattr(v, '__name__', repr(v)).lstrip('_')}" for k, v in self.arguments.items())
        return f"{self.loss.__name__}({', '.join(values)})"

    def works_in_place(self, impl: str | None = None, device: torch.device | None = None) -> bool:
        """Whether `inplace_backward` makes the gradient take the logits' memory; some losses and some
        implementations refuse it or do without."""
        logits = torch.zeros(1, 3, requires_grad=True, device=device).clone()  # not a leaf
        target = torch.zeros(1, dtype=torch.int64, device=device)
        try:
            loss = self.loss(logits, target, **self.arguments, inplace_backward=True, impl=impl)
        except ValueError:
            return False
        (gradient,) = torch.autograd.grad(loss, logits)
        return gradient.data_ptr() == logits.data_ptr()


EXAMPLES: list[Example] = []


def example(formula: Callable[..., Tensor], *, over_rows: bool = False, **arguments: Any) -> Callable[[_Loss], _Loss]:
    """Declares an example of the decorated loss; several read from the bottom up."""

    def declare(loss: _Loss) -> _Loss:
        EXAMPLES.append(Example(loss, formula, arguments, over_rows))
        return loss

    return declare
