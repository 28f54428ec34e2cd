"""Focal loss."""

from typing import ClassVar

import oracle
import pytest
import torch
from row_suite import Case, RowLossSuite, assert_same_bits, logits_and_targets, quarters, with_gradient

import fusedloss as fl


def _case(name, own, **more):
    return Case(name, fl.focal_loss, oracle.focal, own, **more)


#: For `test_fuzz.py`.
DRAWN = {"focal_loss": {"gamma": [0.0, 0.25, 0.5, 1.0, 2.0, 5.0]}}
drawn = _case


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [
        _case("gamma=2", {"gamma": 2.0}, large=True),
        _case("gamma=0.5", {"gamma": 0.5}),  # the textbook derivative has (1 - p_t) ** -0.5
        _case("gamma of each row", lambda n, v, g: {"gamma": quarters(n, g, 0, 5)}),
    ]
    CERTAIN: ClassVar = [_case(f"gamma={gamma}", {"gamma": gamma}) for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)]


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [(2.0, [0.02877176, 2.55857675, 0.77979058]), (0.5, [0.18432913, 2.79168335, 1.20056613])],
)
def test_known_values(gamma, expected, impl, example):
    loss = fl.focal_loss(*example, gamma=gamma, reduction="none", impl=impl)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)


def test_gamma_0_is_cross_entropy(impl, generator):
    z, target = logits_and_targets(5, 40, generator, torch.float32)
    focal = with_gradient(lambda x: fl.focal_loss(x, target, gamma=0.0, impl=impl), z)
    cross_entropy = with_gradient(lambda x: fl.cross_entropy(x, target, impl=impl), z)
    assert torch.equal(focal[0], cross_entropy[0])
    torch.testing.assert_close(focal[1], cross_entropy[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [100.0, 1e3, 6e4])
def test_p_of_1_is_finite(gap, gamma, dtype, impl):
    """Beyond the range of exp the target has all of the probability: no loss, no gradient, no NaN."""
    z = torch.zeros(1, 5, dtype=dtype)
    z[0, 2] = gap
    loss, gradient = with_gradient(lambda x: fl.focal_loss(x, torch.tensor([2]), gamma=gamma, impl=impl), z)
    assert abs(loss) <= 1e-37
    assert gradient.abs().max() <= 1e-37


@pytest.mark.parametrize("shape", [(), (3, 2)], ids=["0-d", "of each row"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 2}], ids=["", "all"])
def test_gamma_is_differentiable(shape, options, impl, generator):
    z, target = logits_and_targets(6, 7, generator)
    z, target = z.reshape(3, 2, 7).requires_grad_(), target.reshape(3, 2)
    target[1, 1] = options.get("ignore_index", 0)
    gamma = (3 * torch.rand(shape, generator=generator).double() + 0.5).requires_grad_()

    def ours(x, g):
        return fl.focal_loss(x, target, gamma=g, reduction="none", impl=impl, **options)

    upstream = torch.randn(3, 2, generator=generator).double()
    truth = torch.autograd.grad(
        oracle.loss(oracle.focal, z, target, gamma=gamma, reduction="none", **options), (z, gamma), upstream
    )
    result = torch.autograd.grad(ours(z, gamma), (z, gamma), upstream)
    assert result[1].shape == gamma.shape
    torch.testing.assert_close(result, truth, rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(ours, (z, gamma))
    assert torch.autograd.gradgradcheck(ours, (z, gamma))


def test_gamma_gradient_at_p_of_1(impl):
    """q^gamma log q is 0 at q = 0, where log q alone is not finite."""
    z = torch.tensor([[200.0, 0.0], [1.0, 0.0]], requires_grad=True)
    gamma = torch.tensor([0.5, 2.0], requires_grad=True)
    loss = fl.focal_loss(z, torch.tensor([0, 0]), gamma=gamma, reduction="none", impl=impl)
    for gradient in torch.autograd.grad(loss.sum(), (z, gamma)):
        assert not gradient[0].any()
        assert gradient[1].abs().min() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gamma_tensors_of_any_kind(dtype, impl, generator):
    """The dtype and the strides of gamma do not matter, nor whether it is a number."""
    z, target = logits_and_targets(6, 40, generator, torch.float32)
    gamma = quarters(6, generator, 0, 5)
    for given, numbers in (
        (gamma.to(dtype), gamma),
        (gamma.to(dtype).repeat(3, 1).t()[:, 1], gamma),
        (gamma[2].to(dtype).expand(6), gamma[2].repeat(6)),
        (gamma[2].to(dtype), gamma[2].repeat(6)),
        (float(gamma[2]), gamma[2].repeat(6)),
    ):
        ours, plain = (
            with_gradient(lambda x, g=g: fl.focal_loss(x, target, gamma=g, reduction="none", impl=impl), z)
            for g in (given, numbers)
        )
        assert_same_bits(ours, plain)


def test_flsd_53(impl, generator):
    """Mukhoti et al. 2020: gamma = 5 where p_t < 0.2, else 3, and no gradient through the choice."""
    z, target = logits_and_targets(16, 20, generator)
    with torch.no_grad():
        _, stats = fl.cross_entropy(z, target, return_stats=True, impl=impl)
    gamma = torch.where(stats.target_log_prob.exp() < 0.2, 5.0, 3.0)
    assert len(gamma.unique()) == 2

    def formula(x):
        p = oracle.at(x.softmax(-1), target)
        return (-((1 - p) ** torch.where(p.detach() < 0.2, 5, 3)) * p.log()).mean()

    ours = with_gradient(lambda x: fl.focal_loss(x, target, gamma=gamma, impl=impl), z)
    torch.testing.assert_close(ours, with_gradient(formula, z), rtol=1e-12, atol=1e-15)
