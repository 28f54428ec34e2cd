"""What a device has and Triton's interpreter lacks: a library of functions, rounding to bfloat16 and products of it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret

if not INTERPRETED:
    from triton.language.extra.libdevice import expm1, fast_dividef, log1p, pow, tanh
    from triton.language.target_info import is_cuda

    @triton.jit
    def convert(x, dtype: tl.constexpr):
        return x.to(dtype)

    @triton.jit
    def reciprocal(x):
        """To two units in the last place; of a subnormal number it may be infinite."""
        if x.dtype == tl.float32:
            return fast_dividef(1.0, x)
        else:
            return 1.0 / x

    @triton.jit
    def fast_log(x):
        """Of normal float32, with an error of 2^-22 that near 1 is absolute, where there is an instruction for it."""
        if x.dtype == tl.float32 and is_cuda():
            log_2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
            return log_2 * 0.6931471805599453
        else:
            return tl.log(x)

    @triton.jit
    def rounded_product(x, y):
        """Fused with the difference of two products, of which only the other is rounded, it would leave the rounding
        error of a large one for a result."""
        if is_cuda() and x.dtype == tl.float32:
            return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
        elif is_cuda():
            return tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [x, y], tl.float64, True, 1)
        else:
            return x * y

    @triton.jit
    def number(x):
        """A maximum takes a number before a NaN."""
        return x

    @triton.jit
    def multiply(x, y, sum, PRECISION: tl.constexpr):
        """The matrix product, added to `sum`."""
        return tl.dot(x, y, sum, input_precision=PRECISION, out_dtype=sum.dtype)

else:
    import numpy
    from triton.runtime.interpreter import TensorHandle

    def _by_numpy(function: Any) -> Any:
        """Of operands of one shape and type."""

        def call(x: Any, *others: Any) -> Any:
            data = function(*(operand.handle.data for operand in (x, *others)))
            return tl.tensor(TensorHandle(data, x.dtype), x.type)

        return call

    expm1, log1p, pow, tanh = map(_by_numpy, (numpy.expm1, numpy.log1p, numpy.power, numpy.tanh))

    @triton.jit
    def convert(x, dtype: tl.constexpr):
        """Ties to even, where the interpreter would cut the digits off."""
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16 << 16
            return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(dtype)
        else:
            return x.to(dtype)

    @triton.jit
    def reciprocal(x):
        return 1.0 / x

    @triton.jit
    def fast_log(x):
        return tl.log(x)

    @triton.jit
    def rounded_product(x, y):
        return x * y

    @triton.jit
    def number(x):
        return tl.where(x == x, x, -float("inf"))

    @triton.jit
    def multiply(x, y, sum, PRECISION: tl.constexpr):
        """The interpreter would take the bits of 16-bit numbers for their values."""
        return tl.dot(x.to(sum.dtype), y.to(sum.dtype), sum, out_dtype=sum.dtype)


@triton.jit
def exp(x):
    """e^x; of float32 as the two instructions that a device has for it. Never of a product that was rounded before the
    maximum was taken from it: a large common offset would take the digits."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


__all__ = [
    "INTERPRETED",
    "convert",
    "exp",
    "expm1",
    "fast_log",
    "log1p",
    "multiply",
    "number",
    "pow",
    "reciprocal",
    "rounded_product",
    "tanh",
]
