"""Tversky loss, in both forms."""

from itertools import product
from typing import ClassVar

import oracle
import pytest
import torch
from row_suite import Case, RowLossSuite, class_weights, logits_and_targets, quarters, with_gradient

import fusedloss as fl

TARGET = {"form": "target"}


def _case(name, own, **more):
    return Case(name, fl.tversky_loss, oracle.tversky, own, smoothing=False, infinite=False, **more)


def _over_classes(name, own, **more):
    return _case(name, own, cancelling=oracle.tversky_terms, **more)


#: For `test_fuzz.py`.
DRAWN = {
    "tversky_loss": {
        "alpha": [0.0, 0.25, 0.5, 0.75, 1.0],
        "beta": [None, 0.0, 0.25, 0.5, 0.75, 1.0],
        "smooth": [0.25, 1.0, 8.0],
        "form": ["one_vs_rest", "target"],
    }
}


def drawn(name, own):
    kind = _case if own["form"] == "target" else _over_classes
    return kind(name, own, of_probabilities=True)


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [
        _over_classes("one-vs-rest", {}, large=True),
        _over_classes("one-vs-rest-alpha of each row", lambda n, v, g: {"alpha": quarters(n, g, 0, 1), "beta": 0.75}),
        _over_classes("one-vs-rest-smooth", {"alpha": 0.25, "smooth": 0.5}),
        _case("target", {"alpha": 0.25, **TARGET}, large=True),
        _case("target-beta of each row", lambda n, v, g: {"beta": quarters(n, g, 0, 2), **TARGET}),
    ]
    CERTAIN: ClassVar = [
        _case(f"{form}-alpha={alpha}-beta={beta}", {"alpha": alpha, "beta": beta, "form": form}, of_probabilities=True)
        for form, (alpha, beta) in product(("one_vs_rest", "target"), ((0.6, 0.4), (0.0, 1.0), (2.0, 0.5)))
    ]


def test_known_values(impl, example):
    """By hand for the third row, where p = 1/4: 1 - (1/4 + 1) / (1/4 + 0.4 * 3/4 + 1) and 3 of 1 - 1 / (0.6/4 + 1)."""
    rows = fl.tversky_loss(*example, reduction="none", impl=impl)
    target = fl.tversky_loss(*example, form="target", reduction="none", impl=impl)
    torch.testing.assert_close(float(target[2]), 1 - 1.25 / 1.55, rtol=1e-12, atol=0)
    torch.testing.assert_close(float(rows[2]), 1 - 1.25 / 1.55 + 3 * (1 - 1 / 1.15), rtol=1e-12, atol=0)


def test_defaults_are_those_of_the_paper(impl, example):
    loss = fl.tversky_loss(*example, impl=impl)
    explicit = fl.tversky_loss(
        *example, alpha=0.6, beta=0.4, smooth=1.0, form="one_vs_rest", level="example", impl=impl
    )
    torch.testing.assert_close(loss, explicit, rtol=1e-15, atol=0)


@pytest.mark.parametrize("level", ["example", "class", "set"])
def test_of_equal_prices_is_linear_dice_with_half_the_smooth(level, impl, generator):
    z, target = logits_and_targets(6, 40, generator)
    dice = with_gradient(lambda x: fl.dice_loss(x, target, squared=False, smooth=1.5, level=level, impl=impl), z)
    own = {"alpha": 0.5, "smooth": 0.75, "level": level, "impl": impl}
    torch.testing.assert_close(
        with_gradient(lambda x: fl.tversky_loss(x, target, **own), z), dice, rtol=1e-11, atol=1e-16
    )


def test_alpha_is_the_price_of_false_positives_and_beta_of_false_negatives(impl):
    """Of two classes, the first row's prediction is a false positive of one and a false negative of the other."""
    z, target = torch.tensor([[20.0, 0.0], [0.0, 20.0]], dtype=torch.float64), torch.tensor([1, 1])

    def of(alpha, beta):
        return fl.tversky_loss(z, target, alpha=alpha, beta=beta, level="class", reduction="none", impl=impl)

    false_positive, false_negative = of(0.5, 0.0), of(0.0, 0.5)
    torch.testing.assert_close(false_positive, torch.tensor([1 / 3, 0.0]).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(false_negative, torch.tensor([0.0, 0.5 / 2.5]).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("level", ["class", "set"])
def test_beta_of_each_row_above_the_rows(level, impl, generator):
    z, target = logits_and_targets(6, 7, generator)
    own = {"alpha": 0.25, "beta": quarters(6, generator, 0, 2)}
    ours = with_gradient(lambda x: fl.tversky_loss(x, target, level=level, impl=impl, **own), z)
    truth = with_gradient(lambda x: oracle.level_loss(oracle.tversky_over_rows, x, target, level=level, **own), z)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("form", ["one_vs_rest", "target"])
@pytest.mark.parametrize("shape", [(), (6,)], ids=["0-d", "of each row"])
def test_alpha_and_beta_are_differentiable(shape, form, impl, generator):
    z, target = logits_and_targets(6, 7, generator)
    z.requires_grad_()
    target[4] = -100
    alpha, beta = ((0.25 + torch.rand(shape, generator=generator).double()).requires_grad_() for _ in range(2))
    options = {"form": form, "reduction": "none", "weight": class_weights(7, generator), "z_loss": 0.01}

    def ours(x, a, b):
        return fl.tversky_loss(x, target, alpha=a, beta=b, impl=impl, **options)

    assert torch.autograd.gradcheck(ours, (z, alpha, beta))
    assert torch.autograd.gradgradcheck(ours, (z, alpha, beta))
    upstream = torch.randn(6, generator=generator).double()
    truth = oracle.loss(oracle.tversky, z, target, alpha=alpha, beta=beta, **options)
    leaves = (z, alpha, beta) if form == "one_vs_rest" else (z, beta)  # nothing of alpha is in the target's loss
    torch.testing.assert_close(
        torch.autograd.grad(ours(z, alpha, beta), leaves, upstream),
        torch.autograd.grad(truth, leaves, upstream),
        rtol=1e-11,
        atol=1e-14,
    )


def test_beta_follows_a_learnt_alpha(impl, generator):
    z, target = logits_and_targets(6, 7, generator)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fl.tversky_loss(z, target, alpha=alpha, impl=impl), alpha)
    (truth,) = torch.autograd.grad(oracle.loss(oracle.tversky, z, target, alpha=alpha), alpha)
    torch.testing.assert_close(slope, truth, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"alpha": -0.5}, ValueError, "alpha .*-0.5"),
        ({"alpha": 1.5}, ValueError, "alpha must be between 0 and 1, got 1.5"),
        ({"alpha": -0.5, "beta": 0.5}, ValueError, "alpha .*-0.5"),
        ({"beta": -0.5}, ValueError, "beta .*-0.5"),
        ({"beta": True}, TypeError, "beta .*True"),
        ({"alpha": "0.6"}, TypeError, "alpha .*'0.6'"),
        ({"smooth": 0}, ValueError, "smooth .*0"),
        ({"level": "batch"}, ValueError, "level .*'batch'"),
        ({"form": "rows"}, ValueError, "form .*'rows'"),
        ({"label_smoothing": 0.1}, TypeError, r"tversky_loss\(\) .*'label_smoothing'"),
    ],
)
def test_bad_arguments(values, error, message):
    with pytest.raises(error, match=message):
        fl.tversky_loss(torch.zeros(4, 5), torch.arange(4), **values)
