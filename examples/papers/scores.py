"""F1 of classes."""

from __future__ import annotations

from torch import Tensor


def f1_scores(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """(C,) of predictions and targets (N,): 2 TP / (2 TP + FP + FN), NaN for a class that neither holds."""
    right = target[predicted == target].bincount(minlength=classes)
    return 2 * right / (predicted.bincount(minlength=classes) + target.bincount(minlength=classes))


def f1(predicted: Tensor, target: Tensor, classes: int) -> float:
    """Of two classes that of the first, which is to be the rare one; of more the mean over those that occur."""
    scores = f1_scores(predicted, target, classes)
    return float(scores[0].nan_to_num() if classes == 2 else scores.nanmean())
