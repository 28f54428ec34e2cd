"""The statistics pass. It reads the logits once, and runs the loss's epilogue on the statistics of whole rows. It can
go on to write the gradient, while the rows are still in the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import moments, parts
from .common import load_common, target_weight_of, z_loss_of
from .device import log1p
from .gradient import row_coefficients, write_gradient
from .logits import compute_type, logit_at
from .rows import COEFFICIENTS, STATISTICS, VARYING, any_of, load_params, rows_of, store_live


@triton.jit
def _picks(
    part, where, rows, live, V, candidates,
    SOURCE: tl.constexpr, TOP_K: tl.constexpr, BELOW: tl.constexpr, PICKS: tl.constexpr, PICK_BLOCK: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Index and logit of each pick, (ROWS, PICK_BLOCK), -1 for none, and whether all of a row's are in range."""
    k = tl.arange(0, PICK_BLOCK)[None, :]
    index = tl.where(live & (k < 0), 0, -1).to(tl.int64)
    logit = tl.where(live & (k < 0), tl.full((1, 1), 0.0, T), -float("inf"))
    if TOP_K > 0:
        index = tl.where(live & (k == 0), part[6], index)
        logit = tl.where(k == 0, part[3], logit)
    if TOP_K > 1:
        index = tl.where(live & (k == 1), part[7], index)
        logit = tl.where(k == 1, part[4], logit)
    if BELOW:
        index = tl.where(live & (k == TOP_K), part[8], index)
        logit = tl.where(k == TOP_K, part[5], logit)
    if candidates is not None:
        first: tl.constexpr = TOP_K + BELOW
        given = live & (k >= first) & (k < PICKS)
        index = tl.where(given, tl.load(candidates + rows * (PICKS - first) + (k - first), given, other=-1), index)
        outside = given & ((index < 0) | (index >= V))
        logit = tl.where(given, logit_at(where, rows, index, given & (outside == 0), SOURCE, T), logit)
        return index, logit, tl.max(outside.to(tl.int32), 1, keep_dims=True) == 0
    else:
        return index, logit, live


