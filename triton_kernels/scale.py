"""Factors of gradients: of one that was made before its upstream gradient was known, and units of float16 rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import INTERPRETED, convert

#: Elements of a block, and the most programs that take them in turn: as many as a GPU runs at a time, or more.
BLOCK = 64 if INTERPRETED else 2048
PROGRAMS = 4 if INTERPRETED else 2048

#: Rows of which the one program looks at the units at a time, and its warps.
UNIT_BLOCK, UNIT_WARPS = (64, 1) if INTERPRETED else (2048, 8)


@triton.jit
def scale_pass(gradient, factor, N, BLOCK: tl.constexpr):
    """Only the device knows the factor. Where it is 1, as in most training, the gradient is not looked at."""
    f = tl.load(factor)
    if f != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for begin in range(first, N, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = begin + tl.arange(0, BLOCK)
            g = tl.load(gradient + at, mask=at < N)
            scaled = tl.where(g == 0, 0.0, g.to(f.dtype) * f)  # of an ignored row, whatever the factor is
            tl.store(gradient + at, convert(scaled, gradient.dtype.element_ty), mask=at < N)


@triton.jit
def _power_of_two(x):
    """Rounded down; infinity of what is not finite."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["upstream_stride", "N"])
def units_pass(
    coefficients, q, upstream, upstream_stride: tl.int64, largest_weight, common, norms, scales, changes, found,
    N: tl.int32, SUMMED: tl.constexpr, OVER_CLASSES: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backend.units_ has the formula; `found` (2 + SUMS, N): units, upstream gradients over them, units over scales."""
    class_weight = 1.0 if largest_weight is None else tl.load(largest_weight)
    main = 1.0 if common is None else tl.load(common)
    largest = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, N, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        inside = rows < N
        bound = tl.abs(tl.load(coefficients + rows, inside, other=0.0))  # of a, the factor of p
        of_weights = tl.abs(tl.load(coefficients + N.to(tl.int64) + rows, inside, other=0.0))  # and u
        if OVER_CLASSES:
            bound += of_weights + 64.0 * main * class_weight
        else:
            bound = bound * tl.load(q + rows, inside, other=0.0) + of_weights * class_weight
        for k in range(2, SUMMED):
            bound += tl.abs(tl.load(coefficients + k * N.to(tl.int64) + rows, inside, other=0.0))
        factor = tl.full((BLOCK,), 1.0, tl.float32)
        if upstream is not None:
            factor = tl.load(upstream + rows * upstream_stride, inside, other=0.0)
        unit = tl.maximum(_power_of_two(bound * tl.abs(factor) * 2.0**-14), 2.0**-78)
        unit = tl.where(unit < float("inf"), unit, 2.0**-14)
        tl.store(found + rows, unit, inside)
        tl.store(found + N.to(tl.int64) + rows, tl.div_rn(factor, unit), inside)
        largest = tl.maximum(largest, tl.where(inside, unit, 0.0))
    tl.debug_barrier()
    peak = tl.max(largest, 0) * 2.0**-14
    for k in tl.static_range(SUMS):
        before = tl.load(scales + k)
        scale = tl.maximum(tl.maximum(_power_of_two(tl.load(norms + k) * peak), 2.0**-114), before)
        tl.debug_barrier()
        tl.store(scales + k, scale)
        tl.store(changes + k, tl.div_rn(before, scale))
        for begin in range(0, N, BLOCK):
            rows = begin + tl.arange(0, BLOCK)
            factor = tl.div_rn(tl.load(found + rows, rows < N), tl.full((BLOCK,), scale, tl.float32))
            tl.store(found + (2 + k) * N.to(tl.int64) + rows, factor, rows < N)


__all__ = ["BLOCK", "PROGRAMS", "UNIT_BLOCK", "UNIT_WARPS", "scale_pass", "units_pass"]
