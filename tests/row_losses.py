"""Every row loss, under options of its own that leave none of its terms at rest."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import typing_extensions
from torch import Tensor

import fusedloss as fl
from fusedloss.losses import _registry


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
    "flex_loss rows": partial(fl.flex_loss, loss_fn=_poly),
    "flex_loss classes": partial(fl.flex_loss, loss_fn=_brier, over="classes"),
}

#: Losses that need no arguments of their own here are as they declare themselves.
NAMED = {getattr(loss, "func", loss) for loss in LOSSES.values()}
LOSSES |= {
    name: partial(loss.row, **loss.examples[0].arguments)
    for name, loss in _registry.LOSSES.items()
    if loss.row not in NAMED
}

#: Those that have levels above the rows.
LEVELED = [
    loss
    for loss in LOSSES.values()
    if any(e.over_rows and e.loss is getattr(loss, "func", loss) for e in _registry.EXAMPLES)
    and loss.keywords.get("form") != "target"
]

#: Those that run on a compiled epilogue or between the compiled passes, and so can take the logits' memory.
INPLACE = [name for name in LOSSES if name != "flex_loss classes"]


def computed(z: Tensor) -> Tensor:
    """Give `z` its own memory as the result of a computation: that of a leaf is not for gradients to take."""
    return z.detach().mul_(torch.ones((), dtype=z.dtype, device=z.device, requires_grad=True))


each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
each_inplace_loss = pytest.mark.parametrize("loss", [LOSSES[name] for name in INPLACE], ids=INPLACE)


def shared_options(function: Callable[..., Any]) -> set[str]:
    """The names in the dictionary that a signature has as ``**options``."""
    names = {"Unpack": typing_extensions.Unpack, "ProcessGroup": dist.ProcessGroup}
    parameters = inspect.signature(function, locals=names, eval_str=True).parameters.values()
    return {name for p in parameters if p.kind is p.VAR_KEYWORD for name in get_args(p.annotation)[0].__annotations__}


def takes(loss: Callable[..., Any], option: str) -> bool:
    """Whether a loss, or a partial of one, takes a shared option."""
    return option in _registry.options_of(getattr(loss, "func", loss))


def is_over_classes(loss: Callable[..., Any]) -> bool:
    """Whether the rows' losses are sums over the classes."""
    own = getattr(loss, "keywords", {})
    example = next(e for e in _registry.EXAMPLES if e.loss is getattr(loss, "func", loss) and _same_kind(e, own))
    return example.over_classes


def _same_kind(example: _registry.Example, own: dict[str, Any]) -> bool:
    return all(example.arguments.get(name) == own.get(name) for name in ("form", "level", "over"))
