"""Gradients of compiled losses are those of eager ones, by every autograd function in each of its forms.

Not the losses alone: torch 2.11, the oldest that is supported, compiles a function whose output was changed in place to
one that has the right values and no gradient. `make test-versions` runs this file there.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fusedloss as fl

pytestmark = pytest.mark.compile

ROWS, CLASSES, FEATURES = 7, 33, 5
_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


#: What may be differentiated, by the name that the cases and the losses have for it.
LEAVES = {
    "logits": _normal(ROWS, CLASSES),
    "hidden": _normal(ROWS, FEATURES),
    "weight": _normal(CLASSES, FEATURES),
    "bias": _normal(CLASSES),
    "features": _normal(ROWS, FEATURES),
    "contrast": _normal(4, FEATURES),
    "token_weight": _normal(ROWS).exp(),
    "temperature": _number(0.4),
    "gamma": _number(1.5),
    "alpha": _number(0.6),
}
TARGET = torch.randint(CLASSES, (ROWS,), generator=_generator).index_fill_(0, torch.tensor([2]), -100)
LABELS = torch.tensor([0, 1, 0, 1, 2, 0, 3])
CLASS_WEIGHT = _normal(CLASSES).exp()


def _picks(s: fl.Statistics) -> Tensor:
    return s.ce + s.q * s.top_ce + s.second_logit.tanh() + s.mean_ce


def _brier(p: Tensor, q: Tensor, positive: Tensor) -> Tensor:
    return torch.where(positive, q, p).square()


def _supcon(**options: Any) -> Callable[..., Tensor]:
    def loss(features: Tensor, temperature: Tensor) -> Tensor:
        return fl.supcon_loss(features, LABELS, temperature=temperature, **options)

    return loss


def _memory_bank(positives: str) -> Callable[..., Tensor]:
    def loss(features: Tensor, contrast: Tensor) -> Tensor:
        labels = torch.arange(len(contrast))
        return fl.supcon_loss(features, LABELS, contrast=contrast, contrast_labels=labels, positives=positives)

    return loss


#: Functions of the leaves that their parameters name.
CASES: dict[str, Callable[..., Tensor]] = {
    "row, each its own": lambda logits, token_weight: fl.focal_loss(
        logits, TARGET, token_weight=token_weight, reduction="none", weight=CLASS_WEIGHT, label_smoothing=0.1
    ),
    "row, a learnt number": lambda logits, gamma: fl.focal_loss(logits, TARGET, gamma=gamma, z_loss=0.01),
    "row, over token weights": lambda logits: fl.mixed_cross_entropy(
        logits, TARGET, alpha=0.25, token_weight=LEAVES["token_weight"], normalizer="token_weight"
    ),
    "row, the two largest": lambda logits: fl.mixed_cross_entropy(
        logits, TARGET, alpha=0.25, top_k=2, weight=CLASS_WEIGHT, label_smoothing=0.1
    ),
    "row, a counted divisor": lambda logits: fl.cross_entropy(logits, TARGET, normalizer=fl.normalizer(TARGET)),
    "row, log-probabilities": lambda logits, temperature: torch.stack(
        fl.log_probs(logits, TARGET, entropy=True, temperature=temperature)
    ),
    "class": lambda logits: fl.dsc_loss(logits, TARGET, alpha=0.5, weight=CLASS_WEIGHT),
    "class, a learnt number": lambda logits, alpha: fl.dsc_loss(logits, TARGET, alpha=alpha, reduction="none"),
    "class of the target, a learnt number": lambda logits, alpha: fl.dsc_loss(
        logits, TARGET, alpha=alpha, form="target"
    ),
    "class over the rows": lambda logits, token_weight: fl.dsc_loss(
        logits, TARGET, alpha=0.5, level="class", reduction="none", token_weight=token_weight
    ),
    "class over the rows, a learnt number": lambda logits, alpha: fl.dsc_loss(
        logits, TARGET, alpha=alpha, level="class"
    ),
    "class, all of them over the rows": lambda logits: fl.dice_loss(logits, TARGET, level="set"),
    "flex": lambda logits, gamma: fl.flex_loss(
        logits, TARGET, lambda s: gamma * _picks(s), statistics=("top", "second", "mean"), weight=CLASS_WEIGHT
    ),
    "flex, a candidate": lambda logits: fl.flex_loss(
        logits, TARGET, lambda s: s.ce - s.candidate_ce[:, 0] / 2, candidates=TARGET.clamp(min=0) // 2, reduction="sum"
    ),
    "flex, over classes": lambda logits, gamma: fl.flex_loss(
        logits, TARGET, lambda *x: gamma * _brier(*x), over="classes", label_smoothing=0.1
    ),
    "linear": lambda hidden, weight, bias: fl.linear_cross_entropy(
        hidden, weight, TARGET, linear_bias=bias, softcap=3.0, normalizer=_number(5)
    ),
    "linear, each its own": lambda hidden, weight: fl.linear_dsc_loss(
        hidden, weight, TARGET, alpha=0.5, reduction="none"
    ),
    "linear, token weights": lambda hidden, weight, token_weight: fl.linear_focal_loss(
        hidden, weight, TARGET, token_weight=token_weight
    ),
    "linear, a learnt number": lambda hidden, weight, gamma: fl.linear_focal_loss(hidden, weight, TARGET, gamma=gamma),
    "linear, log-probabilities": lambda hidden, weight, bias, temperature: torch.stack(
        fl.linear_log_probs(hidden, weight, TARGET, linear_bias=bias, entropy=True, temperature=temperature)
    ),
    "linear, flex": lambda hidden, weight, bias: fl.linear_flex_loss(
        hidden, weight, TARGET, _picks, statistics=("top", "second", "mean"), linear_bias=bias
    ),
    "contrastive": _supcon(),
    "contrastive, each its own": _supcon(reduction="none", positives="in"),
    "contrastive, as they are, in": _supcon(normalize=False, positives="in", reduction="sum"),
    "contrastive, a memory bank": _memory_bank("out"),
    "contrastive, a memory bank, in": _memory_bank("in"),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same_gradients(*losses, fullgraph=True):
    """Of several losses in one graph, each with leaves of its own."""
    names = [list(inspect.signature(loss).parameters) for loss in losses]

    def every(*leaves):
        rest = iter(leaves)
        return [loss(*(1 * next(rest) for _ in own)) for loss, own in zip(losses, names, strict=True)]

    results = []
    for function in (every, torch.compile(every, backend="aot_eager", fullgraph=fullgraph)):
        leaves = [LEAVES[name].clone().requires_grad_() for own in names for name in own]
        values = function(*leaves)
        upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in values]
        results.append([*(x.detach() for x in values), *torch.autograd.grad(values, leaves, upstream)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    assert all(gradient.any() for gradient in results[0][len(losses) :])


@pytest.mark.parametrize("kind", ["row", "class", "flex", "linear", "contrastive"])
def test_row_linear_and_contrastive_losses(kind):
    assert_same_gradients(*(loss for name, loss in CASES.items() if name.startswith(kind)))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One rank, which goes the way of many."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")  # where the ranks meet
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_contrastive_loss_across_ranks(reduction, group):
    assert_same_gradients(_supcon(group=group, reduction=reduction), fullgraph=False)


OF_SHARDS: dict[str, Callable[..., Any]] = {
    "statistics": lambda group: lambda logits, gamma: fl.focal_loss(logits, TARGET, gamma=gamma, group=group),
    "classes": lambda group: lambda logits: fl.dsc_loss(logits, TARGET, alpha=0.6, group=group),
    "each class over the rows": lambda group: (
        lambda logits, token_weight: fl.dsc_loss(
            logits, TARGET, alpha=0.6, level="class", token_weight=token_weight, group=group
        )
    ),
}


def test_losses_of_shards(group):
    shards = fl.VocabularyShards(group, [CLASSES])
    assert_same_gradients(*(of(shards) for of in OF_SHARDS.values()))
