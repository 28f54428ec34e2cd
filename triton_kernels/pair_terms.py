"""Losses that are sums over the classes of two rows: what a class adds, the sums of a span, and both passes."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import class_weights_of, load_common, target_weight_of, z_loss_of
from .device import convert, exp
from .gradient import row_coefficients
from .logits import compute_type, in_block, lane_of, lanes, logit_at, logit_block
from .parts import columns_of_program, merge_sums
from .rows import (
    COEFFICIENTS,
    VARYING,
    any_of,
    load_params,
    load_rows,
    load_softmax,
    row_sum,
    rows_of,
    store_live,
    store_rows,
)


@triton.jit
def _both_rows(statistics, second_statistics, rows, live, N, OF_LOGITS: tl.constexpr):
    """Of both rows max and sum of exp; the log of the second's sum less that of the first, of targets log sum."""
    m, total = load_softmax(statistics, rows, N, live)
    if OF_LOGITS:
        second_m, second_total = load_softmax(second_statistics, rows, N, live)
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
    where, second, rows, live, begin, end, V, target, both, class_weight, params,
    TERM: tl.constexpr, OF_LOGITS: tl.constexpr, BLOCK: tl.constexpr, APART: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Of a span: sums of loss, p df/dp and p - y. Lanes as in `parts.scan`."""
    LANE: tl.constexpr = lane_of(where[0].dtype, None, BLOCK)
    zero = tl.zeros((rows.shape[0], BLOCK // LANE), T)
    loss, slope, difference = zero, zero, zero
    for start in range(begin, end, BLOCK):
        columns, exists, z = logit_block(where, rows, live, start, V, target, None, BLOCK, T)
        _, _, other = logit_block(second, rows, live, start, V, target, None, BLOCK, T)
        weight = class_weights_of(class_weight, columns, exists, T)
        _, f, h, apart = _pair_term(z, other, live & exists, weight, both, params, TERM, OF_LOGITS)
        loss += tl.sum(lanes(f, LANE, APART), 1)
        slope += tl.sum(lanes(h, LANE, APART), 1)
        difference += tl.sum(lanes(apart, LANE, APART), 1)
    return row_sum(loss), row_sum(slope), row_sum(difference)


@triton.jit(do_not_specialize=VARYING)
def pair_terms_pass(
    where, target, class_weight, param_values, param_strides,
    statistics, second, second_statistics, plain_statistics, more_statistics,
    loss, coefficients, part_sums, N: tl.int64, V: tl.int32, common,
    TERM: tl.constexpr, CURVATURE: tl.constexpr, OF_LOGITS: tl.constexpr, PARAMS: tl.constexpr,
    PICKS: tl.constexpr, SOURCE: tl.constexpr, SPLIT: tl.constexpr, MERGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Losses, coefficients and the last statistics, of logits in hand. SPLIT and MERGE as in the statistics pass.

    The statistics of the second row begin with max and sum of exp. Those without the temperature are of the rows that
    have a cross-entropy beside the term; None where there is no temperature.
    """
    T: tl.constexpr = compute_type(where[0].dtype)
    rows, inside, live, t = rows_of(tl.program_id(0), target, N, V, ROWS)
    both = _both_rows(statistics, second_statistics, rows, live, N, OF_LOGITS)
    values = load_params(param_values, param_strides, rows, inside, PARAMS)
    end = tl.where(any_of(live), V, 0)

    if MERGE:
        of_row, slope, difference = merge_sums(part_sums, rows, N, inside, tl.cdiv(V, SPAN * BLOCK))
    else:
        of_row = tl.zeros((ROWS, 1), tl.float64)
        slope, difference = of_row, of_row
        first, last = columns_of_program(end, SPLIT, SPAN * BLOCK)
        for begin in range(first, last, SPAN * BLOCK):
            x, y, z = _pair_sums(
                where, second, rows, live, begin, tl.minimum(begin + SPAN * BLOCK, end), V, t, both, class_weight,
                values, TERM, OF_LOGITS, BLOCK, APART, T,
            )  # fmt: skip
            of_row, slope, difference = of_row + x, slope + y, difference + z

    if SPLIT:
        store_rows(part_sums, rows + tl.program_id(1) * 3 * N, N, inside, (of_row, slope, difference))
    else:
        m, sum_exp, second_m, second_sum, _ = both
        q, ce, target_logit = load_rows(statistics + 2 * N, rows, N, live, 0.0)
        there = live & (t >= 0)
        weight = target_weight_of(class_weight, t, live, V, T)
        of_target = logit_at(second, rows, t, there, None, T)
        p, _, at_target, _ = _pair_term(target_logit, of_target, there, weight, both, values, TERM, OF_LOGITS)
        p = tl.where(sum_exp == 0, 0.0, p)
        main = load_common(common, 0, T)
        z_term, z_slope = z_loss_of(common, 1.0, m + tl.log(sum_exp), T)
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
                factor = load_common(common, 3, T)
                plain_m, plain_sum = load_softmax(plain_statistics, rows, N, live)
                plain_sum = tl.where(hard != 0, plain_sum * exp(plain_m - m / factor), sum_exp)
                q, ce, _ = load_rows(plain_statistics + 2 * N, rows, N, live, 0.0)
                plain = hard / (factor * plain_sum)
            of_row += tl.where(hard != 0, hard * ce, 0.0)
            at_target -= hard / factor * q
        ignored = live == 0
        tl.store(loss + rows, tl.where(ignored, 0.0, of_row), inside)
        store_rows(more_statistics, rows, N, inside, (second_m, second_sum, plain_sum))
        store_live(coefficients, rows, N, inside, ignored, (shift, plain, at_target), (0.0, 0.0, 0.0))
        for k in tl.static_range(PICKS):
            tl.store(coefficients + (rows + (COEFFICIENTS + k) * N), tl.zeros_like(shift), inside)


