"""Sums over the rows: of each class's error and agreement, for losses of these sums. Before them comes 1 - p of each
row's top class, the only one that may have p > 0.5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .class_terms import exponent_of, powers
from .epilogues import power
from .logits import compute_type, logit_at, logit_block
from .rows import VARYING, any_of, load_params, load_softmax, load_upstream, rows_from, rows_of


@triton.jit(do_not_specialize=VARYING)
def top_rest_pass(
    where, target, statistics, index, top_rest, N: tl.int64, V: tl.int32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """1 - p of each row's top class. Only a p > 0.5 of a class that is not the target needs a look at the others."""
    T: tl.constexpr = compute_type(where[0].dtype)
    rows, inside, live, t = rows_of(tl.program_id(0), target, N, V, ROWS)
    top = tl.load(index + rows, live, other=-1)
    m, sum_exp = load_softmax(statistics, rows, N, live)
    rest = 1.0 - tl.exp(logit_at(where, rows, top, live & (top >= 0), None, T) - m) / sum_exp
    rest = tl.where(top == t, tl.load(statistics + (rows + 2 * N), live, other=0.0), rest)
    wrong = live & (top != t) & (rest < 0.5)
    others = tl.zeros((ROWS, 1), tl.float64)
    for begin in range(0, tl.where(any_of(wrong), V, 0), BLOCK):
        columns, _, z = logit_block(where, rows, wrong, begin, V, t, None, BLOCK, T)
        others += tl.sum(tl.where(columns == top, 0.0, tl.exp(z - m)), 1, keep_dims=True).to(tl.float64)
    tl.store(top_rest + rows, tl.where(wrong, others.to(T) / sum_exp, rest), inside)


@triton.jit(do_not_specialize=VARYING)
def class_sums_pass(
    where, target, row_weight, row_weight_stride: tl.int64, statistics, index, top_rest, param_values, param_strides,
    sums, N: tl.int64, V: tl.int32, group_rows,
    OVERLAP: tl.constexpr, EXPONENT: tl.constexpr, PARAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, groups of rows): `sums` (groups, 2, V), error and agreement over the rows of each group."""
    T: tl.constexpr = compute_type(where[0].dtype)
    begin = tl.program_id(0) * BLOCK
    group = tl.program_id(1).to(tl.int64)
    error = tl.zeros((1, BLOCK), tl.float64)
    agreement = tl.zeros((1, BLOCK), tl.float64)
    for first in range(0, group_rows, ROWS):
        rows, inside, live, t = rows_from(group * group_rows + first, target, N, V, ROWS)
        m, sum_exp = load_softmax(statistics, rows, N, live)
        inverse = 1.0 / sum_exp
        weight = load_upstream(row_weight, row_weight_stride, rows, live, T)
        top = tl.load(index + rows, live, other=-1)
        top_q = tl.load(top_rest + rows, live, other=1.0)
        values = load_params(param_values, param_strides, rows, inside, PARAMS)

        columns, exists, z = logit_block(where, rows, live, begin, V, t, None, BLOCK, T)
        is_target, is_top = columns == t, columns == top
        p = tl.where(is_target | is_top, 0.0, tl.exp(z - m) * inverse)
        weights, steep = powers(p, exponent_of(p, values, EXPONENT))
        e, _, _, _ = OVERLAP(p, 1.0 - p, weights, steep, 1.0, values, False)
        # The top class, whose 1 - p is known, and the target.
        top_power = power(top_q, exponent_of(top_q, values, EXPONENT))
        top_e, _, _, _ = OVERLAP(1.0 - top_q, top_q, top_power, top_power, top_q, values, False)
        target_p = tl.exp(logit_at(where, rows, t, live & (t >= 0) & (t < V), None, T) - m) * inverse
        target_p = tl.where(t == top, 1.0 - top_q, target_p)
        target_q = tl.where(t == top, top_q, 1.0 - target_p)
        target_e, target_c, _, _ = OVERLAP(target_p, target_q, target_q, target_q, target_q, values, True)
        e = tl.where(is_target, target_e, tl.where(is_top, top_e, e))
        c = tl.where(is_target, target_c, 0.0)
        counted = live & exists
        error += tl.sum(tl.where(counted, weight * e, 0.0), 0, keep_dims=True).to(tl.float64)
        agreement += tl.sum(tl.where(counted, weight * c, 0.0), 0, keep_dims=True).to(tl.float64)
    columns = begin + tl.arange(0, BLOCK)[None, :]
    to = sums + (group * 2 * V + columns)
    tl.store(to, error, columns < V)
    tl.store(to + V, agreement, columns < V)
