"""The search for the largest logits of rows.

What is found of some columns is six columns (ROWS, 1): the logits of the largest two and of the largest below the
target, then their columns, -1 for none. On equal values the lower column is taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def merge_found(x, y):
    x_top_logit, x_second_logit, x_below_logit, x_top, x_second, x_below = x
    y_top_logit, y_second_logit, y_below_logit, y_top, y_second, y_below = y
    # The largest two of both: y's largest is first, second or neither; y's second can be second only after its largest.
    first = _beats(y_top, y_top_logit, x_top, x_top_logit)
    runner, runner_logit = tl.where(first, x_top, x_second), tl.where(first, x_top_logit, x_second_logit)
    other, other_logit = tl.where(first, y_second, y_top), tl.where(first, y_second_logit, y_top_logit)
    second = _beats(other, other_logit, runner, runner_logit)
    below = _beats(y_below, y_below_logit, x_below, x_below_logit)
    return (
        tl.where(first, y_top_logit, x_top_logit),
        tl.where(second, other_logit, runner_logit),
        tl.where(below, y_below_logit, x_below_logit),
        tl.where(first, y_top, x_top),
        tl.where(second, other, runner),
        tl.where(below, y_below, x_below),
    )


@triton.jit
def _beats(column, logit, than, than_logit):
    return (column >= 0) & ((than < 0) | (logit > than_logit) | ((logit == than_logit) & (column < than)))


@triton.jit
def _largest(columns, real, z):
    """The largest logit of the columns that are real, and its column."""
    logit = tl.max(tl.where(real, z, -float("inf")), 1, keep_dims=True)
    column = tl.min(tl.where(real & (z == logit), columns, _NO_COLUMN), 1, keep_dims=True)
    return logit, tl.where(column == _NO_COLUMN, -1, column)


@triton.jit
def search(found, columns, real, z, target_logit, TOP_K: tl.constexpr, BELOW: tl.constexpr):
    """What is found of a block (ROWS, K) and before."""
    top_logit, second_logit, below_logit, top, second, below = found
    z = tl.where(z == z, z, -float("inf"))
    if TOP_K > 0:
        top_logit, top = _largest(columns, real, z)
    if TOP_K > 1:
        second_logit, second = _largest(columns, real & (columns != top), z)
    if BELOW:
        below_logit, below = _largest(columns, real & (z < target_logit) & (z > -float("inf")), z)
    return merge_found(found, (top_logit, second_logit, below_logit, top, second, below))


@triton.jit
def lane_columns(
    begin, highest, highest_at, below, below_at,
    TOP_K: tl.constexpr, BELOW: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """The columns (ROWS, K) of a span among which its largest logits are, negative for none.

    A lane is LANE columns side by side in each of the blocks. What is known of each is the largest logit and the
    block that has it first, the same of those below the target. The largest two are in the best two lanes.
    """
    first = tl.arange(0, BLOCK // LANE)[None, :] * LANE
    k = tl.arange(0, SPAN * LANE * (4 if TOP_K + BELOW == 3 else TOP_K + BELOW))[None, :]
    which, k = k // (SPAN * LANE), k % (SPAN * LANE)
    lane = tl.full((1, 1), -1, tl.int32)
    if TOP_K > 0:
        _, best = _largest(highest_at + first, highest == highest, highest)
        lane = tl.where(which == 0, best, lane)
    if TOP_K > 1:
        _, next = _largest(highest_at + first, highest_at + first != best, highest)
        lane = tl.where(which == 1, next, lane)
    if BELOW:
        _, under = _largest(below_at + first, below > -float("inf"), below)
        lane = tl.where(which == TOP_K, under, lane)
    return tl.where(lane < 0, -1, begin + k // LANE * BLOCK + lane % BLOCK + k % LANE)
