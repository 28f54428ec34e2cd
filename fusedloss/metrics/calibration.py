"""Calibration: whether a model is right as often as its confidences say."""

# Annotations are evaluated here: help() of a NamedTuple would show a ForwardRef for each that is not.
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_device, check_index_dtype, check_int, check_local
from ..definition.statistics import RowStats
from ..losses.cross_entropy import cross_entropy, linear_cross_entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The largest temperature that a fit looks at, and the inverse of the smallest.
_LARGEST = 2.0**10

#: How exactly it finds the logarithm of a temperature, of float32 statistics.
_TOLERANCE = 1e-6


class CalibrationBins(NamedTuple):
    """The bins of a reliability diagram, as :func:`calibration_bins` returns them; each field has the shape (bins,).

    ``rows`` is the number of rows in a bin (int64), ``confidence`` their mean confidence, and ``accuracy`` the share of
    them that was predicted right, the last two in the statistics' dtype and NaN for a bin without rows.
    """

    rows: Tensor
    confidence: Tensor
    accuracy: Tensor


def calibration_bins(stats: RowStats, target: Tensor, *, bins: int = 15) -> CalibrationBins:
    r"""Compute the mean confidence and the accuracy in B = bins bins of equal width.

    Bin b has the rows with (b - 1) / B < conf <= b / B. The confidence conf of a row is the largest probability,
    exp(stats.argmax_log_prob), and its prediction stats.argmax. Ignored rows, whose argmax is negative, are in no bin;
    a row of NaN makes its bin's confidence NaN.

    Args:
        stats: of any loss with return_stats=True, or of several batches: ``RowStats.cat(batches)``.
        target: the targets of the same rows and shape, of any integer dtype.
        bins: the number of bins, at least 1.

    The host reads nothing. The sums are in float64; on a GPU their order may change the last bit.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range.

    Source: Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"; Guo et al. 2017
    (arXiv:1706.04599), where the diagram of these bins is called a reliability diagram.

    >>> import torch, fusedloss as fl
    >>> logits, target = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), torch.tensor([0, 0, 0])
    >>> _, stats = fl.cross_entropy(logits, target, return_stats=True)
    >>> fl.calibration_bins(stats, target, bins=2)
    CalibrationBins(rows=tensor([1, 2]), confidence=tensor([0.5000, 0.9820]), accuracy=tensor([1.0000, 0.5000]))
    """
    _check(stats, target, bins)
    confidence = stats.argmax_log_prob.reshape(-1).exp()
    predicted = stats.argmax.reshape(-1)
    # Only the inner edges: what lies beyond the first or the last of them is in the first or the last bin.
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)[1:-1]
    index = torch.bucketize(confidence, edges).masked_fill(predicted < 0, bins)

    def summed(rows: Tensor) -> Tensor:
        return rows.new_zeros(bins + 1).index_add_(0, index, rows)[:bins]  # without the last, of the ignored rows

    count = summed(torch.ones_like(index))
    means = [summed(rows.double()) / count for rows in (confidence, predicted == target.reshape(-1))]
    return CalibrationBins(count, *(mean.to(confidence.dtype) for mean in means))


def calibration_error(stats: RowStats, target: Tensor, *, bins: int = 15, norm: str = "l1") -> Tensor:
    r"""Return the calibration error, the distance of confidence and accuracy, as a 0-d tensor in the statistics' dtype.

        "l1"   ECE = sum_b (n_b / n) |acc_b - conf_b|        expected calibration error
        "max"  MCE = max_b |acc_b - conf_b|                  maximum calibration error, over bins that have rows

    with acc_b, conf_b and n_b the accuracy, confidence and rows of :func:`calibration_bins`. It is NaN if a row is
    NaN, or if there are no rows.

    Args:
        stats, target, bins: as for :func:`calibration_bins`.
        norm: "l1" or "max". For "max" a bin with few rows counts as much as any other, so that it is large for small
            data.

    The host reads nothing, so that the result can stay on the device until it is logged.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range.

    Source: Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"; Guo et al. 2017
    (arXiv:1706.04599).

    >>> import torch, fusedloss as fl
    >>> logits, target = torch.randn(64, 1000), torch.randint(1000, (64,))
    >>> loss, stats = fl.focal_loss(logits, target, gamma=3.0, return_stats=True)
    >>> bool(0 <= fl.calibration_error(stats, target) <= fl.calibration_error(stats, target, norm="max") <= 1)
    True
    """
    check_choice("norm", norm, ("l1", "max"))
    count, confidence, accuracy = calibration_bins(stats, target, bins=bins)
    gap = (accuracy - confidence).abs().masked_fill(count == 0, 0)
    if norm == "max":
        return torch.where(count.sum() > 0, gap.amax(), torch.nan)
    return (gap * count).sum() / count.sum()


