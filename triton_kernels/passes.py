"""The passes in Triton. They know no loss: that is an epilogue, a function which a pass takes as a constant.

    statistics_pass   reads the logits once, keeping the rows' statistics (an online softmax without the target's term),
                      then runs the loss's epilogue on them. It can go on to write the gradient, while the rows are
                      still in the caches
    class_terms_pass  for losses over all classes: their sums over each row, from a second look at it
    gradient_pass     reads the logits once more and writes their gradient, which may take their place
    pair_terms_pass, pair_gradient_pass    the same two for losses over the classes of two rows
    top_rest_pass, class_sums_pass    the sums over the rows of each class's error and agreement

Logits come out of memory, or are products of hidden states and a weight that are made on the chip and never stored:
`_block` and `_logit` tell the two apart, and nothing else needs to.

A program looks at ROWS rows, at BLOCK columns of them together. What is of a row is a column (ROWS, 1). Few long rows
are split: programs read a span of SPAN blocks each, others merge. The sums of spans merge always in the same order, so
that a row's sums do not depend on whether it was split, nor on the rows beside it.

Logits are computed in float32 (float64 if they are that). Ignored rows are not read. A row whose target or candidate is
out of range has NaN for its target's logit, which makes all of it NaN, and nothing outside of the row is touched.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import moments
from .device import convert, exp, log1p, multiply, number, tanh
from .epilogues import power
from .search import lane_columns, merge_found, search

# Coefficients and statistics are laid out as fusedloss.engine.operators says.
_STATISTICS = tl.constexpr(6)
_COEFFICIENTS = tl.constexpr(3)
_IGNORED = tl.constexpr(-100)

# What varies from batch to batch and moves no data by 16 bytes: kernels are not compiled anew for its values.
_VARYING = ["N", "group_rows", "grad_output_stride", "row_weight_stride", "param_strides"]


# --- rows and blocks ---


@triton.jit
def _rows(block, N, ROWS: tl.constexpr):
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return rows, rows < N


@triton.jit
def _targets(target, rows, inside, V):
    """Targets as columns, -1 where they are none, and which rows are in the batch and not ignored."""
    t = tl.load(target + rows, inside, other=-1)
    live = inside & (t != _IGNORED)
    return tl.where(live & (t >= 0) & (t < V), t, -1).to(tl.int32), live


@triton.jit
def _any(condition):
    return tl.max(tl.max(condition.to(tl.int32), 1), 0) > 0


@triton.jit
def _row_sum(x):
    return tl.sum(x, 1, keep_dims=True).to(tl.float64)


@triton.jit
def _lanes(x, LANE: tl.constexpr, APART: tl.constexpr):
    """A block (ROWS, BLOCK) as (ROWS, LANE, LANES), of which a thread has all that is of a lane."""
    if APART:
        return tl.reshape(x, (x.shape[0], LANE, x.shape[1] // LANE))
    else:
        return tl.permute(tl.reshape(x, (x.shape[0], x.shape[1] // LANE, LANE)), (0, 2, 1))


@triton.jit
def _in_block(column, begin, BLOCK: tl.constexpr):
    """Whether a column of any row is in the block that begins there."""
    return _any((column >= begin) & (column < begin + BLOCK))


@triton.jit
def _class_weights(class_weight, columns, exists, T: tl.constexpr):
    if class_weight is None:
        return tl.full((1, 1), 1.0, T)
    else:
        return tl.load(class_weight + columns, exists, other=0.0)


@triton.jit
def _params(values, strides, rows, inside, COUNT: tl.constexpr):
    """The parameters as columns."""
    columns = ()
    for k in tl.static_range(COUNT):
        columns = columns + (tl.load(values[k] + rows * strides[k], inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return columns


@triton.jit
def _upstream(grad_output, stride, rows, live, T: tl.constexpr):
    if grad_output is None:
        return tl.full((1, 1), 1.0, T)
    else:
        return tl.load(grad_output + rows * stride, live, other=0.0)


# What is kept of rows lies one below the other, N apart.


@triton.jit
def _load_three(values, rows, N, real, OTHER: tl.constexpr):
    one, two = tl.load(values + rows, real, other=OTHER), tl.load(values + (rows + N), real, other=OTHER)
    return one, two, tl.load(values + (rows + 2 * N), real, other=OTHER)


@triton.jit
def _load_moments(values, rows, span, N, real, MOMENTS: tl.constexpr):
    if MOMENTS:
        at = values + (rows + span * moments.COUNT * N)
        low, ties = tl.load(at, real, other=0.0), tl.load(at + N, real, other=0.0)
        return low, ties, tl.load(at + 2 * N, real, other=0.0), tl.load(at + 3 * N, real, other=0.0)
    else:
        return ()


@triton.jit
def _store_rows(to, rows, N, inside, values):
    for k in tl.static_range(len(values)):
        tl.store(to + (rows + k * N), values[k], inside)


@triton.jit
def _store_live(to, rows, N, inside, ignored, values, neutral):
    """Ignored rows get the neutral values."""
    for k in tl.static_range(len(values)):
        tl.store(to + (rows + k * N), tl.where(ignored, neutral[k], values[k]), inside)


# --- logits ---
# `where` they are: (logits, row stride) with SOURCE None, or with SOURCE a launch.Product (hidden states, its strides,
# weight, its strides, depth D); then what every loss has, if the logits have a factor, and the bias, if there is one.


@triton.jit
def _logit(where, rows, column, real, SOURCE: tl.constexpr, T: tl.constexpr):
    """Logits (ROWS, K) of some columns (ROWS, K) of each row, -inf where there is none."""
    if SOURCE is None:
        z = tl.load(where[0] + rows * where[1] + column, real, other=-float("inf")).to(T)
        return z * tl.load(where[2] + 3) if len(where) > 2 else z
    else:
        z = tl.zeros(column.shape, T)
        hidden, row_stride, hidden_stride, weight, class_stride, weight_stride, depth = where[:7]
        for begin in range(0, depth, 16):
            d = begin + tl.arange(0, 16)[None, None, :]
            there = real[:, :, None] & (d < depth)
            x = tl.load(hidden + (rows * row_stride)[:, :, None] + d * hidden_stride, there, other=0.0).to(T)
            of_columns = weight + (column.to(tl.int64) * class_stride)[:, :, None]
            w = tl.load(of_columns + d * weight_stride, there, other=0.0).to(T)
            z += tl.sum(x * w, 2)
        return tl.where(real, _after_product(z, where, column, real, SOURCE, T), -float("inf"))


@triton.jit
def _block(where, rows, live, begin, V, target, SOURCE: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """Columns (1, BLOCK), which of them exist, and their logits (ROWS, BLOCK); -inf where there is none."""
    tl.assume(begin >= 0)  # saves 64-bit arithmetic
    columns = begin + tl.arange(0, BLOCK)[None, :]
    exists = columns < V
    if SOURCE is None:
        z = tl.load(where[0] + rows * where[1] + columns, live & exists, other=-float("inf")).to(T)
        if len(where) > 2:
            z *= tl.load(where[2] + 3)
        return columns, exists, z
    else:
        z = tl.zeros((rows.shape[0], BLOCK), T)
        hidden, row_stride, hidden_stride, weight, class_stride, weight_stride, depth = where[:7]
        hidden += rows * row_stride
        weight += columns.to(tl.int64) * class_stride
        precision: tl.constexpr = SOURCE.precision  # Triton 3.6 passes on no string that is an attribute
        for first in range(0, depth, SOURCE.depth):
            d = first + tl.arange(0, SOURCE.depth)
            x = tl.load(hidden + d[None, :] * hidden_stride, live & (d[None, :] < depth), other=0.0)
            w = tl.load(weight + d[:, None] * weight_stride, exists & (d[:, None] < depth), other=0.0)
            z = multiply(x, w, z, precision)
        z = _after_product(z, where, columns, exists, SOURCE, T)
        if SOURCE.masks_target:
            z = tl.where(columns == target, -float("inf"), z)
        return columns, exists, tl.where(live & exists, z, -float("inf"))


@triton.jit
def _after_product(z, where, columns, exists, SOURCE: tl.constexpr, T: tl.constexpr):
    if len(where) > 7 + SOURCE.tempered:
        z += tl.load(where[7 + SOURCE.tempered] + columns, exists, other=0.0).to(T)
    if SOURCE.softcap > 0:
        z = SOURCE.softcap * tanh(z / SOURCE.softcap)
    if SOURCE.tempered:
        z *= tl.load(where[7] + 3)
    return z


# --- the statistics of a part of a row, and how they merge ---
# Of all columns but the target: (max; sum of exp(z - max); sum of w (z - _offset); the logits of the largest two and of
# the largest below the target; their columns, -1 for none; the sums of moments, if asked for). Sums are in float64. The
# target is a part of its own, without a sum.


@triton.jit
def _nothing(ROWS: tl.constexpr, T: tl.constexpr, MOMENTS: tl.constexpr):
    lowest = tl.full((ROWS, 1), -float("inf"), T)
    zero = tl.zeros((ROWS, 1), tl.float64)
    nowhere = tl.full((ROWS, 1), -1, tl.int32)
    part = (lowest, zero, zero, lowest, lowest, lowest, nowhere, nowhere, nowhere)
    return part + moments.nothing(ROWS, 1, tl.float64, MOMENTS)


@triton.jit
def _reference(maximum):
    return tl.where(maximum == -float("inf"), 0.0, maximum)  # exp(-inf - -inf) would be NaN


@triton.jit
def _offset(target_logit):
    """What the mean logit is summed from, so that a common offset takes no digits from the sum."""
    return tl.where(tl.abs(target_logit) < float("inf"), target_logit, 0.0)


@triton.jit
def _merge(x, y):
    x_max, x_rest, x_mean = x[:3]
    y_max, y_rest, y_mean = y[:3]
    higher = x_max >= y_max
    # The lower sum counts for less. A part without a finite logit has an empty one, or a NaN that must pass through.
    less = tl.exp(tl.where(x_max == y_max, 0.0, -tl.abs(x_max - y_max)).to(tl.float64))
    rest = tl.fma(tl.where(higher, y_rest, x_rest), less, tl.where(higher, x_rest, y_rest))
    part = (tl.maximum(x_max, y_max), rest, x_mean + y_mean) + merge_found(x[3:9], y[3:9])  # noqa: RUF005
    return part + moments.merge(x[9:], x_max, y[9:], y_max)


@triton.jit
def _scan(
    where,
    rows,
    live,
    begin,
    end,
    V,
    target,
    target_logit,
    class_weight,
    SOURCE: tl.constexpr,
    TOP_K: tl.constexpr,
    BELOW: tl.constexpr,
    MEAN: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    APART: tl.constexpr,
    T: tl.constexpr,
):
    """The statistics of a span, the columns from `begin` to `end`.

    A lane is LANE columns of each block that a thread loads: side by side, or APART where rows begin anywhere. A thread
    keeps a maximum and a sum of its lanes. Nothing is reduced over threads before the span ends.
    """
    LANE: tl.constexpr = BLOCK if SOURCE is not None else 128 // where[0].dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // LANE
    ROWS: tl.constexpr = rows.shape[0]
    maximum = tl.full((ROWS, LANES), -float("inf"), T)
    rest = tl.zeros((ROWS, LANES), T)
    mean = tl.zeros((ROWS, LANES), T)
    at = tl.zeros((ROWS, LANES), tl.int32) + begin  # the block with the maximum
    below, below_at = maximum, at
    found = _nothing(ROWS, T, False)[3:]
    sums = moments.nothing(ROWS, LANES, T, MOMENTS)
    tl.assume(begin >= 0)
    for start in range(begin, end, BLOCK):
        columns, exists, z = _block(where, rows, live, start, V, target, SOURCE, BLOCK, T)
        if MEAN:
            of_columns = (z - _offset(target_logit)) * _class_weights(class_weight, columns, exists, T)
            if start + BLOCK > V:
                of_columns = tl.where(exists, of_columns, 0.0)
            mean += tl.sum(_lanes(of_columns, LANE, APART), 1)
        if _in_block(target, start, BLOCK):  # a part of its own
            z = tl.where(columns == target, -float("inf"), z)
        if SOURCE is not None:
            found = search(found, columns, exists & (columns != target), z, target_logit, TOP_K, BELOW)
        z = _lanes(z, LANE, APART)
        higher = tl.maximum(maximum, tl.max(number(z), 1))
        if TOP_K > 0:
            at = tl.where(higher > maximum, start, at)
        if BELOW:
            lower = tl.max(tl.where(z < target_logit[:, :, None], z, -float("inf")), 1)
            below_at = tl.where(lower > below, start, below_at)
            below = tl.maximum(lower, below)
        reference = _reference(higher)
        e = exp(z - reference[:, None, :])
        rest = rest * exp(maximum - reference) + tl.sum(e, 1)
        if MOMENTS:
            sums = moments.add(moments.rise(sums, maximum, higher), z, e, higher)
        maximum = higher
    highest = tl.max(maximum, 1, keep_dims=True)
    rest *= exp(maximum - _reference(highest))
    if SOURCE is None and (TOP_K > 0 or BELOW):
        columns = lane_columns(begin, maximum, at, below, below_at, TOP_K, BELOW, SPAN, BLOCK, LANE)
        real = live & (columns >= 0) & (columns < V) & (columns != target)
        z = _logit(where, rows, columns, real, SOURCE, T)
        found = search(found, columns, real, z, target_logit, TOP_K, BELOW)
    part = (highest, _row_sum(rest), _row_sum(mean)) + found  # noqa: RUF005
    if MOMENTS:
        low, ties, excess, square = moments.rise(sums, maximum, highest)
        return part + (_row_sum(low), _row_sum(ties), _row_sum(excess), _row_sum(square))  # noqa: RUF005
    else:
        return part


# --- from the statistics of whole rows to what the pass gives ---


@triton.jit
def _picks(
    part,
    where,
    rows,
    live,
    V,
    candidates,
    SOURCE: tl.constexpr,
    TOP_K: tl.constexpr,
    BELOW: tl.constexpr,
    PICKS: tl.constexpr,
    PICK_BLOCK: tl.constexpr,
    T: tl.constexpr,
):
    """Index and logit of each pick, (ROWS, PICK_BLOCK), -1 for none, and whether all of a row's are in range."""
    k = tl.arange(0, PICK_BLOCK)[None, :]
    index = tl.where(live & (k < 0), 0, -1).to(tl.int64)
    logit = tl.where(live & (k < 0), tl.full((1, 1), 0.0, T), -float("inf"))
    if TOP_K > 0:
        index = tl.where(live & (k == 0), part[6], index)
        logit = tl.where(k == 0, part[3], logit)
    if TOP_K > 1:
        index = tl.where(live & (k == 1), part[7], index)
        logit = tl.where(k == 1, part[4], logit)
    if BELOW:
        index = tl.where(live & (k == TOP_K), part[8], index)
        logit = tl.where(k == TOP_K, part[5], logit)
    if candidates is not None:
        first: tl.constexpr = TOP_K + BELOW
        given = live & (k >= first) & (k < PICKS)
        index = tl.where(given, tl.load(candidates + rows * (PICKS - first) + (k - first), given, other=-1), index)
        outside = given & ((index < 0) | (index >= V))
        logit = tl.where(given, _logit(where, rows, index, given & (outside == 0), SOURCE, T), logit)
        return index, logit, tl.max(outside.to(tl.int32), 1, keep_dims=True) == 0
    else:
        return index, logit, live


