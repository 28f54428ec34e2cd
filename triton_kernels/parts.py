"""The statistics of a part of a row, and how they merge: an online softmax without the target's term.

Of all columns but the target: (max; sum of exp(z - max); sum of w (z - offset); the logits of the largest two and of
the largest below the target; their columns, -1 for none; the sums of moments, if asked for). Sums are in float64. The
target is a part of its own, without a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import moments
from .common import class_weights_of
from .device import exp, number
from .logits import in_block, lane_of, lanes, logit_at, logit_block
from .rows import load_rows, row_sum, store_rows
from .search import lane_columns, merge_found, search


@triton.jit
def nothing(ROWS: tl.constexpr, T: tl.constexpr, MOMENTS: tl.constexpr):
    lowest = tl.full((ROWS, 1), -float("inf"), T)
    zero = tl.zeros((ROWS, 1), tl.float64)
    nowhere = tl.full((ROWS, 1), -1, tl.int32)
    part = (lowest, zero, zero, lowest, lowest, lowest, nowhere, nowhere, nowhere)
    return part + moments.nothing(ROWS, 1, tl.float64, MOMENTS)


@triton.jit
def of_target(part, logit, target, MOMENTS: tl.constexpr):
    """Of the target alone, from nothing."""
    largest = tl.where(logit == logit, logit, -float("inf"))
    part = (largest, part[1], part[2], largest, part[4], part[5], target, part[7], part[8])
    return part + moments.of_one(largest, MOMENTS)


@triton.jit
def finite(maximum):
    return tl.where(maximum == -float("inf"), 0.0, maximum)  # exp(-inf - -inf) would be NaN


@triton.jit
def offset_of(target_logit):
    """What the mean logit is summed from, so that a common offset takes no digits from the sum."""
    return tl.where(tl.abs(target_logit) < float("inf"), target_logit, 0.0)


@triton.jit
def merge(x, y):
    x_max, x_rest, x_mean = x[:3]
    y_max, y_rest, y_mean = y[:3]
    higher = x_max >= y_max
    # The lower sum counts for less. A part without a finite logit has an empty one, or a NaN that must pass through.
    less = tl.exp(tl.where(x_max == y_max, 0.0, -tl.abs(x_max - y_max)).to(tl.float64))
    rest = tl.fma(tl.where(higher, y_rest, x_rest), less, tl.where(higher, x_rest, y_rest))
    part = (tl.maximum(x_max, y_max), rest, x_mean + y_mean) + merge_found(x[3:9], y[3:9])  # noqa: RUF005
    return part + moments.merge(x[9:], x_max, y[9:], y_max)


@triton.jit
def scan(
    where, rows, live, begin, end, V, target, target_logit, class_weight,
    SOURCE: tl.constexpr, TOP_K: tl.constexpr, BELOW: tl.constexpr, MEAN: tl.constexpr, MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, APART: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The statistics of a span, the columns from `begin` to `end`.

    A lane is LANE columns of each block that a thread loads: side by side, or APART where rows begin anywhere. A thread
    keeps a maximum and a sum of its lanes. Nothing is reduced over threads before the span ends.
    """
    LANE: tl.constexpr = lane_of(where[0].dtype, SOURCE, BLOCK)
    LANES: tl.constexpr = BLOCK // LANE
    ROWS: tl.constexpr = rows.shape[0]
    maximum = tl.full((ROWS, LANES), -float("inf"), T)
    rest = tl.zeros((ROWS, LANES), T)
    mean = tl.zeros((ROWS, LANES), T)
    at = tl.zeros((ROWS, LANES), tl.int32) + begin  # the block with the maximum
    below, below_at = maximum, at
    found = nothing(ROWS, T, False)[3:]
    sums = moments.nothing(ROWS, LANES, T, MOMENTS)
    tl.assume(begin >= 0)
    for start in range(begin, end, BLOCK):
        columns, exists, z = logit_block(where, rows, live, start, V, target, SOURCE, BLOCK, T)
        if MEAN:
            of_columns = (z - offset_of(target_logit)) * class_weights_of(class_weight, columns, exists, T)
            if start + BLOCK > V:
                of_columns = tl.where(exists, of_columns, 0.0)
            mean += tl.sum(lanes(of_columns, LANE, APART), 1)
        if in_block(target, start, BLOCK):  # a part of its own
            z = tl.where(columns == target, -float("inf"), z)
        if SOURCE is not None:
            found = search(found, columns, exists & (columns != target), z, target_logit, TOP_K, BELOW)
        z = lanes(z, LANE, APART)
        higher = tl.maximum(maximum, tl.max(number(z), 1))
        if TOP_K > 0:
            at = tl.where(higher > maximum, start, at)
        if BELOW:
            lower = tl.max(tl.where(z < target_logit[:, :, None], z, -float("inf")), 1)
            below_at = tl.where(lower > below, start, below_at)
            below = tl.maximum(lower, below)
        reference = finite(higher)
        e = exp(z - reference[:, None, :])
        rest = rest * exp(maximum - reference) + tl.sum(e, 1)
        if MOMENTS:
            sums = moments.add(moments.rise(sums, maximum, higher), z, e, higher)
        maximum = higher
    highest = tl.max(maximum, 1, keep_dims=True)
    rest *= exp(maximum - finite(highest))
    if SOURCE is None and (TOP_K > 0 or BELOW):
        columns = lane_columns(begin, maximum, at, below, below_at, TOP_K, BELOW, SPAN, BLOCK, LANE)
        real = live & (columns >= 0) & (columns < V) & (columns != target)
        z = logit_at(where, rows, columns, real, SOURCE, T)
        found = search(found, columns, real, z, target_logit, TOP_K, BELOW)
    part = (highest, row_sum(rest), row_sum(mean)) + found  # noqa: RUF005
    if MOMENTS:
        low, ties, excess, square = moments.rise(sums, maximum, highest)
        return part + (row_sum(low), row_sum(ties), row_sum(excess), row_sum(square))  # noqa: RUF005
    else:
        return part


