"""Calibration: whether a model is right as often as its confidences say."""

# Annotations are evaluated here: help() of a NamedTuple would show a ForwardRef for each that is not.
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_index_dtype, check_int, check_local
from ..definition.statistics import RowStats


class CalibrationBins(NamedTuple):
    """Rows by their confidence, as :func:`calibration_bins` gives them: (bins,) each, what a reliability diagram shows.

    ``rows`` is how many a bin has (int64), ``confidence`` is their mean confidence and ``accuracy`` the share of them
    that was predicted right, both in the statistics' dtype and NaN for a bin without rows.
    """

    rows: Tensor
    confidence: Tensor
    accuracy: Tensor


def calibration_bins(stats: RowStats, target: Tensor, *, bins: int = 15) -> CalibrationBins:
    r"""Confidence and accuracy in B = bins of equal width, where bin b has the rows with (b - 1) / B < conf <= b / B.

    The confidence conf of a row is the largest probability, exp(stats.argmax_log_prob), and its prediction
    stats.argmax. Ignored rows, whose argmax is negative, are in no bin; a row of NaN makes its bin's confidence NaN.

    Args:
        stats: of any loss with return_stats=True, or of several batches: ``RowStats.cat(batches)``.
        target: the targets of the same rows and shape, of any integer dtype.
        bins: their number, at least 1.

    Nothing is read by the host. The sums are in float64; on a GPU their order may change the last bit of that.

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
    r"""How far confidence and accuracy are apart, of the row statistics that every loss gives. 0-d, in their dtype.

        "l1"   ECE = sum_b (n_b / n) |acc_b - conf_b|        expected calibration error
        "max"  MCE = max_b |acc_b - conf_b|                  maximum calibration error, over bins that have rows

    with acc_b, conf_b and n_b the accuracy, confidence and rows of :func:`calibration_bins`. It is NaN where a row is,
    and of no row at all.

    Args:
        stats, target, bins: as of :func:`calibration_bins`.
        norm: "l1" or "max". For "max" a bin of few rows counts as much as any: it is large for little data.

    Nothing is read by the host, so that it can stay on the device until it is logged.

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
        if column.device != target.device:
            raise ValueError(f"target is on {target.device}, but stats.{name} on {column.device}")
    check_int("bins", bins, 1)