@triton.jit
def _finish(
    part,
    rows,
    inside,
    live,
    target,
    target_logit,
    where,
    class_weight,
    weight_sum,
    candidates,
    param_values,
    param_strides,
    loss,
    statistics,
    index,
    coefficients,
    N,
    V,
    common,
    EPILOGUE: tl.constexpr,
    PARAMS: tl.constexpr,
    SOURCE: tl.constexpr,
    TOP_K: tl.constexpr,
    BELOW: tl.constexpr,
    MEAN: tl.constexpr,
    MOMENTS: tl.constexpr,
    PICKS: tl.constexpr,
    PICK_BLOCK: tl.constexpr,
    T: tl.constexpr,
):
    pick_index, pick_logit, in_range = _picks(
        part, where, rows, live, V, candidates, SOURCE, TOP_K, BELOW, PICKS, PICK_BLOCK, T
    )
    target_logit = tl.where(in_range, target_logit, float("nan"))

    m = _reference(part[0])
    rest = part[1].to(T)
    mine = tl.exp(target_logit - m)
    sum_exp = rest + mine
    log_sum = tl.log(sum_exp)
    hopeless = sum_exp == 0  # no finite logit at all
    q = tl.where(hopeless, 1.0, rest / sum_exp)
    p = tl.where(hopeless, 0.0, mine / sum_exp)
    ce = tl.where(rest < mine, log1p(rest / mine), (m - target_logit) + log_sum)
    ce = tl.where(hopeless, float("inf"), ce)
    classes = V.to(tl.float64)
    total = classes  # of the class weights
    if weight_sum is not None:
        total = tl.load(weight_sum)
    mean_ce = tl.zeros_like(ce)
    if MEAN:
        sum_ce = total * (log_sum.to(tl.float64) + (m.to(tl.float64) - _offset(target_logit).to(tl.float64))) - part[2]
        mean_ce = (sum_ce / classes).to(T)

    # Ignored rows get the statistics of two equal logits, one of them the target, so that a user's loss function sees
    # nothing that is not finite, and loss and coefficients of zero.
    ignored = live == 0
    log_2 = 0.6931471805599453
    values = (m, sum_exp, q, ce, target_logit, mean_ce)
    _store_live(statistics, rows, N, inside, ignored, values, (0.0, 2.0, 0.5, log_2, 0.0, log_2))
    k = tl.arange(0, PICK_BLOCK)[None, :]
    real = inside & (k < PICKS)
    tl.store(statistics + (rows + (k + _STATISTICS) * N), tl.where(ignored, 0.0, pick_logit), real)
    tl.store(index + (rows + k * N), pick_index, real)
    if MOMENTS:
        to = statistics + (_STATISTICS + PICKS) * N
        _store_live(to, rows, N, inside, ignored, moments.finish(part[9:], sum_exp > 0, T), (log_2, 0.0, 0.5))

    if EPILOGUE is not None:
        lse = m + log_sum
        values = _params(param_values, param_strides, rows, inside, PARAMS)
        target_weight = _target_weight(class_weight, target, live, V, T)
        main = _common(common, 0, T) * target_weight
        smooth = _common(common, 1, T)
        z_term, z_slope = _z_loss(common, target_weight, lse, T)
        spread = smooth * total.to(T)
        same = pick_index == target
        pick_ce = tl.where(same, ce, log_sum + (m - pick_logit))
        # L = w_t (main * base + z_loss lse^2) + smooth * sum_j w_j (-log p_j)
        of_row, a, d, b = EPILOGUE(ce, q, p, lse, pick_ce, real, real & (same == 0), PICKS, values)
        of_row = main * of_row + z_term + smooth * classes.to(T) * mean_ce
        a = main * a + z_slope + spread
        d = main * d + z_slope + spread
        at_target = d - a * q - smooth * target_weight
        tl.store(loss + rows, tl.where(ignored, 0.0, of_row), inside)
        columns = (a, smooth + tl.zeros_like(a), at_target)
        _store_live(coefficients, rows, N, inside, ignored, columns, (0.0, 0.0, 0.0))
        tl.store(coefficients + (rows + (k + _COEFFICIENTS) * N), tl.where(ignored, 0.0, main * b), real)