# Parts of spans lie one after the other, each (2 to 4, N): of sums, logits, columns and moments.


@triton.jit
def store(part, to, rows, span, N, inside, MOMENTS: tl.constexpr):
    at = rows + span * 3 * N
    store_rows(to[0], at, N, inside, part[1:3])
    store_rows(to[1], at, N, inside, (part[0], part[4], part[5]))
    store_rows(to[2], at, N, inside, part[6:9])
    if MOMENTS:
        store_rows(to[3], rows + span * moments.COUNT * N, N, inside, part[9:])


@triton.jit
def load(values, rows, span, N, inside, MOMENTS: tl.constexpr):
    at = rows + span * 3 * N
    rest, mean, _ = load_rows(values[0], at, N, inside, 0.0)
    logits = load_rows(values[1], at, N, inside, 0.0)
    part = (logits[0], rest, mean) + logits + load_rows(values[2], at, N, inside, -1)  # noqa: RUF005
    if MOMENTS:
        return part + load_rows(values[3], rows + span * moments.COUNT * N, N, inside, 0.0, moments.COUNT)
    else:
        return part


@triton.jit
def columns_of_program(end, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """The columns that a program reads: a span of SIZE of them where rows are split, or all."""
    first = tl.program_id(1) * SIZE if SPLIT else 0
    return first, tl.minimum(first + SIZE, end) if SPLIT else end


@triton.jit
def merge_sums(part_sums, rows, N, inside, spans):
    """Three sums of rows, from those of their spans."""
    zero = tl.zeros(rows.shape, tl.float64)
    x, y, z = zero, zero, zero
    for span in range(0, spans):
        of_span = load_rows(part_sums, rows + span * 3 * N, N, inside, 0.0)
        x, y, z = x + of_span[0], y + of_span[1], z + of_span[2]
    return x, y, z
