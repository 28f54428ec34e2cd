"""The losses' epilogues in Triton, the twin of ``csrc/epilogues.h``: from the statistics of rows to losses and the
coefficients of their gradient. Nothing here knows memory or programs.

Everything of a row is a column (R, 1), what is of its picks (R, K), what is of its classes (R, BLOCK); `params` are the
parameters, columns too. Notation as there: q = 1 - p_t, ce = -log p_t, and d = a - b_t, so that the target's gradient
is d - a q, which keeps its digits where p_t -> 1.

To add a loss: write its function and put it into ROW_EPILOGUES or CLASS_TERMS at the end of this file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import expm1, pow, reciprocal


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
    slope = error_slope * rest
    if POSITIVE:
        slope -= agreement_slope * error
    return class_weight * (error * inverse), class_weight * (slope * (inverse * inverse))


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
#: Those whose sums over the rows are a loss's; there they lack the last parameter.
SUMMED_TERMS = ("dsc_over_rows", "tversky_over_rows")