@triton.jit
def _target_weight(class_weight, target, live, V, T: tl.constexpr):
    if class_weight is None:
        return tl.full((1, 1), 1.0, T)
    else:
        return tl.load(class_weight + target, live & (target >= 0) & (target < V), other=0.0)


@triton.jit
def _common(common, K: tl.constexpr, T: tl.constexpr):
    """What every loss has, see fusedloss.engine.operators."""
    if common is None:
        return tl.full((1, 1), 1.0 if K == 0 else 0.0, T)
    else:
        return tl.full((1, 1), tl.load(common + K), T)


@triton.jit
def _z_loss(common, target_weight, lse, T: tl.constexpr):
    """Its term and its slope by lse; with no such loss an infinite lse is no matter."""
    z_loss = _common(common, 2, T) * target_weight
    return tl.where(z_loss != 0, z_loss * lse * lse, 0.0), tl.where(z_loss != 0, 2 * z_loss * lse, 0.0)


# --- class terms ---


@triton.jit
def _exponent(p, params, EXPONENT: tl.constexpr):
    if EXPONENT is None:
        return tl.zeros_like(p)
    else:
        return params[EXPONENT]


@triton.jit
def _series(p, x):
    """(1 - p)^x of small p; what it leaves out is less than half an ulp."""
    second = x * (x - 1.0) / 2.0
    third = second * (2.0 - x) / 3.0
    fourth = third * (3.0 - x) / 4.0
    return 1.0 + p * (p * (second + p * (third + p * fourth)) - x)