class TemperatureFit(NamedTuple):
    """The result of :func:`fit_temperature`, as Python numbers.

    ``temperature`` is the number to divide logits by, and ``error_before`` and ``error_after`` are the
    expected calibration errors of the same rows without and with it.
    """

    temperature: float
    error_before: float
    error_after: float


def fit_temperature(
    input: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    linear_weight: Tensor | None = None,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    bins: int = 15,
    impl: Any = None,
) -> TemperatureFit:
    r"""Find the temperature tau > 0 for which softmax(z / tau) has the least cross-entropy on held-out rows.

    Args:
        input: logits (*, V) that the model was not trained on, or a list of batches of them; with `linear_weight`
            hidden states (*, D), whose logits are computed one chunk at a time.
        target: the targets (*), or a list of those of the batches.
        linear_weight, linear_bias, softcap: as of :func:`~fusedloss.linear_cross_entropy`.
        bins: of the expected calibration errors before and after; see :func:`calibration_error`.
        ignore_index, impl: as of :func:`~fusedloss.cross_entropy`.

    The mean cross-entropy L is convex in 1 / tau, and dL / d log tau = mean(H - ce), with H a row's entropy at that
    temperature and ce its cross-entropy: the statistics pass gives both, and no gradient is computed. The zero is
    bracketed by factors of 2 and found by false position (Illinois) in log tau. tau is exact to a relative 1e-6, or to
    the rounding of the statistics where that is larger. It takes about 8 to 20 passes; the host waits for each.

    tau lies between 2^-10 and 2^10. Where L has no minimum between, tau is the end that it falls towards, the upper one
    where the logits point away from the targets; where each row is predicted right, it is the lower one, or the tau at
    which the rounded slope is 0, beyond which L falls no more.

    Raises:
        TypeError, ValueError: as the loss; no target that counts; a cross-entropy that is not finite.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv:1706.04599).

    >>> import torch, fusedloss as fl
    >>> z = 2 * torch.randn(4096, 10, generator=torch.Generator().manual_seed(0))
    >>> target = torch.distributions.Categorical(logits=z).sample()
    >>> fit = fl.fit_temperature(3 * z, target)  # three times too sure
    >>> 2.5 < fit.temperature < 3.5 and fit.error_after < fit.error_before
    True
    """
    if isinstance(input, Tensor) != isinstance(target, Tensor):
        raise TypeError(
            f"input and target must be two tensors or two lists of them, got {type(input).__name__} and "
            f"{type(target).__name__}"
        )
    inputs = [input] if isinstance(input, Tensor) else list(input)
    targets = [target] if isinstance(target, Tensor) else list(target)
    if len(inputs) != len(targets):
        raise ValueError(f"input and target must be as many batches, got {len(inputs)} and {len(targets)}")
    for t in targets:
        if not isinstance(t, Tensor):
            raise TypeError(f"each target must be a tensor of class indices, got {type(t).__name__}")
        check_index_dtype("target", t)
    check_int("bins", bins, 1)
    options: dict[str, Any] = {"ignore_index": ignore_index, "impl": impl, "stats": ("entropy",)}
    if linear_weight is not None:
        options |= {"linear_weight": linear_weight, "linear_bias": linear_bias, "softcap": softcap}
    elif linear_bias is not None or softcap is not None:
        raise ValueError("linear_bias and softcap need a linear_weight; add them to the logits beforehand")
    loss: Callable[..., Any] = cross_entropy if linear_weight is None else linear_cross_entropy

    @torch.no_grad()
    def rows_at(log_tau: float) -> RowStats:
        batches = []
        for x, t in zip(inputs, targets, strict=True):
            _, stats = loss(x, target=t, temperature=math.exp(log_tau), return_stats=True, **options)
            batches.append(RowStats(*[column.reshape(-1) for column in stats]))
        return RowStats.cat(batches)

    def slope(stats: RowStats) -> float:
        assert stats.entropy is not None
        by_row = stats.entropy.double() + stats.target_log_prob
        return float(by_row.where(stats.argmax >= 0, 0).sum())

    if not inputs:
        raise ValueError("a temperature needs at least one batch, got none")
    before = rows_at(0.0)
    if not bool((before.argmax >= 0).any()):
        raise ValueError(
            f"a temperature needs at least one target that counts, got {len(before.argmax)}, all of them {ignore_index}"
        )
    log_tau = _zero(lambda x: slope(rows_at(x)), slope(before), math.log(_LARGEST))
    all_targets = torch.cat([t.reshape(-1) for t in targets])
    errors = [float(calibration_error(stats, all_targets, bins=bins)) for stats in (before, rows_at(log_tau))]
    return TemperatureFit(math.exp(log_tau), *errors)


