"""The options that every row loss shares, and their defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..distributed.vocabulary import VocabularyShards


class RowOptions(TypedDict, total=False):
    """Options that every row loss shares."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    smoothing_over: str
    z_loss: float
    token_weight: Tensor | None
    normalizer: float | Tensor | str | None
    return_stats: bool
    inplace_backward: bool
    group: ProcessGroup | VocabularyShards | None
    impl: str | None


DEFAULTS: RowOptions = {
    "weight": None,
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "smoothing_over": "all",
    "z_loss": 0.0,
    "token_weight": None,
    "normalizer": None,
    "return_stats": False,
    "inplace_backward": False,
    "group": None,
    "impl": None,
}
