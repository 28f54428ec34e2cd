"""Losses that are sums over all classes of a row: what a block of classes adds, the sums of a span, and the pass.

The target and the top class, the only one that may have p > 0.5, are left out of the sums and come last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import class_weights_of, target_weight_of, z_loss_of
from .device import exp, number
from .epilogues import power
from .logits import compute_type, in_block, lane_of, lanes, logit_block
from .parts import columns_of_program, merge_sums
from .rows import VARYING, any_of, load_params, load_softmax, row_sum, rows_of, store_live, store_rows


@triton.jit
def exponent_of(p, params, EXPONENT: tl.constexpr):
    if EXPONENT is None:
        return tl.zeros_like(p)
    else:
        return params[EXPONENT]


@triton.jit
def _series(p, x):
    """(1 - p)^x of small p; what it leaves out is less than half an ulp."""
    second = x * (x - 1.0) / 2.0
    third = second * (2.0 - x) / 3.0
    fourth = third * (3.0 - x) / 4.0
    return 1.0 + p * (p * (second + p * (third + p * fourth)) - x)


@triton.jit
def powers(p, alpha):
    """(1 - p)^alpha and (1 - p)^(alpha - 1), of small p as series: all there is to do in almost every block.

    Which of the two it is is up to each p alone, whatever stands beside it.
    """
    most = (2.0**-12 if p.dtype == tl.float64 else 2.0**-6) / (1.0 + alpha)
    weight = _series(p, alpha)
    steep = _series(p, alpha - 1.0)
    if any_of(tl.max(number(p), 1, keep_dims=True) > most):
        q = 1.0 - p
        exact = tl.exp(alpha * tl.log(q))
        weight = tl.where(p > most, exact, weight)
        steep = tl.where(p > most, exact / q, steep)
    return weight, steep


@triton.jit
def other_logits(z, columns, begin, target, top, BLOCK: tl.constexpr):
    """The logits of a block without the target and the top class, which have p = 0 then."""
    if in_block(target, begin, BLOCK) | in_block(top, begin, BLOCK):
        z = tl.where((columns == target) | (columns == top), -float("inf"), z)
    return z


@triton.jit
def negative_terms(p, class_weight, params, TERM: tl.constexpr, EXPONENT: tl.constexpr):
    """Loss and slope of the classes of a block as such that are not the target."""
    weight, steep = powers(p, exponent_of(p, params, EXPONENT))
    return TERM(p, 1.0 - p, weight, steep, 1.0, class_weight, params, False)


@triton.jit
def _term_sums(
    where, rows, live, begin, end, V, target, top, m, inverse, class_weight, params,
    TERM: tl.constexpr, EXPONENT: tl.constexpr, SOURCE: tl.constexpr,
    BLOCK: tl.constexpr, APART: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Of a span, the columns from `begin` to `end`, without the target and the top class: sums of exp(z - m), loss and
    p g. Lanes as in `parts.scan`."""
    LANE: tl.constexpr = lane_of(where[0].dtype, SOURCE, BLOCK)
    LANES: tl.constexpr = BLOCK // LANE
    ROWS: tl.constexpr = rows.shape[0]
    zero = tl.zeros((ROWS, LANES), T)
    others, loss, slope = zero, zero, zero
    tl.assume(begin >= 0)
    for start in range(begin, end, BLOCK):
        columns, exists, z = logit_block(where, rows, live, start, V, target, SOURCE, BLOCK, T)
        e = exp(other_logits(z, columns, start, target, top, BLOCK) - m)
        p = e * inverse
        f, g = negative_terms(p, class_weights_of(class_weight, columns, exists, T), params, TERM, EXPONENT)
        others += tl.sum(lanes(e, LANE, APART), 1)
        loss += tl.sum(lanes(f, LANE, APART), 1)
        slope += tl.sum(lanes(p * g, LANE, APART), 1)
    return row_sum(others), row_sum(loss), row_sum(slope)


