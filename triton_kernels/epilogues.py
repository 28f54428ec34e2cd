"""The losses' epilogues in Triton, the twin of ``csrc/epilogues.h``: from the statistics of rows to losses and the
coefficients of their gradient. Nothing here knows memory or programs.

Everything of a row is a column (R, 1), what is of its picks (R, K), what is of its classes (R, BLOCK); `params` are the
parameters, columns too. Notation as there: q = 1 - p_t, ce = -log p_t, and d = a - b_t, so that the target's gradient
is d - a q, which keeps its digits where p_t -> 1.

To add a loss: write its function and put it into ROW_EPILOGUES, CLASS_TERMS or PAIR_TERMS at the end of this file.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import exp, expm1, fast_log, pow, reciprocal


@triton.jit
def power(x, y):
    """x^y for x in [0, 1]; 0^0 = 1."""
    return tl.where(y == 0, 1.0, pow(x, y))


# Row epilogues: (loss, a, d, b) from ce, q, p = p_t, lse; of the picks their ce, whether there is one, whether it is
# another class than the target; their number.


@triton.jit
def cross_entropy(ce, q, p, lse, pick_ce, real, other, picks, params):
    return ce, tl.full(ce.shape, 1.0, ce.dtype), tl.zeros_like(ce), tl.zeros_like(pick_ce)


@triton.jit
def log_sum_exp(ce, q, p, lse, pick_ce, real, other, picks, params):
    """L = lse"""
    one = tl.full(ce.shape, 1.0, ce.dtype)
    return lse, one, one, tl.zeros_like(pick_ce)


@triton.jit
def focal(ce, q, p, lse, pick_ce, real, other, picks, params):
    """L = q^gamma ce; a = b_t = q^gamma (1 + gamma p_t r), r = ce / q -> 1."""
    gamma = params[0]
    modulation = power(q, gamma)
    ratio = tl.where(q > 0, ce / q, 1.0)
    # p = 0 with an infinite ce would give 0 * inf; the limit is 0.
    a = modulation * (1.0 + tl.where(p > 0, gamma * p * ratio, 0.0))
    return modulation * ce, a, tl.zeros_like(ce), tl.zeros_like(pick_ce)


@triton.jit
def mixed_cross_entropy(ce, q, p, lse, pick_ce, real, other, picks, params):
    """L = (1 - alpha) ce_t + (alpha / K) sum_k ce_k over the K picks."""
    alpha = params[0]
    share = alpha / picks
    picked = tl.sum(tl.where(real, pick_ce, 0.0), 1, keep_dims=True)
    # 0 * inf where a class without probability has no share.
    loss = tl.where(alpha < 1, (1.0 - alpha) * ce, 0.0) + tl.where(alpha > 0, share * picked, 0.0)
    others = tl.sum(tl.where(other, 1.0, tl.zeros_like(pick_ce)), 1, keep_dims=True)
    # A pick that is the target is already in d: b_t = 1 - alpha + share.
    return loss, tl.full(ce.shape, 1.0, ce.dtype), share * others, tl.where(other, share, 0.0)


# Losses of overlap, E / (E + C + s). What a class adds to the error E and the agreement C, and their slopes by p, as
# (E, C, E', C'). POSITIVE: of the target's class, the slopes times q = 1 - p, with which they are finite where dE/dp
# itself is not. Otherwise C = 0, `weight` = q^exponent, and the slopes are times `unit`: either 1, and then `steep` is
# q^(exponent - 1), or q, and then `steep` is q^exponent.


@triton.jit
def dsc(p, q, weight, steep, unit, params, POSITIVE: tl.constexpr):
    """u = q^alpha p: y = 1 adds E = (1 - u)^k and C = 2 u, y = 0 E = u^k, k = 2 if squared."""
    alpha, squared, self_adjust = params[0], params[1], params[2]
    if POSITIVE:
        # 1 - u without cancellation, from q^alpha - 1 = expm1(alpha log q)
        weight_1 = tl.where(alpha == 0, 0.0, tl.where(q > 0, expm1(alpha * tl.log(q)), -1.0))
        weight = tl.where(weight_1 > -0.5, 1.0 + weight_1, power(q, alpha))
        rest = q - p * weight_1
        du = weight * tl.where(self_adjust != 0, q - alpha * p, q)
        square = squared != 0
        return tl.where(square, rest * rest, rest), 2 * weight * p, tl.where(square, -2 * rest, -1.0) * du, 2 * du
    else:
        u = weight * p
        du = weight * unit - self_adjust * alpha * p * steep
        linear = 1.0 - squared
        return u * (u * squared + linear), 0.0, (u * (2 * squared) + linear) * du, 0.0


@triton.jit
def tversky(p, q, weight, steep, unit, params, POSITIVE: tl.constexpr):
    """y = 1 adds E = beta (1 - p) and C = p, y = 0 E = alpha p."""
    if POSITIVE:
        return params[1] * q, p, -params[1] * q, q
    else:
        return params[0] * p, 0.0, params[0] * unit, 0.0


@triton.jit
def _one_vs_rest(overlap, class_weight, smooth, POSITIVE: tl.constexpr):
    """The overlap of each class in each row for itself: its loss, and the loss's slope, times what that of E is."""
    error, agreement, error_slope, agreement_slope = overlap
    rest = agreement + smooth
    inverse = reciprocal(error + rest)
    # The square of the inverse may be infinite where neither product is large.
    loss, slope = error * inverse, error_slope * (rest * inverse)
    if POSITIVE:
        slope -= agreement_slope * loss
    return class_weight * loss, class_weight * (slope * inverse)