def _zero(slope: Callable[[float], float], at_0: float, end: float) -> float:
    """Find the zero in [-end, end] of a function that rises through it, or the end that it lies beyond."""
    low = high = 0.0
    below = above = at_0
    while not (below <= 0 <= above):
        if not math.isfinite(below) or not math.isfinite(above):
            raise ValueError("the rows' cross-entropy is not finite; a target has no probability, or a logit is NaN")
        if above < 0:  # the zero is at a larger temperature
            if high >= end:
                return end
            low, below = high, above
            high = min(end, high + math.log(2))
            above = slope(high)
        else:
            if low <= -end:
                return -end
            high, above = low, below
            low = max(-end, low - math.log(2))
            below = slope(low)
    side = 0
    while high - low > _TOLERANCE and below < 0 < above:
        middle = (low * above - high * below) / (above - below)
        middle = min(max(middle, low + _TOLERANCE / 4), high - _TOLERANCE / 4)
        value = slope(middle)
        # An end that stays twice counts half, so that both move.
        if value < 0:
            low, below, above = middle, value, above / 2 if side < 0 else above
            side = -1
        else:
            high, above, below = middle, value, below / 2 if side > 0 else below
            side = 1
    return low if below == 0 else high if above == 0 else (low + high) / 2


def plot_reliability(bins: CalibrationBins, ax: "Axes | None" = None) -> "Axes":
    """Draw a reliability diagram: the accuracy of each bin over its confidences, with the diagonal.

    Args:
        bins: of :func:`calibration_bins`.
        ax: axes of matplotlib to draw into; None takes the current ones.

    Returns the axes. What a bin's mean confidence has above or below its accuracy is drawn as a gap, and the darker a
    bar, the more rows the bin has.

    Raises:
        ImportError: matplotlib is not installed; ``pip install fusedloss[plot]`` brings it.

    >>> import torch, fusedloss as fl
    >>> _, stats = fl.cross_entropy(torch.randn(64, 9), torch.zeros(64, dtype=torch.int64), return_stats=True)
    >>> ax = fl.plot_reliability(fl.calibration_bins(stats, torch.zeros(64, dtype=torch.int64)))  # doctest: +SKIP
    """
    if not isinstance(bins, CalibrationBins):
        raise TypeError(f"bins must be the CalibrationBins of calibration_bins, got {type(bins).__name__}")
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot_reliability needs matplotlib; pip install fusedloss[plot] brings it") from error
    ax = pyplot.gca() if ax is None else ax
    rows, confidence, accuracy = (column.detach().cpu().tolist() for column in bins)
    width, most = 1 / len(rows), max(1, *rows)
    for i, (count, sure, right) in enumerate(zip(rows, confidence, accuracy, strict=True)):
        if not count:
            continue
        ax.bar(i * width, right, width, align="edge", color="C0", alpha=0.3 + 0.7 * count / most, edgecolor="white")
        ax.bar(i * width, sure - right, width, right, align="edge", color="none", edgecolor="C3", hatch="//")
    ax.plot([0, 1], [0, 1], color="0.4", linestyle="--")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    return ax


def _check(stats: object, target: object, bins: object) -> None:
    if not isinstance(stats, RowStats):
        raise TypeError(f"stats must be the RowStats of a loss with return_stats=True, got {type(stats).__name__}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of class indices, got {type(target).__name__}")
    check_local("target", target)
    check_index_dtype("target", target)
    for name in ("argmax", "argmax_log_prob"):
        column = getattr(stats, name)
        if column.shape != target.shape:
            raise ValueError(
                f"target must have the shape of stats.{name}, {tuple(column.shape)}, got {tuple(target.shape)}"
            )
        check_device("target", target, column, f"stats.{name}")
    check_int("bins", bins, 1)
