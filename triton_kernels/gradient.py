"""The gradient of a block of logits, for the losses of one row, and the pass that reads them once more to write it."""

from __future__ import annotations

import triton
import triton.language as tl

from .class_terms import negative_terms, other_logits
from .common import class_weights_of
from .device import convert, exp
from .logits import compute_type, in_block, logit_block
from .rows import COEFFICIENTS, VARYING, any_of, load_params, load_rows, load_softmax, load_upstream, rows_of

_FEW_PICKS = tl.constexpr(4)


@triton.jit
def row_coefficients(statistics, coefficients, grad_output, grad_output_stride, rows, live, N, T: tl.constexpr):
    """Max, 1 / sum of exp, upstream gradient and the three coefficients."""
    m, sum_exp = load_softmax(statistics, rows, N, live)
    inverse = 1.0 / sum_exp
    upstream = load_upstream(grad_output, grad_output_stride, rows, live, T)
    one, two, three = load_rows(coefficients, rows, N, live, 0.0)
    return m, inverse, upstream, one, two * upstream, three * upstream


@triton.jit
def _less_pick(gradient, k, columns, begin, index, coefficients, upstream, rows, live, N, BLOCK: tl.constexpr):
    pick = tl.load(index + (rows + k * N), live, other=-1).to(tl.int32)
    if in_block(pick, begin, BLOCK):
        b = tl.load(coefficients + (rows + (COEFFICIENTS + k) * N), live, other=0.0) * upstream
        gradient = tl.where(columns == pick, gradient - b, gradient)
    return gradient


@triton.jit
def write_gradient(
    grad, grad_stride, of_rows, where, rows, inside, live, begin, N, V,
    target, class_weight, index, coefficients, params,
    TERM: tl.constexpr, EXPONENT: tl.constexpr, SOURCE: tl.constexpr,
    PICKS: tl.constexpr, MOMENTS: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Of a block of columns."""
    m, inverse, upstream, one, two, at_target = of_rows
    columns, exists, z = logit_block(where, rows, live, begin, V, target, SOURCE, BLOCK, T)
    if TERM is not None:
        top = tl.load(index + rows, live, other=-1).to(tl.int32)
        others = z
        if SOURCE is not None:
            # Triton 3.6 fails for sm_100 where a product is reduced to one number without a branch in between. Logits
            # in memory need none, and would take twice the registers.
            others = other_logits(z, columns, begin, target, top, BLOCK)
        p = exp(others - m) * inverse
        _, g = negative_terms(p, class_weights_of(class_weight, columns, exists, T), params, TERM, EXPONENT)
        gradient = p * (g - one) * upstream
        if in_block(top, begin, BLOCK):
            gradient = tl.where(columns == top, two, gradient)
    elif MOMENTS:
        by_excess = tl.load(coefficients + (rows + (COEFFICIENTS + PICKS) * N), live, other=0.0)
        by_power = tl.load(coefficients + (rows + (COEFFICIENTS + PICKS + 1) * N), live, other=0.0)
        lag = tl.maximum(z - m, -1.0e30)  # -inf times a probability of 0 would be NaN
        p = exp(lag) * inverse
        gradient = p * upstream * (one + by_excess * lag + by_power * p) - two * class_weights_of(
            class_weight, columns, exists, T
        )
    else:
        gradient = exp(z - m) * (one * inverse * upstream)  # 0 of rows that are ignored
        if class_weight is None:
            gradient -= two
        elif any_of(two != 0):
            gradient -= two * class_weights_of(class_weight, columns, exists, T)
    if in_block(target, begin, BLOCK):
        gradient = tl.where(columns == target, at_target, gradient)
    # Many are a loop: the compiler takes half a second for each that is written out.
    if PICKS > _FEW_PICKS:
        for k in range(0, PICKS if TERM is None else 0):
            gradient = _less_pick(gradient, k, columns, begin, index, coefficients, upstream, rows, live, N, BLOCK)
    else:
        for k in tl.static_range(PICKS if TERM is None else 0):
            gradient = _less_pick(gradient, k, columns, begin, index, coefficients, upstream, rows, live, N, BLOCK)
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


@triton.jit(do_not_specialize=VARYING)
def gradient_pass(
    where, target, class_weight, statistics, index, coefficients, grad_output, grad_output_stride: tl.int64,
    param_values, param_strides, grad, grad_stride: tl.int64, N: tl.int64, V: tl.int32,
    TERM: tl.constexpr, EXPONENT: tl.constexpr, PARAMS: tl.constexpr, SOURCE: tl.constexpr,
    PICKS: tl.constexpr, MOMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks times column blocks). `grad` may be the logits themselves."""
    T: tl.constexpr = compute_type(where[0].dtype)
    if SOURCE is None:
        blocks = tl.cdiv(V, BLOCK)
        block, column_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    else:
        # The programs that run side by side have their columns in common, whose weights are read once for all of them.
        blocks = tl.cdiv(N, ROWS).to(tl.int32)
        block, column_block = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    rows, inside, live, t = rows_of(block, target, N, V, ROWS)
    of_rows = row_coefficients(statistics, coefficients, grad_output, grad_output_stride, rows, live, N, T)
    values = load_params(param_values, param_strides, rows, inside, PARAMS)
    write_gradient(
        grad, grad_stride, of_rows, where, rows, inside, live, column_block * BLOCK, N, V, t, class_weight, index,
        coefficients, values, TERM, EXPONENT, SOURCE, PICKS, MOMENTS, BLOCK, T,
    )  # fmt: skip
