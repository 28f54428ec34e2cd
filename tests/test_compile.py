"""Gradients of compiled losses are those of eager ones, by every autograd function in each of its forms.

Not the losses alone: torch 2.11, the oldest that is supported, compiles a function whose output was changed in place to
one that has the right values and no gradient. `make test-versions` runs this file there.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from row_losses import CLASSES, ROWS, SCENES, leaves_of

import fusedloss as fl

pytestmark = pytest.mark.compile

TARGET = torch.tensor([1, 3, -100, 0, 8, 2, 2])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same_gradients(*losses, fullgraph=True, dynamic=None):
    """Of several losses in one graph, each with leaves of its own.

    A number is (1,) until it is in the graph: torch traces a second time where an input is a 0-d tensor of float64.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [leaves_of(loss, generator) for loss in losses]
    shapes = [[x.shape for x in own] for own in inputs]

    def every(*leaves):
        rest = iter(leaves)
        return [
            loss(TARGET, *(next(rest).view(shape) for shape in own)) for loss, own in zip(losses, shapes, strict=True)
        ]

    results = []
    for function in (every, torch.compile(every, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic)):
        leaves = [torch.atleast_1d(x).clone().requires_grad_() for own in inputs for x in own]
        values = function(*leaves)
        upstream = torch.linspace(-0.7, 2, len(values), dtype=torch.float64).unbind()
        results.append([*(x.detach() for x in values), *torch.autograd.grad(values, leaves, upstream)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    assert all(gradient.any() for gradient in results[0][len(losses) :])


@pytest.mark.parametrize("kind", ["row", "class", "flex", "linear", "teacher", "contrastive"])
def test_every_loss(kind):
    assert_same_gradients(*(loss for name, loss in SCENES.items() if name.startswith(kind)))


def test_any_number_of_rows_of_a_teacher():
    assert_same_gradients(SCENES["teacher, linear"], SCENES["teacher of some classes"], dynamic=True)


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
    def loss(t, features, number):
        options = {"temperature": number, "reduction": reduction, "group": group}
        return fl.supcon_loss(features, torch.tensor([0, 1, 0, 1, 2, 0, 3]), **options).square().sum()

    assert_same_gradients(loss, fullgraph=False)


def test_losses_of_shards(group):
    shards = fl.VocabularyShards(group, [CLASSES])
    over_rows = {"alpha": 0.6, "level": "class", "group": shards}
    assert_same_gradients(
        lambda t, logits, number: fl.focal_loss(logits, t, gamma=number, group=shards),
        lambda t, logits, of_rows: fl.dsc_loss(logits, t, token_weight=of_rows, **over_rows),
        lambda t, hidden, weight: fl.linear_mixed_cross_entropy(hidden, weight, t, alpha=0.25, group=shards),
        lambda t, hidden, weight: fl.linear_dsc_loss(hidden, weight, t, group=shards),
    )
    compiled = torch.compile(lambda z: fl.cross_entropy(z, TARGET, group=group), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"VocabularyShards\.gather"):
        compiled(torch.randn(ROWS, CLASSES))
