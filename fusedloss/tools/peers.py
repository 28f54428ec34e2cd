"""What `python -m fusedloss bench` times: row forms, linear forms and the contrastive loss, each among its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses._registry import EXAMPLES, LOSSES, Example
from ..losses.supcon import supcon_loss
from . import timing

#: Of the contrastive loss.
TEMPERATURE, LABELS = 0.3, 100


class Event(NamedTuple):
    """A loss among its peers: the contest, and what all of them must compute."""

    name: str
    contest: Callable[[], timing.Contest]
    expected: Callable[[], tuple[Tensor, ...]]


def events(rows: int, classes: int, features: int, dtype: torch.dtype, compiled: bool) -> Iterator[Event]:
    """Every loss in every form, of logits (rows, classes) or of hidden states (rows, features)."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    logits = drawn(rows, classes)
    target = torch.randint(classes, (rows,), generator=generator)
    for example in EXAMPLES:
        losses = timing.candidates(example, target, compiled)
        if example.loss.__name__ == "cross_entropy":
            losses["F.cross_entropy"] = partial(F.cross_entropy, target=target, **example.arguments)
        yield Event(
            str(example), partial(timing.Contest, logits, losses), partial(timing.expected, example, logits, target)
        )
    hidden, weight = drawn(rows, features), drawn(classes, features) / features**0.5
    of_layer = partial(timing.ProductContest, (hidden, weight), partial(layer_products, hidden, weight))
    for loss in LOSSES.values():
        example = loss.examples[0]
        if example.linear is not None:
            formula = partial(of_layer_eager, example=example, target=target)
            yield Event(
                f"linear_{example}",
                partial(of_layer, linear_candidates(example, target, compiled)),
                partial(timing.expected_of, formula, hidden, weight),
            )
    if rows < 3 or features < 2:  # normalized, they have no gradient to compare
        return
    # Of few rows too some have a positive: without any there is nothing to compare.
    x, labels = drawn(rows, features), torch.randint(min(LABELS, 1 + rows // 4), (rows,), generator=generator)
    yield Event(
        f"supcon_loss(temperature={TEMPERATURE})",
        partial(timing.ProductContest, (x,), similarity_products(x), supcon_candidates(labels, compiled)),
        partial(timing.expected_of, partial(supcon_eager, labels=labels), x),
    )


# linear forms


def linear_candidates(example: Example, target: Tensor, compiled: bool = True) -> dict[str, Callable[..., Tensor]]:
    """The mean loss of hidden states (N, D) and a weight (V, D) by each way to have it.

    One that is not installed raises ImportError when it is called.
    """
    linear = example.linear
    assert linear is not None
    eager = partial(of_layer_eager, example=example, target=target)
    ways: dict[str, Callable[..., Tensor]] = {
        "fused": lambda hidden, weight: linear(hidden, weight, target, **example.arguments),
        "eager": eager,
    }
    if compiled:
        ways["compiled"] = timing.compile_when_called(eager)
    if example.loss.__name__ == "cross_entropy" and not example.arguments:
        ways["torch"] = partial(_torch, target=target, chunked=False)
        ways["torch chunked"] = partial(_torch, target=target, chunked=True)
        if compiled:
            ways["cut-cross-entropy"] = partial(_cut_cross_entropy, target=target)
    return ways


def of_layer_eager(hidden: Tensor, weight: Tensor, *, example: Example, target: Tensor) -> Tensor:
    """The mean loss of all the logits, in PyTorch."""
    logits = F.linear(hidden, weight)
    if example.loss.__name__ == "cross_entropy":
        return F.cross_entropy(logits, target, **example.arguments)
    return example.formula(logits, target, **example.arguments).mean()


def _torch(hidden: Tensor, weight: Tensor, *, target: Tensor, chunked: bool) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return F.linear_cross_entropy(hidden, weight, target, options=options)


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, *, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, target, impl="torch_compile")


def layer_products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The floor: nothing but the three matrix products, each into new memory."""
    logits = torch.mm(hidden, weight.t())
    return torch.mm(logits, weight), torch.mm(logits.t(), hidden)


# the contrastive loss


def supcon_candidates(labels: Tensor, compiled: bool = True) -> dict[str, Callable[..., Tensor]]:
    """The mean loss over anchors with a positive by each way to have it. One not installed raises when called."""
    eager = partial(supcon_eager, labels=labels)
    ways: dict[str, Callable[..., Tensor]] = {
        "fused": partial(supcon_loss, labels=labels, temperature=TEMPERATURE),
        "eager": eager,
    }
    if compiled:
        ways["compiled"] = timing.compile_when_called(eager)
    ways["pytorch-metric-learning"] = partial(_pytorch_metric_learning, labels=labels)
    return ways


def supcon_eager(features: Tensor, *, labels: Tensor) -> Tensor:
    """The loss of features (N, D) from the matrix of their similarities."""
    return supcon_sum(features, labels, slice(None)) / supcon_divisor(labels)


def supcon_sum(features: Tensor, labels: Tensor, anchors: slice) -> Tensor:
    """The losses of some anchors, from the matrix of their similarities to all."""
    f = F.normalize(features, dim=-1)
    itself = torch.arange(len(f))[anchors, None] == torch.arange(len(f))
    positive = (labels[anchors, None] == labels) & ~itself
    similarity = (f[anchors] @ f.t() / TEMPERATURE).masked_fill(itself, -torch.inf)
    log_p = similarity.log_softmax(1).masked_fill(~positive, 0)
    return -(log_p.sum(1) / positive.sum(1).clamp(min=1)).sum()


def supcon_divisor(labels: Tensor) -> Tensor:
    """The number of anchors with a positive."""
    count = labels.bincount()
    return count[count > 1].sum().clamp(min=1)


def _pytorch_metric_learning(features: Tensor, *, labels: Tensor) -> Tensor:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE)(features, labels)


def similarity_products(features: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The floor: the product that makes the similarities and the two of their gradient, into memory that is there."""
    similarity = features.new_empty(len(features), len(features))
    by_rows, by_columns = features.new_empty(2, *features.shape)

    def run() -> tuple[Tensor, ...]:
        torch.mm(features, features.t(), out=similarity)
        torch.mm(similarity, features, out=by_rows)
        return by_rows, torch.mm(similarity.t(), features, out=by_columns)

    return run
