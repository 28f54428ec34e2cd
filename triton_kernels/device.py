"""What a device has and Triton's interpreter lacks: a library of functions, and rounding to bfloat16."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret

if not INTERPRETED:
    from triton.language.extra.libdevice import expm1, log1p, pow

    @triton.jit
    def convert(x, dtype: tl.constexpr):
        return x.to(dtype)

else:
    import numpy
    from triton.runtime.interpreter import TensorHandle

    def _by_numpy(function: Any) -> Any:
        """Of operands of one shape and type."""

        def call(x: Any, *others: Any) -> Any:
            data = function(*(operand.handle.data for operand in (x, *others)))
            return tl.tensor(TensorHandle(data, x.dtype), x.type)

        return call

    expm1, log1p, pow = (_by_numpy(function) for function in (numpy.expm1, numpy.log1p, numpy.power))

    @triton.jit
    def convert(x, dtype: tl.constexpr):
        """Ties to even, where the interpreter would cut the digits off."""
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16 << 16
            return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(dtype)
        else:
            return x.to(dtype)


__all__ = ["INTERPRETED", "convert", "expm1", "log1p", "pow"]
