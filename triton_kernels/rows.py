"""What a program knows of its rows: which they are, what it loads of them, and what it stores.

A program looks at ROWS rows; what is of a row is a column (ROWS, 1). What is kept of rows lies one below the other, N
apart, in the order that fusedloss.engine.operators says.
"""

from __future__ import annotations

import triton
import triton.language as tl

STATISTICS = tl.constexpr(6)
COEFFICIENTS = tl.constexpr(3)
_IGNORED = tl.constexpr(-100)

# What varies from batch to batch and moves no data by 16 bytes: kernels are not compiled anew for its values.
VARYING = ["N", "group_rows", "grad_output_stride", "row_weight_stride", "param_strides"]


@triton.jit
def rows_of(block, target, N, V, ROWS: tl.constexpr):
    """Rows, which of them are in the batch, which of these are not ignored, and their targets, -1 for none."""
    return rows_from(block.to(tl.int64) * ROWS, target, N, V, ROWS)


@triton.jit
def rows_from(first, target, N, V, ROWS: tl.constexpr):
    rows = first + tl.arange(0, ROWS)[:, None]
    inside = rows < N
    t = tl.load(target + rows, inside, other=-1)
    live = inside & (t != _IGNORED)
    return rows, inside, live, tl.where(live & (t >= 0) & (t < V), t, -1).to(tl.int32)


@triton.jit
def any_of(condition):
    return tl.max(tl.max(condition.to(tl.int32), 1), 0) > 0


@triton.jit
def row_sum(x):
    return tl.sum(x, 1, keep_dims=True).to(tl.float64)


@triton.jit
def load_params(values, strides, rows, inside, COUNT: tl.constexpr):
    """The parameters as columns."""
    columns = ()
    for k in tl.static_range(COUNT):
        columns = columns + (tl.load(values[k] + rows * strides[k], inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return columns


@triton.jit
def load_upstream(grad_output, stride, rows, live, T: tl.constexpr):
    if grad_output is None:
        return tl.full((1, 1), 1.0, T)
    else:
        return tl.load(grad_output + rows * stride, live, other=0.0)


@triton.jit
def load_rows(values, rows, N, real, OTHER: tl.constexpr, COUNT: tl.constexpr = 3):
    columns = ()
    for k in tl.static_range(COUNT):
        columns = columns + (tl.load(values + (rows + k * N), real, other=OTHER),)  # type: ignore[assignment]  # noqa: RUF005
    return columns


@triton.jit
def load_softmax(statistics, rows, N, live):
    """Max and sum of exp."""
    return tl.load(statistics + rows, live, other=0.0), tl.load(statistics + (rows + N), live, other=1.0)


@triton.jit
def store_rows(to, rows, N, inside, values):
    for k in tl.static_range(len(values)):
        tl.store(to + (rows + k * N), values[k], inside)


@triton.jit
def store_live(to, rows, N, inside, ignored, values, neutral):
    """Ignored rows get the neutral values."""
    for k in tl.static_range(len(values)):
        tl.store(to + (rows + k * N), tl.where(ignored, neutral[k], values[k]), inside)
