"""The options that losses share: their types, and their defaults.

Functions and modules take them as ``**options: Unpack[...]`` of one of the dictionaries here, which type checkers and
editors spell out. A loss over the classes takes no label smoothing, hence two of each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..distributed.vocabulary import VocabularyShards

Reduction: TypeAlias = Literal["mean", "sum", "none"]
Impl: TypeAlias = Literal["reference", "cpu", "triton", "cuda"]
LinearImpl: TypeAlias = Literal["reference", "cpu", "triton", "cuda", "triton_fused"]


class _Ignoring(TypedDict, total=False):
    ignore_index: int


class _Weighting(_Ignoring, total=False):
    weight: Tensor | None
    z_loss: float


class _Smoothing(TypedDict, total=False):
    label_smoothing: float
    smoothing_over: Literal["all", "others"]


class BatchOptions(TypedDict, total=False):
    """What a batch brings along."""

    token_weight: Tensor | None
    normalizer: float | Tensor | Literal["token_weight"] | None
    group: ProcessGroup | VocabularyShards | None
    stats: Sequence[str]


class ForwardOptions(BatchOptions, total=False):
    """What the call of a module takes."""

    return_stats: bool


class _OfLogits(TypedDict, total=False):
    temperature: float | Tensor
    reduction: Reduction
    inplace_backward: bool
    impl: Impl | None


class _OfHidden(TypedDict, total=False):
    temperature: float | Tensor
    reduction: Reduction
    softcap: float | None
    budget: int | None
    drop_ignored: bool | None
    sequence_parallel: bool
    impl: LinearImpl | None


class ClassLossOptions(_Weighting, BatchOptions, _OfLogits, total=False):
    """Shared options of a loss over the classes."""


class RowOptions(ClassLossOptions, _Smoothing, total=False):
    """Shared options of a loss of logits."""


class LinearClassLossOptions(_Weighting, BatchOptions, _OfHidden, total=False):
    """Shared options of the linear form of a loss over the classes."""

    linear_bias: Tensor | None


class LinearOptions(LinearClassLossOptions, _Smoothing, total=False):
    """Shared options of a linear form."""


class LogProbOptions(_Ignoring, total=False):
    """Options of log-probabilities."""

    temperature: float | Tensor
    group: ProcessGroup | VocabularyShards | None
    impl: Impl | None


class TopkOptions(TypedDict, total=False):
    """Options of the most likely classes."""

    linear_bias: Tensor | None
    softcap: float | None
    temperature: float | Tensor
    budget: int | None
    group: ProcessGroup | VocabularyShards | None
    impl: LinearImpl | None


class LinearLogProbOptions(_Ignoring, TopkOptions, total=False):
    """Options of log-probabilities of hidden states."""

    drop_ignored: bool | None
    sequence_parallel: bool


class _OfTeacher(_Ignoring, total=False):
    hard_weight: float
    temperature: float | Tensor
    scale_by_temperature_squared: bool
    reduction: Reduction
    impl: Impl | None


class _OfTeachersHidden(_OfTeacher, total=False):
    softcap: float | None
    budget: int | None
    drop_ignored: bool | None


class DistillationOptions(_OfTeacher, BatchOptions, total=False):
    """Shared options of losses against a teacher's logits."""

    target: Tensor | None


class LinearDistillationOptions(_OfTeachersHidden, BatchOptions, total=False):
    """Shared options of losses against the logits of a teacher's hidden states."""

    target: Tensor | None
    linear_bias: Tensor | None


class CallOptions(RowOptions, total=False):
    """All that a row loss takes from any of its public forms."""

    return_stats: bool


class _Divided(TypedDict, total=False):
    normalizer: float | Tensor | nn.Module | Literal["token_weight"] | None


class _OfModule(_Divided, total=False):
    return_stats: bool  # deprecated: forward takes it


class _OfLayer(TypedDict, total=False):
    bias: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class DistillationModuleOptions(_OfTeacher, _Divided, total=False):
    """Shared options of the module of a loss against a teacher's logits."""


class LinearDistillationModuleOptions(_OfTeachersHidden, _Divided, _OfLayer, total=False):
    """Shared options of the module of its linear form."""


class ClassLossModuleOptions(_Weighting, _OfModule, _OfLogits, total=False):
    """Shared options of the module of a loss over the classes."""


class ModuleOptions(ClassLossModuleOptions, _Smoothing, total=False):
    """Shared options of the module of a loss of logits."""


class LinearClassLossModuleOptions(_Weighting, _OfModule, _OfHidden, _OfLayer, total=False):
    """Shared options of the module of a linear form of a loss over the classes."""


class LinearModuleOptions(LinearClassLossModuleOptions, _Smoothing, total=False):
    """Shared options of the module of a linear form."""


class CrossEntropyOptions(_Weighting, _Smoothing, _OfModule, total=False):
    """Shared options of a cross-entropy that is the mean, within another module."""

    inplace_backward: bool


DEFAULTS: CallOptions = {
    "temperature": 1.0,
    "weight": None,
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "smoothing_over": "all",
    "z_loss": 0.0,
    "token_weight": None,
    "normalizer": None,
    "return_stats": False,
    "stats": (),
    "inplace_backward": False,
    "group": None,
    "impl": None,
}

#: Those of linear forms beside.
LINEAR_DEFAULTS: dict[str, Any] = {
    "linear_bias": None,
    "softcap": None,
    "budget": None,
    "drop_ignored": None,
    "sequence_parallel": False,
}

#: Those of losses against a teacher beside.
DISTILLATION_DEFAULTS: dict[str, Any] = {"target": None, "hard_weight": 0.0, "scale_by_temperature_squared": False}

#: What a loss against a teacher's logits takes none of.
DISTILLATION_LACKS = ("weight", "z_loss", "label_smoothing", "smoothing_over", "inplace_backward")

#: Label smoothing mixes the losses of all classes, which a loss over the classes has anyway.
CLASS_LOSSES_LACK = tuple(_Smoothing.__annotations__)
