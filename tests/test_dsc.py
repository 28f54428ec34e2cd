"""The dice family: DSC and dice loss, in both forms."""

from functools import partial
from typing import ClassVar

import oracle
import pytest
import torch
from row_suite import Case, RowLossSuite, logits_and_targets, quarters, with_gradient

import fusedloss as fl

TARGET = {"form": "target"}


def _case(name, own, loss=fl.dsc_loss, **more):
    return Case(name, loss, oracle.dsc, own, smoothing=False, infinite=False, **more)


def _over_classes(name, own, loss=fl.dsc_loss, **more):
    return _case(name, own, loss, cancelling=oracle.dsc_terms, **more)


def _dice_loss(input, target, *, alpha, **options):
    assert alpha == 0
    return fl.dice_loss(input, target, **options)


#: For `test_fuzz.py`.
DRAWN = {
    "dsc_loss": {
        "alpha": [0.0, 2**-7, 0.5, 1.0, 2.0],
        "squared": [False, True],
        "detach_weight": [False, True],
        "smooth": [0.25, 1.0, 8.0],
        "form": ["one_vs_rest", "target"],
    }
}


def drawn(name, own):
    kind = _case if own["form"] == "target" else _over_classes
    return kind(name, own, of_probabilities=True)


def _certain(alpha, squared, detach, form):
    own = {"alpha": alpha, "squared": squared, "form": form, "detach_weight": detach}
    name = f"{form}-{'squared' if squared else 'linear'}-alpha={alpha}{'-detached' * detach}"
    return _case(name, own, of_probabilities=True)


def _weighted(form):
    """One-vs-rest: a weight multiplies its class's loss in every row; target: the rows' of that target."""
    weight = torch.linspace(0.25, 3, 40, dtype=torch.float64)

    def by_hand(z, t, impl):
        p, y = z[t >= 0].softmax(-1), torch.nn.functional.one_hot(t[t >= 0], 40)
        terms = (1 - (2 * p * y + 1) / (p * p + y + 1)) * weight
        return (terms if form == "one_vs_rest" else terms * y).sum(-1).mean()

    return partial(fl.dice_loss, weight=weight, form=form), by_hand


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [
        _over_classes("one-vs-rest", {}, large=True),
        _over_classes("one-vs-rest-linear-alpha=1", {"alpha": 1.0, "squared": False}),
        _over_classes("one-vs-rest-detached", {"alpha": 0.5, "detach_weight": True}, derivative=False),
        _over_classes("one-vs-rest-alpha of each row", lambda n, v, g: {"alpha": quarters(n, g, 0, 2)}),
        _over_classes("one-vs-rest-dice", {"alpha": 0, "smooth": 0.5}, _dice_loss),
        _case("target", TARGET, large=True),
        _case("target-linear-alpha=1", {"alpha": 1.0, "squared": False, "smooth": 0.0, **TARGET}),
        _case("target-detached", {"alpha": 0.5, "detach_weight": True, **TARGET}, derivative=False),
        _case("target-dice", {"alpha": 0, "squared": False, **TARGET}, _dice_loss),
    ]
    CERTAIN: ClassVar = [
        _certain(alpha, squared, detach, form)
        for form in ("one_vs_rest", "target")
        for alpha, squared, detach in (
            (0.0, True, False), (0.01, True, True), (0.5, True, False),
            (0.5, False, True), (1.0, False, False), (2.0, True, True),
        )
    ]  # fmt: skip
    KNOWN: ClassVar = [
        (fl.dsc_loss, {}, [0.07057757, 0.87439512, 0.44881473]),  # the defaults of the authors' scripts
        (fl.dsc_loss, {"alpha": 1.0, "squared": False}, [0.59056985, 0.61049799, 0.84511278]),
        (fl.dsc_loss, {"alpha": 1.0, "squared": False, **TARGET}, [0.360015, 0.46107493, 0.37142857]),
    ]
    TWINS: ClassVar = {
        f"{name}, {form}": twins
        for form in ("one_vs_rest", "target")
        for name, twins in {
            "dice is alpha=0": tuple(
                partial(loss, squared=False, form=form, smooth=0.75, **own)
                for loss, own in ((fl.dice_loss, {}), (fl.dsc_loss, {"alpha": 0.0}))
            ),
            "weights are those of the classes": _weighted(form),
        }.items()
    }
    LEARNT: ClassVar = [(fl.dsc_loss, oracle.dsc, ("alpha",), {"form": form}) for form in ("one_vs_rest", "target")]


@pytest.mark.parametrize("form", ["one_vs_rest", "target"])
def test_detached_weight_is_a_constant(form, impl, generator):
    """The gradient is that of the loss with the factor (1 - p)^alpha as a number; the loss is the same."""
    z, target = logits_and_targets(6, 40, generator)
    z[0, target[0]] += 10  # p_t beyond 1 / (1 + alpha), where DSC itself pushes the target down
    own = {"alpha": 0.5, "form": form, "reduction": "sum", "impl": impl}
    free, detached = (
        with_gradient(lambda x, d=d: fl.dsc_loss(x, target, detach_weight=d, **own), z) for d in (False, True)
    )
    assert torch.equal(free[0], detached[0])
    assert detached[1][0, target[0]] < 0
    assert form == "one_vs_rest" or free[1][0, target[0]] > 0

    def second(function):
        leaf = z.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)

    own = {"alpha": 0.5, "form": form, "detach_weight": True}
    ours = second(lambda x: fl.dsc_loss(x, target, impl=impl, **own))
    torch.testing.assert_close(ours, second(lambda x: oracle.loss(oracle.dsc, x, target, **own)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("own", [TARGET, {}, {"level": "class"}], ids=str)
def test_a_subnormal_1_minus_p_makes_no_nan(own, dtype, impl):
    """Its powers alpha - 1 are infinite, and were times nothing."""
    begin, end = (700, 750) if dtype == torch.float64 else (80, 110)
    z = torch.zeros(121, 5, dtype=dtype)
    z[:, 2] = torch.linspace(begin, end, 121)
    for target, alpha in ((2, 2**-7), (0, 0.5)):
        loss, gradient = with_gradient(
            lambda x, t=target, a=alpha: fl.dsc_loss(x, torch.full((121,), t), alpha=a, impl=impl, **own), z
        )
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("columns", [[0, 1], [15, 16, 17], [2047, 2048], [0, 8999]], ids=str)
def test_ties_of_the_largest(columns, impl, generator):
    z = torch.randn(3, 9001, generator=generator, dtype=torch.float64)
    z[:, columns] = 12.0
    target = torch.tensor([columns[0], columns[-1], 5])
    ours = with_gradient(lambda x: fl.dsc_loss(x, target, alpha=1.0, impl=impl), z)
    truth = with_gradient(lambda x: oracle.loss(oracle.dsc, x, target, alpha=1.0), z)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-15)
