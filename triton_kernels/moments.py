"""The moments of rows: entropy -sum_j p_j log p_j, excess sum_j p_j (z_j - max) and power sum_j p_j^2.

They are made of four sums, by the largest logit m so far: `low` of exp(z - m) over the logits below m, `ties`, how many
are m, `excess` of exp(z - m) (z - m) and `square` of exp(2 (z - m)). The entropy is log1p(low + ties - 1) less the mean
excess: no sum holds the 1 of the largest logit, beside which a small one would lose its digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import exp, log1p

COUNT = tl.constexpr(4)
#: What stands for a lag of -inf, which times 0 would be NaN.
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def nothing(rows: tl.constexpr, columns: tl.constexpr, T: tl.constexpr, MOMENTS: tl.constexpr):
    if MOMENTS:
        zero = tl.zeros((rows, columns), T)
        return zero, zero, zero, zero
    else:
        return ()


@triton.jit
def of_one(logit, MOMENTS: tl.constexpr):
    """Of a column alone."""
    if MOMENTS:
        zero = tl.zeros(logit.shape, tl.float64)
        one = zero + 1.0
        return zero, one, zero, one
    else:
        return ()


@triton.jit
def rise(sums, before, now):
    """The sums by a larger logit `now` in the place of the one before, which is then among those below."""
    low, ties, excess, square = sums
    higher = now > before
    lag = tl.where(higher, tl.maximum(before - now, _LOWEST), 0.0)
    factor = exp(lag)
    low = tl.where(higher, low + ties, low)
    return factor * low, tl.where(higher, 0.0, ties), factor * (excess + lag * low), factor * factor * square


@triton.jit
def add(sums, z, e, largest):
    """With logits (ROWS, LANE, LANES), their e = exp(z - m) and m, the largest of each lane."""
    low, ties, excess, square = sums
    m = largest[:, None, :]
    below = tl.where(z == m, 0.0, e)
    lag = tl.maximum(z - tl.where(m == -float("inf"), 0.0, m), _LOWEST)
    return (
        low + tl.sum(below, 1),
        ties + tl.sum((z == m).to(ties.dtype), 1),
        excess + tl.sum(below * lag, 1),
        square + tl.sum(e * e, 1),
    )


@triton.jit
def merge(x, x_max, y, y_max):
    if len(x) == 0:
        return x
    else:
        m = tl.maximum(x_max, y_max).to(tl.float64)
        x = rise(x, x_max.to(tl.float64), m)
        y = rise(y, y_max.to(tl.float64), m)
        return x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3]


@triton.jit
def finish(sums, exists, T: tl.constexpr):
    """Entropy, excess and power of rows that have probabilities."""
    low, ties, excess, square = sums
    total = low + ties
    excess = excess / total
    entropy = log1p(low + (ties - 1.0)) - excess
    power = square / (total * total)
    return (
        tl.where(exists, entropy.to(T), float("nan")),
        tl.where(exists, excess.to(T), float("nan")),
        tl.where(exists, power.to(T), float("nan")),
    )
