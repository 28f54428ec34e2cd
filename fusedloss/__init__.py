"""Fused forward and backward loss kernels for training over large vocabularies."""

from importlib.metadata import version as _version

from . import nn as nn  # not in __all__: `import *` must not take the place of torch's
from .backends.cpu import set_threads_after_fork
from .definition.statistics import LogProbs, RowStats, Statistics
from .distributed.normalizer import normalizer
from .distributed.vocabulary import VocabularyShards
from .losses.cross_entropy import cross_entropy, linear_cross_entropy
from .losses.distillation import distillation_loss, linear_distillation_loss
from .losses.dsc import dice_loss, dsc_loss, linear_dsc_loss
from .losses.flex import flex_loss, linear_flex_loss
from .losses.focal import focal_loss, linear_focal_loss
from .losses.log_probs import linear_log_probs, linear_topk_log_probs, log_probs
from .losses.mixed_cross_entropy import alpha_schedule, linear_mixed_cross_entropy, mixed_cross_entropy
from .losses.supcon import supcon_loss
from .losses.topk_distillation import linear_topk_distillation_loss, topk_distillation_loss
from .losses.tversky import linear_tversky_loss, tversky_loss
from .metrics.calibration import (
    CalibrationBins,
    TemperatureFit,
    calibration_bins,
    calibration_error,
    fit_temperature,
    plot_reliability,
)

__version__ = _version("fusedloss")

__all__ = [
    "CalibrationBins",
    "LogProbs",
    "RowStats",
    "Statistics",
    "TemperatureFit",
    "VocabularyShards",
    "alpha_schedule",
    "calibration_bins",
    "calibration_error",
    "cross_entropy",
    "dice_loss",
    "distillation_loss",
    "dsc_loss",
    "fit_temperature",
    "flex_loss",
    "focal_loss",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_dsc_loss",
    "linear_flex_loss",
    "linear_focal_loss",
    "linear_log_probs",
    "linear_mixed_cross_entropy",
    "linear_topk_distillation_loss",
    "linear_topk_log_probs",
    "linear_tversky_loss",
    "log_probs",
    "mixed_cross_entropy",
    "normalizer",
    "plot_reliability",
    "set_threads_after_fork",
    "supcon_loss",
    "topk_distillation_loss",
    "tversky_loss",
]


def __dir__() -> list[str]:
    """Leave out the sub-packages and what is imported here for its own use."""
    return [*__all__, *(name for name in globals() if name == "nn" or name.startswith("__"))]