@triton.jit
def _over_rows(overlap, class_weight, agreement_weight):
    """Error and agreement themselves, times what the derivatives of a loss by their sums over the rows are."""
    error, agreement, error_slope, agreement_slope = overlap
    return (
        class_weight * error + agreement_weight * agreement,
        class_weight * error_slope + agreement_weight * agreement_slope,
    )


@triton.jit
def _on_target(overlap, p, q, pick_ce, smooth):
    """The overlap of each row's target class alone."""
    loss, h = _one_vs_rest(overlap, 1.0, smooth, True)
    # dL/dz_j = L'(p) p ([j == t] - p_j); where q underflows every p_j of the others is 0 too.
    return loss, tl.where(q > 0, -p * h / q, 0.0), tl.zeros_like(q), tl.zeros_like(pick_ce)


@triton.jit
def dsc_target(ce, q, p, lse, pick_ce, real, other, picks, params):
    return _on_target(dsc(p, q, q, q, q, params, True), p, q, pick_ce, params[3])


@triton.jit
def tversky_target(ce, q, p, lse, pick_ce, real, other, picks, params):
    return _on_target(tversky(p, q, q, q, q, params, True), p, q, pick_ce, params[2])


# Class terms: loss and slope of a class, times its class weight.


@triton.jit
def dsc_one_vs_rest(p, q, weight, steep, unit, class_weight, params, POSITIVE: tl.constexpr):
    return _one_vs_rest(dsc(p, q, weight, steep, unit, params, POSITIVE), class_weight, params[3], POSITIVE)


@triton.jit
def dsc_over_rows(p, q, weight, steep, unit, class_weight, params, POSITIVE: tl.constexpr):
    return _over_rows(dsc(p, q, weight, steep, unit, params, POSITIVE), class_weight, params[3])


@triton.jit
def tversky_one_vs_rest(p, q, weight, steep, unit, class_weight, params, POSITIVE: tl.constexpr):
    return _one_vs_rest(tversky(p, q, weight, steep, unit, params, POSITIVE), class_weight, params[2], POSITIVE)


@triton.jit
def tversky_over_rows(p, q, weight, steep, unit, class_weight, params, POSITIVE: tl.constexpr):
    return _over_rows(tversky(p, q, weight, steep, unit, params, POSITIVE), class_weight, params[2])


# Pair terms: of a class in two rows, p of the student and y of the teacher, what it adds to the loss, h = p df/dp, and
# p - y. d = log y - log p keeps its digits where the rows are close, as p and y do not; there a term is a series in d.


@triton.constexpr_function
def _inverse_factorial(k):
    return 1.0 / math.factorial(k)


@triton.constexpr_function
def _inverse_odd(k):
    return 1.0 / (2 * k + 1)


@triton.jit
def _excess(x):
    """exp(-x) - 1 + x of |x| <= 0.5, in float64 <= 0.125."""
    TERMS: tl.constexpr = 12 if x.dtype == tl.float64 else 8
    sum = tl.full(x.shape, _inverse_factorial(TERMS + 1), x.dtype)
    for k in tl.static_range(TERMS, 1, -1):
        sum = _inverse_factorial(k) - x * sum
    return x * x * sum


@triton.jit
def _log_ratio(difference, sum):
    """log(a / b) of a - b and a + b, for such a logarithm."""
    TERMS: tl.constexpr = 8 if sum.dtype == tl.float64 else 6
    y = difference * reciprocal(sum)
    poly = tl.full(y.shape, _inverse_odd(TERMS - 1), y.dtype)
    for k in tl.static_range(TERMS - 2, -1, -1):
        poly = poly * (y * y) + _inverse_odd(k)
    return 2 * y * poly


@triton.jit
def _distance(p, y, d):
    """Whether p and y are close, and p - y; of close ones d and exp(-d) - 1 + d, which are 0 of the others."""
    MOST: tl.constexpr = 0.125 if d.dtype == tl.float64 else 0.5
    close = tl.abs(d) < MOST
    small = tl.where(close, d, 0.0)
    excess = _excess(small)
    return close, tl.where(close, y * (excess - small), p - y), small, excess


@triton.jit
def forward_kl(p, y, d, params):
    """y (log y - log p) + p - y = y (exp(-d) - 1 + d), which is not negative; the sum of p - y is 0."""
    close, difference, _, excess = _distance(p, y, d)
    apart = difference + tl.where(y > 0, y * d, 0.0)
    return tl.where(close, y * excess, apart), difference, difference


