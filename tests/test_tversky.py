"""Tversky loss, in both forms."""

from functools import partial
from itertools import product
from typing import ClassVar

import oracle
import pytest
import torch
from row_suite import Case, RowLossSuite, each_dtype, logits_and_targets, quarters, with_gradient

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
    TWINS: ClassVar = {
        "the paper's defaults": (fl.tversky_loss, partial(fl.tversky_loss, alpha=0.6, beta=0.4, smooth=1.0)),
        **{
            f"of equal prices, linear dice with half the smooth, level={level}": (
                partial(fl.dice_loss, squared=False, smooth=1.5, level=level),
                partial(fl.tversky_loss, alpha=0.5, smooth=0.75, level=level),
            )
            for level in ("example", "class", "set")
        },
    }
    LEARNT: ClassVar = [
        (fl.tversky_loss, oracle.tversky, ("alpha", "beta"), {"form": "one_vs_rest"}),
        (fl.tversky_loss, oracle.tversky, ("alpha",), {}),  # which beta follows
        (fl.tversky_loss, oracle.tversky, ("beta",), TARGET),
    ]


def test_known_values(impl, example):
    """By hand for the third row, where p = 1/4: 1 - (1/4 + 1) / (1/4 + 0.4 * 3/4 + 1) and 3 of 1 - 1 / (0.6/4 + 1)."""
    rows, target = (fl.tversky_loss(*example, reduction="none", impl=impl, **own) for own in ({}, TARGET))
    torch.testing.assert_close(float(target[2]), 1 - 1.25 / 1.55, rtol=1e-12, atol=0)
    torch.testing.assert_close(float(rows[2]), 1 - 1.25 / 1.55 + 3 * (1 - 1 / 1.15), rtol=1e-12, atol=0)


def test_alpha_is_the_price_of_false_positives_and_beta_of_false_negatives(impl):
    """Of two classes, the first row's prediction is a false positive of one and a false negative of the other."""
    z, target = torch.tensor([[20.0, 0.0], [0.0, 20.0]], dtype=torch.float64), torch.tensor([1, 1])
    for alpha, beta, expected in ((0.5, 0.0, [1 / 3, 0.0]), (0.0, 0.5, [0.0, 0.5 / 2.5])):
        loss = fl.tversky_loss(z, target, alpha=alpha, beta=beta, level="class", reduction="none", impl=impl)
        torch.testing.assert_close(loss, torch.tensor(expected).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("level", ["class", "set"])
def test_beta_of_each_row_above_the_rows(level, impl, generator):
    z, target = logits_and_targets(6, 7, generator)
    own = {"alpha": 0.25, "beta": quarters(6, generator, 0, 2), "level": level}
    ours = with_gradient(lambda x: fl.tversky_loss(x, target, impl=impl, **own), z)
    truth = with_gradient(lambda x: oracle.level_loss(oracle.tversky_over_rows, x, target, **own), z)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-15)


@each_dtype
@pytest.mark.parametrize("gap", [100, 104, 800])
@pytest.mark.parametrize("own", [{"form": "target"}, {"level": "class"}, {"level": "set"}], ids=str)
def test_without_smooth_a_target_without_probability_has_finite_gradients(own, gap, dtype, impl):
    """With beta = 0 the loss of a target alone is 0, also where 1 / p is infinite."""
    z = torch.tensor([[0, gap, 0], [0, 0, gap]], dtype=dtype)
    own = {"alpha": 0.5, "beta": 0.0, "smooth": 0.0, "impl": impl, **own}
    loss, gradient = with_gradient(lambda x: fl.tversky_loss(x, torch.tensor([0, 2]), **own), z)
    assert loss.isfinite() and gradient.isfinite().all()
    if "form" in own:
        assert loss == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("own", "error", "words"),
    [
        ({"alpha": 1.5}, ValueError, "alpha must be between 0 and 1, got 1.5"),
        ({"alpha": -0.5, "beta": 0.5}, ValueError, "alpha .*-0.5"),
        ({"beta": -0.5}, ValueError, "beta .*-0.5"),
        ({"label_smoothing": 0.1}, TypeError, r"tversky_loss\(\) .*'label_smoothing'"),
    ],
)
def test_bad_argument(own, error, words):
    with pytest.raises(error, match=words):
        fl.tversky_loss(torch.zeros(4, 5), torch.arange(4), **own)
