"""The dice family: DSC and dice loss, in both forms."""

from itertools import product
from typing import ClassVar

import oracle
import pytest
import torch
from row_suite import Case, RowLossSuite, class_weights, logits_and_targets, quarters, with_gradient

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


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [
        _over_classes("one-vs-rest", {}, large=True),
        _over_classes("one-vs-rest-linear-alpha=1", {"alpha": 1.0, "squared": False}),
        _over_classes("one-vs-rest-detached", {"alpha": 0.5, "detach_weight": True}, derivative=False),
        _over_classes("one-vs-rest-alpha of each row", lambda n, v, g: {"alpha": quarters(n, g, 0, 2)}),
        _over_classes("one-vs-rest-dice", {"alpha": 0, "smooth": 0.5}, _dice_loss),
        _case("target", TARGET, large=True),
        _case("target-linear-alpha=1", {"alpha": 1.0, "squared": False, **TARGET}),
        _case("target-detached", {"alpha": 0.5, "detach_weight": True, **TARGET}, derivative=False),
        _case("target-dice", {"alpha": 0, "squared": False, **TARGET}, _dice_loss),
    ]
    CERTAIN: ClassVar = [
        _case(
            f"{form}-{'squared' if squared else 'linear'}-alpha={alpha}{'-detached' * detach}",
            {"alpha": alpha, "squared": squared, "form": form, "detach_weight": detach},
            of_probabilities=True,
        )
        for form, squared, alpha, detach in product(
            ("one_vs_rest", "target"), (True, False), (0.0, 0.01, 0.5, 1.0, 2.0), (False, True)
        )
        if alpha or not detach
    ]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"alpha": 0.01}, [0.07057757, 0.87439512, 0.44881473]),
        ({"alpha": 1.0, "squared": False}, [0.59056985, 0.61049799, 0.84511278]),
        ({"alpha": 1.0, "squared": False, **TARGET}, [0.360015, 0.46107493, 0.37142857]),
    ],
    ids=["one-vs-rest squared", "one-vs-rest linear", "target linear"],
)
def test_known_values(own, expected, impl, example):
    loss = fl.dsc_loss(*example, smooth=1.0, reduction="none", impl=impl, **own)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)


def test_defaults_are_those_of_the_authors_scripts(impl, example):
    loss = fl.dsc_loss(*example, impl=impl)
    explicit = fl.dsc_loss(
        *example,
        alpha=0.01,
        smooth=1.0,
        squared=True,
        form="one_vs_rest",
        level="example",
        detach_weight=False,
        impl=impl,
    )
    assert torch.equal(loss, explicit)


@pytest.mark.parametrize("form", ["one_vs_rest", "target"])
@pytest.mark.parametrize("squared", [True, False])
def test_dice_is_dsc_with_alpha_0(squared, form, impl, generator):
    z, target = logits_and_targets(6, 40, generator, torch.float32)
    own = {"squared": squared, "form": form, "smooth": 0.75, "impl": impl}
    dice = with_gradient(lambda x: fl.dice_loss(x, target, **own), z)
    dsc = with_gradient(lambda x: fl.dsc_loss(x, target, alpha=0.0, **own), z)
    assert torch.equal(dice[0], dsc[0])
    assert torch.equal(dice[1], dsc[1])


@pytest.mark.parametrize("form", ["one_vs_rest", "target"])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("smooth", [0.0, 1e-6, 0.5, 1.0, 100.0])
def test_smooth(smooth, squared, form, impl, generator):
    if smooth == 0 and form == "one_vs_rest":
        pytest.skip("without smooth a class without probability would be 0 / 0; refused")
    z, target = logits_and_targets(6, 40, generator)
    own = {"alpha": 0.5, "smooth": smooth, "squared": squared, "form": form}
    ours = with_gradient(lambda x: fl.dsc_loss(x, target, impl=impl, **own), z)
    truth = with_gradient(lambda x: oracle.loss(oracle.dsc, x, target, **own), z)
    torch.testing.assert_close(ours, truth, rtol=1e-9 if smooth == 1e-6 else 1e-11, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0])
def test_detached_weight_is_a_constant(alpha, impl, generator):
    """The gradient is that of the loss with the factor (1 - p)^alpha as a number; the loss is the same."""
    z, target = logits_and_targets(6, 40, generator)
    z[0, target[0]] += 10  # p_t beyond 1 / (1 + alpha), where DSC itself pushes the target down
    for form, squared in product(("one_vs_rest", "target"), (True, False)):
        own = {"alpha": alpha, "form": form, "squared": squared, "reduction": "sum", "impl": impl}
        free = with_gradient(lambda x, o=own: fl.dsc_loss(x, target, **o), z)
        detached = with_gradient(lambda x, o=own: fl.dsc_loss(x, target, detach_weight=True, **o), z)
        assert torch.equal(free[0], detached[0])
        assert detached[1][0, target[0]] < 0
        if form == "target":
            assert free[1][0, target[0]] > 0


