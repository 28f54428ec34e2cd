"""A loss between the two passes: what it is, and what every loss shares around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .statistics import Picks, Statistics


@dataclass(frozen=True)
class Epilogue:
    """A loss as PyTorch code over the statistics of rows.

    ``over="rows"``: ``function(s, *params)`` takes :class:`~fusedloss.Statistics` and gives the rows' losses (N,).

    ``over="classes"``: ``function(p, q, positive, *params)`` gives the loss of each class from its probability p,
    q = 1 - p and whether it is the target; a row's loss is the sum over its classes, which must be 0 at p = 0 of a
    class that is not the target.

    ``over="teacher"``: ``function(log_y, log_p, d, *params)`` gives the loss of each class from its log-probabilities
    in the teacher's row and in the student's, and their difference d, which has digits that they have not. The last
    of the loss's parameters is no argument: the weight of a cross-entropy beside it, of the logits without temperature.

    ``over="targets"``: ``function(y, log_p)`` of targets y, any numbers. Its parameters are two factors, of a target
    and of what is added to each class.

    Each parameter is a 0-d tensor or (N,) (for classes: (N, 1)); one of a function over the rows may be (N, K).
    ``name`` is that of the same loss among a backend's compiled epilogues; a backend that does not know it runs
    ``function`` between its passes. Ranks compare what is shown of it, which is all but the functions.
    """

    name: str
    function: Callable[..., Tensor] = field(repr=False)
    over: Literal["rows", "classes", "teacher", "targets"] = "rows"
    statistics: tuple[str, ...] = ()
    per_chunk: bool = False
    """Whether the function of a linear form may be called once a chunk, so that gradients are made with the loss."""
    curvature: Callable[..., Any] = field(default=lambda *_: 0, repr=False)
    """Of those over the classes of two rows: sum_j p_j^2 d2f/dp_j^2 where both are the same, of the parameters."""
    picks: Picks = field(init=False)

    def __post_init__(self) -> None:
        picks = Picks.of(("top",) if self.over == "classes" else self.statistics)
        object.__setattr__(self, "picks", picks)

    def of_rows(self, s: Statistics, params: list[Tensor]) -> Tensor:
        return self._checked(self.function(s.only(self.statistics), *params), s.ce, "rows")

    def of_classes(self, p: Tensor, q: Tensor, positive: Tensor, params: list[Tensor]) -> Tensor:
        columns = (x[:, None] if x.dim() else x for x in params)
        return self._checked(self.function(p, q, positive, *columns), p, "rows and classes")

    @property
    def has_second_row(self) -> bool:
        return self.over in ("teacher", "targets")

    def _checked(self, loss: object, like: Tensor, each: str) -> Tensor:
        if isinstance(loss, Tensor) and loss.shape == like.shape:
            if loss.is_complex():
                raise TypeError(f"the loss function must give real losses, got {loss.dtype}")
            # Integers have no NaN for a bad target, and sums in half precision would overflow.
            return loss.to(torch.promote_types(loss.dtype, like.dtype))
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss function must give losses of the {each}, of shape {tuple(like.shape)}, got {got}")


class Overlap:
    """A loss of overlap, 1 - (C + smooth) / (E + C + smooth) = E / (E + C + smooth), of an error E and an agreement C.

    ``function(p, q, positive, *params)`` gives what a class adds to E and to C, from its probability p, q = 1 - p and
    whether it is the target. What adds is up to the loss's form and level; ``forms`` holds the epilogues of the level
    "example", whose last parameter is `smooth`.
    """

    def __init__(self, name: str, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.function = function
        self.over_rows = f"{name}_over_rows"
        """Its name among the compiled epilogues that sum over the rows, and in their derivative."""

        def one_vs_rest(p: Tensor, q: Tensor, positive: Tensor, *params: Tensor) -> Tensor:
            return self.ratio(*function(p, q, positive, *params[:-1]), params[-1])

        def of_target(s: Statistics, *params: Tensor) -> Tensor:
            return one_vs_rest(s.p, s.q, torch.ones_like(s.q, dtype=torch.bool), *params)

        self.forms = {
            "one_vs_rest": Epilogue(f"{name}_one_vs_rest", one_vs_rest, over="classes"),
            "target": Epilogue(f"{name}_target", of_target),
        }

    @staticmethod
    def ratio(error: Tensor, agreement: Tensor, smooth: Tensor) -> Tensor:
        return error / (error + agreement + smooth)


def smoothing_factors(eps: float, smoothing_over: str, classes: int) -> tuple[float, float]:
    """(main, smooth) of main * loss + smooth * sum_j w_j (-log p_j)."""
    if eps == 0 or (smoothing_over == "others" and classes == 1):
        return 1.0, 0.0
    if smoothing_over == "all":
        return 1.0 - eps, eps / classes
    return 1.0 - eps - eps / (classes - 1), eps / (classes - 1)


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent for base in [0, 1] with gradients that stay finite at base = 0, where 0 ** 0 = 1.

    Subnormal bases count as 0: their base ** (exponent - 1) may overflow.
    """
    positive = base >= torch.finfo(base.dtype).tiny
    value = torch.where(positive, base, 1) ** exponent
    return torch.where(positive, value, (exponent == 0).to(base.dtype))
