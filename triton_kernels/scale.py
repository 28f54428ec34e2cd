"""A gradient that was made before its upstream gradient was known, times that."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import INTERPRETED, convert

#: Elements of a block, and the most programs that take them in turn: as many as a GPU runs at a time, or more.
BLOCK = 64 if INTERPRETED else 2048
PROGRAMS = 4 if INTERPRETED else 2048


@triton.jit
def scale_pass(gradient, factor, N, BLOCK: tl.constexpr):
    """Only the device knows the factor. Where it is 1, as in most training, the gradient is not looked at."""
    f = tl.load(factor)
    if f != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for begin in range(first, N, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = begin + tl.arange(0, BLOCK)
            g = tl.load(gradient + at, mask=at < N)
            tl.store(gradient + at, convert(g.to(f.dtype) * f, gradient.dtype.element_ty), mask=at < N)


__all__ = ["BLOCK", "PROGRAMS", "scale_pass"]
