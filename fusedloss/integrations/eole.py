"""The losses of Eole's trainer on the linear form.

Eole, the successor of OpenNMT-py, computes a batch's loss in a LossCompute. Of its methods one makes the logits, and
:func:`fuse` replaces that one on the instance. Target shifts, masked prompts, heads that predict further tokens, the
other terms of the loss, accumulation and normalization stay Eole's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.output_layer import beside_products, described, products
from ..losses._registry import argument_names
from ..losses.cross_entropy import linear_cross_entropy
from ._losses import OF_THE_MODEL, check_arguments, current, forms

try:
    import eole
    from eole.utils.loss import LossCompute
except ImportError as error:
    raise ImportError(f"fusedloss.integrations.eole needs Eole: pip install 'fusedloss[eole]' ({error})") from error

__all__ = ["fuse", "unfuse"]

#: Eole's method, from hidden states (B, T, D) and targets (B * T,) to the sum of the losses and the scores.
_NAME = "_compute_ce_loss"
_TESTED = "0.6.4"

#: Arguments of the losses that come from Eole, or cannot come with each of its batches.
_OF_EOLE = OF_THE_MODEL | {"label_smoothing", "token_weight", "stats"}


def fuse(loss_compute: LossCompute, loss: str | Callable[..., Any] = "cross_entropy", **arguments: Any) -> LossCompute:
    """Make a LossCompute of Eole compute a linear form of its generator: the logits are never stored.

    A trainer has two of them. ``fuse(trainer.train_loss, ...)`` changes what it trains on, ``fuse(trainer.valid_loss)``
    the memory and time of validation. Padding and ``label_smoothing`` are Eole's own, read at each call. The logged
    loss, perplexity and accuracy are Eole's where the loss is cross-entropy, up to rounding. With another loss, the
    logged loss and perplexity are computed from that. Heads that predict further tokens train on the same loss.

    :func:`unfuse` undoes it. Fusing a fused LossCompute replaces its loss.

    Args:
        loss_compute: of a model whose generator is a plain nn.Linear, or PEFT's LoRA on one.
        loss: name of a loss, such as "focal_loss", or the function, such as :func:`fusedloss.linear_focal_loss`.
        arguments: of the linear form, such as ``alpha`` or ``budget``. A callable (but for ``loss_fn``) is called at
            each batch for its value, as :class:`fusedloss.nn.AlphaSchedule` is.

    Returns the LossCompute.

    Raises:
        TypeError: not a LossCompute; an argument that the loss does not take, or that is Eole's.
        ValueError: a generator that does more than a product, with its class; a criterion that is not Eole's
            cross-entropy; label smoothing with a loss that has none.
        RuntimeError: an Eole that computes its loss in another way, with its version.

    >>> import torch, fusedloss as fl
    >>> from eole.utils.loss import LossCompute
    >>> criterion = torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)
    >>> train_loss = LossCompute(criterion, torch.nn.Linear(16, 100), vocabs={"specials": {}})  # as a trainer has one
    >>> alpha = fl.nn.AlphaSchedule(total_steps=1000)
    >>> train_loss = fuse(train_loss, "mixed_cross_entropy", alpha=alpha)
    """
    _check_type(loss_compute)
    _, linear = forms(loss)
    check_arguments(linear, arguments, _OF_EOLE)
    fused = functools.partial(_loss_and_scores, loss_compute, linear, arguments)
    _compare(loss_compute, fused)
    setattr(loss_compute, _NAME, fused)
    return loss_compute


def unfuse(loss_compute: LossCompute) -> LossCompute:
    """Undo :func:`fuse` and return the LossCompute; one that is not fused is unchanged.

    Raises TypeError for anything but a LossCompute.
    """
    _check_type(loss_compute)
    if getattr(loss_compute.__dict__.get(_NAME), "func", None) is _loss_and_scores:
        delattr(loss_compute, _NAME)
    return loss_compute


def _check_type(loss_compute: Any) -> None:
    if not isinstance(loss_compute, LossCompute):
        raise TypeError(
            "loss_compute must be a LossCompute of Eole, such as train_loss and valid_loss of its Trainer, got "
            f"{type(loss_compute).__name__}"
        )


class _Scores(NamedTuple):
    """Stands where Eole expects the scores, whose largest is all that it asks for."""

    argmax: Tensor

    def max(self, dim: int) -> tuple[None, Tensor]:
        return None, self.argmax


def _loss_and_scores(
    loss_compute: LossCompute, linear: Callable[..., Any], arguments: dict[str, Any], output: Tensor, flat_tgt: Tensor
) -> tuple[Tensor, _Scores]:
    """Eole's method, by a linear form."""
    generator, criterion = loss_compute.generator, loss_compute.criterion
    what = beside_products(generator) if isinstance(generator, nn.Module) else "no weight"
    if what is not None:
        raise ValueError(
            f"the fused loss reads weight and bias of a generator that is a plain nn.Linear, but the "
            f"{described(generator)} has {what}; merge or remove it, or do not fuse"
        )
    if type(criterion) is not nn.CrossEntropyLoss or criterion.reduction != "sum" or criterion.weight is not None:
        raise ValueError(
            f"the fused loss stands for Eole's nn.CrossEntropyLoss with reduction='sum' and no weight, but the "
            f"criterion is {criterion!r}; set generator_function to softmax, or do not fuse"
        )
    options: dict[str, Any] = {"ignore_index": loss_compute.padding_idx, "reduction": "sum", "return_stats": True}
    if "label_smoothing" in argument_names(linear):
        options["label_smoothing"] = criterion.label_smoothing
    elif criterion.label_smoothing:
        raise ValueError(
            f"{linear.__name__}() has no label smoothing, but Eole's label_smoothing is {criterion.label_smoothing}; "
            "set it to 0"
        )
    hidden, weight, bias = products(generator, loss_compute._bottle(output))
    loss, stats = linear(hidden, weight, target=flat_tgt, linear_bias=bias, **options, **current(arguments))
    return loss, _Scores(stats.argmax)


@torch.no_grad()
def _compare(loss_compute: LossCompute, fused: Callable[..., Any]) -> None:
    """Raise where the fused loss cannot be computed, or Eole's own is no cross-entropy of its generator's products."""
    own = getattr(type(loss_compute), _NAME, None)
    weight = getattr(loss_compute.generator, "weight", torch.empty(1, 1))
    hidden = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    target = torch.arange(4, device=weight.device) % len(weight)
    target[0] = loss_compute.padding_idx
    dropouts = [module for module in loss_compute.modules() if module.training]
    for module in dropouts:  # LoRA has some, which differ from call to call
        module.training = False
    try:
        fused(hidden, target)
        ours = _loss_and_scores(loss_compute, linear_cross_entropy, {}, hidden, target)[0]
        theirs = None if own is None else own(loss_compute, hidden, target)[0]
    finally:
        for module in dropouts:
            module.training = True
    if theirs is None or not torch.allclose(ours, theirs.to(ours), rtol=1e-4 if weight.element_size() > 2 else 5e-2):
        raise RuntimeError(
            f"{type(loss_compute).__name__} of Eole {eole.__version__} has a {_NAME} that is no cross-entropy of what "
            f"its generator gives, for which the fused loss would stand; it is tested with Eole {_TESTED}. Train "
            "without it, or with that version"
        )