@triton.jit
def _class_term(
    sums, top, target, p, sum_exp, top_weight, target_weight, params, z_slope,
    TERM: tl.constexpr, EXPONENT: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The rows' losses; shift, gradient at the top class, gradient at the target. dL/dz_j = p_j (g_j - shift)."""
    others, loss, slope = sums
    inverse = 1.0 / sum_exp
    # 1 - p of the top class, the only one that may have p > 0.5, comes from the others' sum.
    is_top = target == top
    top_q = tl.where(is_top, others, others + (p * sum_exp).to(tl.float64)).to(T) * inverse
    top_p = 1.0 - top_q
    positive_q = tl.where(is_top, top_q, 1.0 - p)
    f, h = TERM(tl.where(is_top, top_p, p), positive_q, positive_q, positive_q, positive_q, target_weight, params, True)
    weight = power(top_q, exponent_of(top_q, params, EXPONENT))
    top_f, top_h = TERM(top_p, top_q, weight, weight, top_q, top_weight, params, False)
    target_g = h / positive_q
    loss += tl.where(is_top, f, f + top_f).to(tl.float64)
    slope += tl.where(is_top, 0.0, p * target_g).to(tl.float64)
    top_h = tl.where(is_top, h, top_h)
    # dL/dz_top = p (h - slope); for the others p_j (g_j - slope - p h / q), q the top's 1 - p. Where q underflows, so
    # do they.
    shift = slope.to(T) + tl.where(top_q > 0, top_p * top_h / top_q, 0.0) - z_slope
    top_gradient = top_p * (top_h - slope.to(T) + z_slope)
    return loss.to(T), shift, top_gradient, tl.where(is_top, top_gradient, p * (target_g - shift))


@triton.jit(do_not_specialize=VARYING)
def class_terms_pass(
    where, target, class_weight, param_values, param_strides, statistics, index,
    loss, coefficients, part_sums, N: tl.int64, V: tl.int32, common,
    TERM: tl.constexpr, EXPONENT: tl.constexpr, PARAMS: tl.constexpr, SOURCE: tl.constexpr,
    SPLIT: tl.constexpr, MERGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Losses and coefficients, from statistics with the top class. SPLIT and MERGE as in the statistics pass."""
    T: tl.constexpr = compute_type(where[0].dtype)
    rows, inside, live, t = rows_of(tl.program_id(0), target, N, V, ROWS)
    top = tl.load(index + rows, live, other=-1).to(tl.int32)
    m, sum_exp = load_softmax(statistics, rows, N, live)
    inverse = 1.0 / sum_exp
    values = load_params(param_values, param_strides, rows, inside, PARAMS)
    end = tl.where(any_of(live), V, 0)

    if MERGE:
        sums = merge_sums(part_sums, rows, N, inside, tl.cdiv(V, SPAN * BLOCK))
    else:
        zero = tl.zeros((ROWS, 1), tl.float64)
        sums = zero, zero, zero
        first, last = columns_of_program(end, SPLIT, SPAN * BLOCK)
        for begin in range(first, last, SPAN * BLOCK):
            of_span = _term_sums(
                where, rows, live, begin, tl.minimum(begin + SPAN * BLOCK, end), V, t, top, m, inverse, class_weight,
                values, TERM, EXPONENT, SOURCE, BLOCK, APART, T,
            )  # fmt: skip
            sums = sums[0] + of_span[0], sums[1] + of_span[1], sums[2] + of_span[2]

    if SPLIT:
        store_rows(part_sums, rows + tl.program_id(1) * 3 * N, N, inside, sums)
    else:
        target_weight = target_weight_of(class_weight, t, live, V, T)
        top_weight = target_weight_of(class_weight, top, live, V, T)
        z_term, z_slope = z_loss_of(common, target_weight, m + tl.log(sum_exp), T)
        target_logit = tl.load(statistics + (rows + 4 * N), live, other=0.0)
        p = tl.where(sum_exp == 0, 0.0, tl.exp(target_logit - m) * inverse)
        total, shift, at_top, at_target = _class_term(
            sums, top, t, p, sum_exp, top_weight, target_weight, values, z_slope, TERM, EXPONENT, T
        )  # fmt: skip
        ignored = live == 0
        tl.store(loss + rows, tl.where(ignored, 0.0, total + z_term), inside)
        columns = (shift, at_top, at_target, tl.zeros_like(shift))
        store_live(coefficients, rows, N, inside, ignored, columns, (0.0, 0.0, 0.0, 0.0))