def test_target_form_is_least_at_1_over_1_plus_alpha(impl):
    for alpha in (0.01, 0.5, 1.0):
        p = 1 / (1 + alpha)
        z = torch.tensor([p / (1 - p), 1.0], dtype=torch.float64).log()[None]
        _, gradient = with_gradient(
            lambda x, a=alpha: fl.dsc_loss(x, torch.tensor([0]), alpha=a, form="target", impl=impl), z
        )
        assert gradient.abs().max() < 1e-15


def test_weights_are_those_of_the_classes(impl):
    """One-vs-rest: a weight multiplies its class's loss in every row; target: the rows' of that target."""
    z = torch.tensor([[2.0, 0.0, -1.0], [-1.0, 3.0, 0.25]], dtype=torch.float64)
    target = torch.tensor([0, 2])
    weight = torch.tensor([1.0, 0.25, 3.0], dtype=torch.float64)
    p = z.softmax(-1)
    y = torch.tensor([[1, 0, 0], [0, 0, 1]])
    terms = 1 - (2 * p * y + 1) / (p * p + y + 1)
    for form, expected in (("one_vs_rest", (terms * weight).sum(-1)), ("target", (terms * weight * y).sum(-1))):
        loss = fl.dice_loss(z, target, weight=weight, form=form, reduction="none", impl=impl)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("form", ["one_vs_rest", "target"])
def test_beyond_the_range_of_exp(form, alpha, dtype, impl):
    """p = 1 of the target, and of another class: u = (1 - p)^alpha p is 1 for dice and 0 else; nothing left to move."""
    z = torch.zeros(2, 5, dtype=dtype)
    z[:, 2] = 5e4
    loss, gradient = with_gradient(
        lambda x: fl.dsc_loss(x, torch.tensor([2, 0]), alpha=alpha, form=form, reduction="none", impl=impl), z
    )
    u = 1.0 if alpha == 0 else 0.0
    other = 1 - (0 + 1) / (u * u + 0 + 1) if form == "one_vs_rest" else 0.0
    expected = [1 - (2 * u + 1) / (u * u + 1 + 1), 1 - 1 / 2 + other]
    torch.testing.assert_close(loss.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-30)
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [2**-7, 0.5])
@pytest.mark.parametrize("own", [TARGET, {}, {"level": "class"}], ids=str)
def test_a_subnormal_1_minus_p_makes_no_nan(own, alpha, dtype, impl):
    """Its powers alpha - 1 are infinite, and were times nothing."""
    begin, end = (700, 750) if dtype == torch.float64 else (80, 110)
    z = torch.zeros(121, 5, dtype=dtype)
    z[:, 2] = torch.linspace(begin, end, 121)
    for target in (2, 0):
        loss, gradient = with_gradient(
            lambda x, t=target: fl.dsc_loss(x, torch.full((121,), t), alpha=alpha, impl=impl, **own), z
        )
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("columns", [[0, 1], [1, 30], [15, 16, 17], [2047, 2048], [0, 8999]], ids=str)
@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_ties_of_the_largest(columns, alpha, impl, generator):
    z = torch.randn(3, 9001, generator=generator, dtype=torch.float64)
    z[:, columns] = 12.0
    target = torch.tensor([columns[0], columns[-1], 5])
    ours = with_gradient(lambda x: fl.dsc_loss(x, target, alpha=alpha, impl=impl), z)
    truth = with_gradient(lambda x: oracle.loss(oracle.dsc, x, target, alpha=alpha), z)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("form", ["one_vs_rest", "target"])
@pytest.mark.parametrize("shape", [(), (6,)], ids=["0-d", "of each row"])
def test_alpha_is_differentiable(shape, form, impl, generator):
    z, target = logits_and_targets(6, 7, generator)
    z.requires_grad_()
    target[4] = -100
    alpha = (0.25 + torch.rand(shape, generator=generator).double()).requires_grad_()
    options = {"form": form, "reduction": "none", "weight": class_weights(7, generator), "z_loss": 0.01}

    def ours(x, a):
        return fl.dsc_loss(x, target, alpha=a, impl=impl, **options)

    upstream = torch.randn(6, generator=generator).double()
    truth = torch.autograd.grad(oracle.loss(oracle.dsc, z, target, alpha=alpha, **options), (z, alpha), upstream)
    torch.testing.assert_close(torch.autograd.grad(ours(z, alpha), (z, alpha), upstream), truth, rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(ours, (z, alpha))
    assert torch.autograd.gradgradcheck(ours, (z, alpha))
