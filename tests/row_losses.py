"""Every row loss, under options of its own that leave none of its terms at rest; and every loss in each form."""

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


# --- every autograd function in each of its forms, for the compiler and for function transforms ---

ROWS, CLASSES, FEATURES = 7, 9, 5

#: Tensors that may be differentiated, by the names that the scenes have for them, and their shapes.
LEAVES: dict[str, tuple[int, ...]] = {
    "logits": (ROWS, CLASSES),
    "hidden": (ROWS, FEATURES),
    "weight": (CLASSES, FEATURES),
    "bias": (CLASSES,),
    "of_rows": (ROWS,),
    "number": (),
    "features": (ROWS, FEATURES),
    "contrast": (4, FEATURES),
}

_W = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
_LABELS = torch.tensor([0, 1, 0, 1, 2, 0, 3])
_CANDIDATES = torch.arange(2 * ROWS).view(ROWS, 2) % CLASSES
_TEACHER = torch.linspace(-2, 3, ROWS * CLASSES, dtype=torch.float64).sin().view(ROWS, CLASSES)
_TOP = [x.contiguous() for x in _TEACHER.log_softmax(-1).topk(3)[::-1]]
_SCHEDULED = fl.nn.MixedCrossEntropyLoss(alpha=fl.nn.AlphaSchedule(9))
_PICKS = {"statistics": ("top", "second", "mean")}
_BANK = {"contrast_labels": torch.arange(4)}
_WITH_BATCH = {"contrast_labels": torch.cat([_LABELS, torch.arange(4)])}
_MASK = torch.arange(ROWS**2).view(ROWS, ROWS) % 3 == 0
_HARD = {"hard_weight": 0.3, "temperature": 2.0, "scale_by_temperature_squared": True}


def _picks(s: fl.Statistics) -> Tensor:
    return s.ce + s.q * s.top_ce + s.second_logit.tanh() + s.mean_ce


def _of_probs(result: fl.LogProbs) -> Tensor:
    return torch.stack(result).square().sum()