@triton.jit
def reverse_kl(p, y, d, params):
    """p (log p - log y) + y - p = p (exp(d) - 1 - d)"""
    close, difference, small, _ = _distance(p, y, d)
    slope = tl.where(p > 0, -p * d, 0.0)
    return tl.where(close, p * _excess(-small), slope - difference), slope, difference


@triton.jit
def total_variation(p, y, d, params):
    """|p - y| / 2"""
    _, difference, _, _ = _distance(p, y, d)
    half = 0.5 * p
    slope = tl.where(difference > 0, half, tl.where(difference < 0, -half, difference))
    return 0.5 * tl.abs(difference), slope, difference


@triton.jit
def mixture_kl(p, y, d, params):
    """a KL(y | m) + b KL(p | m) with m = mu y + (1 - mu) p; parameters: mu, a, b."""
    mu, a, b = params[0], params[1], params[2]
    rest = 1.0 - mu
    close, difference, small, excess = _distance(p, y, d)
    # log(m / y) and log(m / p): of close ones by p / y - 1, of others by the smaller over the larger.
    ratio = excess - small
    near_y = _log_ratio(rest * ratio, 2.0 + rest * ratio)
    near_p = _log_ratio(-mu * ratio, 2.0 + (1.0 + rest) * ratio)
    up = d > 0
    of_larger = tl.where(up, mu, rest)
    log_m = fast_log(of_larger + (1.0 - of_larger) * exp(-tl.abs(d)))
    y_log = tl.where(y > 0, y * tl.where(close, near_y, tl.where(up, log_m, log_m - d)), 0.0)
    p_log = tl.where(p > 0, p * tl.where(close, near_p, tl.where(up, log_m + d, log_m)), 0.0)
    of_y = tl.where(close, y * _excess(-near_y), rest * difference - y_log)
    of_p = tl.where(close, p * _excess(-near_p), -mu * difference - p_log)
    m = mu * y + rest * p
    LEAST: tl.constexpr = 2.0**-1022 if m.dtype == tl.float64 else 2.0**-126
    share = tl.where(m < LEAST, 0.0, p * reciprocal(m))
    return of_y * a + of_p * b, share * difference * (rest * (a * rest - b * mu)) - p_log * b, difference


@triton.jit
def soft_targets(p, y, d, params):
    """-y log p of targets y, which need not sum to 1; d = -log p. A NaN among them must pass through."""
    return tl.where(y == 0, 0.0, y * d), -y, tl.zeros_like(y)


# And of their parameters, sum_j p_j^2 d2f/dp_j^2 where both rows are the same.


@triton.jit
def _curvature_of_kl(params):
    return 1.0


@triton.jit
def _curvature_of_mixture(params):
    mu, a, b = params[0], params[1], params[2]
    return a * (1.0 - mu) * (1.0 - mu) + b * mu * mu


@triton.jit
def _no_curvature(params):
    return 0.0


class RowEpilogue(NamedTuple):
    """A loss of the statistics of each row."""

    function: Any
    params: int


class ClassTerm(NamedTuple):
    """A loss that is a sum over the classes of each row."""

    term: Any
    overlap: Any
    #: The parameter that is the exponent of (1 - p); None where there is no such factor.
    exponent: int | None
    params: int


class PairTerm(NamedTuple):
    """A loss that is a sum over the classes of two rows."""

    term: Any
    curvature: Any
    params: int
    #: Whether the second row has logits, and not targets. The last parameter is then the weight of a cross-entropy.
    of_logits: bool = True


ROW_EPILOGUES = {
    "cross_entropy": RowEpilogue(cross_entropy, 0),
    "log_sum_exp": RowEpilogue(log_sum_exp, 0),
    "focal": RowEpilogue(focal, 1),
    "mixed_cross_entropy": RowEpilogue(mixed_cross_entropy, 1),
    "dsc_target": RowEpilogue(dsc_target, 4),
    "tversky_target": RowEpilogue(tversky_target, 3),
}
CLASS_TERMS = {
    "dsc_one_vs_rest": ClassTerm(dsc_one_vs_rest, dsc, 0, 4),
    "dsc_over_rows": ClassTerm(dsc_over_rows, dsc, 0, 4),
    "tversky_one_vs_rest": ClassTerm(tversky_one_vs_rest, tversky, None, 3),
    "tversky_over_rows": ClassTerm(tversky_over_rows, tversky, None, 3),
}
PAIR_TERMS = {
    "forward_kl": PairTerm(forward_kl, _curvature_of_kl, 1),
    "reverse_kl": PairTerm(reverse_kl, _curvature_of_kl, 1),
    "total_variation": PairTerm(total_variation, _no_curvature, 1),
    "mixture_kl": PairTerm(mixture_kl, _curvature_of_mixture, 4),
    "soft_targets": PairTerm(soft_targets, _no_curvature, 2, of_logits=False),
}
#: Those whose sums over the rows are a loss's; there they lack the last parameter.
SUMMED_TERMS = ("dsc_over_rows", "tversky_over_rows")