@triton.jit
def _finish(
    part, rows, inside, live, target, target_logit, where,
    class_weight, weight_sum, candidates, param_values, param_strides,
    loss, statistics, index, coefficients, N, V, common,
    EPILOGUE: tl.constexpr, PARAMS: tl.constexpr, SOURCE: tl.constexpr,
    TOP_K: tl.constexpr, BELOW: tl.constexpr, MEAN: tl.constexpr, MOMENTS: tl.constexpr,
    PICKS: tl.constexpr, PICK_BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """From the statistics of whole rows to what the pass gives."""
    pick_index, pick_logit, in_range = _picks(
        part, where, rows, live, V, candidates, SOURCE, TOP_K, BELOW, PICKS, PICK_BLOCK, T
    )
    target_logit = tl.where(in_range, target_logit, float("nan"))

    m = parts.finite(part[0])
    rest = part[1].to(T)
    mine = tl.exp(target_logit - m)
    sum_exp = rest + mine
    log_sum = tl.log(sum_exp)
    hopeless = sum_exp == 0  # no finite logit at all
    q = tl.where(hopeless, 1.0, rest / sum_exp)
    p = tl.where(hopeless, 0.0, mine / sum_exp)
    ce = tl.where(rest < mine, log1p(rest / mine), (m - target_logit) + log_sum)
    ce = tl.where(hopeless, float("inf"), ce)
    classes = V.to(tl.float64)
    total = classes  # of the class weights
    if weight_sum is not None:
        total = tl.load(weight_sum)
    mean_ce = tl.zeros_like(ce)
    if MEAN:
        sum_ce = (
            total * (log_sum.to(tl.float64) + (m.to(tl.float64) - parts.offset_of(target_logit).to(tl.float64)))
            - part[2]
        )
        mean_ce = (sum_ce / classes).to(T)

    # Ignored rows get the statistics of two equal logits, one of them the target, so that a user's loss function sees
    # nothing that is not finite, and loss and coefficients of zero.
    ignored = live == 0
    log_2 = 0.6931471805599453
    values = (m, sum_exp, q, ce, target_logit, mean_ce)
    store_live(statistics, rows, N, inside, ignored, values, (0.0, 2.0, 0.5, log_2, 0.0, log_2))
    k = tl.arange(0, PICK_BLOCK)[None, :]
    real = inside & (k < PICKS)
    tl.store(statistics + (rows + (k + STATISTICS) * N), tl.where(ignored, 0.0, pick_logit), real)
    tl.store(index + (rows + k * N), pick_index, real)
    if MOMENTS:
        to = statistics + (STATISTICS + PICKS) * N
        store_live(to, rows, N, inside, ignored, moments.finish(part[9:], sum_exp > 0, T), (log_2, 0.0, 0.5))

    if EPILOGUE is not None:
        lse = m + log_sum
        values = load_params(param_values, param_strides, rows, inside, PARAMS)
        target_weight = target_weight_of(class_weight, target, live, V, T)
        main = load_common(common, 0, T) * target_weight
        smooth = load_common(common, 1, T)
        z_term, z_slope = z_loss_of(common, target_weight, lse, T)
        spread = smooth * total.to(T)
        same = pick_index == target
        pick_ce = tl.where(same, ce, log_sum + (m - pick_logit))
        # L = w_t (main * base + z_loss lse^2) + smooth * sum_j w_j (-log p_j)
        of_row, a, d, b = EPILOGUE(ce, q, p, lse, pick_ce, real, real & (same == 0), PICKS, values)
        of_row = main * of_row + z_term + smooth * classes.to(T) * mean_ce
        a = main * a + z_slope + spread
        d = main * d + z_slope + spread
        at_target = d - a * q - smooth * target_weight
        tl.store(loss + rows, tl.where(ignored, 0.0, of_row), inside)
        columns = (a, smooth + tl.zeros_like(a), at_target)
        store_live(coefficients, rows, N, inside, ignored, columns, (0.0, 0.0, 0.0))
        tl.store(coefficients + (rows + (k + COEFFICIENTS) * N), tl.where(ignored, 0.0, main * b), real)


@triton.jit(do_not_specialize=VARYING)
def statistics_pass(
    where, target, class_weight, weight_sum, candidates, param_values, param_strides,
    loss, statistics, index, coefficients, part_sums, part_logits, part_columns,
    grad, grad_stride: tl.int64, grad_output, grad_output_stride: tl.int64, part_moments,
    N: tl.int64, V: tl.int32, common,
    EPILOGUE: tl.constexpr, PARAMS: tl.constexpr, SOURCE: tl.constexpr,
    TOP_K: tl.constexpr, BELOW: tl.constexpr, MEAN: tl.constexpr, MOMENTS: tl.constexpr,
    PICKS: tl.constexpr, PICK_BLOCK: tl.constexpr, SPLIT: tl.constexpr, MERGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """SPLIT: grid (row blocks, spans), stores the statistics of a span of the rows. MERGE: takes them up from there.

    Otherwise both in one; with `grad`, which may be the logits themselves, the gradient too.
    """
    T: tl.constexpr = compute_type(where[0].dtype)
    rows, inside, live, t = rows_of(tl.program_id(0), target, N, V, ROWS)
    target_logit = logit_at(where, rows, t, t >= 0, SOURCE, T)
    if SOURCE is not None:  # noqa: SIM102 - only a condition of its own is one for the compiler
        if SOURCE.masks_target:
            target_logit = tl.full(target_logit.shape, -float("inf"), T)
    target_logit = tl.where((t >= 0) | (live == 0), target_logit, float("nan"))
    of_spans = part_sums, part_logits, part_columns, part_moments
    end = tl.where(any_of(live), V, 0)  # where all are ignored there is nothing to read

    part = parts.nothing(ROWS, T, MOMENTS)
    if not SPLIT:  # begins with the target alone
        part = parts.of_target(part, target_logit, t, MOMENTS)
    if MERGE:
        for span in range(0, tl.cdiv(V, SPAN * BLOCK)):
            part = parts.merge(part, parts.load(of_spans, rows, span, N, inside, MOMENTS))
    else:
        first, last = parts.columns_of_program(end, SPLIT, SPAN * BLOCK)
        for begin in range(first, last, SPAN * BLOCK):
            span = parts.scan(
                where, rows, live, begin, tl.minimum(begin + SPAN * BLOCK, end), V, t, target_logit, class_weight,
                SOURCE, TOP_K, BELOW, MEAN, MOMENTS, BLOCK, SPAN, APART and TOP_K + BELOW == 0, T,
            )  # fmt: skip
            part = parts.merge(part, span)

    if SPLIT:
        parts.store(part, of_spans, rows, tl.program_id(1), N, inside, MOMENTS)
    else:
        _finish(
            part, rows, inside, live, t, target_logit, where, class_weight, weight_sum, candidates, param_values,
            param_strides, loss, statistics, index, coefficients, N, V, common,
            EPILOGUE, PARAMS, SOURCE, TOP_K, BELOW, MEAN, MOMENTS, PICKS, PICK_BLOCK, T,
        )  # fmt: skip
        if grad is not None:
            tl.debug_barrier()  # the coefficients are there, and all that is read of the logits here was read
            of_rows = row_coefficients(statistics, coefficients, grad_output, grad_output_stride, rows, live, N, T)
            blocks = tl.cdiv(V, BLOCK)
            for k in range(0, blocks):
                begin = (blocks - 1 - k) * BLOCK  # what was read last is most likely still in the caches
                write_gradient(
                    grad, grad_stride, of_rows, where, rows, inside, live, begin, N, V, t, class_weight, index,
                    coefficients, (), None, None, SOURCE, PICKS, False, BLOCK, T,
                )  # fmt: skip
