"""Cross-entropy, and that it is PyTorch's."""

from functools import partial
from itertools import product
from typing import ClassVar

import oracle
import pytest
import torch
from row_suite import Case, RowLossSuite, class_weights, logits_and_targets, with_gradient

import fusedloss as fl


def drawn(name, own, **more):
    return Case(name, fl.cross_entropy, oracle.cross_entropy, own, weighted_mean=True, **more)


def _fairseqs(z, t, impl):
    """(1 - eps) (-log p_t) + eps / (V - 1) sum_{j != t} -log p_j."""
    nll = -z[t >= 0].log_softmax(-1)
    mine = oracle.at(nll, t[t >= 0])
    return (0.9 * mine + 0.1 / (z.shape[-1] - 1) * (nll.sum(-1) - mine)).mean()


#: For `test_fuzz.py`.
DRAWN = {"cross_entropy": {}}


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [drawn("cross_entropy", {}, large=True)]
    CERTAIN: ClassVar = CASES
    TWINS: ClassVar = {
        "smoothing over the others": (
            lambda z, t, impl: fl.cross_entropy(z, t, label_smoothing=0.1, smoothing_over="others", impl=impl),
            _fairseqs,
        ),
        # For the rest of the options the oracle is held to PyTorch's, and the losses to the oracle.
        "PyTorch's, of nothing but smoothing": tuple(
            partial(loss, label_smoothing=1.0, weight=torch.linspace(0.5, 2, 40).double())
            for loss in (fl.cross_entropy, lambda z, t, impl, **own: torch.nn.functional.cross_entropy(z, t, **own))
        ),
    }


def test_the_oracle_is_right(generator):
    """The formulas that the tests trust, against PyTorch's own and against 250 digits."""
    z, target = logits_and_targets(5, 7, generator)
    weight = class_weights(7, generator)
    for reduction, smoothing, ignore_index in product(("mean", "sum", "none"), (0.0, 0.1, 1.0), (-100, 2)):
        options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
        expected = torch.nn.functional.cross_entropy(z, target, weight, **options)
        result = oracle.loss(oracle.cross_entropy, z, target, weight=weight, weighted_mean=True, **options)
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-15)
    for base, own in (
        (oracle.cross_entropy, {}),
        (oracle.focal, {"gamma": 1.5}),
        (oracle.mixed_cross_entropy, {"alpha": 0.25, "top_k": 2}),
        (oracle.dsc, {"alpha": 0.5, "detach_weight": True}),
        (oracle.dsc, {"alpha": 0.5, "form": "target", "squared": False}),
    ):
        exact = oracle.exact(base, z, target, **own)
        result = with_gradient(lambda x, b=base, o=own: oracle.loss(b, x, target, reduction="none", **o), z)
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("smoothing_over", ["all", "others"])
def test_smoothing_of_a_masked_class_is_infinite(smoothing_over, impl):
    """-log p of a class without probability is a part of the loss, as it is in PyTorch."""
    z, target = torch.tensor([[0.5, -torch.inf, 1.0], [0.5, 0.25, 1.0]]), torch.tensor([0, 2])
    options = {"label_smoothing": 0.1, "reduction": "none"}
    loss = fl.cross_entropy(z, target, smoothing_over=smoothing_over, impl=impl, **options)
    assert loss[0] == torch.inf == torch.nn.functional.cross_entropy(z, target, **options)[0]
    assert loss[1].isfinite()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("linear", [False, True], ids=["row", "linear"])
def test_mean_over_class_weights_that_sum_to_0_is_0(linear, smoothing, impl, generator):
    """Of a batch whose targets all have weight 0: PyTorch's is NaN, since smoothing is over classes that have one."""
    hidden = torch.randn(5, 4, generator=generator, requires_grad=True)
    head = torch.randn(9, 4, generator=generator, requires_grad=True)
    target, weight = torch.tensor([0, 1, 2, -100, 1]), torch.ones(9).index_fill(0, torch.arange(3), 0)
    options = {"weight": weight, "label_smoothing": smoothing, "impl": impl}
    if linear:
        loss = fl.linear_cross_entropy(hidden, head, target, **options)
    else:
        loss = fl.cross_entropy(hidden @ head.t(), target, **options)
    gradients = torch.autograd.grad(loss, (hidden, head))
    assert loss == 0 and not any(gradient.count_nonzero() for gradient in gradients)