@triton.jit
def _powers(p, alpha):
    """(1 - p)^alpha and (1 - p)^(alpha - 1), of small p as series: all there is to do in almost every block.

    Which of the two it is is up to each p alone, whatever stands beside it.
    """
    most = (2.0**-12 if p.dtype == tl.float64 else 2.0**-6) / (1.0 + alpha)
    weight = _series(p, alpha)
    steep = _series(p, alpha - 1.0)
    if _any(tl.max(number(p), 1, keep_dims=True) > most):
        q = 1.0 - p
        exact = tl.exp(alpha * tl.log(q))
        weight = tl.where(p > most, exact, weight)
        steep = tl.where(p > most, exact / q, steep)
    return weight, steep


@triton.jit
def _others(z, columns, begin, target, top, BLOCK: tl.constexpr):
    """The logits of a block without the target and the top class, which have p = 0 then."""
    if _in_block(target, begin, BLOCK) | _in_block(top, begin, BLOCK):
        z = tl.where((columns == target) | (columns == top), -float("inf"), z)
    return z


@triton.jit
def _negative_terms(p, class_weight, params, TERM: tl.constexpr, EXPONENT: tl.constexpr):
    """Loss and slope of the classes of a block as such that are not the target."""
    weight, steep = _powers(p, _exponent(p, params, EXPONENT))
    return TERM(p, 1.0 - p, weight, steep, 1.0, class_weight, params, False)


@triton.jit
def _term_sums(
    where,
    rows,
    live,
    begin,
    end,
    V,
    target,
    top,
    m,
    inverse,
    class_weight,
    params,
    TERM: tl.constexpr,
    EXPONENT: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
    APART: tl.constexpr,
    T: tl.constexpr,
):
    """Of a span, the columns from `begin` to `end`, without the target and the top class: sums of exp(z - m), loss and
    p g. Lanes as in `_scan`."""
    LANE: tl.constexpr = BLOCK if SOURCE is not None else 128 // where[0].dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // LANE
    ROWS: tl.constexpr = rows.shape[0]
    zero = tl.zeros((ROWS, LANES), T)
    others, loss, slope = zero, zero, zero
    tl.assume(begin >= 0)
    for start in range(begin, end, BLOCK):
        columns, exists, z = _block(where, rows, live, start, V, target, SOURCE, BLOCK, T)
        e = exp(_others(z, columns, start, target, top, BLOCK) - m)
        p = e * inverse
        f, g = _negative_terms(p, _class_weights(class_weight, columns, exists, T), params, TERM, EXPONENT)
        others += tl.sum(_lanes(e, LANE, APART), 1)
        loss += tl.sum(_lanes(f, LANE, APART), 1)
        slope += tl.sum(_lanes(p * g, LANE, APART), 1)
    return _row_sum(others), _row_sum(loss), _row_sum(slope)


@triton.jit
def _class_term(
    sums,
    top,
    target,
    p,
    sum_exp,
    top_weight,
    target_weight,
    params,
    z_slope,
    TERM: tl.constexpr,
    EXPONENT: tl.constexpr,
    T: tl.constexpr,
):
    """The rows' losses; shift, gradient at the top class, gradient at the target. dL/dz_j = p_j (g_j - shift)."""
    others, loss, slope = sums
    inverse = 1.0 / sum_exp
    # 1 - p of the top class, the only one that may have p > 0.5, comes from the others' sum.
    is_top = target == top
    top_q = tl.where(is_top, others, others + (p * sum_exp).to(tl.float64)).to(T) * inverse
    top_p = 1.0 - top_q
    positive_q = tl.where(is_top, top_q, 1.0 - p)
    f, h = TERM(tl.where(is_top, top_p, p), positive_q, positive_q, positive_q, positive_q, target_weight, params, True)
    weight = power(top_q, _exponent(top_q, params, EXPONENT))
    top_f, top_h = TERM(top_p, top_q, weight, weight, top_q, top_weight, params, False)
    target_g = h / positive_q
    loss += tl.where(is_top, f, f + top_f).to(tl.float64)
    slope += tl.where(is_top, 0.0, p * target_g).to(tl.float64)
    top_h = tl.where(is_top, h, top_h)
    # dL/dz_top = p (h - slope); for the others p_j (g_j - slope - p h / q), q the top's 1 - p. Where q underflows, so
    # do they.
    shift = slope.to(T) + tl.where(top_q > 0, top_p * top_h / top_q, 0.0) - z_slope
    top_gradient = top_p * (top_h - slope.to(T) + z_slope)
    return loss.to(T), shift, top_gradient, tl.where(is_top, top_gradient, p * (target_g - shift))


# --- pair terms ---


@triton.jit
def _both_rows(statistics, second_statistics, rows, live, N, OF_LOGITS: tl.constexpr):
    """Of both rows max and sum of exp; the log of the second's sum less that of the first, of targets log sum."""
    m = tl.load(statistics + rows, live, other=0.0)
    total = tl.load(statistics + (rows + N), live, other=1.0)
    if OF_LOGITS:
        second_m = tl.load(second_statistics + rows, live, other=0.0)
        second_total = tl.load(second_statistics + (rows + N), live, other=1.0)
        return m, total, second_m, second_total, tl.log(second_total / total)
    else:
        return m, total, tl.zeros_like(m), tl.full(m.shape, 1.0, m.dtype), tl.log(total)