@triton.jit(do_not_specialize=VARYING)
def pair_gradient_pass(
    where, second, target, class_weight, param_values, param_strides, statistics, second_statistics, coefficients,
    grad_output, grad_output_stride: tl.int64, grad, grad_stride: tl.int64, N: tl.int64, V: tl.int32, common,
    TERM: tl.constexpr, OF_LOGITS: tl.constexpr, PARAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks times column blocks). `grad` may be the logits themselves."""
    T: tl.constexpr = compute_type(where[0].dtype)
    blocks = tl.cdiv(V, BLOCK)
    begin = (tl.program_id(0) % blocks) * BLOCK
    rows, inside, live, t = rows_of(tl.program_id(0) // blocks, target, N, V, ROWS)
    both = _both_rows(statistics, second_statistics, rows, live, N, OF_LOGITS)
    of_rows = row_coefficients(statistics, coefficients, grad_output, grad_output_stride, rows, live, N, T)
    m, _, upstream, shift, plain, at_target = of_rows
    values = load_params(param_values, param_strides, rows, inside, PARAMS)
    columns, exists, z = logit_block(where, rows, live, begin, V, t, None, BLOCK, T)
    _, _, other = logit_block(second, rows, live, begin, V, t, None, BLOCK, T)
    weight = class_weights_of(class_weight, columns, exists, T)
    p, _, h, _ = _pair_term(z, other, live & exists, weight, both, values, TERM, OF_LOGITS)
    gradient = (load_common(common, 0, T) * h - p * shift) * upstream
    if any_of(plain != 0):
        gradient += plain * exp((z - m) / load_common(common, 3, T))
    if in_block(t, begin, BLOCK):
        gradient = tl.where(columns == t, at_target, gradient)
    gradient = tl.where(live, gradient, 0.0)
    tl.store(grad + (rows * grad_stride + columns), convert(gradient, grad.dtype.element_ty), inside & exists)