#: Numbers, each of a target and of leaves that its parameters name. The first word says which function it is.
SCENES: dict[str, Callable[..., Tensor]] = {
    "row, each its own": lambda t, logits, of_rows: fl.focal_loss(
        logits, t, token_weight=of_rows, reduction="none", weight=_W, label_smoothing=0.1
    ).square().sum(),
    "row, smoothing over the others": lambda t, logits: fl.focal_loss(
        logits, t, label_smoothing=0.2, smoothing_over="others", weight=_W, z_loss=0.3
    ),
    "row, a learnt number": lambda t, logits, number: fl.focal_loss(logits, t, gamma=number, z_loss=0.01),
    "row, a learnt number of each row": lambda t, logits, of_rows: fl.focal_loss(logits, t, gamma=of_rows),
    "row, over token weights": lambda t, logits, of_rows: fl.dsc_loss(
        logits, t, token_weight=of_rows, normalizer="token_weight"
    ),
    "row, the two largest": lambda t, logits: fl.mixed_cross_entropy(
        logits, t, alpha=0.25, top_k=2, weight=_W, label_smoothing=0.1
    ),
    "row, a counted divisor": lambda t, logits: fl.cross_entropy(logits, t, normalizer=fl.normalizer(t)),
    "row, a learnt divisor": lambda t, logits, number: fl.cross_entropy(logits, t, normalizer=number),
    "row, statistics": lambda t, logits: fl.cross_entropy(logits, t, return_stats=True)[0],
    "row, a schedule": lambda t, logits: _SCHEDULED(logits, t),
    "row, log-probabilities": lambda t, logits, number: _of_probs(
        fl.log_probs(logits, t, entropy=True, temperature=number)
    ),
    "class": lambda t, logits: fl.dsc_loss(logits, t, alpha=0.5, weight=_W),
    "class, a learnt number": lambda t, logits, number: fl.dsc_loss(
        logits, t, alpha=number, reduction="none"
    ).square().sum(),
    "class of the target, a learnt number": lambda t, logits, number: fl.dsc_loss(
        logits, t, alpha=number, form="target"
    ),
    "class over the rows": lambda t, logits, of_rows: fl.dsc_loss(
        logits, t, alpha=0.5, level="class", reduction="none", token_weight=of_rows, weight=_W
    ).square().sum(),
    "class over the rows, a learnt number": lambda t, logits, number: fl.dsc_loss(
        logits, t, alpha=number, level="class"
    ),
    "class, all of them over the rows": lambda t, logits: fl.dice_loss(logits, t, level="set"),
    "flex": lambda t, logits, number: fl.flex_loss(logits, t, lambda s: number * _picks(s), **_PICKS, weight=_W),
    "flex, candidates": lambda t, logits: fl.flex_loss(
        logits, t, lambda s: s.ce - s.candidate_ce.mean(-1) / 2, candidates=_CANDIDATES, reduction="sum"
    ),
    "flex, over classes": lambda t, logits, number: fl.flex_loss(
        logits, t, lambda *x: number * _brier(*x), over="classes", label_smoothing=0.1
    ),
    "linear": lambda t, hidden, weight, bias: fl.linear_cross_entropy(
        hidden, weight, t, linear_bias=bias, softcap=3.0, normalizer=torch.tensor(5.0)
    ),
    "linear, chunks": lambda t, hidden, weight: fl.linear_focal_loss(hidden, weight, t, softcap=2.0, budget=3 * 16 * 9),
    "linear, each its own": lambda t, hidden, weight: fl.linear_dsc_loss(
        hidden, weight, t, alpha=0.5, reduction="none"
    ).square().sum(),
    "linear, token weights": lambda t, hidden, weight, of_rows: fl.linear_focal_loss(
        hidden, weight, t, token_weight=of_rows
    ),
    "linear, a learnt number": lambda t, hidden, weight, number: fl.linear_focal_loss(hidden, weight, t, gamma=number),
    "linear, log-probabilities": lambda t, hidden, weight, bias, number: _of_probs(
        fl.linear_log_probs(hidden, weight, t, linear_bias=bias, entropy=True, temperature=number)
    ),
    "linear, flex": lambda t, hidden, weight, bias: fl.linear_flex_loss(
        hidden, weight, t, _picks, **_PICKS, linear_bias=bias
    ),
    "linear, flex per chunk": lambda t, hidden, weight: fl.linear_flex_loss(
        hidden, weight, t, lambda s, own: s.ce + own * s.q, row_tensors=(_TEACHER[:, 0],), per_chunk=True
    ),
    "teacher": lambda t, logits: fl.distillation_loss(logits, _TEACHER, divergence="jsd", target=t, **_HARD),
    "teacher, each its own": lambda t, logits: fl.distillation_loss(
        logits, _TEACHER, reduction="none"
    ).square().sum(),
    "teacher, targets": lambda t, logits: fl.cross_entropy(logits, _TEACHER.softmax(-1), label_smoothing=0.1),
    "teacher, linear": lambda t, hidden, weight: fl.linear_distillation_loss(
        hidden, weight, _TEACHER, _TEACHER.diag_embed().sum(0), target=t, softcap=20.0, teacher_softcap=3.0, **_HARD
    ),
    "teacher of some classes": lambda t, logits: fl.topk_distillation_loss(logits, *_TOP, target=t, **_HARD),
    "teacher of some classes, linear": lambda t, hidden, weight: fl.linear_topk_distillation_loss(
        hidden, weight, *_TOP, target=t, hard_weight=0.5
    ),
    "contrastive": lambda t, features, number: fl.supcon_loss(features, _LABELS, temperature=number),
    "contrastive, in": lambda t, features, number: fl.supcon_loss(
        features, _LABELS, temperature=number, positives="in", reduction="mean_all"
    ),
    "contrastive, as they are": lambda t, features: fl.supcon_loss(
        features, _LABELS, reduction="none", normalize=False
    ).square().sum(),
    "contrastive, a memory bank": lambda t, features, contrast: fl.supcon_loss(
        features, _LABELS, contrast=contrast, **_BANK
    ),
    "contrastive, a memory bank, in": lambda t, features, contrast: fl.supcon_loss(
        features, _LABELS, contrast=contrast, positives="in", **_BANK
    ),
    "contrastive, batch and bank": lambda t, features, contrast: fl.supcon_loss(
        features, _LABELS, contrast=torch.cat([features, contrast]), contrast_includes_batch=True, **_WITH_BATCH
    ),
    "contrastive, own rows, in": lambda t, features, contrast: fl.supcon_loss(
        features, _LABELS, contrast=torch.cat([features, contrast]), self_index=torch.arange(ROWS) - 1,
        positives="in", **_WITH_BATCH
    ),
    "contrastive, a mask": lambda t, features: fl.supcon_loss(features, positive_mask=_MASK),
    "contrastive, views": lambda t, features: fl.supcon_loss(features[1:].view(3, 2, FEATURES), _LABELS[:3]),
}  # fmt: skip


def leaves_of(scene: Callable[..., Tensor], generator: torch.Generator) -> list[Tensor]:
    """New tensors in (0.1, 0.9) for a scene's leaves."""
    shapes = [LEAVES[name] for name in list(inspect.signature(scene).parameters)[1:]]
    return [0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