@triton.jit
def _pair_term(z, second, real, weight, both, params, TERM: tl.constexpr, OF_LOGITS: tl.constexpr):
    """p, and what classes add to the loss, p df/dp and p - y: nothing where both rows are -inf, or no class is."""
    m, total, second_m, second_total, lag = both
    p = exp(z - m) * (1.0 / total)
    if OF_LOGITS:
        y = exp(second - second_m) * (1.0 / second_total)
        # One after the other: a large common offset would leave no digits of the second, nor would one of a row alone.
        offset = second_m - m
        d = tl.where(tl.abs(offset) > 16.0, (second - second_m) - (z - m), (second - z) - offset)
        d -= lag  # NaN of a class that neither row has, where no term looks at it
    else:
        y = tl.where(real, second * params[0] + params[1], 0.0) * weight
        d = lag - (z - m)
    loss, slope, difference = TERM(p, y, d, params)
    return p, loss, slope, difference


@triton.jit
def _pair_sums(
    where,
    second,
    rows,
    live,
    begin,
    end,
    V,
    target,
    both,
    class_weight,
    params,
    TERM: tl.constexpr,
    OF_LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
    APART: tl.constexpr,
    T: tl.constexpr,
):
    """Of a span: sums of loss, p df/dp and p - y. Lanes as in `_scan`."""
    LANE: tl.constexpr = 128 // where[0].dtype.element_ty.primitive_bitwidth
    zero = tl.zeros((rows.shape[0], BLOCK // LANE), T)
    loss, slope, difference = zero, zero, zero
    for start in range(begin, end, BLOCK):
        columns, exists, z = _block(where, rows, live, start, V, target, None, BLOCK, T)
        _, _, other = _block(second, rows, live, start, V, target, None, BLOCK, T)
        weight = _class_weights(class_weight, columns, exists, T)
        _, f, h, apart = _pair_term(z, other, live & exists, weight, both, params, TERM, OF_LOGITS)
        loss += tl.sum(_lanes(f, LANE, APART), 1)
        slope += tl.sum(_lanes(h, LANE, APART), 1)
        difference += tl.sum(_lanes(apart, LANE, APART), 1)
    return _row_sum(loss), _row_sum(slope), _row_sum(difference)


# --- the gradient ---


@triton.jit
def _row_coefficients(statistics, coefficients, grad_output, grad_output_stride, rows, live, N, T: tl.constexpr):
    """Max, 1 / sum of exp, upstream gradient and the three coefficients."""
    m = tl.load(statistics + rows, live, other=0.0)
    inverse = 1.0 / tl.load(statistics + (rows + N), live, other=1.0)
    upstream = _upstream(grad_output, grad_output_stride, rows, live, T)
    one, two, three = _load_three(coefficients, rows, N, live, 0.0)
    return m, inverse, upstream, one, two * upstream, three * upstream


@triton.jit
def _write_gradient(
    grad,
    grad_stride,
    of_rows,
    where,
    rows,
    inside,
    live,
    begin,
    N,
    V,
    target,
    class_weight,
    index,
    coefficients,
    params,
    TERM: tl.constexpr,
    EXPONENT: tl.constexpr,
    SOURCE: tl.constexpr,
    PICKS: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
):
    """Of a block of columns."""
    m, inverse, upstream, one, two, at_target = of_rows
    columns, exists, z = _block(where, rows, live, begin, V, target, SOURCE, BLOCK, T)
    if TERM is not None:
        top = tl.load(index + rows, live, other=-1).to(tl.int32)
        others = z
        if SOURCE is not None:
            # Triton 3.6 fails for sm_100 where a product is reduced to one number without a branch in between. Logits
            # in memory need none, and would take twice the registers.
            others = _others(z, columns, begin, target, top, BLOCK)
        p = exp(others - m) * inverse
        _, g = _negative_terms(p, _class_weights(class_weight, columns, exists, T), params, TERM, EXPONENT)
        gradient = p * (g - one) * upstream
        if _in_block(top, begin, BLOCK):
            gradient = tl.where(columns == top, two, gradient)
    elif MOMENTS:
        by_excess = tl.load(coefficients + (rows + (_COEFFICIENTS + PICKS) * N), live, other=0.0)
        by_power = tl.load(coefficients + (rows + (_COEFFICIENTS + PICKS + 1) * N), live, other=0.0)
        lag = tl.maximum(z - m, -1.0e30)  # -inf times a probability of 0 would be NaN
        p = exp(lag) * inverse
        gradient = p * upstream * (one + by_excess * lag + by_power * p) - two * _class_weights(
            class_weight, columns, exists, T
        )
    else:
        gradient = exp(z - m) * (one * inverse * upstream)  # 0 of rows that are ignored
        if class_weight is None:
            gradient -= two
        elif _any(two != 0):
            gradient -= two * _class_weights(class_weight, columns, exists, T)
    if _in_block(target, begin, BLOCK):
        gradient = tl.where(columns == target, at_target, gradient)
    for k in tl.static_range(PICKS if TERM is None else 0):
        pick = tl.load(index + (rows + k * N), live, other=-1).to(tl.int32)
        if _in_block(pick, begin, BLOCK):
            b = tl.load(coefficients + (rows + (_COEFFICIENTS + k) * N), live, other=0.0) * upstream
            gradient = tl.where(columns == pick, gradient - b, gradient)
    if SOURCE is not None:  # noqa: SIM102 - only a condition of its own is one for the compiler
        if SOURCE.softcap > 0:
            share = z / SOURCE.softcap
            if SOURCE.tempered:
                share /= tl.load(where[7] + 3)
            share = tl.maximum(share, -1.0)  # that of a masked target is -inf
            gradient *= 1.0 - share * share
    if TERM is not None or SOURCE is not None or class_weight is not None or MOMENTS:
        gradient = tl.where(live, gradient, 0.0)
    tl.store(grad + (rows * grad_stride + columns), convert(gradient, grad.dtype.element_ty), inside & exists)


# --- the passes ---


@triton.jit(do_not_specialize=_VARYING)
def statistics_pass(
    where,
    target,
    class_weight,
    weight_sum,
    candidates,
    param_values,
    param_strides,
    loss,
    statistics,
    index,
    coefficients,
    part_sums,
    part_logits,
    part_columns,
    grad,
    grad_stride: tl.int64,
    grad_output,
    grad_output_stride: tl.int64,
    part_moments,
    N: tl.int64,
    V: tl.int32,
    common,
    EPILOGUE: tl.constexpr,
    PARAMS: tl.constexpr,
    SOURCE: tl.constexpr,
    TOP_K: tl.constexpr,
    BELOW: tl.constexpr,
    MEAN: tl.constexpr,
    MOMENTS: tl.constexpr,
    PICKS: tl.constexpr,
    PICK_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    APART: tl.constexpr,
):
    """SPLIT: grid (row blocks, spans), stores the statistics of a span of the rows. MERGE: takes them up from there.

    Otherwise both in one; with `grad`, which may be the logits themselves, the gradient too. Spans lie one after the
    other, each (2 to 4, N): of sums, logits, columns and moments.
    """
    T: tl.constexpr = tl.float64 if where[0].dtype.element_ty == tl.float64 else tl.float32
    rows, inside = _rows(tl.program_id(0), N, ROWS)
    t, live = _targets(target, rows, inside, V)
    target_logit = _logit(where, rows, t, t >= 0, SOURCE, T)
    if SOURCE is not None:  # noqa: SIM102 - only a condition of its own is one for the compiler
        if SOURCE.masks_target:
            target_logit = tl.full(target_logit.shape, -float("inf"), T)
    target_logit = tl.where((t >= 0) | (live == 0), target_logit, float("nan"))
    end = tl.where(_any(live), V, 0)  # where all are ignored there is nothing to read

    part = _nothing(ROWS, T, MOMENTS)
    if not SPLIT:  # begins with the target alone
        largest = tl.where(target_logit == target_logit, target_logit, -float("inf"))
        part = (largest, part[1], part[2], largest, part[4], part[5], t, part[7], part[8])
        part = part + moments.of_one(largest, MOMENTS)
    if MERGE:
        for span in range(0, tl.cdiv(V, SPAN * BLOCK)):
            at = rows + span * 3 * N
            rest, mean, _ = _load_three(part_sums, at, N, inside, 0.0)
            logits = _load_three(part_logits, at, N, inside, 0.0)
            columns = _load_three(part_columns, at, N, inside, -1)
            other = (logits[0], rest, mean) + logits + columns  # noqa: RUF005
            part = _merge(part, other + _load_moments(part_moments, rows, span, N, inside, MOMENTS))
    else:
        first = tl.program_id(1) * (SPAN * BLOCK) if SPLIT else 0
        last = tl.minimum(first + SPAN * BLOCK, end) if SPLIT else end
        for begin in range(first, last, SPAN * BLOCK):
            span = _scan(
                where, rows, live, begin, tl.minimum(begin + SPAN * BLOCK, end), V, t, target_logit, class_weight,
                SOURCE, TOP_K, BELOW, MEAN, MOMENTS, BLOCK, SPAN, APART and TOP_K + BELOW == 0, T,
            )  # fmt: skip
            part = _merge(part, span)

    if SPLIT:
        at = rows + tl.program_id(1) * 3 * N
        _store_rows(part_sums, at, N, inside, part[1:3])
        _store_rows(part_logits, at, N, inside, (part[0], part[4], part[5]))
        _store_rows(part_columns, at, N, inside, part[6:9])
        if MOMENTS:
            _store_rows(part_moments, rows + tl.program_id(1) * moments.COUNT * N, N, inside, part[9:])
    else:
        _finish(
            part, rows, inside, live, t, target_logit, where, class_weight, weight_sum, candidates, param_values,
            param_strides, loss, statistics, index, coefficients, N, V, common, EPILOGUE, PARAMS, SOURCE,
            TOP_K, BELOW, MEAN, MOMENTS, PICKS, PICK_BLOCK, T,
        )  # fmt: skip
        if grad is not None:
            tl.debug_barrier()  # the coefficients are there, and all that is read of the logits here was read
            of_rows = _row_coefficients(statistics, coefficients, grad_output, grad_output_stride, rows, live, N, T)
            blocks = tl.cdiv(V, BLOCK)
            for k in range(0, blocks):
                begin = (blocks - 1 - k) * BLOCK  # what was read last is most likely still in the caches
                _write_gradient(
                    grad, grad_stride, of_rows, where, rows, inside, live, begin, N, V, t, class_weight, index,
                    coefficients, (), None, None, SOURCE, PICKS, False, BLOCK, T,
                )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def class_terms_pass(
    where,
    target,
    class_weight,
    param_values,
    param_strides,
    statistics,
    index,
    loss,
    coefficients,
    part_sums,
    N: tl.int64,
    V: tl.int32,
    common,
    TERM: tl.constexpr,
    EXPONENT: tl.constexpr,
    PARAMS: tl.constexpr,
    SOURCE: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    APART: tl.constexpr,
):
    """Losses and coefficients, from statistics with the top class. SPLIT and MERGE as in the statistics pass."""
    T: tl.constexpr = tl.float64 if where[0].dtype.element_ty == tl.float64 else tl.float32
    rows, inside = _rows(tl.program_id(0), N, ROWS)
    t, live = _targets(target, rows, inside, V)
    top = tl.load(index + rows, live, other=-1).to(tl.int32)
    m = tl.load(statistics + rows, live, other=0.0)
    sum_exp = tl.load(statistics + (rows + N), live, other=1.0)
    inverse = 1.0 / sum_exp
    values = _params(param_values, param_strides, rows, inside, PARAMS)
    end = tl.where(_any(live), V, 0)

    zero = tl.zeros((ROWS, 1), tl.float64)
    others, of_row, slope = zero, zero, zero
    if MERGE:
        for span in range(0, tl.cdiv(V, SPAN * BLOCK)):
            at = rows + span * 3 * N
            span_others, span_loss, span_slope = _load_three(part_sums, at, N, inside, 0.0)
            others += span_others
            of_row += span_loss
            slope += span_slope
    else:
        first = tl.program_id(1) * (SPAN * BLOCK) if SPLIT else 0
        last = tl.minimum(first + SPAN * BLOCK, end) if SPLIT else end
        for begin in range(first, last, SPAN * BLOCK):
            span_others, span_loss, span_slope = _term_sums(
                where, rows, live, begin, tl.minimum(begin + SPAN * BLOCK, end), V, t, top, m, inverse, class_weight,
                values, TERM, EXPONENT, SOURCE, BLOCK, APART, T,
            )  # fmt: skip
            others += span_others
            of_row += span_loss
            slope += span_slope

    if SPLIT:
        at = rows + tl.program_id(1) * 3 * N
        _store_rows(part_sums, at, N, inside, (others, of_row, slope))
    else:
        target_weight = _target_weight(class_weight, t, live, V, T)
        top_weight = _target_weight(class_weight, top, live, V, T)
        z_term, z_slope = _z_loss(common, target_weight, m + tl.log(sum_exp), T)
        target_logit = tl.load(statistics + (rows + 4 * N), live, other=0.0)
        p = tl.where(sum_exp == 0, 0.0, tl.exp(target_logit - m) * inverse)
        total, shift, at_top, at_target = _class_term(
            (others, of_row, slope), top, t, p, sum_exp, top_weight, target_weight, values, z_slope, TERM, EXPONENT, T
        )  # fmt: skip
        ignored = live == 0
        tl.store(loss + rows, tl.where(ignored, 0.0, total + z_term), inside)
        columns = (shift, at_top, at_target, tl.zeros_like(shift))
        _store_live(coefficients, rows, N, inside, ignored, columns, (0.0, 0.0, 0.0, 0.0))


@triton.jit(do_not_specialize=_VARYING)
def pair_terms_pass(
    where,
    target,
    class_weight,
    param_values,
    param_strides,
    statistics,
    second,
    second_statistics,
    plain_statistics,
    more_statistics,
    loss,
    coefficients,
    part_sums,
    N: tl.int64,
    V: tl.int32,
    common,
    TERM: tl.constexpr,
    CURVATURE: tl.constexpr,
    OF_LOGITS: tl.constexpr,
    PARAMS: tl.constexpr,
    PICKS: tl.constexpr,
    SOURCE: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    APART: tl.constexpr,
):
    """Losses, coefficients and the last statistics, of logits in hand. SPLIT and MERGE as in the statistics pass.

    The statistics of the second row begin with max and sum of exp. Those without the temperature are of the rows that
    have a cross-entropy beside the term; None where there is no temperature.
    """
    T: tl.constexpr = tl.float64 if where[0].dtype.element_ty == tl.float64 else tl.float32
    rows, inside = _rows(tl.program_id(0), N, ROWS)
    t, live = _targets(target, rows, inside, V)
    both = _both_rows(statistics, second_statistics, rows, live, N, OF_LOGITS)
    values = _params(param_values, param_strides, rows, inside, PARAMS)
    end = tl.where(_any(live), V, 0)

    of_row = tl.zeros((ROWS, 1), tl.float64)
    slope, difference = of_row, of_row
    if MERGE:
        for span in range(0, tl.cdiv(V, SPAN * BLOCK)):
            x, y, z = _load_three(part_sums, rows + span * 3 * N, N, inside, 0.0)
            of_row, slope, difference = of_row + x, slope + y, difference + z
    else:
        first = tl.program_id(1) * (SPAN * BLOCK) if SPLIT else 0
        last = tl.minimum(first + SPAN * BLOCK, end) if SPLIT else end
        for begin in range(first, last, SPAN * BLOCK):
            x, y, z = _pair_sums(
                where, second, rows, live, begin, tl.minimum(begin + SPAN * BLOCK, end), V, t, both, class_weight,
                values, TERM, OF_LOGITS, BLOCK, APART, T,
            )  # fmt: skip
            of_row, slope, difference = of_row + x, slope + y, difference + z

    if SPLIT:
        _store_rows(part_sums, rows + tl.program_id(1) * 3 * N, N, inside, (of_row, slope, difference))
    else:
        m, sum_exp, second_m, second_sum, _ = both
        q, ce, target_logit = _load_three(statistics + 2 * N, rows, N, live, 0.0)
        there = live & (t >= 0)
        weight = _target_weight(class_weight, t, live, V, T)
        of_target = _logit(second, rows, t, there, None, T)
        p, _, at_target, _ = _pair_term(target_logit, of_target, there, weight, both, values, TERM, OF_LOGITS)
        p = tl.where(sum_exp == 0, 0.0, p)
        main = _common(common, 0, T)
        z_term, z_slope = _z_loss(common, 1.0, m + tl.log(sum_exp), T)
        # A rounded log-sum-exp makes all p too large by the same factor, 1 + the sum of p - y; what that adds to the
        # loss is taken off to the second order, whose coefficient is that of close rows.
        more = difference * (slope - 0.5 * CURVATURE(values) * difference)
        of_row = tl.where(of_row < float("inf"), of_row - more, of_row)
        shift = main * slope.to(T) - z_slope
        of_row = main * of_row.to(T) + z_term
        at_target = main * at_target - p * shift
        plain, plain_sum = tl.zeros_like(m), sum_exp
        if OF_LOGITS:
            hard = values[PARAMS - 1]
            if plain_statistics is None:  # both are factors of the same exponentials
                factor = 1.0
                shift -= hard
            else:
                factor = _common(common, 3, T)
                plain_m = tl.load(plain_statistics + rows, live, other=0.0)
                plain_sum = tl.load(plain_statistics + (rows + N), live, other=1.0)
                plain_sum = tl.where(hard != 0, plain_sum * exp(plain_m - m / factor), sum_exp)
                q, ce, _ = _load_three(plain_statistics + 2 * N, rows, N, live, 0.0)
                plain = hard / (factor * plain_sum)
            of_row += tl.where(hard != 0, hard * ce, 0.0)
            at_target -= hard / factor * q
        ignored = live == 0
        tl.store(loss + rows, tl.where(ignored, 0.0, of_row), inside)
        _store_rows(more_statistics, rows, N, inside, (second_m, second_sum, plain_sum))
        _store_live(coefficients, rows, N, inside, ignored, (shift, plain, at_target), (0.0, 0.0, 0.0))
        for k in tl.static_range(PICKS):
            tl.store(coefficients + (rows + (_COEFFICIENTS + k) * N), tl.zeros_like(shift), inside)


@triton.jit(do_not_specialize=_VARYING)
def pair_gradient_pass(
    where,
    second,
    target,
    class_weight,
    param_values,
    param_strides,
    statistics,
    second_statistics,
    coefficients,
    grad_output,
    grad_output_stride: tl.int64,
    grad,
    grad_stride: tl.int64,
    N: tl.int64,
    V: tl.int32,
    common,
    TERM: tl.constexpr,
    OF_LOGITS: tl.constexpr,
    PARAMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (row blocks times column blocks). `grad` may be the logits themselves."""
    T: tl.constexpr = tl.float64 if where[0].dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(V, BLOCK)
    rows, inside = _rows(tl.program_id(0) // blocks, N, ROWS)
    begin = (tl.program_id(0) % blocks) * BLOCK
    t, live = _targets(target, rows, inside, V)
    both = _both_rows(statistics, second_statistics, rows, live, N, OF_LOGITS)
    of_rows = _row_coefficients(statistics, coefficients, grad_output, grad_output_stride, rows, live, N, T)
    m, _, upstream, shift, plain, at_target = of_rows
    values = _params(param_values, param_strides, rows, inside, PARAMS)
    columns, exists, z = _block(where, rows, live, begin, V, t, None, BLOCK, T)
    _, _, other = _block(second, rows, live, begin, V, t, None, BLOCK, T)
    weight = _class_weights(class_weight, columns, exists, T)
    p, _, h, _ = _pair_term(z, other, live & exists, weight, both, values, TERM, OF_LOGITS)
    gradient = (_common(common, 0, T) * h - p * shift) * upstream
    if _any(plain != 0):
        gradient += plain * exp((z - m) / _common(common, 3, T))
    if _in_block(t, begin, BLOCK):
        gradient = tl.where(columns == t, at_target, gradient)
    gradient = tl.where(live, gradient, 0.0)
    tl.store(grad + (rows * grad_stride + columns), convert(gradient, grad.dtype.element_ty), inside & exists)


@triton.jit(do_not_specialize=_VARYING)
def gradient_pass(
    where,
    target,
    class_weight,
    statistics,
    index,
    coefficients,
    grad_output,
    grad_output_stride: tl.int64,
    param_values,
    param_strides,
    grad,
    grad_stride: tl.int64,
    N: tl.int64,
    V: tl.int32,
    TERM: tl.constexpr,
    EXPONENT: tl.constexpr,
    PARAMS: tl.constexpr,
    SOURCE: tl.constexpr,
    PICKS: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (row blocks times column blocks). `grad` may be the logits themselves."""
    T: tl.constexpr = tl.float64 if where[0].dtype.element_ty == tl.float64 else tl.float32
    if SOURCE is None:
        blocks = tl.cdiv(V, BLOCK)
        block, column_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    else:
        # The programs that run side by side have their columns in common, whose weights are read once for all of them.
        blocks = tl.cdiv(N, ROWS).to(tl.int32)
        block, column_block = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    rows, inside = _rows(block, N, ROWS)
    t, live = _targets(target, rows, inside, V)
    of_rows = _row_coefficients(statistics, coefficients, grad_output, grad_output_stride, rows, live, N, T)
    values = _params(param_values, param_strides, rows, inside, PARAMS)
    _write_gradient(
        grad, grad_stride, of_rows, where, rows, inside, live, column_block * BLOCK, N, V, t, class_weight, index,
        coefficients, values, TERM, EXPONENT, SOURCE, PICKS, MOMENTS, BLOCK, T,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def top_rest_pass(
    where,
    target,
    statistics,
    index,
    top_rest,
    N: tl.int64,
    V: tl.int32,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 - p of each row's top class. Only a p > 0.5 of a class that is not the target needs a look at the others."""
    T: tl.constexpr = tl.float64 if where[0].dtype.element_ty == tl.float64 else tl.float32
    rows, inside = _rows(tl.program_id(0), N, ROWS)
    t, live = _targets(target, rows, inside, V)
    top = tl.load(index + rows, live, other=-1)
    m = tl.load(statistics + rows, live, other=0.0)
    sum_exp = tl.load(statistics + (rows + N), live, other=1.0)
    rest = 1.0 - tl.exp(_logit(where, rows, top, live & (top >= 0), None, T) - m) / sum_exp
    rest = tl.where(top == t, tl.load(statistics + (rows + 2 * N), live, other=0.0), rest)
    wrong = live & (top != t) & (rest < 0.5)
    others = tl.zeros((ROWS, 1), tl.float64)
    for begin in range(0, tl.where(_any(wrong), V, 0), BLOCK):
        columns, _, z = _block(where, rows, wrong, begin, V, t, None, BLOCK, T)
        others += tl.sum(tl.where(columns == top, 0.0, tl.exp(z - m)), 1, keep_dims=True).to(tl.float64)
    tl.store(top_rest + rows, tl.where(wrong, others.to(T) / sum_exp, rest), inside)


@triton.jit(do_not_specialize=_VARYING)
def class_sums_pass(
    where,
    target,
    row_weight,
    row_weight_stride: tl.int64,
    statistics,
    index,
    top_rest,
    param_values,
    param_strides,
    sums,
    N: tl.int64,
    V: tl.int32,
    group_rows,
    OVERLAP: tl.constexpr,
    EXPONENT: tl.constexpr,
    PARAMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (column blocks, groups of rows): `sums` (groups, 2, V), error and agreement over the rows of each group."""
    T: tl.constexpr = tl.float64 if where[0].dtype.element_ty == tl.float64 else tl.float32
    begin = tl.program_id(0) * BLOCK
    group = tl.program_id(1).to(tl.int64)
    error = tl.zeros((1, BLOCK), tl.float64)
    agreement = tl.zeros((1, BLOCK), tl.float64)
    for first in range(0, group_rows, ROWS):
        rows = group * group_rows + first + tl.arange(0, ROWS)[:, None]
        inside = rows < N
        t, live = _targets(target, rows, inside, V)
        m = tl.load(statistics + rows, live, other=0.0)
        inverse = 1.0 / tl.load(statistics + (rows + N), live, other=1.0)
        weight = _upstream(row_weight, row_weight_stride, rows, live, T)
        top = tl.load(index + rows, live, other=-1)
        top_q = tl.load(top_rest + rows, live, other=1.0)
        values = _params(param_values, param_strides, rows, inside, PARAMS)

        columns, exists, z = _block(where, rows, live, begin, V, t, None, BLOCK, T)
        is_target, is_top = columns == t, columns == top
        p = tl.where(is_target | is_top, 0.0, tl.exp(z - m) * inverse)
        weights, steep = _powers(p, _exponent(p, values, EXPONENT))
        e, _, _, _ = OVERLAP(p, 1.0 - p, weights, steep, 1.0, values, False)
        # The top class, whose 1 - p is known, and the target.
        top_power = power(top_q, _exponent(top_q, values, EXPONENT))
        top_e, _, _, _ = OVERLAP(1.0 - top_q, top_q, top_power, top_power, top_q, values, False)
        target_p = tl.exp(_logit(where, rows, t, live & (t >= 0) & (t < V), None, T) - m) * inverse
        target_p = tl.where(t == top, 1.0 - top_q, target_p)
        target_q = tl.where(t == top, top_q, 1.0 - target_p)
        target_e, target_c, _, _ = OVERLAP(target_p, target_q, target_q, target_q, target_q, values, True)
        e = tl.where(is_target, target_e, tl.where(is_top, top_e, e))
        c = tl.where(is_target, target_c, 0.0)
        counted = live & exists
        error += tl.sum(tl.where(counted, weight * e, 0.0), 0, keep_dims=True).to(tl.float64)
        agreement += tl.sum(tl.where(counted, weight * c, 0.0), 0, keep_dims=True).to(tl.float64)
    columns = begin + tl.arange(0, BLOCK)[None, :]
    to = sums + (group * 2 * V + columns)
    tl.store(to, error, columns < V)
    tl.store(to + V, agreement, columns < V)
