"""Every row loss, under options of its own that leave none of its terms at rest."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss as fl


def _poly(s: fl.Statistics) -> Tensor:
    return s.ce + s.q


def _brier(p: Tensor, q: Tensor, positive: Tensor) -> Tensor:
    return torch.where(positive, q, p).square()


LOSSES: dict[str, Any] = {
    "cross_entropy": fl.cross_entropy,
    "focal_loss": partial(fl.focal_loss, gamma=1.5),
    "mixed_cross_entropy": partial(fl.mixed_cross_entropy, alpha=0.25),
    "mixed_cross_entropy top 2": partial(fl.mixed_cross_entropy, alpha=0.25, top_k=2),
    "dsc_loss one_vs_rest": partial(fl.dsc_loss, alpha=0.5),
    "dsc_loss target": partial(fl.dsc_loss, alpha=0.5, form="target"),
    "dice_loss": partial(fl.dice_loss, squared=False),
    "tversky_loss": partial(fl.tversky_loss, alpha=0.25),
    "flex_loss rows": partial(fl.flex_loss, loss_fn=_poly),
    "flex_loss classes": partial(fl.flex_loss, loss_fn=_brier, over="classes"),
}

#: Those that run on a compiled epilogue or between the compiled passes, and so can take the logits' memory.
INPLACE = [name for name in LOSSES if name != "flex_loss classes"]


def computed(z: Tensor) -> Tensor:
    """Give `z` its own memory as the result of a computation: that of a leaf is not for gradients to take."""
    return z.detach().mul_(torch.ones((), dtype=z.dtype, device=z.device, requires_grad=True))


each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
each_inplace_loss = pytest.mark.parametrize("loss", [LOSSES[name] for name in INPLACE], ids=INPLACE)
