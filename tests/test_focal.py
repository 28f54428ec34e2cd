"""Focal loss."""

from functools import partial
from typing import ClassVar

import oracle
import pytest
import torch
from row_suite import Case, RowLossSuite, assert_same_bits, logits_and_targets, quarters, with_gradient

import fusedloss as fl


def drawn(name, own, **more):
    return Case(name, fl.focal_loss, oracle.focal, own, **more)


#: For `test_fuzz.py`.
DRAWN = {"focal_loss": {"gamma": [0.0, 0.25, 0.5, 1.0, 2.0, 5.0]}}


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = [
        drawn("gamma=2", {"gamma": 2.0}, large=True),
        drawn("gamma=0.5", {"gamma": 0.5}),  # the textbook derivative has (1 - p_t) ** -0.5
        drawn("gamma of each row", lambda n, v, g: {"gamma": quarters(n, g, 0, 5)}),
    ]
    CERTAIN: ClassVar = [drawn(f"gamma={gamma}", {"gamma": gamma}) for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)]
    KNOWN: ClassVar = [
        (fl.focal_loss, {"gamma": 2.0}, [0.02877176, 2.55857675, 0.77979058]),
        (fl.focal_loss, {"gamma": 0.5}, [0.18432913, 2.79168335, 1.20056613]),
    ]
    TWINS: ClassVar = {"gamma=0 is cross-entropy": (partial(fl.focal_loss, gamma=0.0), fl.cross_entropy)}
    LEARNT: ClassVar = [(fl.focal_loss, oracle.focal, ("gamma",), {"label_smoothing": 0.1})]


def test_gamma_gradient_at_p_of_1(impl):
    """q^gamma log q is 0 at q = 0, where log q alone is not finite."""
    z = torch.tensor([[200.0, 0.0], [1.0, 0.0]], requires_grad=True)
    gamma = torch.tensor([0.5, 2.0], requires_grad=True)
    loss = fl.focal_loss(z, torch.tensor([0, 0]), gamma=gamma, reduction="none", impl=impl)
    for gradient in torch.autograd.grad(loss.sum(), (z, gamma)):
        assert not gradient[0].any()
        assert gradient[1].abs().min() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gamma_tensors_of_any_kind(dtype, impl, generator):
    """The dtype and the strides of gamma do not matter, nor whether it is a number."""
    z, target = logits_and_targets(6, 40, generator, torch.float32)
    gamma = quarters(6, generator, 0, 5)
    for given, numbers in (
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
