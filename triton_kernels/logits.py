"""Logits, of single columns and of blocks. They come out of memory, or are products of hidden states and a weight that
are made on the chip and never stored: nothing but `logit_at` and `logit_block` needs to tell the two apart.

`where` they are: (logits, row stride) with SOURCE None, or with SOURCE a launch.Product (hidden states, its strides,
weight, its strides, depth D); then what every loss has, if the logits have a factor, and the bias, if there is one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import multiply, rounded_product, tanh
from .rows import any_of


@triton.constexpr_function
def compute_type(pointer):
    return tl.float64 if pointer.element_ty == tl.float64 else tl.float32


@triton.constexpr_function
def lane_of(pointer, SOURCE, BLOCK):
    """The columns of a lane: those of a block that a thread loads at once, or a block of products."""
    return 128 // pointer.element_ty.primitive_bitwidth if SOURCE is None else BLOCK


@triton.jit
def logit_at(where, rows, column, real, SOURCE: tl.constexpr, T: tl.constexpr):
    """Logits (ROWS, K) of some columns (ROWS, K) of each row, -inf where there is none."""
    if SOURCE is None:
        z = tl.load(where[0] + rows * where[1] + column, real, other=-float("inf")).to(T)
        return rounded_product(z, tl.load(where[2] + 3)) if len(where) > 2 else z
    else:
        z = tl.zeros(column.shape, T)
        hidden, row_stride, hidden_stride, weight, class_stride, weight_stride, depth = where[:7]
        for begin in range(0, depth, 16):
            d = begin + tl.arange(0, 16)[None, None, :]
            there = real[:, :, None] & (d < depth)
            x = tl.load(hidden + (rows * row_stride)[:, :, None] + _steps(d, hidden_stride), there, other=0.0).to(T)
            of_columns = weight + (column.to(tl.int64) * class_stride)[:, :, None]
            w = tl.load(of_columns + _steps(d, weight_stride), there, other=0.0).to(T)
            z += tl.sum(x * w, 2)
        return tl.where(real, _after_product(z, where, column, real, SOURCE, T), -float("inf"))


@triton.jit
def logit_block(where, rows, live, begin, V, target, SOURCE: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """Columns (1, BLOCK), which of them exist, and their logits (ROWS, BLOCK); -inf where there is none."""
    tl.assume(begin >= 0)  # saves 64-bit arithmetic
    columns = begin + tl.arange(0, BLOCK)[None, :]
    exists = columns < V
    if SOURCE is None:
        z = tl.load(where[0] + rows * where[1] + columns, live & exists, other=-float("inf")).to(T)
        if len(where) > 2:
            z = rounded_product(z, tl.load(where[2] + 3))
        return columns, exists, z
    else:
        z = tl.zeros((rows.shape[0], BLOCK), T)
        hidden, row_stride, hidden_stride, weight, class_stride, weight_stride, depth = where[:7]
        hidden += rows * row_stride
        weight += columns.to(tl.int64) * class_stride
        precision: tl.constexpr = SOURCE.precision  # Triton 3.6 passes on no string that is an attribute
        for first in range(0, depth, SOURCE.depth):
            d = first + tl.arange(0, SOURCE.depth)
            x = tl.load(hidden + _steps(d[None, :], hidden_stride), live & (d[None, :] < depth), other=0.0)
            w = tl.load(weight + _steps(d[:, None], weight_stride), exists & (d[:, None] < depth), other=0.0)
            z = multiply(x, w, z, precision)
        z = _after_product(z, where, columns, exists, SOURCE, T)
        if SOURCE.masks_target:
            z = tl.where(columns == target, -float("inf"), z)
        return columns, exists, tl.where(live & exists, z, -float("inf"))


@triton.jit
def _steps(d, stride):
    """Return offsets along the depth in 64 bits: of a matrix stored by columns they may exceed 2^31."""
    return d.to(tl.int64) * stride


@triton.jit
def _after_product(z, where, columns, exists, SOURCE: tl.constexpr, T: tl.constexpr):
    if len(where) > 7 + SOURCE.tempered:
        z += tl.load(where[7 + SOURCE.tempered] + columns, exists, other=0.0).to(T)
    if SOURCE.softcap > 0:
        z = SOURCE.softcap * tanh(z / SOURCE.softcap)
    if SOURCE.tempered:
        z = rounded_product(z, tl.load(where[7] + 3))
    return z


@triton.jit
def in_block(column, begin, BLOCK: tl.constexpr):
    """Whether a column of any row is in the block that begins there."""
    return any_of((column >= begin) & (column < begin + BLOCK))


@triton.jit
def lanes(x, LANE: tl.constexpr, APART: tl.constexpr):
    """A block (ROWS, BLOCK) as (ROWS, LANE, LANES), of which a thread has all that is of a lane."""
    if APART:
        return tl.reshape(x, (x.shape[0], LANE, x.shape[1] // LANE))
    else:
        return tl.permute(tl.reshape(x, (x.shape[0], x.shape[1] // LANE, LANE)), (0, 2, 1))
