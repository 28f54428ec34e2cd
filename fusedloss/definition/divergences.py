"""Losses against a second row over the classes, by their definitions: a teacher's divergences, and soft targets.

With y the probabilities of the teacher, p those of the student and m = mu y + (1 - mu) p:

    forward_kl        sum_j y_j (log y_j - log p_j)
    reverse_kl        sum_j p_j (log p_j - log y_j)
    total_variation   1/2 sum_j |p_j - y_j|
    mixture_kl        a KL(y | m) + b KL(p | m): Jensen-Shannon and the skew divergences

Each is a sum over the classes of terms that are not negative, KL(y | p) = sum_j y_j (exp(-d_j) - 1 + d_j) with
d_j = log y_j - log p_j, since y and p have the same sum. Where the rows are close the plain form is a difference of
numbers far larger than it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .epilogue import Epilogue

#: Where |d| is below this, a term is a series in d.
CLOSE = 0.25
_TERMS = 14

#: Where the largest logits of two rows differ by more than this, each row's own is subtracted from its logits first.
FAR = 16.0


def lag_between(second: Tensor, z: Tensor, second_top: Tensor, top: Tensor) -> Tensor:
    """Compute (second - second_top) - (z - top) in the order that keeps its digits, for close rows and for far ones."""
    offset = second_top - top
    return torch.where(offset.abs() > FAR, (second - second_top) - (z - top), (second - z) - offset)


def _excess(x: Tensor) -> Tensor:
    """exp(-x) - 1 + x by its series, for |x| <= CLOSE."""
    result = torch.ones_like(x)
    for k in range(_TERMS + 2, 2, -1):
        result = 1 - x / k * result
    return x * x / 2 * result


class _Distance:
    """p - y of the classes, and what their divergences are made of."""

    def __init__(self, log_y: Tensor, log_p: Tensor, d: Tensor) -> None:
        self.y, self.p = log_y.exp(), log_p.exp()
        self.close = d.abs() < CLOSE
        self.d = torch.where(self.close, d, 0)  # of the close ones
        self.excess = _excess(self.d)
        self.difference = torch.where(self.close, self.y * (self.excess - self.d), self.p - self.y)


def whole(log_y: Tensor, log_p: Tensor, d: Tensor) -> Tensor:
    """d without what its log-sum-exps were rounded by: the sum of p - y over the classes is 0."""
    difference = _Distance(log_y, log_p, d).difference.sum(-1, keepdim=True).detach()
    return d + torch.log1p(difference)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p x, 0 where p is."""
    return p * torch.where(p == 0, 0, x)


def _forward_kl(log_y: Tensor, log_p: Tensor, d: Tensor) -> Tensor:
    s = _Distance(log_y, log_p, d)
    return torch.where(s.close, s.y * s.excess, s.difference + _times(s.y, d))


def _reverse_kl(log_y: Tensor, log_p: Tensor, d: Tensor) -> Tensor:
    s = _Distance(log_y, log_p, d)
    return torch.where(s.close, s.p * _excess(-s.d), -s.difference - _times(s.p, d))


def _mixture_kl(log_y: Tensor, log_p: Tensor, d: Tensor, mu: Tensor, a: Tensor, b: Tensor) -> Tensor:
    s = _Distance(log_y, log_p, d)
    none = (s.y == 0) & (s.p == 0)
    log_m = torch.logaddexp(log_y.masked_fill(none, 0) + mu.log(), log_p.masked_fill(none, 0) + (1 - mu).log())
    close_y = torch.log1p((1 - mu) * torch.expm1(-s.d))
    close_p = torch.log1p(mu * torch.expm1(s.d))
    of_y = torch.where(s.close, s.y * _excess(-close_y), (1 - mu) * s.difference - _times(s.y, log_m - log_y))
    of_p = torch.where(s.close, s.p * _excess(-close_p), -mu * s.difference - _times(s.p, log_m - log_p))
    return a * of_y + b * of_p


FORWARD_KL = Epilogue("forward_kl", _forward_kl, over="teacher", curvature=lambda: 1)
REVERSE_KL = Epilogue("reverse_kl", _reverse_kl, over="teacher", curvature=lambda: 1)
TOTAL_VARIATION = Epilogue("total_variation", lambda *rows: _Distance(*rows).difference.abs() / 2, over="teacher")
MIXTURE_KL = Epilogue(
    "mixture_kl", _mixture_kl, over="teacher", curvature=lambda mu, a, b: a * (1 - mu) ** 2 + b * mu**2
)
SOFT_TARGETS = Epilogue("soft_targets", lambda y, log_p: -_times(y, log_p), over="targets")
